"""Blocks of weights: what the bytes of each format mean, as NumPy decoders and encoders.

Knows blocks alone: [n_blocks, block_bytes] of uint8 and [n_blocks, block] of float32, of fp8 whole rows; nothing of
shapes and of the table of formats (formats.py).

    decode_q8_0(encode_q8_0(values))

Layouts and rounding are ggml's (ggml-common.h `block_q*`, ggml-quants.c `quantize_row_*_ref` and `dequantize_row_*`),
so that bytes and decoded values are bit-equal to what llama.cpp's own tools read and write.  All of it little-endian.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finial.errors import ModelError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# --- floats ---------------------------------------------------------------------------------------------------------


def decode_f32(blocks: Bytes) -> Floats:
    """A view."""
    return blocks.view("<f4")


def encode_f32(values: Floats) -> Bytes:
    """A view."""
    return values.view(np.uint8)


def decode_f16(blocks: Bytes) -> Floats:
    """Exact."""
    return blocks.view("<f2").astype(np.float32)


def encode_f16(values: Floats) -> Bytes:
    """To nearest even; ModelError for a finite value that becomes infinite."""
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    infinite = (half.view("<u2") & 0x7FFF) == 0x7C00
    if infinite.any() and np.isfinite(worst := values[infinite]).any():
        raise _too_large(float(worst[np.isfinite(worst)][0]), "f16", 65504.0)
    return half.view(np.uint8)


def decode_bf16(blocks: Bytes) -> Floats:
    """Exact: the upper half of a float32."""
    wide = blocks.view("<u2").astype("<u4")
    wide <<= np.uint32(16)
    return wide.view("<f4")


def encode_bf16(values: Floats) -> Bytes:
    """To nearest even."""
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


def decode_q8_0(blocks: Bytes) -> Floats:
    """f16 scale, 32 int8: scale · q."""
    out = blocks[:, 2:].view(np.int8).astype(np.float32)
    out *= _half(blocks, 0)
    return out


def decode_q4_0(blocks: Bytes) -> Floats:
    """f16 scale, 16 bytes of nibbles: scale · (q - 8)."""
    out = _nibbles(blocks[:, 2:])
    out -= np.float32(8)
    out *= _half(blocks, 0)
    return out


def decode_q4_1(blocks: Bytes) -> Floats:
    """f16 scale, f16 minimum, 16 bytes of nibbles: scale · q + minimum."""
    out = _nibbles(blocks[:, 4:])
    out *= _half(blocks, 0)
    out += _half(blocks, 2)
    return out


def decode_q5_0(blocks: Bytes) -> Floats:
    """f16 scale, 32 fifth bits, 16 bytes of nibbles: scale · (q - 16)."""
    out = _nibbles(blocks[:, 6:])
    out += _fifth_bits(blocks, 2)
    out -= np.float32(16)
    out *= _half(blocks, 0)
    return out


def decode_q5_1(blocks: Bytes) -> Floats:
    """f16 scale, f16 minimum, 32 fifth bits, 16 bytes of nibbles: scale · q + minimum."""
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


def encode_q8_0(values: Floats) -> Bytes:
    """The largest magnitude becomes 127; ModelError where the scale is beyond f16."""
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


def encode_q4_0(values: Floats) -> Bytes:
    """The value of largest magnitude becomes -8; ModelError where the scale is beyond f16."""
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


def decode_q4_k(blocks: Bytes) -> Floats:
    """f16 factors of scales and minimums, those (see `_k_scales`), 128 bytes of nibbles: scale · q - minimum."""
    scales, minimums = _k_scales(blocks)
    out = _k_nibbles(blocks[:, 16:])
    out *= scales
    out -= minimums
    return out.reshape(-1, 256)


def decode_q5_k(blocks: Bytes) -> Floats:
    """As q4_k, with 256 fifth bits before the nibbles."""
    scales, minimums = _k_scales(blocks)
    out = _k_nibbles(blocks[:, 48:])
    high = blocks[:, 16:48]
    for group in range(8):  # bit g of byte j is the fifth bit of element j of group g
        out[:, group] += ((high >> np.uint8(group)) & np.uint8(1)) << np.uint8(4)
    out *= scales
    out -= minimums
    return out.reshape(-1, 256)


def decode_q6_k(blocks: Bytes) -> Floats:
    """128 bytes of low nibbles, 64 of high pairs of bits, 16 int8 scales, their f16 factor: scale · (q - 32)."""
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


def decode_fp8(rows: Bytes) -> Floats:
    """f32 scale, then a byte for each value of the row: scale · e4m3."""
    out = e4m3(rows[:, 4:])
    out *= np.ascontiguousarray(rows[:, :4]).view("<f4")
    return out


def encode_fp8(values: Floats) -> Bytes:
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
