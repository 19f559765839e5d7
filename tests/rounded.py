"""The reference with the roundings that a backend says it makes, so that nothing but float32 sums is left to differ.

Knows no backend.

    with rounding_reference(activations="bf16", queries="bf16"):
        logits = compile_graph(graph, weights, "reference").run(step)
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from finial.backends import reference
from finial.formats import Tensor

CHUNK = 256  # positions that share a maximum: ATTENTION_CHUNK of the native kernels
LOG2_E = np.float32(1.44269504)


def to_bf16(x: np.ndarray) -> np.ndarray:
    return Tensor.from_array(np.ascontiguousarray(x, np.float32), "bf16").decode().reshape(x.shape)


def to_int8(x: np.ndarray) -> np.ndarray:
    """Steps of absmax / 127 in each block of 32, the step rounded up to five significant bits."""
    blocks = x.reshape(len(x), -1, 32)
    part, power = np.frexp(np.abs(blocks).max(-1, keepdims=True) / np.float32(127))
    step = np.ldexp(np.ceil(part * 32) / 32, power)
    rounded: np.ndarray = (np.rint(blocks / np.where(step > 0, step, 1)) * step).reshape(x.shape)
    return rounded


def attention(
    queries: np.ndarray,
    cache: Any,
    positions: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    pages: np.ndarray,
    head_dim: int,
    num_kv_heads: int,
    scale: float,
    window: int | None,
) -> np.ndarray:
    """`reference.attention` with the scaled query and each chunk's weights rounded to bf16, in powers of two."""
    out = np.empty_like(queries)
    for b, length in enumerate(lengths):
        at = np.arange(length)
        slots = pages[b, at // cache.page_size] * cache.page_size + at % cache.page_size
        for t in range(starts[b], starts[b + 1]):
            low = 0 if window is None else max(0, positions[t] - window + 1)
            seen = slots[low : positions[t] + 1]
            keys, values = cache.data[seen, 0].astype(np.float64), cache.data[seen, 1].astype(np.float64)
            grouped = to_bf16(queries[t] * (np.float32(scale) * LOG2_E)).reshape(num_kv_heads, -1, head_dim)
            scores = np.einsum("kgd,nkd->kgn", grouped.astype(np.float64), keys).astype(np.float32)
            highest = scores.max(axis=-1)
            total: np.ndarray = np.zeros(highest.shape)
            mixed: np.ndarray = np.zeros(grouped.shape)
            for chunk in range(low // CHUNK, positions[t] // CHUNK + 1):
                part = slice(max(low, chunk * CHUNK) - low, (chunk + 1) * CHUNK - low)
                best = scores[..., part].max(axis=-1)
                weights = to_bf16(np.exp2(scores[..., part] - best[..., None])).astype(np.float64)
                share = np.exp2((best - highest).astype(np.float64))
                total += share * weights.sum(axis=-1)
                mixed += share[..., None] * np.einsum("kgn,nkd->kgd", weights, values[part])
            out[t] = (mixed / total[..., None]).reshape(-1)
    return out


@contextlib.contextmanager
def rounding_reference(
    activations: str = "f32", queries: str = "f32", weights: str = "f32", small: int = 0, cached: str = "f32"
) -> Iterator[None]:
    """The reference, but the input of every product, or every attention's queries and weights, rounded.

    Args:
        weights: what the weights of a product are rounded to where its input is.
        small: products of so many rows or fewer round nothing.
        cached: what keys and values are rounded to where queries are.
    """
    plain = reference.linear

    def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        if len(x) <= small:
            return plain(x, weight, bias)
        factor = to_bf16(weight) if weights == "bf16" else weight
        return plain(to_bf16(x) if activations == "bf16" else to_int8(x), factor, bias)

    def attend(queries: np.ndarray, cache: Any, *rest: Any, **named: Any) -> np.ndarray:
        if cached == "bf16":
            cache = copy.copy(cache)
            cache.data = to_bf16(cache.data)
        return attention(queries, cache, *rest, **named)

    assert {activations, queries, weights, cached} <= {"f32", "bf16", "int8"}
    assert "int8" not in (queries, weights, cached)
    with pytest.MonkeyPatch.context() as patch:
        if activations != "f32":
            patch.setitem(reference._OPS, "linear", linear)
        if queries != "f32":
            patch.setitem(reference._OPS, "attention", attend)
        yield


def product_rounding(engine: Any, format: str) -> dict[str, Any]:
    """What a backend says of its products with weights of this format, as `rounding_reference` takes it."""
    precision = getattr(engine, "activation_precision", lambda format: "f32")(format)
    weights = getattr(engine, "weight_precision", lambda format: "f32")(format)
    return {"activations": precision, "weights": weights, "small": getattr(engine, "small_rows", 0)}
