"""GGUF: what the `gguf` package writes finial reads, and the other way round; split models; size and time limits."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from finial.errors import FileError, ModelError
from finial.files.gguf import GgufFile
from finial.files.gguf_writer import write_gguf
from finial.formats import FORMATS, Tensor

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    arrays = {"token_embd.weight": values(12, 64), "output_norm.weight": values(64), "cube": values(2, 3, 32)}
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -5)
    writer.add_uint64("a.u64", 2**63)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 1e300)
    writer.add_bool("a.yes", True)
    writer.add_uint8("a.u8", 200)
    writer.add_string("a.text", "größer 🦊")
    writer.add_array("a.words", ["", "a", "日本"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.scores", [0.5, -1.0])
    for name, array in arrays.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name != "output_norm.weight" else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GgufFile.open(path)
    assert file.version == 3
    meta = file.metadata
    assert meta["general.architecture"] == "qwen3"
    assert (meta["a.u32"], meta["a.i32"], meta["a.u64"], meta["a.u8"]) == (2**32 - 1, -5, 2**63, 200)
    assert (meta["a.f32"], meta["a.f64"], meta["a.yes"], meta["a.text"]) == (0.5, 1e300, True, "größer 🦊")
    assert [type(meta[key]) for key in ("a.u32", "a.f32", "a.yes", "a.text")] == [int, float, bool, str]
    assert meta["a.words"] == ["", "a", "日本"]
    assert meta["a.numbers"].tolist() == [1, -2, 3] and meta["a.numbers"].dtype == np.int32
    assert meta["a.scores"].tolist() == [0.5, -1.0]
    assert list(file.tensors) == list(arrays)
    for name, array in arrays.items():
        tensor = file.tensors[name]
        assert tensor.shape == array.shape and not tensor.data.flags.writeable
        expected = Tensor.from_array(array, tensor.format)
        assert np.array_equal(tensor.data, expected.data)


def test_the_gguf_package_reads_what_finial_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = {
        f"blk.0.{name}": Tensor.from_array(values(3, 256), name if row.encode else "f32")
        for name, row in FORMATS.items()
        if row.gguf_type is not None
    }
    fp8 = Tensor.from_array(values(3, 256), "fp8")
    with pytest.raises(ModelError, match="no file holds fp8"):
        write_gguf(path, {}, [("w", fp8.format, fp8.shape, fp8.slabs())])
    tensors["vector"] = Tensor.from_array(values(5), "bf16")  # its end is not aligned
    metadata = {
        "general.architecture": "llama",
        "int": 7, "negative": -7, "large": 2**40, "lowest": -(2**40),
        "float": 1e-6, "yes": True, "no": False, "typed": np.uint16(3), "double": np.float64(0.1),
        "words": ["a", "ß", ""], "no words": [], "ints": [1, 2], "mixed": [1, 0.5], "flags": [True, False],
        "types": np.array([1, -1, 3], np.int32), "none": np.zeros(0, np.float32),
    }  # fmt: skip
    seen: list[tuple[int, int]] = []
    write_gguf(
        path,
        metadata,
        ((name, tensor.format, tensor.shape, tensor.slabs()) for name, tensor in tensors.items()),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)
    assert [item.name for item in tmp_path.iterdir()] == ["model.gguf"]

    reader = gguf.GGUFReader(path)
    assert [field.types[0] for key, field in reader.fields.items() if not key.startswith("GGUF.")][1:10] == [
        gguf.GGUFValueType[name]
        for name in ("UINT32", "INT32", "UINT64", "INT64", "FLOAT32", "BOOL", "BOOL", "UINT16", "FLOAT64")
    ]
    assert reader.fields["types"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert reader.fields["types"].contents() == [1, -1, 3]
    assert reader.fields["words"].contents() == ["a", "ß", ""]
    assert reader.fields["mixed"].contents() == [1.0, 0.5]
    for theirs, (name, ours) in zip(reader.tensors, tensors.items(), strict=True):
        assert theirs.name == name and theirs.data_offset % 32 == 0
        assert tuple(theirs.shape)[::-1] == ours.shape
        assert theirs.tensor_type.name.lower() == ours.format
        assert theirs.data.tobytes() == ours.data.tobytes()

    again = GgufFile.open(path)
    for key, value in metadata.items():
        found = again.metadata[key]
        assert np.array_equal(found, np.float32(value) if key == "float" else value), key
    for name, tensor in tensors.items():
        assert again.tensors[name].format == tensor.format
        assert np.array_equal(again.tensors[name].data, tensor.data)


def test_no_tensors_no_keys_and_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {}, [])
    assert GgufFile.open(path).tensors == {} and GgufFile.open(path).metadata == {}
    scalar = Tensor.from_array(np.array(3.0, np.float32))
    write_gguf(
        path, {}, [("empty", "f32", (0, 4), []), ("scalar", "f32", (), scalar.slabs()), ("none", "q8_0", (0,), [])]
    )
    tensors = GgufFile.open(path).tensors
    assert tensors["empty"].shape == (0, 4) and tensors["empty"].decode().size == 0
    assert tensors["scalar"].decode() == 3.0
    assert tensors["none"].decode().shape == (0,)


def test_alignment_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    pair = [Tensor.from_array(values(3)), Tensor.from_array(values(5))]
    write_gguf(
        path,
        {"general.alignment": 256},
        [(f"t{index}", "f32", tensor.shape, tensor.slabs()) for index, tensor in enumerate(pair)],
    )
    assert [tensor.data_offset % 256 for tensor in gguf.GGUFReader(path).tensors] == [0, 0]
    found = GgufFile.open(path).tensors
    assert np.array_equal(found["t1"].data, pair[1].data)


def test_a_large_vocabulary_is_read_in_well_under_a_second(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    words = [f"Ġtoken{index}" for index in range(150_000)]
    write_gguf(path, {"tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": np.zeros(150_000, np.float32)}, [])
    start = time.perf_counter()
    file = GgufFile.open(path)
    assert time.perf_counter() - start < 1
    assert file.metadata["tokenizer.ggml.tokens"] == words


def test_tensors_outlive_the_file_object(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    source = Tensor.from_array(values(4, 32), "q8_0")
    write_gguf(path, {}, [("w", "q8_0", source.shape, source.slabs())])
    tensor = GgufFile.open(path).tensors["w"]
    path.unlink()
    assert np.array_equal(tensor.data, source.data)


def test_a_model_is_never_whole_in_memory_while_written(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    rows, columns, count = 1024, 4096, 8  # eight tensors of 16 MiB

    def slabs() -> Iterator[np.ndarray]:
        for _ in range(16):
            yield np.ones(rows * columns * 4 // 16, np.uint8)

    tracemalloc.start()
    write_gguf(path, {}, [(f"t{index}", "f32", (rows, columns), slabs()) for index in range(count)])
    file = GgufFile.open(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(file.tensors) == count and path.stat().st_size > count * 16 << 20
    assert peak < 8e6


def write_parts(directory: Path, count: int = 3, **changes: object) -> tuple[list[Path], dict[str, Tensor]]:
    """A split model as gguf-split writes it: metadata in the first part, one tensor in each."""
    paths, tensors = [], {}
    for number in range(count):
        paths.append(directory / f"big-{number + 1:05d}-of-{count:05d}.gguf")
        tensor = tensors[f"t{number}"] = Tensor.from_array(values(2, 32), "q8_0")
        metadata = {"general.architecture": "llama"} if number == 0 else {}
        metadata |= {
            "split.no": np.uint16(number),
            "split.count": np.uint16(count),
            "split.tensors.count": count,
            **changes,
        }
        write_gguf(paths[-1], metadata, [(f"t{number}", "q8_0", (2, 32), tensor.slabs())])
    return paths, tensors


def test_split_models_open_from_any_part(tmp_path: Path) -> None:
    paths, tensors = write_parts(tmp_path)
    for path in paths:
        file = GgufFile.open(path)
        assert file.path == paths[0] and file.metadata["general.architecture"] == "llama"
        assert list(file.tensors) == list(tensors)
        assert all(np.array_equal(file.tensors[name].data, tensor.data) for name, tensor in tensors.items())


def test_split_models_with_parts_missing_or_mixed_up(tmp_path: Path) -> None:
    paths, _ = write_parts(tmp_path)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(paths[0].read_bytes())
    with pytest.raises(FileError, match="one of 3 parts"):
        GgufFile.open(renamed)
    second = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(FileError, match=r"00002-of-00003.*part 2 of 3"):
        GgufFile.open(paths[0])
    paths[1].unlink()
    with pytest.raises(FileError, match=r"00002-of-00003.*missing"):
        GgufFile.open(paths[0])
    paths[1].write_bytes(second)
    write_parts(tmp_path, **{"split.tensors.count": 4})
    with pytest.raises(FileError, match=r"split\.tensors\.count is 4"):
        GgufFile.open(paths[0])


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        ({}, [("w", "f32", (1,), [bytes(4)]), ("w", "f32", (1,), [bytes(4)])], "'w'"),
        ({}, [("n" * 64, "f32", (1,), [bytes(4)])], "1 to 63 bytes"),
        ({}, [("w", "f32", (1, 1, 1, 1, 1), [bytes(4)])], "4 axes"),
        ({}, [("w", "q8_0", (31,), [bytes(4)])], "multiple of 32"),
        ({}, [("w", "q9", (32,), [bytes(4)])], "q9"),
        ({"k": 2**64}, [], "'k'.*fit no GGUF type"),
        ({"k": [1, "a"]}, [], "'k'.*int, str"),
        ({"k": {"a": 1}}, [], "'k'.*dict"),
        ({"k": np.zeros((2, 2), np.float32)}, [], "'k'.*2 axes"),
        ({"k": np.zeros(2, np.complex64)}, [], "'k'.*complex64"),
        ({"general.alignment": 24}, [], "alignment 24"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, metadata: dict, tensors: list, says: str) -> None:
    with pytest.raises((FileError, ModelError), match=says) as caught:
        write_gguf(tmp_path / "x.gguf", metadata, tensors)
    assert caught.value.fix or "\n  fix:" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {"kept": True}, [])

    def broken() -> Iterator[bytes]:
        yield bytes(64)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {}, [("w", "f32", (32,), broken())])
    with pytest.raises(FileError, match=r"x.gguf.*written|directory"):
        write_gguf(tmp_path / "nowhere" / "x.gguf", {}, [])
    assert [item.name for item in tmp_path.iterdir()] == ["x.gguf"]
    assert GgufFile.open(path).metadata == {"kept": True}


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"GB are needed, .* GB are free"):
        write_gguf(tmp_path / "x.gguf", {}, [("w", "f32", (2**50,), [])])
    assert list(tmp_path.iterdir()) == []
