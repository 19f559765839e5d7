"""A compiled graph on one device: steps in, outputs back, one recorded list of launches per bucket of rows.

Knows the meaning of a step's integers; nothing of engines and sampling.

    program = CudaProgram(graph, weights, device)
    outputs = program.run(step.feeds(), program.new_state(pages=64, page_size=32))
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.backends import Ahead, Draw
from finial.backends.cuda import ahead as runs
from finial.backends.cuda import kernels, run_feeds
from finial.backends.cuda.device import Device, Launch, free_all
from finial.backends.cuda.feeds import (
    Ints,
    bucket,
    check_sequences,
    check_shape,
    contiguous,
    indices,
    own_pages,
    requests,
)
from finial.backends.cuda.kernels import cache_row_bytes, flash_tokens
from finial.backends.cuda.lower import Lowering
from finial.backends.cuda.mega import program as megakernel
from finial.backends.cuda.mega.shape import Unsuited
from finial.backends.cuda.model import Model
from finial.backends.cuda.ring import Ring
from finial.backends.cuda.ways import Trial, TryOut, Ways
from finial.backends.cuda.workspace import Place, Workspace
from finial.errors import BackendError
from finial.formats import Tensor
from finial.graph import Graph, Node, Value

Shape = tuple[tuple[tuple[str, int], ...], bool]  # buckets by symbol, and whether every sequence has one row

# The most rows of a step in which every sequence has one and attention is fused with what prepares it.
DECODE_ROWS = 64
# Kept free beside caches for what a step of a few thousand rows needs: this, or an eighth of a smaller device.
HEADROOM = 1 << 29
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


class CudaProgram:
    """See `finial.backends.Program`.

    Attributes:
        ways: how runs of steps are decoded, and why.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor], device: Device) -> None:
        self.graph, self.device = graph, device
        self._weight_shapes = {value.name: value.shape for value in graph.of_kind("weight")}
        need = sum(weights[value.name].nbytes for value in graph.of_kind("weight"))
        free, _ = device.memory()
        if need > free:
            raise BackendError(
                f"the weights take {need:,} bytes, {device.name} has {free:,} free",
                fix="choose a smaller weight format (--format q8_0), or another --device",
            )
        self.model = Model(graph, weights, device)
        self._int_values = [value for value in graph.of_kind("input") if value.dtype == "i32"]
        self._float_values = [value for value in graph.of_kind("input") if value.dtype == "f32"]
        self._tables = {node.inputs[5] for node in graph.nodes if node.op == "attention"}
        self._indices = indices(graph)
        self._ring: Ring | None = None
        self._groups = {_group(graph, node) for node in graph.nodes if node.op == "attention"}
        self.ways = Ways(self.model, weights, device)

    @property
    def notes(self) -> list[str]:
        """What a person may want to know of how steps are decoded."""
        return self.ways.notes

    def new_state(self, pages: int, page_size: int) -> CudaState:
        """See `Program.new_state`."""
        self.ways.choose(self._try_out(page_size))  # so that this is known, and said, at load
        sizes = {value.name: _slot_bytes(value) * pages * page_size for value in self.graph.of_kind("state")}
        free, total = self.device.memory()
        need, free = sum(sizes.values()), max(0, free - headroom(total))
        if need > free and self.ways.mega is not None and not self.ways.forced:
            self.ways.give_up(f"the megakernel's {self.ways.mega.nbytes:,} bytes are wanted for the cache", warn=False)
            free = max(0, self.device.memory()[0] - headroom(total))
        if need > free:
            slot = sum(_slot_bytes(value) for value in self.graph.of_kind("state"))
            raise BackendError(
                f"a cache of {pages * page_size:,} positions takes {need:,} bytes, {self.device.name} has {free:,} "
                f"free beside the weights and {headroom(total):,} bytes to work in",
                fix=f"ask for --max-context {free // slot:,} or less",
            )
        state = CudaState(pages, page_size, need, {})
        addresses: list[int] = []
        weakref.finalize(state, free_all, self.device, addresses).atexit = False
        for name, size in sizes.items():
            state.caches[name] = self.device.allocate(size)
            addresses.append(state.caches[name])
        return state

    def run(self, feeds: Mapping[str, np.ndarray], state: CudaState) -> list[np.ndarray]:
        """See `Program.run`."""
        recorded, sizes = self._prepare(feeds, state)
        self.device.replay(recorded.recording)
        return [self._fetch(name, recorded, sizes, feeds) for name in self.graph.outputs]

    def sample(self, feeds: Mapping[str, np.ndarray], state: CudaState, draws: Sequence[Draw]) -> Ints | None:
        """One step, and the token chosen for each row of the graph's first output; the logits stay on the device.

        Returns:
            int32 [R]; -1 where the highest logit is not finite.  None: this output is no logits of rows R.
        """
        value = self.graph.values[self.graph.outputs[0]]
        if value.shape[0] != "R" or value.kind == "input":
            return None
        assert len(draws) == len(feeds["wanted"])
        recorded, sizes = self._prepare(feeds, state, draws)
        if sizes["R"] == 0:
            self.device.replay(recorded.recording)
            return np.zeros(0, np.int32)
        if recorded.sampling is None:
            recorded.sampling = self._record_sampling(recorded, value)
        recording, address = recorded.sampling
        self.device.replay(recording)
        tokens = np.empty(sizes["R"], np.int32)
        self.device.download(address, tokens)
        return tokens

    def _record_sampling(self, recorded: Recorded, logits: Value) -> tuple[Any, int]:
        place, rows = recorded.places[logits.name], recorded.offsets["requests"][1] // 4
        tokens = recorded.workspace.keep(4 * rows)
        kernel = kernels.sample(int(logits.shape[1]))
        args = kernel.pack(
            logits=place.address,
            requests=recorded.block + 4 * recorded.offsets["requests"][0],
            draws=recorded.block + 4 * recorded.offsets["draws"][0],
            tokens=tokens,
            vocab=int(logits.shape[1]),
            stride=place.stride,
        )
        return self.device.record([*recorded.launches, Launch(kernel, (rows, 1, 1), args)]), tokens

    def ahead(
        self, feeds: Mapping[str, np.ndarray], state: CudaState, ahead: Ahead
    ) -> Generator[Ints, None, None] | None:
        """See `finial.backends.RunsAhead.ahead`.

        None beside what is said there: more rows, steps or stop ids of a row than `ahead.fits` knows room for, or a
        page that a row will write to is in another row's table.
        """
        value = self.graph.values[self.graph.outputs[0]]
        if value.shape[0] != "R" or value.kind == "input" or not self._tables or not runs.fits(ahead):
            return None
        rows = ahead.uniforms.shape[1]
        if not (
            np.array_equal(feeds["wanted"], np.arange(rows))
            and len(feeds.get("pooled", ())) == 0
            and np.array_equal(feeds["lengths"], feeds["positions"] + 1)
            and own_pages(feeds, ahead.limits, state.page_size)
        ):
            return None
        return self._start(feeds, state, ahead, self.ways.mega_runs(rows, self._try_out(state.page_size)))

    def _start(
        self, feeds: Mapping[str, np.ndarray], state: CudaState, ahead: Ahead, by_mega: bool
    ) -> Generator[Ints, None, None]:
        recorded, _ = self._prepare(feeds, state, ahead.draws, feeds["lengths"] + ahead.limits - 1)
        if self._ring is None:
            self._ring = Ring(self.device)
        if by_mega and megakernel.fits(ahead):
            started = self._start_mega(feeds, state, ahead, recorded, self._ring)
            if started is not None:
                return started
        if recorded.ahead is None:
            value = self.graph.values[self.graph.outputs[0]]
            recorded.ahead = self._record_ahead(recorded, state, value, self._ring)
        recording, block = recorded.ahead
        epoch = self._ring.epochs(len(ahead.uniforms))
        block.upload(self.device, ahead, epoch)
        return runs.run(self.device, self._ring, recording, ahead, epoch)

    def _start_mega(
        self, feeds: Mapping[str, np.ndarray], state: CudaState, ahead: Ahead, recorded: Recorded, ring: Ring
    ) -> Generator[Ints, None, None] | None:
        """A run by the megakernel; None: it has no kernel for so many rows."""
        mega = self.ways.mega
        assert mega is not None
        size, drawn = bucket(len(feeds["tokens"])), any(draw.temperature != 0 for draw in ahead.draws)
        steps, depth = len(ahead.uniforms), int(feeds["positions"].max()) + 1
        alone = mega.whole_steps(size, depth)
        whole = alone >= min(steps, megakernel.PIECE)
        if (size, drawn, whole) not in state.sessions:
            try:
                made = mega.session(size, drawn, state.caches, state.page_size, whole=whole)
                state.sessions[size, drawn, whole] = made
            except Unsuited as reason:
                if not self.ways.forced:
                    self.ways.give_up(str(reason))
                return None
        session = state.sessions[size, drawn, whole]
        given = {name: np.array(array) for name, array in feeds.items()}  # for later, if need be
        run = megakernel.Run(
            ahead,
            given[mega.recognised.tokens],
            given[mega.recognised.positions],
            recorded.pages,
            recorded.page_stride,
            recorded.block + 4 * recorded.offsets["requests"][0],
            min(steps, alone) if whole else steps,  # the rest is another run's
        )

        def go_on(done: int, last: list[int], left: list[int]) -> Generator[Ints, None, None] | None:
            where = session.error()
            self.ways.give_up(f"block {where[0]} of the megakernel waited in vain at entry {where[1]}" if where else "")
            return self._go_on(given, state, ahead, done, last, left)

        return megakernel.start(mega, session, run, ring, go_on)

    def _go_on(
        self, feeds: dict[str, np.ndarray], state: CudaState, ahead: Ahead, done: int, last: list[int], left: list[int]
    ) -> Generator[Ints, None, None] | None:
        """The rest of a run of which so many steps are done, by graph; None: nobody is left."""
        rows, rest, less = run_feeds.rest(feeds, ahead, done=done, last=last, left=left, page_size=state.page_size)
        return run_feeds.spread(self._start(rest, state, less, False), rows, len(left)) if len(rows) else None

    def _try_out(self, page_size: int) -> TryOut:
        """Steps of so many rows over a cache of their own, by one of the two ways; the first time compiles."""

        def run(rows: int, by_mega: bool) -> Trial:
            vocab = int(self.graph.values[self.graph.outputs[0]].shape[1])
            feeds, ahead = run_feeds.trial(rows, page_size, vocab, steps=run_feeds.TRIAL_STEPS)
            state = self.new_state(feeds["pages"].size, page_size)
            for _ in range(2):
                started = time.perf_counter()
                tokens = np.array(list(self._start(feeds, state, ahead, by_mega)))
                seconds = time.perf_counter() - started
            return Trial(seconds / len(tokens), tokens)

        return run

    def _record_ahead(
        self, recorded: Recorded, state: CudaState, logits: Value, ring: Ring
    ) -> tuple[Any, runs.AheadBlock]:
        place, ints = recorded.places[logits.name], recorded.offsets
        block = runs.AheadBlock(recorded.workspace, ints["sequence"][1])
        launch = block.launch(
            int(logits.shape[1]),
            state.page_size,
            ring=ring.address,
            logits=place.address,
            stride=place.stride,
            pages=recorded.pages,
            page_stride=recorded.page_stride,
            **{
                name: recorded.block + 4 * ints[name][0]
                for name in ("requests", "tokens", "positions", "slots", "sequence")
            },
        )
        return self.device.record([*recorded.launches, launch]), block

    def _fetch(
        self, name: str, recorded: Recorded, sizes: dict[str, int], feeds: Mapping[str, np.ndarray]
    ) -> NDArray[np.float32]:
        value = self.graph.values[name]
        if value.kind == "input":
            return np.array(feeds[name])
        rows, width = _size(value, sizes), int(value.shape[1])
        if rows == 0:
            return np.empty((0, width), np.float32)
        place = recorded.places[name]
        out = np.empty((rows, place.stride), np.float32)
        self.device.download(place.address, out)
        return out if place.stride == width else np.ascontiguousarray(out[:, :width])

    # --- steps --------------------------------------------------------------------------------------------------------

    def _prepare(
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
        if self._tables:
            check_sequences(feeds, sizes)
        shape = self._shape(feeds, sizes, state)
        recorded = state.recorded.get(shape)
        width = max([int(feeds[name].shape[1]) for name in self._tables], default=0)
        if recorded is None or width > recorded.page_stride:
            recorded = self._record(shape, state, width)
        self._upload(recorded, feeds, sizes, state, draws)
        for name in self._tables:
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
        if not self._tables or "slots" not in feeds or rows != sizes.get("B") or not 1 <= rows <= DECODE_ROWS:
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
            if value.name not in self._tables and value.shape[0] in buckets:
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
        ints = {name: block + 4 * first for name, (first, _) in offsets.items()} | dict.fromkeys(self._tables, pages)
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


def headroom(total: int) -> int:
    """Bytes to leave free on a device that has `total`."""
    return min(HEADROOM, total // 8)


def _group(graph: Graph, node: Node) -> int:
    """Query heads of each key/value head."""
    heads, head_dim = graph.state_of(node.inputs[1]).shape[2:]
    return int(graph.values[node.outputs[0]].shape[1]) // (int(heads) * int(head_dim))


def _slot_bytes(state: Value) -> int:
    heads, head_dim = int(state.shape[2]), int(state.shape[3])
    return 2 * heads * cache_row_bytes(state.dtype, head_dim)


def _size(value: Value, sizes: dict[str, int]) -> int:
    rows = value.shape[0]
    return rows if isinstance(rows, int) else sizes[rows]
