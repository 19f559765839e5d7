"""K-quants for tests: a plain encoder of q4_k, q5_k and q6_k, and a model in the mixture that llama.cpp calls Q4_K_M.

finial reads these formats and does not write them.  The encoder rounds each group to its own range, without ggml's
search for better scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from finial.formats import Tensor


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype("<f2")[:, None].view(np.uint8)


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.divide(1, x, out=np.zeros_like(x), where=x > 0)


def _with_minimums(values: np.ndarray, bits: int) -> np.ndarray:
    """Eight groups of 32: level · d · scale - dmin · minimum, both factors of six bits (quants.py, `_k_scales`)."""
    groups = values.reshape(-1, 8, 32)
    low = np.minimum(groups.min(-1), 0)
    step = (groups.max(-1) - low) / (2**bits - 1)
    d, least = ((x.max(-1) / 63).astype("<f2").astype(np.float32) for x in (step, -low))
    scale = np.clip(np.rint(step * _inverse(d)[:, None]), 0, 63).astype(np.uint8)
    minimum = np.clip(np.rint(-low * _inverse(least)[:, None]), 0, 63).astype(np.uint8)
    offset, width = (least[:, None] * minimum)[..., None], (d[:, None] * scale)[..., None]
    level = np.clip(np.rint((groups + offset) * _inverse(width)), 0, 2**bits - 1).astype(np.uint8)
    head = np.concatenate(
        [
            scale[:, :4] | scale[:, 4:] >> 4 << 6,
            minimum[:, :4] | minimum[:, 4:] >> 4 << 6,
            scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    fifth = np.bitwise_or.reduce((level >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    level &= 15
    nibbles = (level[:, ::2] | level[:, 1::2] << 4).reshape(-1, 128)
    return np.concatenate([_half(d), _half(least), head, *([fifth] if bits == 5 else []), nibbles], axis=1)


def _six_bits(values: np.ndarray) -> np.ndarray:
    """Sixteen groups of 16: (level - 32) · d · scale, the scale an int8."""
    groups = values.reshape(-1, 16, 16)
    step = np.abs(groups).max(-1) / 31
    d = (step.max(-1) / 127).astype("<f2").astype(np.float32)
    scale = np.clip(np.rint(step * _inverse(d)[:, None]), 0, 127).astype(np.uint8)
    width = (d[:, None] * scale)[..., None]
    level = (np.clip(np.rint(groups * _inverse(width)), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    nibbles = (level[:, :, :2] & 15 | (level[:, :, 2:] & 15) << 4).reshape(-1, 128)
    high = np.bitwise_or.reduce((level >> 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=2)
    return np.concatenate([nibbles, high.reshape(-1, 64), scale, _half(d)], axis=1)


def encode(values: np.ndarray, format: str) -> Tensor:
    """float32 [..., 256 n] as "q4_k", "q5_k" or "q6_k"."""
    flat = np.asarray(values, np.float32)
    blocks = _six_bits(flat) if format == "q6_k" else _with_minimums(flat, int(format[1]))
    return Tensor(format, flat.shape, np.ascontiguousarray(blocks, np.uint8).reshape(-1))


def mixture(values: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """A model's float32 tensors by name: table, values and down in q6_k, up in q5_k, other matrices in q4_k."""

    def format(name: str) -> str:
        if any(part in name for part in ("embed_tokens", "v_proj", "down_proj")):
            return "q6_k"
        return "q5_k" if "up_proj" in name else "q4_k"

    return {
        name: encode(value, format(name)) if value.ndim == 2 else Tensor.from_array(value)
        for name, value in values.items()
    }
