"""safetensors: the same files as the `safetensors` library reads and writes, single and sharded."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from finial.errors import FileError, ModelError
from finial.files.safetensors import INDEX, SINGLE, open_safetensors, write_safetensors
from finial.formats import Tensor

RNG = np.random.default_rng(0)


def some_tensors() -> dict[str, Tensor]:
    shapes = {"a": (3, 5), "b": (7,), "c": (), "d": (0, 4), "größe": (2, 2, 2)}
    formats = ["bf16", "f32", "f16", "bf16", "f32"]
    return {
        name: Tensor.from_array(RNG.standard_normal(shape).astype(np.float32), format)
        for (name, shape), format in zip(shapes.items(), formats, strict=True)
    }


def sources(tensors: dict[str, Tensor]) -> list[tuple[str, str, tuple[int, ...], Iterator[np.ndarray]]]:
    return [(name, tensor.format, tensor.shape, tensor.slabs()) for name, tensor in tensors.items()]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].format == right[name].format
        and left[name].shape == right[name].shape
        and np.array_equal(left[name].data, right[name].data)
        for name in left
    )


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in {"x": (4, 3), "y": (0,)}.items()}
    arrays["half"] = RNG.standard_normal((5,)).astype(np.float16)
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt", "made": "here"})
    found = open_safetensors(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    assert found["half"].format == "f16"
    for name, array in arrays.items():
        assert np.array_equal(found[name].decode(), array.astype(np.float32))
        assert not found[name].data.flags.writeable


def test_the_library_reads_what_finial_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = tmp_path / "a.safetensors"
    seen: list[tuple[int, int]] = []
    written = write_safetensors(path, sources(tensors), {"made": "here"}, progress=lambda *step: seen.append(step))
    assert written == [path] and [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[-1] == (total, total)
    with safetensors.safe_open(path, "np") as theirs:
        assert theirs.metadata() == {"format": "pt", "made": "here"}
        assert set(theirs.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert tuple(theirs.get_slice(name).get_shape()) == tensor.shape
            if tensor.format != "bf16":
                assert np.array_equal(theirs.get_tensor(name).astype(np.float32), tensor.decode())
    raw = safetensors.deserialize(path.read_bytes())
    assert {name: bytes(info["data"]) for name, info in raw} == {name: bytes(t.data) for name, t in tensors.items()}
    found = open_safetensors(path)
    assert same(found, tensors)
    assert all(found[name].data.ctypes.data % 4 == 0 for name in ("b", "größe"))  # f32 first, so aligned


def test_an_empty_model(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE, [])
    assert open_safetensors(tmp_path) == {}


@pytest.mark.parametrize("limit", [1, 40, 60, 10**9])
def test_shards_read_as_the_single_file(tmp_path: Path, limit: int) -> None:
    tensors = some_tensors()
    written = write_safetensors(tmp_path / SINGLE, sources(tensors), max_shard_bytes=limit)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    found = open_safetensors(tmp_path)
    assert same(found, tensors)
    if limit == 10**9:
        assert written == [tmp_path / SINGLE]
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert written[0].name == f"model-00001-of-{len(written) - 1:05d}.safetensors"
    for path in written[:-1]:
        inside = open_safetensors(path)
        assert len(inside) == 1 or sum(tensor.nbytes for tensor in inside.values()) <= limit


def test_progress_over_shards_only_rises(tmp_path: Path) -> None:
    tensors = some_tensors()
    seen: list[tuple[int, int]] = []
    write_safetensors(tmp_path / SINGLE, sources(tensors), max_shard_bytes=40, progress=lambda *step: seen.append(step))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert seen == sorted(seen) and seen[-1] == (total, total)


def test_a_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    big = Tensor("bf16", (16, 1 << 20), np.zeros(32 << 20, np.uint8))
    tracemalloc.start()
    write_safetensors(tmp_path / "a.safetensors", [(f"t{i}", "f32", big.shape, big.slabs("f32")) for i in range(2)])
    found = open_safetensors(tmp_path / "a.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found["t1"].nbytes == 64 << 20
    assert peak < 10e6


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    with pytest.raises(FileError, match="'w' is to be q8_0") as caught:
        write_safetensors(path, [("w", "q8_0", (32,), [bytes(34)])])
    assert "GGUF" in caught.value.fix
    with pytest.raises((FileError, ModelError), match="q9"):
        write_safetensors(path, [("w", "q9", (32,), [bytes(34)])])
    with pytest.raises(FileError, match="two tensors of one name"):
        write_safetensors(path, [("w", "f32", (1,), [bytes(4)])] * 2)
    with pytest.raises(FileError, match="GB are needed"):
        write_safetensors(path, [("w", "f32", (2**50,), [])])
    assert list(tmp_path.iterdir()) == []
    write_safetensors(path, [])
    with pytest.raises(FileError, match="would be read instead of the shards"):
        write_safetensors(path, sources(some_tensors()), max_shard_bytes=40)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    old = some_tensors()
    write_safetensors(path, sources(old))

    def broken() -> Iterator[bytes]:
        yield bytes(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, [("w", "f32", (2,), broken())])
    assert [item.name for item in tmp_path.iterdir()] == [SINGLE]
    assert same(open_safetensors(path), old)
