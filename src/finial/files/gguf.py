"""Reading GGUF, the file format of llama.cpp: versions 2 and 3, little-endian, single or split.

Knows nothing of models: names and values are the file's own.  Writing is `gguf_writer`.

    file = GgufFile.open(Path("model.gguf")); file.metadata["general.architecture"]; file.tensors["output_norm.weight"]

The layout is ggml's docs/gguf.md.  Nothing that the file claims is believed: every count, length, type and offset is
compared with the bytes that are there before anything of that size is allocated.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.errors import FileError, ModelError
from finial.files.disk import map_file, shown
from finial.formats import FORMATS, Tensor

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
BOOL = 7
# gguf.md `enum gguf_metadata_value_type`, without string and array.
_SCALAR_CODES = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
SCALARS: Mapping[int, np.dtype[Any]] = MappingProxyType({kind: np.dtype(code) for kind, code in _SCALAR_CODES.items()})
MAX_AXES = 4  # ggml.h GGML_MAX_DIMS
DEFAULT_ALIGNMENT = 32  # gguf.md

# ggml types that finial does not decode, for an error that speaks the user's language (ggml.h `enum ggml_type`).
OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_BY_TYPE = {row.gguf_type: row for row in FORMATS.values() if row.gguf_type is not None}

# Far above any real file (a vocabulary is below 2^19 tokens, a model below 2^14 tensors), low enough that a damaged
# count inside a file of many GB cannot fill the memory before the damage shows.
MAX_ENTRIES = 1 << 16
MAX_STRING = 16 << 20
MAX_ARRAY = 1 << 20
MAX_ITEMS = 1 << 22  # of all arrays together
MAX_ELEMENTS = 1 << 60
MAX_ALIGNMENT = 1 << 20

DAMAGED = "the file is damaged or incomplete: fetch or convert it again"
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An open GGUF model.

    Attributes:
        path: the file, or the first part of a split one.
        version: 2 or 3.
        metadata: key -> bool, int, float, str, list of str, or a read-only NumPy array of numbers or booleans.
        tensors: the file's own names -> tensors on the memory map, shapes in PyTorch's order (ggml's reversed).
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @staticmethod
    def open(path: Path) -> GgufFile:
        """Map and check the whole header; of a split model any part may be named, all parts are opened.

        FileError naming the file, the key or tensor and the fix: not GGUF, version 1 or unknown, big-endian, damaged,
        a tensor type that finial does not decode, a missing part.
        """
        first = _Reader(path).read()
        count = first.metadata.get("split.count", 1)
        if not _is_int(count) or count <= 1:
            return first
        return _open_split(first, count)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _open_split(named: GgufFile, count: int) -> GgufFile:
    """All parts of a split model, merged; metadata is the first part's, as llama.cpp's gguf-split writes it."""
    match = _PART.fullmatch(named.path.name)
    if match is None or int(match["count"]) != count:
        raise FileError(
            f"{named.path}: is one of {count} parts, but its name does not end in -NNNNN-of-{count:05d}.gguf",
            fix="give the parts the names they were published under",
        )
    parts = []
    for number in range(1, count + 1):
        path = named.path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        if not path.exists():
            raise FileError(f"{path}: missing, part {number} of {count}", fix="fetch all parts into one directory")
        part = named if path == named.path else _Reader(path).read()
        claims = part.metadata.get("split.no"), part.metadata.get("split.count")
        if claims != (number - 1, count):
            raise FileError(
                f"{path}: is part {number} of {count}, but its split.no and split.count are {shown(claims)}",
                fix="fetch all parts of the same model again",
            )
        parts.append(part)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if twice := tensors.keys() & part.tensors.keys():
            raise FileError(
                f"{part.path}: tensor {shown(min(twice))} is also in an earlier part",
                fix="fetch all parts of the same model again",
            )
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise FileError(
            f"{parts[0].path}: split.tensors.count is {shown(total)}, the {count} parts hold {len(tensors)} tensors",
            fix="fetch all parts of the same model again",
        )
    return GgufFile(parts[0].path, parts[0].version, parts[0].metadata, tensors)


@dataclass(frozen=True)
class _Placed:
    """A tensor's place in the data section, in bytes."""

    name: str
    format: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Reader:
    """A cursor over one file; every read says what it is for, so that an error can."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = map_file(path)
        self.bytes = self.data.data
        self.size = self.data.size
        self.at = 0
        self.items_left = MAX_ITEMS

    def fail(self, what: str, fix: str = DAMAGED) -> FileError:
        return FileError(f"{self.path}: {what}", fix=fix)

    def take(self, nbytes: int, what: str) -> int:
        """Move over `nbytes` bytes and return where they start."""
        if nbytes > self.size - self.at:
            raise self.fail(f"{what} needs {nbytes} bytes at offset {self.at}, but the file ends at {self.size}")
        start = self.at
        self.at += nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.bytes, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.bytes, self.take(8, what))[0])

    def count(self, what: str, least: int, limit: int) -> int:
        """A uint64 count of things of which each takes at least `least` bytes."""
        count = self.u64(what)
        if count > limit or count * least > self.size - self.at:
            raise self.fail(
                f"{what} is {count}, but the {self.size - self.at} bytes left hold at most "
                f"{min(limit, (self.size - self.at) // least)}"
            )
        return count

    def string(self, what: str) -> str:
        length = self.count(f"the length of {what}", 1, MAX_STRING)
        start = self.take(length, what)
        try:
            return str(self.bytes[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8 (at offset {start})") from None

    def read(self) -> GgufFile:
        version, tensor_count, key_count = self.header()
        metadata: dict[str, Any] = {}
        for index in range(key_count):
            key = self.string(f"the name of key {index}")
            if not key or key in metadata:
                raise self.fail(f"key {index} is {shown(key)}, " + ("which came before" if key else "an empty name"))
            metadata[key] = self.value(self.u32(f"the type of {shown(key)}"), shown(key))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not _is_int(alignment) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.fail(
                f"general.alignment is {shown(alignment)}, a power of two up to {MAX_ALIGNMENT} was expected"
            )
        infos = [self.tensor_info(index) for index in range(tensor_count)]
        return GgufFile(self.path, version, metadata, self.place(infos, alignment))

    def header(self) -> tuple[int, int, int]:
        """Version, tensor count, key count."""
        if bytes(self.bytes[:4]) != MAGIC:
            begins = f"begins with {bytes(self.bytes[:4])!r}" if self.size else "is empty"
            raise self.fail(f"is not a GGUF file: it {begins}", fix="name a .gguf file, or a directory of safetensors")
        self.at = 4
        version = self.u32("the version")
        if version and not version & 0xFFFF:  # no version will need the high half: its bytes are the other way round
            raise self.fail("is a big-endian GGUF file", fix="convert it with --outfile in little-endian order")
        if version == 1:
            raise self.fail("is GGUF version 1, of 2023", fix="convert the model again: versions 2 and 3 are read")
        if version not in (2, 3):
            raise self.fail(f"has GGUF version {version}, 2 and 3 are known", fix="fetch it again, or update finial")
        # A tensor is at least a name's length, axis count, type and offset; a key a name's length, type and one byte.
        tensor_count = self.count("the tensor count", 24, MAX_ENTRIES)
        return version, tensor_count, self.count("the key count", 13, MAX_ENTRIES)

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise self.fail(f"{what} has value type {kind}, types 0 to 12 are known")
        return self.numbers(kind, 1, what)[0].item()

    def array(self, what: str) -> list[str] | NDArray[Any]:
        kind = self.u32(f"the element type of {what}")
        if kind == ARRAY:
            raise self.fail(f"{what} is an array of arrays, which no model uses")
        if kind != STRING and kind not in SCALARS:
            raise self.fail(f"{what} is an array of value type {kind}, types 0 to 12 are known")
        least = 8 if kind == STRING else SCALARS[kind].itemsize  # a string is at least its length
        count = self.count(f"the length of {what}", least, min(MAX_ARRAY, self.items_left))
        self.items_left -= count
        return self.strings(count, what) if kind == STRING else self.numbers(kind, count, what)

    def numbers(self, kind: int, count: int, what: str) -> NDArray[Any]:
        dtype = SCALARS[kind]
        start = self.take(count * dtype.itemsize, what)
        raw = self.data[start : self.at]
        if kind == BOOL and count and int(raw.max()) > 1:
            raise self.fail(f"{what} has a boolean that is {int(raw.max())}, 0 or 1 was expected")
        return raw.view(dtype)

    def strings(self, count: int, what: str) -> list[str]:
        """As `string`, for the hundred thousands of a vocabulary: one loop with its bounds checks in place."""
        data, size, at, unpack = self.bytes, self.size, self.at, _U64.unpack_from
        out: list[str] = []
        for index in range(count):
            start = at + 8
            at = start + unpack(data, at)[0] if start <= size else size + 1
            if at > size or at - start > MAX_STRING:
                raise self.fail(
                    f"string {index} of {what}, at {start - 8}, ends beyond the file or is over {MAX_STRING} bytes"
                )
            try:
                out.append(str(data[start:at], "utf-8"))
            except UnicodeDecodeError:
                raise self.fail(f"string {index} of {what} is not UTF-8 (at offset {start})") from None
        self.at = at
        return out

    def tensor_info(self, index: int) -> _Placed:
        name = self.string(f"the name of tensor {index}")
        what = f"tensor {shown(name)}"
        axes = self.u32(f"the axis count of {what}")
        if axes > MAX_AXES:
            raise self.fail(f"{what} has {axes} axes, at most {MAX_AXES} were expected")
        shape = tuple(self.u64(f"axis {axis} of {what}") for axis in range(axes))[::-1]
        kind = self.u32(f"the type of {what}")
        offset = self.u64(f"the offset of {what}")
        if math.prod(max(1, length) for length in shape) > MAX_ELEMENTS:
            raise self.fail(f"{what} has shape {list(shape)}, more elements than any file can hold")
        if (row := _BY_TYPE.get(kind)) is None:
            if kind in OTHER_TYPES:
                readable = ", ".join(found.name.upper() for found in _BY_TYPE.values())
                raise self.fail(
                    f"{what} has type {OTHER_TYPES[kind]}, which finial does not decode",
                    fix=f"use a file of this model in one of {readable}",
                )
            raise self.fail(f"{what} has the unknown tensor type {kind}")
        try:
            nbytes = row.nbytes(shape)
        except ModelError as error:
            raise self.fail(f"{what}: {error.what}") from None
        return _Placed(name, row.name, shape, offset, offset + nbytes)

    def place(self, infos: list[_Placed], alignment: int) -> dict[str, Tensor]:
        """The tensors on the memory map; their offsets count from the header's end, rounded up to the alignment."""
        base = -(-self.at // alignment) * alignment
        room = max(0, self.size - base)
        tensors: dict[str, Tensor] = {}
        for info in infos:
            what = f"tensor {shown(info.name)}"
            if not info.name or info.name in tensors:
                raise self.fail(f"{what} " + ("is there twice" if info.name else "has no name"))
            if info.start % alignment:
                raise self.fail(f"{what} is at offset {info.start}, not a multiple of {alignment}")
            if info.end > room:
                raise self.fail(f"{what} is bytes {info.start} to {info.end} of the data, which has only {room}")
            data = self.data[base + info.start : base + info.end] if info.end > info.start else self.data[:0]
            tensors[info.name] = Tensor(info.format, info.shape, data)
        held = sorted((info for info in infos if info.end > info.start), key=lambda info: info.start)
        for left, right in pairwise(held):
            if right.start < left.end:
                raise self.fail(f"tensors {shown(left.name)} and {shown(right.name)} overlap at offset {right.start}")
        return tensors
