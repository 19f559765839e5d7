"""Weight formats: the byte layout of each, and its NumPy encoder and decoder.

Knows nothing of files, models or devices: a `Tensor` is a shape, a format's name and bytes, wherever those bytes live.

    Tensor.from_array(weight, "q8_0").decode()

Layouts and rounding are ggml's (ggml-common.h `block_q*`, ggml-quants.c `quantize_row_*_ref` and `dequantize_row_*`),
so that bytes and decoded values are bit-equal to what llama.cpp's own tools read and write.  All of it little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.errors import ModelError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

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


# --- floats ---------------------------------------------------------------------------------------------------------


def _decode_f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4")


def _encode_f32(values: Floats) -> Bytes:
    return values.view(np.uint8)


def _decode_f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _encode_f16(values: Floats) -> Bytes:
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    infinite = (half.view("<u2") & 0x7FFF) == 0x7C00
    if infinite.any() and np.isfinite(worst := values[infinite]).any():
        raise _too_large(float(worst[np.isfinite(worst)][0]), "f16", 65504.0)
    return half.view(np.uint8)


def _decode_bf16(blocks: Bytes) -> Floats:
    wide = blocks.view("<u2").astype("<u4")
    wide <<= np.uint32(16)
    return wide.view("<f4")


def _encode_bf16(values: Floats) -> Bytes:
    bits = values.view("<u4")
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += bits
    odd >>= np.uint32(16)
    if np.isnan(values).any():  # the carry could turn a NaN into an infinity or a zero: keep it, as a quiet one
        odd = np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), odd)
    return odd.astype("<u2").view(np.uint8)


# --- blocks of 32 with one f16 scale (and a minimum in the _1 formats) ------------------------------------------------


def _half(blocks: Bytes, at: int) -> Floats:
    """The f16 at byte `at` of every block: float32 [n_blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Floats:
    """Bytes [n, m] to float32 [n, 2 m]: first every low nibble, then every high one."""
    width = packed.shape[1]
    out = np.empty((packed.shape[0], 2 * width), np.float32)
    out[:, :width] = packed & np.uint8(15)
    out[:, width:] = packed >> np.uint8(4)
    return out


def _fifth_bits(blocks: Bytes, at: int) -> Floats:
    """16 where bit j of the uint32 at byte `at` is set, else 0: float32 [n_blocks, 32]."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")
    bits <<= np.uint8(4)
    return bits.astype(np.float32)


def _decode_q8_0(blocks: Bytes) -> Floats:
    out = blocks[:, 2:].view(np.int8).astype(np.float32)
    out *= _half(blocks, 0)
    return out


def _decode_q4_0(blocks: Bytes) -> Floats:
    out = _nibbles(blocks[:, 2:])
    out -= np.float32(8)
    out *= _half(blocks, 0)
    return out


def _decode_q4_1(blocks: Bytes) -> Floats:
    out = _nibbles(blocks[:, 4:])
    out *= _half(blocks, 0)
    out += _half(blocks, 2)
    return out


def _decode_q5_0(blocks: Bytes) -> Floats:
    out = _nibbles(blocks[:, 6:])
    out += _fifth_bits(blocks, 2)
    out -= np.float32(16)
    out *= _half(blocks, 0)
    return out


def _decode_q5_1(blocks: Bytes) -> Floats:
    out = _nibbles(blocks[:, 8:])
    out += _fifth_bits(blocks, 4)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)
    return out


def _too_large(value: float, name: str, limit: float) -> ModelError:
    return ModelError(
        f"the value {value:g} cannot be written as {name}, which holds magnitudes up to {limit:g}",
        fix="write this tensor as bf16 or f32, or look for a broken weight if the value is infinite or not a number",
    )


def _scale_and_inverse(extreme: Floats, divisor: int, name: str) -> tuple[Floats, Floats]:
    """scale = extreme / divisor and its inverse, both [n, 1]; the inverse is 0 where the scale is stored as nothing.

    ggml takes the inverse of the float32 scale, not of the f16 one that is stored.
    """
    scale = extreme / np.float32(divisor)
    beyond = ~(np.abs(scale) < 65520)  # 65520 and above round to an f16 infinity; NaN fails the comparison too
    if beyond.any():
        raise _too_large(float(extreme[beyond][0]), name, 65504.0 * abs(divisor))
    # Below 2^-126 the inverse may overflow; such a scale is 0 in f16, so the integers do not matter and 0 is safe.
    tiny = np.abs(scale) < np.float32(2.0**-126)
    inverse = np.where(tiny, np.float32(0), np.float32(1) / np.where(tiny, np.float32(1), scale))
    return scale, inverse.astype(np.float32, copy=False)


def _encode_q8_0(values: Floats) -> Bytes:
    largest = np.abs(values).max(axis=1, keepdims=True)
    scale, inverse = _scale_and_inverse(largest, 127, "q8_0")
    scaled = values * inverse
    whole = np.trunc(scaled)
    scaled -= whole  # exact, so doubling and truncating it rounds halves away from zero as C's roundf does
    scaled += scaled
    whole += np.trunc(scaled)
    out = np.empty((values.shape[0], 34), np.uint8)
    out[:, :2] = scale.astype("<f2").view(np.uint8)
    out[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return out


def _encode_q4_0(values: Floats) -> Bytes:
    at = np.abs(values).argmax(axis=1)[:, None]
    scale, inverse = _scale_and_inverse(np.take_along_axis(values, at, axis=1), -8, "q4_0")
    scaled = values * inverse
    scaled += np.float32(8.5)
    level = np.minimum(scaled.astype(np.uint8), np.uint8(15))
    out = np.empty((values.shape[0], 18), np.uint8)
    out[:, :2] = scale.astype("<f2").view(np.uint8)
    out[:, 2:] = level[:, :16] | (level[:, 16:] << np.uint8(4))
    return out


# --- super-blocks of 256 ----------------------------------------------------------------------------------------------


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minimums of the eight groups of a q4_k or q5_k block: float32 [n, 8, 1] each.

    Bytes 4..16 hold eight 6-bit scales and eight 6-bit minimums.  Scales 0-3 are the low six bits of bytes 0-3,
    minimums 0-3 those of bytes 4-7; of scales and minimums 4-7 the low four bits are the nibbles of bytes 8-11 and the
    high two bits are the top bits of bytes 0-3 and 4-7 (ggml-quants.c `get_scale_min_k4`).
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimums = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minimums)[..., None]


def _k_nibbles(packed: Bytes) -> Floats:
    """128 bytes to eight groups of 32: each run of 32 bytes gives a group of low and one of high nibbles."""
    n = packed.shape[0]
    runs = packed.reshape(n, 4, 32)
    out = np.empty((n, 4, 2, 32), np.float32)
    out[:, :, 0] = runs & np.uint8(15)
    out[:, :, 1] = runs >> np.uint8(4)
    return out.reshape(n, 8, 32)


def _decode_q4_k(blocks: Bytes) -> Floats:
    scales, minimums = _k_scales(blocks)
    out = _k_nibbles(blocks[:, 16:])
    out *= scales
    out -= minimums
    return out.reshape(-1, 256)


def _decode_q5_k(blocks: Bytes) -> Floats:
    scales, minimums = _k_scales(blocks)
    out = _k_nibbles(blocks[:, 48:])
    high = blocks[:, 16:48]
    for group in range(8):  # bit g of byte j is the fifth bit of element j of group g
        out[:, group] += ((high >> np.uint8(group)) & np.uint8(1)) << np.uint8(4)
    out *= scales
    out -= minimums
    return out.reshape(-1, 256)


def _decode_q6_k(blocks: Bytes) -> Floats:
    n = blocks.shape[0]
    low = blocks[:, :128].reshape(n, 2, 2, 32)  # [half, run, byte]
    high = blocks[:, 128:192].reshape(n, 2, 32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    out = np.empty((n, 2, 4, 32), np.float32)  # each half: low nibbles of two runs, then their high nibbles
    for group in range(4):
        run = low[:, :, group % 2]
        nibble = run & np.uint8(15) if group < 2 else run >> np.uint8(4)
        out[:, :, group] = nibble | (((high >> np.uint8(2 * group)) & np.uint8(3)) << np.uint8(4))
    out -= np.float32(32)
    groups = out.reshape(n, 16, 16)
    groups *= scales[..., None]
    return groups.reshape(n, 256)


# --- one byte with a scale for each row -----------------------------------------------------------------------------

FP8_LARGEST = 448.0  # of e4m3 without infinities (OCP 8-bit floating point specification, 1.0, table 1)


def e4m3(data: Bytes) -> Floats:
    """Bytes to their values: sign, four bits of exponent, three of mantissa; finial writes no NaN.

    Sign, exponent and mantissa moved into an f16 are the value times 2^-8, subnormals too.
    """
    bits = data.astype(np.uint16)
    half = ((bits & np.uint16(0x80)) << np.uint16(8) | (bits & np.uint16(0x7F)) << np.uint16(7)).view(np.float16)
    out = half.astype(np.float32)
    out *= np.float32(256)
    return out


def _decode_fp8(rows: Bytes) -> Floats:
    out = e4m3(rows[:, 4:])
    out *= np.ascontiguousarray(rows[:, :4]).view("<f4")
    return out


def _encode_fp8(values: Floats) -> Bytes:
    """To nearest even, each row scaled so that its largest magnitude is 448; one below 2^-100 is all zeros."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise _too_large(float(largest[~np.isfinite(largest)][0]), "fp8", float(np.finfo(np.float32).max))
    scale = np.where(largest > 2.0**-100, largest / np.float32(FP8_LARGEST), np.float32(1)).astype(np.float32)
    scaled = values / scale
    # Steps between neighbours are 2^-3 of the power of two below, and 2^-9 from the smallest normal 2^-6 down.
    _, exponent = np.frexp(scaled)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, -6) - 3).astype(np.float32)
    rounded = np.clip(np.rint(scaled / step) * step, -FP8_LARGEST, FP8_LARGEST)
    half = (rounded * np.float32(2.0**-8)).astype(np.float16).view(np.uint16)  # exact: see e4m3
    out = np.empty((values.shape[0], 4 + values.shape[1]), np.uint8)
    out[:, :4] = scale.astype("<f4").view(np.uint8)
    out[:, 4:] = (half >> np.uint16(8) & np.uint16(0x80)) | (half >> np.uint16(7) & np.uint16(0x7F))
    return out


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        row.name: row
        for row in (
            Format("f32", 1, 4, 0, _decode_f32, _encode_f32),
            Format("f16", 1, 2, 1, _decode_f16, _encode_f16),
            Format("bf16", 1, 2, 30, _decode_bf16, _encode_bf16),
            Format("q8_0", 32, 34, 8, _decode_q8_0, _encode_q8_0),
            Format("q4_0", 32, 18, 2, _decode_q4_0, _encode_q4_0),
            Format("q4_1", 32, 20, 3, _decode_q4_1, None),
            Format("q5_0", 32, 22, 6, _decode_q5_0, None),
            Format("q5_1", 32, 24, 7, _decode_q5_1, None),
            Format("q4_k", 256, 144, 12, _decode_q4_k, None),
            Format("q5_k", 256, 176, 13, _decode_q5_k, None),
            Format("q6_k", 256, 210, 14, _decode_q6_k, None),
            Format("fp8", 1, 1, None, _decode_fp8, _encode_fp8, row_bytes=4),
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
