"""Runs of decode steps through the megakernel: a few steps a launch, launch after launch without the host between them.

Puts a model's streams and tables on the device and knows what a launch is given; what it does with pages and requests
is the program's that owns it.  When a launch gives up, because blocks waited too long for each other, the tokens so far
are good and the run goes on by other means.

    mega = Mega(model, weights, device)             # raises Unsuited
    steps = mega.start(run, ring)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.backends import Ahead
from finial.backends.cuda import ring as rings
from finial.backends.cuda.device import Device, Launch, free_all
from finial.backends.cuda.feeds import Ints, bucket
from finial.backends.cuda.kernels import Kernel
from finial.backends.cuda.mega import layout, table
from finial.backends.cuda.mega.check import check
from finial.backends.cuda.mega.layout import MOST_ROWS, STOPS
from finial.backends.cuda.mega.plan import Plan, make_plan
from finial.backends.cuda.mega.shape import Unsuited, recognise
from finial.backends.cuda.mega.stream import Packer
from finial.backends.cuda.model import Model
from finial.backends.cuda.ring import Ring
from finial.backends.cuda.workspace import Workspace
from finial.errors import BackendError
from finial.formats import Tensor

# Steps of a launch, and launches under way: what is thrown away when a run is closed is at most their product, and a
# launch's own cost, some 10 microseconds, is little beside so many steps.
PIECE, UNDER_WAY = 8, 2
# No wait between blocks takes milliseconds; a second means that something is not there.
LIMIT_NS = 1_000_000_000


@dataclass(frozen=True)
class Variant:
    """Which phases of a layer are one; see `table.py`.

    Attributes:
        ordered: every sum has one order, so that the same run gives the same bits.
    """

    fused_mlp: bool = False
    by_head: bool = False

    @property
    def ordered(self) -> bool:
        """See the class."""
        return not (self.fused_mlp or self.by_head)


# By their names in FINIAL_CUDA, in the order in which they are tried.
VARIANTS = {"mega": Variant(), "mega-heads": Variant(True, True), "mega-fused": Variant(fused_mlp=True)}

# (steps done, each row's last token, tokens that each row may still get) -> who does the other steps, None: nobody
GoOn = Callable[[int, list[int], list[int]], Iterator[Ints] | None]


@dataclass(frozen=True)
class Run:
    """What a run is given, in the program's own memory on the device.

    Attributes:
        tokens, positions: int32 [rows], of the first step.
        pages: address of the page table, rows of `page_stride` entries; requests: of sample.cuh's structs.
        steps: of `ahead` that are done at most.
    """

    ahead: Ahead
    tokens: Ints
    positions: Ints
    pages: int
    page_stride: int
    requests: int
    steps: int


class Session:
    """Buffers and the kernel for one bucket of rows over one cache; goes with the object."""

    def __init__(self, mega: Mega, plan: Plan, kernel: Kernel, caches: Mapping[str, int]) -> None:
        device, shape = mega.device, plan.shape
        self.plan, self.kernel, self._device = plan, kernel, device
        self._workspace = Workspace(device)
        keep, d, rows = self._workspace.keep, shape.head_dim, plan.rows
        self._draws = np.zeros((rings.STEPS, rows), np.float64)
        self.addresses = {
            "table": self._put(np.ascontiguousarray(plan.table)),
            "caches": self._put(np.array([caches[layer.cache] for layer in mega.recognised.layers], np.uint64)),
            "state": keep(16 * rows),
            "x0": keep(4 * rows * shape.width),
            "x1": keep(4 * rows * shape.width),
            "qkv": keep(4 * rows * shape.qkv_rows),
            "attn": keep(4 * rows * shape.heads * d),
            "act": keep(4 * rows * shape.ffn),
            "parts": keep(plan.parts_bytes),
            "tickets": keep(4 * plan.items),
            "counters": keep(4 * layout.counters(shape) * layout.COUNTER_STRIDE),
            "candidates": keep(8 * 2 * plan.blocks * rows),
            "logits": keep(4 * rows * shape.vocab if plan.sampled else 0),
            "tokens": keep(4 * 2 * rows),
            "draws": keep(self._draws.nbytes),
            "stops": keep(4 * rows * STOPS),
            "control": keep(32),
        }

    def _put(self, array: NDArray[np.generic]) -> int:
        address = self._workspace.keep(array.nbytes)
        self._device.upload(address, array)
        return address

    def begin(self, run: Run) -> None:
        """The rows of a run; those of the bucket beyond them do nothing."""
        rows, count = self.plan.rows, len(run.tokens)
        state, stops = np.zeros((rows, 4), np.int32), np.full((rows, STOPS), -1, np.int32)
        state[:count, 0], state[:count, 1], state[:count, 2] = run.tokens, run.positions, 1
        state[:count, 3] = run.ahead.limits
        for row, ids in enumerate(run.ahead.stop_ids):
            stops[row, : len(ids)] = sorted(ids)
        self._device.upload(self.addresses["state"], state)
        self._device.upload(self.addresses["stops"], stops)
        if self.plan.sampled:
            steps = len(run.ahead.uniforms)
            self._draws[:steps, :count] = run.ahead.uniforms
            self._device.upload(self.addresses["draws"], self._draws[:steps])

    def launch(self, mega: Mega, run: Run, ring: Ring, epoch: int, first: int, steps: int) -> None:
        """Steps `first`, … of a run whose first one has this epoch."""
        addresses = dict(self.addresses)
        addresses["draws"] += 8 * self.plan.rows * first
        args = self.kernel.pack(
            **mega.addresses,
            **addresses,
            pages=run.pages,
            requests=run.requests,
            ring=ring.address,
            limit_ns=mega.limit_ns,
            steps=steps,
            page_stride=run.page_stride,
            ring_rows=rings.STEPS,
            ring_stride=rings.ROWS,
            epoch=int(np.uint32(epoch + first).view(np.int32)),
        )
        self._device.launch(Launch(self.kernel, (self.plan.blocks, 1, 1), args))

    def error(self) -> tuple[int, int] | None:
        """(block, entry) that waited in vain."""
        control = np.zeros(8, np.uint32)
        self._device.download(self.addresses["control"], control)
        return (int(control[0]) - 1, int(control[2])) if control[0] else None


class Mega:
    """A model's streams on a device, and the sessions' plans.

    Attributes:
        nbytes: of the streams and what goes with them.
        addresses: of what all launches share.

    Args:
        weights: of the graph, by name; needed only here.
    Raises:
        Unsuited: this model or device cannot, with the reason.
    """

    def __init__(
        self,
        model: Model,
        weights: Mapping[str, Tensor],
        device: Device,
        variant: Variant = VARIANTS["mega"],
        *,
        warps: int = 8,
    ) -> None:
        if device.capability < 80:
            raise Unsuited(f"compute capability {device.capability / 10} is below 8.0")
        if device.refuses_waiting:
            raise Unsuited(device.refuses_waiting)
        self.device, self._warps, self.variant, self.limit_ns = device, warps, variant, LIMIT_NS
        self.recognised = recognise(model.graph, model.items, model.formats)
        shape = self.recognised.shape
        # Head groups are worth their while also where the second half of a layer has to stay two phases.
        octets = shape.format != "q8_0" and shape.ffn % layout.ROWS == 0
        self._fused_mlp = variant.fused_mlp and (octets or not variant.by_head)
        self._plans: dict[tuple[int, bool, bool], Plan] = {}
        self._stored: list[int] = []
        self.addresses: dict[str, int] = {}
        weakref.finalize(self, free_all, device, self._stored).atexit = False
        plan = self.plan(1, False)
        self._offsets = plan.offsets()
        self._fits(plan, page_size=32)
        free, _ = device.memory()
        size = int(plan.offsets()[-1])
        if 2 * size > free:
            raise Unsuited(f"its streams take {size:,} bytes more, {free:,} are free for them and the cache")
        self.nbytes = 0
        embed = model.matrix((self.recognised.embed,))
        self.addresses = {
            "embed": embed.data,
            "embed_scales": embed.scales,
            "frequencies": model.vector((self.recognised.frequencies,)),
            "streams": self._keep(size),
            "offsets": self._put(self._offsets),
        }
        packer = Packer(plan, self.recognised, weights)
        for offset, data in packer.pieces():
            device.upload(self.addresses["streams"] + offset, data)
        self.addresses["vectors"] = self._put(packer.vectors())

    def close(self) -> None:
        """Give the streams' memory back now."""
        free_all(self.device, self._stored)

    def _keep(self, nbytes: int) -> int:
        self._stored.append(self.device.allocate(nbytes))
        self.nbytes += nbytes
        return self._stored[-1]

    def _put(self, array: NDArray[np.generic]) -> int:
        address = self._keep(array.nbytes)
        self.device.upload(address, array)
        return address

    def whole_steps(self, rows: int, depth: int) -> int:
        """For how many steps of so many rows, the deepest of which sees `depth` positions in the first one, each block
        attends by itself; 0: attention is split."""
        if not self.variant.by_head:
            return 0
        return max(0, table.whole_positions(self.recognised.shape, bucket(rows)) - depth + 1)

    def plan(self, rows: int, sampled: bool, whole: bool = False) -> Plan:
        """Of a bucket of rows, proven.  Raises Unsuited."""
        if (rows, sampled, whole) not in self._plans:
            made = make_plan(
                self.recognised.shape,
                rows=rows,
                multiprocessors=self.device.multiprocessors,
                shared=self.device.shared_memory,
                sampled=sampled,
                warps=self._warps,
                fused_mlp=self._fused_mlp,
                by_head=self.variant.by_head,
                whole=whole,
            )
            assert not self.addresses or np.array_equal(made.offsets(), self._offsets), "other streams"
            findings = check(made)  # what runs is what was checked
            if findings:
                raise Unsuited(
                    f"its table for this shape and GPU is wrong, which is a mistake of ours: {findings[0].text}"
                )
            self._plans[rows, sampled, whole] = made
        return self._plans[rows, sampled, whole]

    def _fits(self, plan: Plan, page_size: int) -> Kernel:
        """The kernel of a plan, all of whose blocks can be at work at once.  Raises Unsuited."""
        kernel = plan.kernel(page_size, bulk=self.device.capability >= 90)
        resident = self.device.resident(kernel)
        if resident < plan.blocks:
            raise Unsuited(f"{resident} of its {plan.blocks} blocks can be at work at once")
        return kernel

    def session(
        self, rows: int, sampled: bool, caches: Mapping[str, int], page_size: int, *, whole: bool = False
    ) -> Session:
        """For runs of up to so many rows.  Raises Unsuited."""
        plan = self.plan(bucket(rows), sampled, whole)
        return Session(self, plan, self._fits(plan, page_size), caches)


def fits(ahead: Ahead) -> bool:
    """Whether a launch has room for the rows and stop ids of a run."""
    return ahead.uniforms.shape[1] <= MOST_ROWS and max(map(len, ahead.stop_ids), default=0) <= STOPS


def start(mega: Mega, session: Session, run: Run, ring: Ring, go_on: GoOn) -> Generator[Ints, None, None]:
    """See `finial.backends.RunsAhead.ahead`; what the first step needs besides is on the device.

    Args:
        go_on: called when a launch gave up.
    """
    steps = run.steps
    epoch, begun = ring.epochs(steps), 0
    session.begin(run)
    for _ in range(UNDER_WAY):
        begun = _piece(mega, session, run, ring, epoch, begun)
    return _tokens(mega, session, run, ring, epoch, begun, go_on)


def _piece(mega: Mega, session: Session, run: Run, ring: Ring, epoch: int, begun: int) -> int:
    steps = min(PIECE, run.steps - begun)
    if steps > 0:
        session.launch(mega, run, ring, epoch, begun, steps)
    return begun + steps


def _tokens(
    mega: Mega,
    session: Session,
    run: Run,
    ring: Ring,
    epoch: int,
    begun: int,
    go_on: GoOn,
) -> Generator[Ints, None, None]:
    left, rows = run.ahead.limits.tolist(), len(run.tokens)
    last = run.tokens.tolist()
    for step in range(run.steps):
        try:
            tokens = ring.wait(epoch + step, rows)
        except BackendError:
            if session.error() is None:
                raise
            more = go_on(step, last, left)
            if more is not None:
                yield from more
            return
        for row, token in enumerate(tokens.tolist()):
            left[row] = 0 if token < 0 or token in run.ahead.stop_ids[row] else left[row] - 1
            last[row] = token
        # Fewer rows may be another bucket's, which is faster.
        whole = bucket(sum(more > 0 for more in left)) == bucket(rows)
        if whole and step + 1 == begun - PIECE * (UNDER_WAY - 1):
            begun = _piece(mega, session, run, ring, epoch, begun)
        yield tokens
        if not whole:
            return
