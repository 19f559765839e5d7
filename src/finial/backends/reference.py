"""Every operation in plain float32 NumPy: the definition that all other backends are held against.

Written to be read, not to be fast.  Weights are decoded to float32; a cache value is rounded to its
state's dtype when it is written.  See `graph.OPS` for the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.errors import BackendError
from finial.formats import Tensor
from finial.graph import Graph, Node

F32 = np.float32
Rows = NDArray[np.float32]  # [N, D]
Ints = NDArray[np.int32]


def embed(tokens: Ints, weight: Rows) -> Rows:
    """weight[tokens]: [T], [V, D] -> [T, D]."""
    return weight[tokens]


def linear(x: Rows, weight: Rows, bias: Rows | None = None) -> Rows:
    """x · weightᵀ + bias: [N, I], [O, I], [O] -> [N, O]."""
    out: Rows = x @ weight.T
    return out if bias is None else out + bias


def rms_norm(x: Rows, weight: Rows, eps: float) -> Rows:
    """Each group of len(weight) values divided by its root mean square (Zhang & Sennrich 2019, eq. 4)."""
    groups = x.reshape(len(x), x.shape[1] // len(weight), len(weight))  # no -1: there may be no rows
    mean_square: Rows = np.mean(groups * groups, axis=-1, keepdims=True, dtype=F32)
    root: Rows = np.sqrt(mean_square + F32(eps))
    out: Rows = groups / root * weight
    return out.reshape(x.shape)


def rope(x: Rows, positions: Ints, frequencies: Rows, head_dim: int, scale: float) -> Rows:
    """Rotary embedding with half-split pairs (i, i + head_dim/2), as transformers' `rotate_half`."""
    angles = positions.astype(F32)[:, None] * frequencies
    cos, sin = (np.cos(angles) * F32(scale))[:, None], (np.sin(angles) * F32(scale))[:, None]
    heads = x.reshape(len(x), -1, head_dim)
    first, second = heads[..., : head_dim // 2], heads[..., head_dim // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)


def cache_write(cache: Cache, keys: Rows, values: Rows, slots: Ints) -> Cache:
    """cache[slots] = keys, values, rounded to the cache's dtype; [T, heads · head_dim] each."""
    for which, rows in enumerate((keys, values)):
        rounded = Tensor.from_array(rows, cache.dtype).decode()
        cache.data[slots, which] = rounded.reshape(len(rows), *cache.data.shape[2:])
    return cache


def attention(
    queries: Rows,
    cache: Cache,
    positions: Ints,
    starts: Ints,
    lengths: Ints,
    pages: Ints,
    head_dim: int,
    num_kv_heads: int,
    scale: float,
    window: int | None,
) -> Rows:
    """Scaled dot-product attention of each row over its own sequence's past and itself; no GQA expansion.

    Head h of the queries reads key/value head h // (heads / num_kv_heads).
    """
    out = np.empty_like(queries)
    for b, length in enumerate(lengths):
        at = np.arange(length)
        slots = pages[b, at // cache.page_size] * cache.page_size + at % cache.page_size
        for t in range(starts[b], starts[b + 1]):
            low = 0 if window is None else max(0, positions[t] - window + 1)
            seen = slots[low : positions[t] + 1]
            keys, values = cache.data[seen, 0], cache.data[seen, 1]  # [n, kv_heads, head_dim]
            grouped = queries[t].reshape(num_kv_heads, -1, head_dim)  # [kv_heads, group, head_dim]
            scores = np.einsum("kgd,nkd->kgn", grouped, keys) * F32(scale)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[t] = np.einsum("kgn,nkd->kgd", weights, values).reshape(-1)
    return out


def silu_mul(gate: Rows, up: Rows) -> Rows:
    """gate · sigmoid(gate) · up (Shazeer 2020, arXiv:2002.05202, SwiGLU without its matrices)."""
    with np.errstate(over="ignore"):  # exp(-gate) may reach infinity: the quotient is then 0, as it should be
        decay: Rows = np.exp(-gate)
    out: Rows = gate / (F32(1) + decay) * up
    return out


def add(a: Rows, b: Rows) -> Rows:
    """a + b."""
    out: Rows = a + b
    return out


def select_rows(x: Rows, rows: Ints) -> Rows:
    """x[rows]."""
    return x[rows]


_OPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (embed, linear, rms_norm, rope, cache_write, attention, silu_mul, add, select_rows)
}


@dataclass
class Cache:
    """One layer's keys and values, float32 [slots, 2, heads, head_dim] holding values of `dtype`."""

    data: np.ndarray
    dtype: str
    page_size: int


class ReferenceState(dict[str, Cache]):
    """Caches by state name."""

    @property
    def nbytes(self) -> int:
        """Bytes of all caches as held here (float32 whatever the dtype)."""
        return sum(cache.data.nbytes for cache in self.values())


class ReferenceProgram:
    """Runs the nodes one after another."""

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor]) -> None:
        self._graph = graph
        self._weights = {value.name: weights[value.name].decode() for value in graph.of_kind("weight")}

    def new_state(self, pages: int, page_size: int) -> ReferenceState:
        """See `Program.new_state`."""
        try:
            return ReferenceState(
                {
                    value.name: Cache(
                        np.zeros((pages * page_size, *map(int, value.shape[1:])), F32), value.dtype, page_size
                    )
                    for value in self._graph.of_kind("state")
                }
            )
        except MemoryError as error:
            raise BackendError(
                f"no memory for {pages * page_size:,} cache positions", fix="ask for a smaller --max-context"
            ) from error

    def run(self, feeds: Mapping[str, np.ndarray], state: ReferenceState) -> list[np.ndarray]:
        """See `Program.run`."""
        values: dict[str, Any] = {**self._weights, **feeds, **state}
        for node in self._graph.nodes:
            inputs = [values[name] for name in node.inputs]
            if node.op in _INDEXED:
                _check_range(node, inputs)
            values[node.outputs[0]] = _OPS[node.op](*inputs, **node.attrs)
        return [values[name] for name in self._graph.outputs]


# op -> (which input holds indices, into the rows of which other input)
_INDEXED = {"embed": (0, 1), "cache_write": (3, 0), "select_rows": (1, 0)}


def _check_range(node: Node, inputs: list[Any]) -> None:
    """Indices that NumPy would wrap or read past the end of are errors, named."""
    which, table = _INDEXED[node.op]
    indices, rows = inputs[which], inputs[table]
    limit = len(rows.data if isinstance(rows, Cache) else rows)
    bad = indices[(indices < 0) | (indices >= limit)]
    if len(bad):
        raise BackendError(f"step input {node.inputs[which]} holds {bad[0]}, expected 0 to {limit - 1}")


class ReferenceBackend:
    """See the module."""

    name = "reference"

    def supports(self, graph: Graph, node: Node) -> bool:
        """All operations of the table."""
        return node.op in _OPS

    def compile(self, graph: Graph, weights: Mapping[str, Tensor]) -> ReferenceProgram:
        """Weights are decoded to float32 here: 4 bytes an element."""
        return ReferenceProgram(graph, weights)


def create(threads: int | None) -> ReferenceBackend:
    """The backend; NumPy chooses its own threads."""
    return ReferenceBackend()
