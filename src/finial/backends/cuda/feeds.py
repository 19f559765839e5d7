"""What the inputs of a step must be, and how they go to the device.

Knows the meaning of a step's integers; nothing of kernels, launches and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from finial.backends import Draw
from finial.errors import BackendError
from finial.graph import Graph, Node, Value

Ints = NDArray[np.int32]


def bucket(rows: int) -> int:
    """0, or the next power of two."""
    return 0 if rows == 0 else 1 << (rows - 1).bit_length()


def requests(draws: Sequence[Draw]) -> tuple[Ints, Ints]:
    """sample.cuh's structs of the rows, and their random numbers, as int32."""
    table = np.zeros((len(draws), 4), np.float32)
    table[:, 0] = [draw.temperature for draw in draws]
    table[:, 1] = np.array([draw.top_k for draw in draws], np.int32).view(np.float32)
    table[:, 2], table[:, 3] = [draw.top_p for draw in draws], [draw.min_p for draw in draws]
    return table.view(np.int32).reshape(-1), np.array([draw.uniform for draw in draws], np.float64).view(np.int32)


def indices(graph: Graph) -> list[tuple[str, str | int, Node]]:
    """Inputs that hold indices, what they must stay below, and a node that uses them so."""
    found = {}
    for node in graph.nodes:
        if node.op == "embed":
            found[node.inputs[0]] = (graph.values[node.inputs[1]].shape[0], node)
        elif node.op == "cache_write":
            found[node.inputs[3]] = ("slots", node)
        elif node.op == "select_rows":
            found[node.inputs[1]] = (graph.values[node.inputs[0]].shape[0], node)
    return [(name, limit, node) for name, (limit, node) in found.items()]


def check_sequences(feeds: Mapping[str, np.ndarray], sizes: dict[str, int]) -> None:
    """Rows belong to one sequence each, and look at positions that it has."""
    starts, lengths, positions = feeds["starts"], feeds["lengths"], feeds["positions"]
    if len(starts) != len(lengths) + 1 or starts[0] != 0 or starts[-1] != sizes["T"] or (np.diff(starts) < 0).any():
        raise BackendError(f"step input starts is {starts.tolist()!s:.80}, expected to rise from 0 to {sizes['T']}")
    if (lengths < 0).any():
        raise BackendError(f"step input lengths holds {lengths.min()}, expected 0 or more")
    beyond = (positions < 0) | (positions >= np.repeat(lengths, np.diff(starts)))
    if beyond.any():
        raise BackendError(f"step input positions holds {positions[beyond][0]}, expected less than the row's length")


def contiguous(feeds: Mapping[str, np.ndarray]) -> bool:
    """Whether the rows of each sequence are at neighbouring positions, as tiles of them must be."""
    starts, positions = feeds["starts"], feeds["positions"]
    return len(positions) > 0 and bool(
        (
            positions - np.repeat(positions[np.minimum(starts[:-1], len(positions) - 1)], np.diff(starts))
            == np.arange(len(positions)) - np.repeat(starts[:-1], np.diff(starts))
        ).all()
    )


def own_pages(feeds: Mapping[str, np.ndarray], limits: Ints, page_size: int) -> bool:
    """Whether each page that rows write to in a run, from positions on, is in the table of one row alone, and once."""
    pages, size, positions = feeds["pages"], page_size, feeds["positions"]
    at, ends = np.arange(pages.shape[1]), (positions + limits - 1) // size
    used = pages[at <= ends[:, None]]
    written = pages[(at <= ends[:, None]) & (at >= (positions // size)[:, None])]
    seen, counts = np.unique(used, return_counts=True)
    return bool((counts[np.searchsorted(seen, written)] == 1).all())


def check_shape(value: Value, feeds: Mapping[str, np.ndarray], sizes: dict[str, int]) -> None:
    """A step's input has the size that its value has in the graph; `sizes` takes in what its symbols stand for."""
    array = feeds.get(value.name)
    assert array is not None, f"step input {value} was not given"
    assert array.ndim == len(value.shape), f"step input {value} is {array.shape}"
    for dim, size in zip(value.shape, array.shape, strict=True):  # symbols have the size of who comes first
        expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
        if size != expected:
            raise BackendError(f"step input {value} is {list(array.shape)}, expected {dim} to be {expected}")
