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
from finial.quants import e4m3

Bytes = NDArray[np.uint8]
_SIZES = {"f32": 4, "bf16": 2, "f16": 2}


def pack_matrix(parts: Sequence[Tensor], format: str, interleave: bool) -> tuple[Bytes, NDArray[Any]]:
    """Matrices [O, K] of one stored format, one after another: (rows of bytes [O, width], scales [O, …]).

    Args:
        format: the stored one; fp8 is made here of any other.
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
        rows = tensor.to("fp8").data.reshape(out, 4 + k)
        # The kernels read e4m3 as f16, which is 2^-8 of the value: the scale makes up for it.
        channels = np.ascontiguousarray(rows[:, :4]).view(np.float32) * np.float32(256)
        return _pad(np.ascontiguousarray(rows[:, 4:]), padded(k), 0), channels
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


def fp8_decoded(data: Bytes, scales: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """What the kernels read from such a matrix: float32 [O, K]."""
    return e4m3(data[:, :k]) * (scales / np.float32(256))
