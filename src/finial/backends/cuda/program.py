"""A compiled graph on one device: steps in, outputs or tokens back, runs of steps without the host between them.

Knows which way runs are decoded and hands them on; nothing of engines and sampling.

    program = CudaProgram(graph, weights, device)
    outputs = program.run(step.feeds(), program.new_state(pages=64, page_size=32))
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.backends import Ahead, Draw
from finial.backends.cuda import ahead as runs
from finial.backends.cuda import kernels, run_feeds
from finial.backends.cuda.device import Device, Launch, free_all
from finial.backends.cuda.feeds import Ints, bucket, own_pages
from finial.backends.cuda.kernels import cache_row_bytes
from finial.backends.cuda.mega import program as megakernel
from finial.backends.cuda.mega.shape import Unsuited
from finial.backends.cuda.model import Model
from finial.backends.cuda.ring import Ring
from finial.backends.cuda.steps import CudaState, Recorded, Steps
from finial.backends.cuda.ways import Trial, TryOut, Ways
from finial.errors import BackendError
from finial.formats import Tensor
from finial.graph import Graph, Value

# Kept free beside caches for what a step of a few thousand rows needs: this, or an eighth of a smaller device.
HEADROOM = 1 << 29


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
        self.steps = Steps(graph, self.model, device)
        self._ring: Ring | None = None
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
        recorded, sizes = self.steps.prepare(feeds, state)
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
        recorded, sizes = self.steps.prepare(feeds, state, draws)
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
        if value.shape[0] != "R" or value.kind == "input" or not self.steps.tables or not runs.fits(ahead):
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
        recorded, _ = self.steps.prepare(feeds, state, ahead.draws, feeds["lengths"] + ahead.limits - 1)
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


def headroom(total: int) -> int:
    """Bytes to leave free on a device that has `total`."""
    return min(HEADROOM, total // 8)


def _slot_bytes(state: Value) -> int:
    heads, head_dim = int(state.shape[2]), int(state.shape[3])
    return 2 * heads * cache_row_bytes(state.dtype, head_dim)


def _size(value: Value, sizes: dict[str, int]) -> int:
    rows = value.shape[0]
    return rows if isinstance(rows, int) else sizes[rows]
