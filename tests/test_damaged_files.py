"""Damaged files: each gives one clear error, quickly and in little memory, and never a crash.

Every truncation and every overwritten field of small valid files is tried, and Hypothesis tries what nobody thought of.
The only outcomes allowed are success and a FinialError that names the file and a fix.
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finial.errors import FileError, FinialError
from finial.files.gguf import MAX_ARRAY, GgufFile
from finial.files.gguf_writer import write_gguf
from finial.files.safetensors import INDEX, SINGLE, open_safetensors, write_safetensors
from finial.formats import Tensor

EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@contextmanager
def frugal(megabytes: float = 100, seconds: float = 60) -> Iterator[None]:
    """The block allocates less than that at any moment (NumPy's arrays counted) and takes less processor time."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 1e6
    assert time.process_time() - start < seconds


def replaced(path: Path, content: bytes) -> Path:
    """`path` as a new file: one that is still mapped must not change under its mapping."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def refused(open_it: Callable[[Path], Any], path: Path, says: str = "") -> None:
    with pytest.raises(FileError, match=says or None) as caught:
        open_it(path)
    assert str(path.name) in caught.value.what and caught.value.fix
    str(caught.value).encode()


def survives(open_it: Callable[[Path], dict[str, Tensor]], path: Path) -> bool:
    """True when the file opens, and then every tensor decodes; False when it is refused properly."""
    try:
        tensors = open_it(path)
    except FinialError as error:
        assert path.name in error.what and error.fix
        str(error).encode()
        return False
    for tensor in tensors.values():
        assert tensor.decode().shape == tensor.shape
    return True


def open_gguf(path: Path) -> dict[str, Tensor]:
    return GgufFile.open(path).tensors


# --- GGUF -------------------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def info(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(keys: list[bytes] | None = None, infos: list[bytes] | None = None, data: int = 256, version: int = 3) -> bytes:
    """A file of these parts, valid if they are."""
    keys, infos = keys or [], infos or []
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(keys)) + b"".join(keys + infos)
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.fixture
def small_gguf(tmp_path: Path) -> bytes:
    path = tmp_path / "valid.gguf"
    tensors = {"norm": Tensor.from_array(np.ones(7, np.float32)), "w": Tensor.from_array(np.ones((3, 32)), "q8_0")}
    metadata = {
        "general.architecture": "qwen3", "general.alignment": 32, "number": 1.5, "yes": True,
        "words": ["a", "bc", ""], "types": np.array([1, 2, 3], np.int32), "flags": [True, False],
    }  # fmt: skip
    write_gguf(path, metadata, [(name, t.format, t.shape, t.slabs()) for name, t in tensors.items()])
    return path.read_bytes()


def test_gguf_truncated_anywhere(tmp_path: Path, small_gguf: bytes) -> None:
    complete = len(small_gguf) - -(3 * 34) % 32  # the last tensor's padding may be missing
    with frugal():
        for length in range(complete):
            refused(open_gguf, replaced(tmp_path / "x.gguf", small_gguf[:length]))
        for length in range(complete, len(small_gguf) + 1):
            assert survives(open_gguf, replaced(tmp_path / "x.gguf", small_gguf[:length]))


@pytest.mark.parametrize("code", ["<I", "<Q"])
def test_gguf_overwritten_anywhere(tmp_path: Path, small_gguf: bytes, code: str) -> None:
    """Every count, length, type and offset is at one of these places."""
    limit = 2 ** (8 * struct.calcsize(code))
    with frugal():
        for at in range(len(small_gguf) - 8):
            for value in EXTREMES:
                if value < limit:
                    changed = bytearray(small_gguf)
                    struct.pack_into(code, changed, at, value)
                    survives(open_gguf, replaced(tmp_path / "x.gguf", changed))


@pytest.mark.parametrize("value", [2**63, 2**64 - 1, 2**32 - 1, 2**40])
@pytest.mark.parametrize(
    ("says", "build"),
    [
        ("tensor count", lambda n: b"GGUF" + struct.pack("<IQQ", 3, n, 0)),
        ("key count", lambda n: b"GGUF" + struct.pack("<IQQ", 3, 0, n)),
        ("name of key 0", lambda n: b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, n) + bytes(64)),
        ("length of 'k'", lambda n: gguf([key("k", 8, struct.pack("<Q", n))])),
        ("length of 'k'", lambda n: gguf([key("k", 9, struct.pack("<IQ", 4, n))])),
        ("length of 'k'", lambda n: gguf([key("k", 9, struct.pack("<IQ", 8, n))])),
        ("string 1 of 'k'", lambda n: gguf([key("k", 9, struct.pack("<IQQQ", 8, 2, 0, n))])),
        ("tensor 'w'", lambda n: gguf([], [info("w", (n,), 0, 0)])),
        ("tensor 'w'", lambda n: gguf([], [info("w", (n, n, n, n), 0, 0)])),
        ("tensor 'w'", lambda n: gguf([], [info("w", (0, n, n), 0, 0)])),
        ("tensor 'w'", lambda n: gguf([], [info("w", (8,), 0, n // 32 * 32)])),
        ("general.alignment", lambda n: gguf([key("general.alignment", 10, struct.pack("<Q", n))])),
    ],
)
def test_gguf_extreme_counts(tmp_path: Path, says: str, build: Callable[[int], bytes], value: int) -> None:
    with frugal(1, 1):
        refused(open_gguf, replaced(tmp_path / "x.gguf", build(value)), says)


@pytest.mark.parametrize(
    ("says", "content"),
    [
        ("is empty", b""),
        ("not a GGUF file.*ggjt", b"ggjt" + bytes(100)),
        ("version 1", gguf(version=1)),
        ("version 4", gguf(version=4)),
        ("version 0", gguf(version=0)),
        ("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
        ("value type 13", gguf([key("k", 13, bytes(8))])),
        ("array of arrays", gguf([key("k", 9, struct.pack("<IQIQ", 9, 1, 4, 0))])),
        ("array of value type 77", gguf([key("k", 9, struct.pack("<IQ", 77, 1))])),
        ("'k' has a boolean that is 2", gguf([key("k", 7, b"\2")])),
        ("'k' has a boolean that is 255", gguf([key("k", 9, struct.pack("<IQ", 7, 2) + b"\1\xff")])),
        ("'k'.*came before", gguf([key("k", 7, b"\1")] * 2)),
        ("empty name", gguf([key("", 7, b"\1")])),
        ("not UTF-8", gguf([key("k", 8, text(b"\xff\xfe"))])),
        ("not UTF-8", gguf([key(b"\xff", 7, b"\1")])),
        ("string 1 of 'k' is not UTF-8", gguf([key("k", 9, struct.pack("<IQ", 8, 2) + text("a") + text(b"\xc3"))])),
        ("alignment is 24", gguf([key("general.alignment", 4, struct.pack("<I", 24))])),
        ("alignment is 0", gguf([key("general.alignment", 4, struct.pack("<I", 0))])),
        ("alignment is '32'", gguf([key("general.alignment", 8, text("32"))])),
        ("'w' is there twice", gguf([], [info("w", (8,), 0, 0), info("w", (8,), 0, 32)])),
        ("no name", gguf([], [info("", (8,), 0, 0)])),
        ("'v' and 'w' overlap", gguf([], [info("w", (9,), 0, 32), info("v", (16,), 0, 0)])),
        ("'w' and 'v' overlap", gguf([], [info("w", (9,), 0, 0), info("v", (9,), 0, 0)])),
        ("not a multiple of 32", gguf([], [info("w", (8,), 0, 4)])),
        ("5 axes", gguf([], [info("w", (1, 1, 1, 1, 1), 0, 0)])),
        ("only 256", gguf([], [info("w", (65,), 0, 0)])),
        ("only 256", gguf([], [info("w", (1,), 0, 256)])),
        ("only 0", gguf([], [info("w", (1,), 0, 0)], data=0)),
        ("multiple of 32", gguf([], [info("w", (33,), 8, 0)])),
        ("'w' has type Q2_K.*does not decode", gguf([], [info("w", (256,), 10, 0)])),
        ("'w' has type IQ4_XS", gguf([], [info("w", (256,), 23, 0)])),
        ("'w' has type MXFP4", gguf([], [info("w", (256,), 39, 0)])),
        ("unknown tensor type 999", gguf([], [info("w", (256,), 999, 0)])),
    ],
)
def test_gguf_contradictions(tmp_path: Path, says: str, content: bytes) -> None:
    with frugal(1, 1):
        refused(open_gguf, replaced(tmp_path / "x.gguf", content), says)


def test_gguf_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        GgufFile.open(replaced(tmp_path / "x.gguf", gguf([], [info("w", (256,), 10, 0)])))
    assert "Q4_K" in caught.value.fix
    with pytest.raises(FileError) as caught:
        GgufFile.open(replaced(tmp_path / "x.gguf", gguf([], [info("n" * 60_000, (8,), 0, 4)])))
    assert len(str(caught.value)) < 400


def test_gguf_lies_in_a_huge_file(tmp_path: Path) -> None:
    """The file's size would allow what its counts claim: limits must hold by themselves.  (The file is sparse.)"""
    path = tmp_path / "x.gguf"
    claims = [
        key("k", 9, struct.pack("<IQ", 8, MAX_ARRAY)),  # a million empty strings, then a key without a name
        key("k", 9, struct.pack("<IQ", 8, 2**30)),
        key("k", 9, struct.pack("<IQ", 6, MAX_ARRAY)),
        key("k", 9, struct.pack("<IQ", 7, 2**33)),
        key("k", 8, struct.pack("<Q", 2**32)),
    ]
    for claim in claims:
        replaced(path, b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + claim)
        with path.open("r+b") as file:
            file.truncate(16 << 30)
        with frugal(80):
            refused(open_gguf, path)
    replaced(path, b"GGUF" + struct.pack("<IQQ", 3, 2**16, 0))
    with path.open("r+b") as file:
        file.truncate(16 << 30)
    with frugal(80):
        refused(open_gguf, path)


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(open_gguf, tmp_path / "missing.gguf", "no such file")
    refused(open_gguf, tmp_path, "directory")
    refused(open_safetensors, tmp_path / "missing.safetensors", "no such file")


# --- safetensors ------------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: int = 64, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def entry(shape: Any = (16,), start: Any = 0, end: Any = 64, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


@pytest.fixture
def small_safetensors(tmp_path: Path) -> bytes:
    path = tmp_path / "valid.safetensors"
    tensors = {"norm": Tensor.from_array(np.ones(7, np.float32)), "w": Tensor.from_array(np.ones((3, 8)), "bf16")}
    write_safetensors(path, [(name, t.format, t.shape, t.slabs()) for name, t in tensors.items()])
    return path.read_bytes()


def test_safetensors_truncated_anywhere(tmp_path: Path, small_safetensors: bytes) -> None:
    path = tmp_path / "x.safetensors"
    with frugal():
        for length in range(len(small_safetensors)):
            refused(open_safetensors, replaced(path, small_safetensors[:length]))
        refused(open_safetensors, replaced(path, small_safetensors + b"\0"), "which has")


def test_safetensors_overwritten_anywhere(tmp_path: Path, small_safetensors: bytes) -> None:
    path = tmp_path / "x.safetensors"
    with frugal():
        for value in EXTREMES:
            refused(open_safetensors, replaced(path, struct.pack("<Q", value) + small_safetensors[8:]))
        for at in range(8, len(small_safetensors)):
            for value in b'\0\xff{}[],:"019-e':
                changed = bytearray(small_safetensors)
                changed[at] = value
                survives(open_safetensors, replaced(path, changed))


@pytest.mark.parametrize(
    ("says", "content"),
    [
        ("0 bytes long", b""),
        ("7 bytes long", bytes(7)),
        ("not a JSON object", safetensors(b"")),
        ("not a JSON object", safetensors(b"[]")),
        ("not readable JSON", safetensors(b"{]}")),
        ("not readable JSON", safetensors(b'{"a":\xff}')),
        ("not readable JSON.*nested", safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
        ("not readable JSON.*values", safetensors(b'{"a":[' + b"[]," * 600_000 + b"[]]}")),
        ("not readable JSON", safetensors(b'{"a":' + b"9" * 100_000 + b"}")),
        ("'w' is there twice", safetensors(b'{"w":' + b",".join([json.dumps(entry()).encode() + b',"w":{}}']))),
        (
            "'shape' is there twice",
            safetensors(b'{"w":{"dtype":"F32","shape":[16],"shape":[16],"data_offsets":[0,64]}}'),
        ),
        ("'w' has dtype 'I64'", safetensors({"w": entry((8,), dtype="I64")})),
        ("'w' has dtype 'F8_E4M3'", safetensors({"w": entry((64,), dtype="F8_E4M3")})),
        ("'w' has dtype", safetensors({"w": entry(dtype=["F32"])})),
        ("'w' has dtype 7", safetensors({"w": entry(dtype=7)})),
        ("'w' has an entry", safetensors({"w": 3})),
        ("'w' has an entry", safetensors({"w": {"dtype": "F32"}})),
        ("'w' has an entry", safetensors({"w": entry() | {"scale": 1}})),
        ("'w' has shape", safetensors({"w": entry((-16,))})),
        ("'w' has shape", safetensors({"w": entry((16.0,))})),
        ("'w' has shape", safetensors({"w": entry((True,))})),
        ("'w' has shape", safetensors({"w": entry("16")})),
        ("'w' has shape", safetensors({"w": entry((2**63, 2**63, 0))})),
        ("'w' has shape", safetensors({"w": entry((1,) * 9)})),
        ("'w' has data_offsets", safetensors({"w": entry(end=65)})),
        ("'w' has data_offsets", safetensors({"w": entry(end=2**63)})),
        ("'w' has data_offsets", safetensors({"w": entry(start=64, end=0)})),
        ("'w' has data_offsets", safetensors({"w": entry(start=-64, end=0)})),
        ("'w' has data_offsets", safetensors({"w": entry(start=None)})),
        ("64 were expected", safetensors({"w": entry(end=60)})),
        ("32 were expected", safetensors({"w": entry(dtype="BF16")})),
        ("'v' at offset 28 overlaps", safetensors({"w": entry((8,), end=32), "v": entry((9,), start=28)})),
        ("overlaps", safetensors({"w": entry(), "v": entry()})),
        ("'v' at offset 36 leaves 4", safetensors({"w": entry((8,), end=32), "v": entry((7,), start=36)})),
        ("end at byte 32", safetensors({"w": entry((8,), end=32)})),
        ("end at byte 0", safetensors({})),
        ("not text", safetensors(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}")),
    ],
)
def test_safetensors_contradictions(tmp_path: Path, says: str, content: bytes) -> None:
    with frugal():
        refused(open_safetensors, replaced(tmp_path / "x.safetensors", content), says)


def test_safetensors_lies_in_a_huge_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in (99_000_000, 100_000_001, 2**33):
        replaced(path, safetensors(b'{"w":', length=length))
        with path.open("r+b") as file:
            file.truncate(16 << 30)
        with frugal():
            refused(open_safetensors, path)


def write_sharded(directory: Path) -> dict[str, Any]:
    """Three tensors in three shards; returns the index."""
    one = Tensor.from_array(np.ones((4, 4), np.float32))
    write_safetensors(directory / SINGLE, [(n, "f32", one.shape, one.slabs()) for n in "abc"], max_shard_bytes=64)
    index: dict[str, Any] = json.loads((directory / INDEX).read_text())
    return index


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("no weight_map", {}),
        ("no weight_map", {"weight_map": []}),
        ("no weight_map", {"weight_map": {}}),
        ("'a'.*etc/passwd", {"weight_map": {"a": "/etc/passwd"}}),
        ("'a'.*beside the index", {"weight_map": {"a": "../other/model.safetensors"}}),
        ("'a'.*beside the index", {"weight_map": {"a": "sub/model.safetensors"}}),
        ("'a'.*beside the index", {"weight_map": {"a": "..\\model.safetensors"}}),
        ("'a'.*beside the index", {"weight_map": {"a": "model\0.safetensors"}}),
        ("'a'.*beside the index", {"weight_map": {"a": "m" * 300 + ".safetensors"}}),
        ("'a'.*beside the index", {"weight_map": {"a": "\ud800.safetensors"}}),
        ("'a'.*beside the index", {"weight_map": {"a": ".safetensors"}}),
        ("'a'.*beside the index", {"weight_map": {"a": 1}}),
    ],
)
def test_safetensors_index_contradictions(tmp_path: Path, says: str, change: dict[str, Any]) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(change))
    with pytest.raises(FileError, match=says) as caught:
        open_safetensors(tmp_path)
    assert INDEX in caught.value.what and caught.value.fix
    str(caught.value).encode()


def test_safetensors_shards_that_disagree_with_the_index(tmp_path: Path) -> None:
    weight_map = write_sharded(tmp_path)["weight_map"]
    index = tmp_path / INDEX

    def says(words: str, changed: dict[str, str]) -> None:
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(FileError, match=words) as caught:
            open_safetensors(tmp_path)
        assert caught.value.fix

    says("00001-of-00003.*lacks tensor 'd'", weight_map | {"d": weight_map["a"]})
    says("00002-of-00003.*lacks tensor 'c'", weight_map | {"c": weight_map["b"]})
    (tmp_path / weight_map["b"]).write_bytes((tmp_path / weight_map["a"]).read_bytes())
    says("00002-of-00003.*lacks tensor 'b'", weight_map)
    (tmp_path / weight_map["b"]).unlink()
    says("00002-of-00003.*missing", weight_map)
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(FileError, match="'a' is there twice"):
        open_safetensors(tmp_path)
    (tmp_path / weight_map["b"]).write_bytes((tmp_path / weight_map["c"]).read_bytes())
    says("00003-of-00003.*lacks tensor 'd'", {"a": weight_map["a"], "d": weight_map["c"]})
    write_safetensors(tmp_path / weight_map["a"], [(name, "f32", (1,), [bytes(4)]) for name in "ab"])
    says("00001-of-00003.*has tensor 'b'.*does not list", {"a": weight_map["a"], "c": weight_map["c"]})
    index.write_text("{")
    with pytest.raises(FileError, match="not readable JSON"):
        open_safetensors(tmp_path)


def test_directories_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"neither model\.safetensors") as caught:
        open_safetensors(tmp_path)
    assert caught.value.fix
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileError, match=r"pytorch_model\.bin") as caught:
        open_safetensors(tmp_path)
    assert "finial convert" in caught.value.fix
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(FileError, match="directory"):
        open_safetensors(tmp_path)


# --- what nobody thought of -------------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),  # where, as a fraction of the file
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from(EXTREMES).map(lambda value: struct.pack("<Q", value)),
            st.sampled_from(EXTREMES[:5]).map(lambda value: struct.pack("<I", value)),
        ),
        st.sampled_from(["overwrite", "insert", "delete"]),
    ),
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[float, bytes, str]]) -> bytes:
    out = bytearray(content)
    for where, piece, how in edits:
        at = int(where * len(out))
        if how == "overwrite":
            out[at : at + len(piece)] = piece
        elif how == "insert":
            out[at:at] = piece
        else:
            del out[at : at + len(piece)]
    return bytes(out)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


HEADERS = [
    gguf([key("a", 8, text("bc")), key("d", 9, struct.pack("<IQ", 8, 2) + text("e") + text("f"))]),
    gguf([key("general.alignment", 4, struct.pack("<I", 64))], [info("w", (8, 2), 0, 0), info("v", (32,), 8, 64)]),
    gguf([key("k", 9, struct.pack("<IQ", 5, 3) + bytes(12))], [info("w", (256, 1), 12, 0)]),
    gguf([key("split.count", 2, b"\2\0"), key("split.no", 2, b"\0\0")], [info("w", (4,), 0, 0)]),
]


@given(st.sampled_from(HEADERS), EDITS)
@settings(max_examples=1500)
def test_fuzzed_gguf(scratch: Path, valid: bytes, edits: list[tuple[float, bytes, str]]) -> None:
    survives(open_gguf, replaced(scratch / "x.gguf", edited(valid, edits)))


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_random_bytes(scratch: Path, noise: bytes) -> None:
    survives(open_gguf, replaced(scratch / "x.gguf", b"GGUF" + struct.pack("<I", 3) + noise))
    survives(open_gguf, replaced(scratch / "x.gguf", noise))
    survives(open_safetensors, replaced(scratch / "x.safetensors", noise))
    survives(open_safetensors, replaced(scratch / "x.safetensors", safetensors(b"{" + noise + b"}")))


@given(EDITS)
@settings(max_examples=500)
def test_fuzzed_safetensors(scratch: Path, edits: list[tuple[float, bytes, str]]) -> None:
    valid = safetensors(
        {"__metadata__": {"a": "b"}, "w": entry((8,), end=32), "v": entry((4, 4), start=32, dtype="BF16")}
    )
    survives(open_safetensors, replaced(scratch / "x.safetensors", edited(valid, edits)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(EXTREMES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
SIZES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, -1, 2**63]), max_size=4)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8"]) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": st.sampled_from([[0, 64], [0, 32], [32, 64], [64, 64]]) | SIZES | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3))
@settings(max_examples=500)
def test_fuzzed_safetensors_entries(scratch: Path, header: dict[str, Any]) -> None:
    survives(open_safetensors, replaced(scratch / "x.safetensors", safetensors(header)))


@given(JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=3), JSON, max_size=3)}))
@settings(max_examples=150)
def test_fuzzed_safetensors_index(scratch: Path, index: Any) -> None:
    directory = scratch / INDEX.removesuffix(".json")
    directory.mkdir(exist_ok=True)
    (directory / INDEX).write_text(json.dumps(index))
    survives(open_safetensors, directory)
