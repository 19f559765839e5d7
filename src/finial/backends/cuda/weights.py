"""Weights in the order in which kernels read them; see formats.cuh for the layouts.

Knows finial's formats and the device's; nothing of graphs or kernels.

    data, scales = pack_matrix([tensor], "q8_0", interleave=False)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.kernels import padded
from finial.formats import Tensor

Bytes = NDArray[np.uint8]
_SIZES = {"f32": 4, "bf16": 2, "f16": 2}
FP8_LARGEST = 448.0  # of e4m3 without infinities (OCP 8-bit floating point specification, 1.0)


def pack_matrix(parts: Sequence[Tensor], format: str, interleave: bool) -> tuple[Bytes, NDArray[Any]]:
    """Matrices [O, K] of one stored format, one after another: (rows of bytes [O, width], scales [O, …]).

    Args:
        format: of the device: the stored one, or "fp8" made here.
        interleave: row i of every part before row i + 1 of any.
    """
    packed = [_one(part, format) for part in parts]
    if len(packed) == 1:
        return packed[0]
    join = _interleaved if interleave else np.concatenate
    return join([data for data, _ in packed]), join([scales for _, scales in packed])


def _interleaved(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.stack(parts, axis=1).reshape(len(parts) * len(parts[0]), parts[0].shape[1])


def _one(tensor: Tensor, format: str) -> tuple[Bytes, NDArray[Any]]:
    out, k = tensor.shape
    none = np.zeros((out, 0), np.uint16)
    if format == "fp8":
        return _fp8(tensor.decode().reshape(out, k))
    assert tensor.format == format, (tensor.format, format)
    if format in _SIZES:
        return _pad(tensor.data.reshape(out, k * _SIZES[format]), padded(k) * _SIZES[format], 0), none
    blocks = tensor.data.reshape(out, k // 32, -1)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.uint16).reshape(out, k // 32)
    scales = _pad(scales, padded(k) // 32, 0)
    bytes_ = np.ascontiguousarray(blocks[:, :, 2:]).reshape(out, -1)
    if format == "q8_0":
        return _pad(bytes_ ^ np.uint8(128), padded(k), 128), scales  # int8 + 128
    return _pad(bytes_, padded(k) // 2, 0x88), scales


def _pad(rows: NDArray[Any], width: int, value: int) -> NDArray[Any]:
    if rows.shape[1] == width:
        return rows
    out = np.full((rows.shape[0], width), value, rows.dtype)
    out[:, : rows.shape[1]] = rows
    return out


def _fp8(values: NDArray[np.float32]) -> tuple[Bytes, NDArray[Any]]:
    """e4m3 to nearest even, each row scaled so that its largest magnitude is 448; scales hold the kernels' 2^8 too."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(FP8_LARGEST), np.float32(1)).astype(np.float32)
    scaled = values / scale
    # Steps between neighbours are 2^-3 of the power of two below, and 2^-9 from the smallest normal 2^-6 down.
    _, exponent = np.frexp(scaled)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, -6) - 3).astype(np.float32)
    rounded = np.clip(np.rint(scaled / step) * step, -FP8_LARGEST, FP8_LARGEST)
    # Exactly an f16 times 2^-8, whose exponent has e4m3's range; the low seven bits of the mantissa are zero.
    half = (rounded * np.float32(2.0**-8)).astype(np.float16).view(np.uint16)
    data = ((half >> np.uint16(8) & np.uint16(0x80)) | (half >> np.uint16(7) & np.uint16(0x7F))).astype(np.uint8)
    return _pad(data, padded(values.shape[1]), 0), scale * np.float32(256)


def fp8_decoded(data: Bytes, scales: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """What the kernels read from such a matrix: float32 [O, K]."""
    bits = data[:, :k].astype(np.uint16)
    half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view(np.float16)
    return half.astype(np.float32) * scales
