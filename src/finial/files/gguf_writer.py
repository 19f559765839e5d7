"""Writing GGUF version 3, as docs/gguf.md of ggml lays it out, one slab of tensor bytes at a time.

Knows nothing of models: keys, names and formats are the caller's.

    write_gguf(path, {"general.architecture": "qwen3"}, [("output_norm.weight", "f32", (64,), tensor.slabs("f32"))])
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.errors import FileError, ModelError
from finial.files.disk import Progress, Slab, atomic_file, shown
from finial.files.gguf import ARRAY, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_AXES, SCALARS, STRING
from finial.formats import get_format

# A tensor to write: name, format, shape in PyTorch's order, and its bytes in order in pieces of any size.  The pieces
# are asked for one at a time when their turn comes, so a generator keeps a model from ever being whole in memory.
Source = tuple[str, str, tuple[int, ...], Iterable[Slab]]

MAX_NAME = 63  # bytes: ggml.h GGML_MAX_NAME is 64 with the terminating zero
_TYPE_OF = {dtype: number for number, dtype in SCALARS.items()}


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Iterable[Source], progress: Progress | None = None
) -> None:
    """Write `path`, which appears whole or not at all.

    Values: str, bool, int (uint32 where it fits, else int32, uint64 or int64), float (float32), lists of one of these,
    and NumPy scalars and 1-D arrays, which keep their type: that is how to ask for one, as in
    `np.array(token_types, np.int32)`.  An empty list is one of strings.  `general.alignment` is honoured, 32 otherwise.

    FileError: a value or name that GGUF cannot hold, a name twice, a full disk.  ModelError: an unknown format, a
    shape that is not whole blocks.
    """
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise FileError(f"{path}: general.alignment {alignment} is not a power of two", fix="leave it out")
    sources = list(tensors)
    seen: set[str] = set()
    info = bytearray()
    offset = 0
    sizes = []
    for name, format, shape, _ in sources:
        if name in seen or not 0 < len(name.encode()) <= MAX_NAME or len(shape) > MAX_AXES:
            raise FileError(
                f"{path}: cannot hold tensor {shown(name)} of shape {list(shape)}",
                fix=f"names must differ and be 1 to {MAX_NAME} bytes long, with at most {MAX_AXES} axes",
            )
        seen.add(name)
        row = get_format(format)
        if row.gguf_type is None:
            raise ModelError(f"no file holds {format}: it is made when a model is loaded", fix="write bf16 or q8_0")
        sizes.append(row.nbytes(shape))
        info += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], row.gguf_type, offset)
        offset += _padded(sizes[-1], alignment)
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(sources), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _value(value, f"{path}: {shown(key)}")
    head += info
    head += bytes(_padded(len(head), alignment) - len(head))
    with atomic_file(path, len(head) + offset, progress) as write:
        write(head)
        for (name, _, _, slabs), size in zip(sources, sizes, strict=True):
            written = 0
            for slab in slabs:
                written += write(slab)
            assert written == size, f"{name}: {written} bytes given, its format and shape are {size}"
            write(bytes(_padded(size, alignment) - size))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any, what: str) -> bytes:
    """Type number and bytes of one metadata value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    numbers = _numbers(value, what)
    kind = _TYPE_OF.get(numbers.dtype)
    if kind is None or numbers.ndim > 1:
        raise FileError(
            f"{what}: GGUF has no value type for {numbers.dtype} with {numbers.ndim} axes", fix="convert it"
        )
    if numbers.ndim == 0:
        return struct.pack("<I", kind) + numbers.tobytes()
    return struct.pack("<IIQ", ARRAY, kind, numbers.size) + numbers.tobytes()


def _numbers(value: Any, what: str) -> NDArray[Any]:
    """The value as a 0-D or 1-D array of the type it is written in."""
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        return array.astype(array.dtype.newbyteorder("<"), copy=False)
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return np.array(value, np.bool_)
    if kinds == {int}:
        return np.array(value, _integer_type(min(items), max(items), what))
    if kinds <= {int, float}:
        return np.array(value, "<f4")
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise FileError(
        f"{what}: GGUF holds text, numbers, booleans or lists of one of them, not {names}", fix="convert it"
    )


def _integer_type(least: int, most: int, what: str) -> str:
    for code in ("<u4", "<i4", "<u8", "<i8"):
        limits = np.iinfo(code)
        if limits.min <= least and most <= limits.max:
            return code
    raise FileError(f"{what}: integers from {least} to {most} fit no GGUF type", fix="write them as text or floats")
