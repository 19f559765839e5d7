"""What a step must at least read and compute: the numerator of every roofline.

Counts from the graph alone, in the formats that the weights are stored in; knows no machine and no
time.  A weight matrix is read once per step however many rows share it; an embedding reads only its
rows; attention reads each sequence's cached keys and values once per step.

    step_bytes(graph, weights, rows=1, lengths=[1024])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from finial.formats import Tensor, get_format
from finial.graph import Graph, Node


def step_bytes(graph: Graph, weights: Mapping[str, Tensor], rows: int, lengths: Sequence[int]) -> int:
    """Bytes that one step must read.

    Args:
        rows: token rows of the step (T).
        lengths: cached positions that each sequence attends over, new rows included.
    """
    whole = {name for node in graph.nodes if node.op != "embed" for name in node.inputs}
    total = sum(weights[value.name].nbytes for value in graph.of_kind("weight") if value.name in whole)
    for node in graph.nodes:
        if node.op == "embed":
            table = weights[node.inputs[1]]
            total += rows * table.nbytes // table.shape[0]
        elif node.op == "attention":
            total += sum(_seen(node, length) for length in lengths) * _kv_bytes(graph, node)
    return total


def step_flops(graph: Graph, rows: int, wanted: int, lengths: Sequence[int]) -> int:
    """Multiplications and additions of one step's matrix products and attention (2 per multiply-add).

    `rows` new rows are taken as spread evenly over the sequences, each seeing its sequence's whole length.
    """
    total = 0
    for node in graph.nodes:
        if node.op == "linear":
            count = wanted if graph.values[node.inputs[0]].shape[0] == "R" else rows
            total += 2 * count * int(np.prod(graph.values[node.inputs[1]].shape))  # type: ignore[arg-type]
        elif node.op == "attention":
            width = graph.values[node.inputs[0]].shape[1]
            assert isinstance(width, int)
            total += sum(4 * width * _seen(node, length) for length in lengths) * rows // max(len(lengths), 1)
    return total


def kv_bytes_per_token(graph: Graph) -> int:
    """Cache bytes that one position takes over all layers."""
    return sum(_state_bytes(value.shape, value.dtype) for value in graph.of_kind("state"))


def _seen(node: Node, length: int) -> int:
    window = node.attrs["window"]
    return length if window is None else min(length, int(window))


def _kv_bytes(graph: Graph, node: Node) -> int:
    cache = graph.values[node.inputs[1]]
    return _state_bytes(cache.shape, cache.dtype)


def _state_bytes(shape: tuple[int | str, ...], dtype: str) -> int:
    return get_format(dtype).nbytes(tuple(int(size) for size in shape[1:]))
