"""Weight formats: the table of them, and tensors stored in one.

Knows nothing of files, models or devices: a `Tensor` is a shape, a format's name and bytes, wherever those bytes live.
What the bytes of a block mean is quants.py's.

    Tensor.from_array(weight, "q8_0").decode()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial import quants
from finial.errors import ModelError
from finial.quants import Bytes, Floats

# Elements converted at a time: 1 MiB of float32 and a few temporaries of that size stay inside a core's second-level
# cache and cost a conversion of any length the same few MB.  A multiple of every block length.
SLAB = 1 << 18


@dataclass(frozen=True)
class Format:
    """One weight format.

    Attributes:
        name: what users type.
        block: elements per block along the last axis.
        block_bytes: bytes per block.
        gguf_type: ggml's number for it (ggml.h `enum ggml_type`); None: no file holds it, it is made at load.
        decode: uint8 [n_blocks, block_bytes] -> float32 [n_blocks, block].
        encode: float32 [n_blocks, block] -> uint8 [n_blocks, block_bytes]; None where finial only reads.
        row_bytes: what stands before each row of the last axis, such as a scale for all of it.  Where it is not 0,
            decode and encode take whole rows, as if a block were a row: [n, K], [n, row_bytes + K * block_bytes].
    """

    name: str
    block: int
    block_bytes: int
    gguf_type: int | None
    decode: Callable[[Bytes], Floats]
    encode: Callable[[Floats], Bytes] | None
    row_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per element, scales included."""
        return 8 * self.block_bytes / self.block

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape; ModelError when the last axis is not whole blocks."""
        last = shape[-1] if shape else 1
        if last % self.block:
            raise ModelError(
                f"shape {list(shape)} cannot be {self.name}: its last axis is not a multiple of {self.block}",
                fix="keep this tensor in f32, f16 or bf16",
            )
        heads = math.prod(shape[:-1]) * self.row_bytes if shape else self.row_bytes
        return heads + math.prod(shape) // self.block * self.block_bytes

    def unit(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(elements, bytes) of what decode and encode take: a block, or a row where rows have something before them."""
        if not self.row_bytes:
            return self.block, self.block_bytes
        last = shape[-1] if shape else 1
        return last, self.row_bytes + last // self.block * self.block_bytes


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        row.name: row
        for row in (
            Format("f32", 1, 4, 0, quants.decode_f32, quants.encode_f32),
            Format("f16", 1, 2, 1, quants.decode_f16, quants.encode_f16),
            Format("bf16", 1, 2, 30, quants.decode_bf16, quants.encode_bf16),
            Format("q8_0", 32, 34, 8, quants.decode_q8_0, quants.encode_q8_0),
            Format("q4_0", 32, 18, 2, quants.decode_q4_0, quants.encode_q4_0),
            Format("q4_1", 32, 20, 3, quants.decode_q4_1, None),
            Format("q5_0", 32, 22, 6, quants.decode_q5_0, None),
            Format("q5_1", 32, 24, 7, quants.decode_q5_1, None),
            Format("q4_k", 256, 144, 12, quants.decode_q4_k, None),
            Format("q5_k", 256, 176, 13, quants.decode_q5_k, None),
            Format("q6_k", 256, 210, 14, quants.decode_q6_k, None),
            Format("fp8", 1, 1, None, quants.decode_fp8, quants.encode_fp8, row_bytes=4),
        )
    }
)


def get_format(name: str) -> Format:
    """The format of that name; ModelError listing the known ones when there is none."""
    if (found := FORMATS.get(name)) is None:
        raise ModelError(f"unknown weight format {name!r}", fix=f"use one of {', '.join(FORMATS)}")
    return found


@dataclass(frozen=True, eq=False)
class Tensor:
    """A weight in its stored format.

    Attributes:
        format: a name in FORMATS.
        shape: PyTorch's order, last axis contiguous; blocks run along the last axis (a linear weight is [out, in]).
        data: uint8, 1-D, contiguous, exactly `nbytes` long; often a read-only view of a memory map.
    """

    format: str
    shape: tuple[int, ...]
    data: Bytes

    def __post_init__(self) -> None:
        expected = get_format(self.format).nbytes(self.shape)
        assert self.data.dtype == np.uint8 and self.data.ndim == 1 and self.data.flags.c_contiguous
        assert self.data.size == expected, f"{self.format} {self.shape} is {expected} bytes, got {self.data.size}"

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return int(self.data.size)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def decode(self) -> Floats:
        """The values as float32 [shape]; for f32 a view of `data`, so perhaps read-only."""
        if self.format == "f32" and self.data.ctypes.data % 4 == 0:
            return self.data.view("<f4").reshape(self.shape)
        out = np.empty(self.size, np.float32)
        at = 0
        for values in self._decoded():
            out[at : at + values.size] = values.reshape(-1)
            at += values.size
        return out.reshape(self.shape)

    def to(self, format: str) -> Tensor:
        """The tensor re-encoded; itself when the format is the same.

        ModelError: unknown format, a format that finial only reads, a last axis that is not whole blocks, or a value
        that the format cannot hold.
        """
        if format == self.format:
            return self
        out = np.empty(get_format(format).nbytes(self.shape), np.uint8)
        at = 0
        for part in self.slabs(format):
            out[at : at + part.size] = part
            at += part.size
        return Tensor(format, self.shape, out)

    def slabs(self, format: str | None = None) -> Iterator[Bytes]:
        """The bytes in `format` (as stored when None), in order, as uint8 [n] pieces of at most a few MB.

        What the file writers take, so that a model is written without ever being whole in memory.  Raises as `to` does,
        before the first piece where the cause is the format or the shape.
        """
        target = get_format(self.format if format is None else format)
        target.nbytes(self.shape)
        if target.name == self.format:
            step = 4 << 20
            return (self.data[at : at + step] for at in range(0, self.nbytes, step))
        if target.encode is None:
            writable = ", ".join(row.name for row in FORMATS.values() if row.encode)
            raise ModelError(f"finial reads {target.name} but does not write it", fix=f"use one of {writable}")
        encode, (unit, _) = target.encode, target.unit(self.shape)
        return (encode(values.reshape(-1, unit)).reshape(-1) for values in self._decoded(unit))

    def _decoded(self, whole: int = 1) -> Iterator[Floats]:
        """Values in order, in pieces of a multiple of `whole` elements."""
        source = get_format(self.format)
        unit, unit_bytes = source.unit(self.shape)
        blocks = self.data.reshape(-1, unit_bytes)
        together = math.lcm(unit, whole)
        step = max(1, SLAB // together) * together // unit
        for at in range(0, blocks.shape[0], step):
            # A damaged scale may be an infinity or a NaN; it must come out as one, not as a warning.
            with np.errstate(invalid="ignore", over="ignore"):
                values = source.decode(blocks[at : at + step])
            yield values

    def rows(self, index: NDArray[Any]) -> Tensor:
        """A new tensor with the rows `index` (integers [n], first axis) in that order; copies bytes, decodes nothing.

        ModelError when a row is not whole blocks, as in a one-dimensional block-quantised tensor.
        """
        assert self.shape, "a scalar has no rows"
        row_bytes = get_format(self.format).nbytes((1, *self.shape[1:])) if self.shape[1:] else self._element_bytes()
        picked = self.data.reshape(self.shape[0], row_bytes)[index]
        return Tensor(self.format, (picked.shape[0], *self.shape[1:]), picked.reshape(-1))

    def _element_bytes(self) -> int:
        row = get_format(self.format)
        if row.block != 1 or row.row_bytes:
            shared = f"blocks of {row.block}" if row.block != 1 else "one scale"
            raise ModelError(
                f"cannot pick elements of a one-dimensional {self.format} tensor: they share {shared}",
                fix="decode it first",
            )
        return row.block_bytes

    def later(self, format: str, name: str) -> Tensor:
        """As `to`, but encoded anew each time its bytes are asked for; `name` is what an error then calls it."""
        return self if format == self.format else Reencoded(self, format, name)

    @staticmethod
    def from_array(array: NDArray[Any], format: str = "f32") -> Tensor:
        """A tensor of `array`'s values; shares its memory where neither type nor layout has to change."""
        stored = "f16" if array.dtype == np.float16 else "f32"
        values = np.asarray(array, dtype="<f2" if stored == "f16" else "<f4", order="C")
        return Tensor(stored, tuple(array.shape), values.reshape(-1).view(np.uint8)).to(format)


class Reencoded(Tensor):
    """A tensor in another format than the one it is stored in.  It holds no bytes: whoever asks for `data` gets new
    ones, so that a model can be re-encoded tensor by tensor without ever being in memory twice.

    Attributes:
        source: the tensor as stored.

    Raises:
        ModelError: as `Tensor.to`; for the format or the shape at once, for a value when `data` is asked for.
    """

    source: Tensor
    _name: str

    def __init__(self, source: Tensor, format: str, name: str) -> None:
        target = get_format(format)
        target.nbytes(source.shape)
        if target.encode is None:
            writable = ", ".join(row.name for row in FORMATS.values() if row.encode)
            raise ModelError(f"finial reads {format} but does not write it", fix=f"use one of {writable}")
        for attribute, value in (("format", format), ("shape", source.shape), ("source", source), ("_name", name)):
            object.__setattr__(self, attribute, value)

    @property
    def data(self) -> Bytes:
        """The encoded bytes, made now."""
        try:
            return self.source.to(self.format).data
        except ModelError as error:
            raise ModelError(f"{self._name}: {error.what}", fix=error.fix) from error

    @property
    def nbytes(self) -> int:
        """Bytes that `data` has."""
        return get_format(self.format).nbytes(self.shape)
