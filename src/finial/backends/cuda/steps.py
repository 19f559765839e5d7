"""The recorded launches of a step: one list per bucket of rows, and a step's integers where its launches read them.

Knows the meaning of a step's integers; nothing of what a program does with outputs, tokens and runs of steps.

    steps = Steps(graph, model, device)
    recorded, sizes = steps.prepare(step.feeds(), state)
    device.replay(recorded.recording)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from finial.backends import Draw
from finial.backends.cuda import ahead as runs
from finial.backends.cuda.device import Device, Launch
from finial.backends.cuda.feeds import Ints, bucket, check_sequences, check_shape, contiguous, indices, requests
from finial.backends.cuda.kernels import flash_tokens
from finial.backends.cuda.lower import Lowering
from finial.backends.cuda.mega import program as megakernel
from finial.backends.cuda.model import Model
from finial.backends.cuda.workspace import Place, Workspace
from finial.errors import BackendError
from finial.graph import Graph, Node

Shape = tuple[tuple[tuple[str, int], ...], bool]  # buckets by symbol, and whether every sequence has one row

# The most rows of a step in which every sequence has one and attention is fused with what prepares it.
DECODE_ROWS = 64
_FILL = {"slots": -1, "sequence": -1}


@dataclass
class Recorded:
    """Launches for one shape of step, and where its inputs and outputs lie."""

    recording: Any
    workspace: Workspace
    block: int  # address of `ints`
    ints: Ints
    offsets: dict[str, tuple[int, int]]  # of each int32 input in the block: first, entries
    places: dict[str, Place]
    pages: int  # address of the page table
    page_stride: int
    table: Ints  # the page table as uploaded last
    used: Ints  # how many entries of each row were in use then
    launches: list[Launch]
    sampling: tuple[Any, int] | None = None  # the same with the choice of tokens, and where those lie
    ahead: tuple[Any, runs.AheadBlock] | None = None  # the same with what leads to the next step of a run


@dataclass(eq=False)
class CudaState:
    """Caches on the device, and the launches recorded for them."""

    pages: int
    page_size: int
    nbytes: int
    caches: dict[str, int]
    recorded: dict[Shape, Recorded] = field(default_factory=dict)
    # By bucket of rows, whether tokens are drawn, whether blocks attend by themselves.
    sessions: dict[tuple[int, bool, bool], megakernel.Session] = field(default_factory=dict)


class Steps:
    """See the module.

    Attributes:
        tables: names of the inputs that are page tables.
    """

    def __init__(self, graph: Graph, model: Model, device: Device) -> None:
        self.graph, self.model, self.device = graph, model, device
        self._int_values = [value for value in graph.of_kind("input") if value.dtype == "i32"]
        self._float_values = [value for value in graph.of_kind("input") if value.dtype == "f32"]
        self.tables = {node.inputs[5] for node in graph.nodes if node.op == "attention"}
        self._indices = indices(graph)
        self._groups = {_group(graph, node) for node in graph.nodes if node.op == "attention"}

    def prepare(
        self,
        feeds: Mapping[str, np.ndarray],
        state: CudaState,
        draws: Sequence[Draw] = (),
        lengths: Ints | None = None,
    ) -> tuple[Recorded, dict[str, int]]:
        """The launches for a step, and its inputs on the device.

        Args:
            lengths: positions that the page tables must have, when that is more than feeds' lengths.
        """
        sizes: dict[str, int] = {}
        for value in (*self._int_values, *self._float_values):
            check_shape(value, feeds, sizes)
        for which, limit, node in self._indices:
            array, most = feeds[which], self._limit(limit, sizes, state)
            if array.size and not (int(array.min()) >= 0 and int(array.max()) < most):
                bad = array[(array < 0) | (array >= most)].flat[0]
                raise BackendError(f"step input {which} of {node.op} holds {bad}, expected 0 to {most - 1}")
        if self.tables:
            check_sequences(feeds, sizes)
        shape = self._shape(feeds, sizes, state)
        recorded = state.recorded.get(shape)
        width = max([int(feeds[name].shape[1]) for name in self.tables], default=0)
        if recorded is None or width > recorded.page_stride:
            recorded = self._record(shape, state, width)
        self._upload(recorded, feeds, sizes, state, draws)
        for name in self.tables:
            self._upload_table(recorded, feeds[name], feeds["lengths"] if lengths is None else lengths, state)
        return recorded, sizes

    def _limit(self, limit: str | int, sizes: dict[str, int], state: CudaState) -> int:
        if limit == "slots":
            return state.pages * state.page_size
        return limit if isinstance(limit, int) else sizes[limit]

    def _shape(self, feeds: Mapping[str, np.ndarray], sizes: dict[str, int], state: CudaState) -> Shape:
        symbols = {v.shape[0] for v in self.graph.values.values() if v.kind != "state" and isinstance(v.shape[0], str)}
        rows = {str(s): bucket(sizes.get(str(s), 0)) for s in sorted(map(str, symbols - {"B", "B1"}))}
        decode = self._is_decode(feeds, sizes, state)
        tensor_cores = self.device.capability >= 80 and not self.model.exact
        if not decode and len(self._groups) == 1 and tensor_cores and contiguous(feeds):
            rows["tiles"] = bucket(len(self._tiles(feeds)))
        return tuple(rows.items()), decode

    def _tiles(self, feeds: Mapping[str, np.ndarray]) -> Ints:
        """Tiles of attention over many rows: (sequence, first row, rows, position of the first), shallow ones first."""
        (group,) = self._groups
        most, tiles = flash_tokens(group), []
        for sequence, (start, stop) in enumerate(pairwise(feeds["starts"].tolist())):
            first = int(feeds["positions"][start]) if stop > start else 0
            tiles += [(sequence, t, min(most, stop - t), first + t - start) for t in range(start, stop, most)]
        tiles.sort(key=lambda tile: tile[3])
        return np.array(tiles, np.int32).reshape(-1, 4)

    def _is_decode(self, feeds: Mapping[str, np.ndarray], sizes: dict[str, int], state: CudaState) -> bool:
        """Every sequence has one row, and no row is written to a page that another sequence reads in this step."""
        rows = sizes.get("T", 0)
        if not self.tables or "slots" not in feeds or rows != sizes.get("B") or not 1 <= rows <= DECODE_ROWS:
            return False
        if rows == 1:
            return True
        if not np.array_equal(feeds["starts"], np.arange(rows + 1)):
            return False
        # Only a page that this step fills may be in another sequence's table already.
        slots, size = feeds["slots"], state.page_size
        filled = slots[(slots + 1) % size == 0] // size
        return all(int(np.count_nonzero(feeds["pages"] == page)) == 1 for page in filled)

    def _record(self, shape: Shape, state: CudaState, width: int) -> Recorded:
        buckets, decode = dict(shape[0]), shape[1]
        state.recorded.pop(shape, None)
        workspace = Workspace(self.device)
        offsets: dict[str, tuple[int, int]] = {}
        at = 0
        for value in self._int_values:
            if value.name not in self.tables and value.shape[0] in buckets:
                offsets[value.name] = (at, buckets[str(value.shape[0])])
                at += -(-offsets[value.name][1] // 4) * 4
        rows = buckets.get("R", 0)
        own = {
            "sequence": buckets.get("T", 0),
            "tiles": 4 * buckets.get("tiles", 0),
            "requests": 4 * rows,
            "draws": 2 * rows,
        }
        for name, entries in own.items():
            offsets[name] = (at, entries)
            at += -(-entries // 4) * 4
        block = workspace.keep(at * 4)
        rows, stride = max(1, buckets.get("T", 1)), max(64, 1 << (max(width, 1) - 1).bit_length())
        rows = min(rows, 1024)  # more sequences than that do not share a step
        pages = workspace.keep(rows * stride * 4)
        ints = {name: block + 4 * first for name, (first, _) in offsets.items()} | dict.fromkeys(self.tables, pages)
        lowering = Lowering(
            self.model,
            workspace,
            caches=state.caches,
            ints=ints,
            page_size=state.page_size,
            page_stride=stride,
            rows=buckets,
            decode=decode,
        )
        recorded = Recorded(
            self.device.record(lowering.launches),
            workspace,
            block,
            np.zeros(at, np.int32),
            offsets,
            lowering.places,
            pages,
            stride,
            np.zeros((0, 0), np.int32),
            np.zeros(0, np.int32),
            lowering.launches,
        )
        state.recorded[shape] = recorded
        return recorded

    def _upload(
        self,
        recorded: Recorded,
        feeds: Mapping[str, np.ndarray],
        sizes: dict[str, int],
        state: CudaState,
        draws: Sequence[Draw],
    ) -> None:
        ints, (options, numbers) = recorded.ints, requests(draws)
        for name, (first, entries) in recorded.offsets.items():
            if name == "sequence":
                if "starts" not in feeds:
                    continue
                array = np.repeat(np.arange(sizes["B"], dtype=np.int32), np.diff(feeds["starts"]))
            elif name == "tiles":
                if not entries:
                    continue
                array = self._tiles(feeds).reshape(-1)
            elif name == "requests":
                array = options
            elif name == "draws":
                array = numbers
            else:
                array = feeds[name]
            ints[first : first + len(array)] = array
            ints[first + len(array) : first + entries] = _FILL.get(name, 0)
        self.device.upload(recorded.block, ints)
        for value in self._float_values:
            place, array = recorded.places[value.name], feeds[value.name]
            self.device.upload(place.address, np.ascontiguousarray(array, np.float32))

    def _upload_table(self, recorded: Recorded, pages: Ints, lengths: Ints, state: CudaState) -> None:
        used = -(-lengths // state.page_size)  # pages of each sequence
        if used.max(initial=0) > pages.shape[1]:
            raise BackendError(f"step input pages has {pages.shape[1]} pages a sequence, lengths needs {used.max()}")
        if np.array_equal(recorded.table, pages) and np.array_equal(recorded.used, used):
            return
        needed = np.arange(pages.shape[1]) < used[:, None]
        bad = needed & ((pages < 0) | (pages >= state.pages))
        if bad.any():
            raise BackendError(f"step input pages holds {pages[bad][0]}, expected 0 to {state.pages - 1}")
        if len(pages) == 1:
            self.device.upload(recorded.pages, np.ascontiguousarray(pages[0]))
        else:
            table = np.zeros((len(pages), recorded.page_stride), np.int32)
            table[:, : pages.shape[1]] = pages
            self.device.upload(recorded.pages, table)
        recorded.table, recorded.used = pages.copy(), used


def _group(graph: Graph, node: Node) -> int:
    """Query heads of each key/value head."""
    heads, head_dim = graph.state_of(node.inputs[1]).shape[2:]
    return int(graph.values[node.outputs[0]].shape[1]) // (int(heads) * int(head_dim))
