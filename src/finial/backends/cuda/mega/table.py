"""The phase table: which block computes which rows, what it waits for, what it signals; what shared memory holds.

Knows shapes and layouts; nothing of graphs, weights and devices.

    plan = make_plan(shape, rows=1, multiprocessors=132, shared=227 << 10)
    plan.table[block]; kernel(plan, page_size=32)

A step is a list of phases, each shared out over the blocks: for every layer QKV, ATTEND, OUTPUT, GATE_UP and DOWN,
then HEAD, SAMPLE where tokens are drawn, and TOKEN.  Products go by row groups of 8 weight rows, in the order of
`layout.row_order`.  With `fused_mlp` a block's rows of gate·up make neurons that nobody else sees (MLP_UP), and it adds
their part of down to everybody's rows (MLP_DOWN): one wait less a layer, and sums in the order of arrival.

Where x of eight rows of down is too wide for a block, down comes in parts of its columns, one entry after another, of
which each adds to the one before; x is staged whole where that fits, else part by part.

With `by_head` the product after attention is shared out by head groups: a team of blocks has a group's columns, each
block some of the rows, which it adds to everybody's residual (GROUP_OUTPUT).  With `whole` each block of a team attends
for the group by itself (GROUP_ATTEND), all positions of all rows: one wait less again, for as long as positions are
few; else attention is split as ever.  The streams are the same, so that a run may go from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda import kernels
from finial.backends.cuda.kernels import Kernel, heads_at_once
from finial.backends.cuda.mega.layout import (
    ATTEND,
    ATTENDS,
    ATTENDS_AND_KEEPS,
    COUNT,
    DOWN,
    END,
    ENTRY,
    FIRST,
    GATE_UP,
    GROUP_ATTEND,
    GROUP_OUTPUT,
    HEAD,
    KIND,
    MLP_DOWN,
    MLP_UP,
    MOST_ROWS,
    MOST_SPLITS,
    NAMES,
    NOTHING,
    OUTPUT,
    PRODUCTS,
    QKV,
    ROWS,
    SAMPLE,
    STAGES,
    TARGET,
    TOKEN,
    UNIT_BYTES,
    UNIT_K,
    WAIT,
    Numbers,
    counter,
    counters,
    down_columns,
    down_groups,
    groups_of,
    head_columns,
    head_groups,
    head_output_units,
    k_units,
    octet_bytes,
    parts_of,
)
from finial.backends.cuda.mega.room import (
    LEAST_STAGES,
    RESERVED_SHARED,
    STAGE_BYTES,
    SharedLayout,
    most_k_of,
    parts_of_down,
    shared_layout,
    terms_of,
)
from finial.backends.cuda.mega.shape import MegaShape, Unsuited

# What a block reads of keys and values at most where it attends by itself: about what a split of at least 128 positions
# reads and the wait that this saves takes to read, at 40 GB/s a multiprocessor from L2 (reckoned, not measured).
WHOLE_BYTES = 128 << 10


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """A table and what goes with it.

    Attributes:
        rows: sequences of a step, B.
        blocks: of the launch; warps: that compute, in each.
        terms: bf16 terms of a value of x.
        stage_units, stages: of the ring.
        most_groups: row groups whose sums go through shared memory at once.
        splits: of each attention item; heads: query heads of an item; parts: items of a key/value head and row.
        own: neurons that a block keeps for itself at most; 0 where gate·up and down are two phases.
        by_head, whole: see the module.
        down_parts: of its columns, the same for all plans of a model and device; down_whole: x is staged once for all.
        sampled: tokens are drawn; otherwise the highest logit is taken where it is made.
        table: int32 [blocks, entries, 8], ended by END.
        arrivals: int32 [counters], of a step.
    """

    shape: MegaShape
    rows: int
    blocks: int
    warps: int
    terms: int
    stage_units: int
    stages: int
    most_groups: int
    splits: int
    heads: int
    parts: int
    own: int
    by_head: bool
    whole: bool
    down_parts: int
    down_whole: bool
    sampled: bool
    table: NDArray[np.int32]
    arrivals: NDArray[np.int32]
    shared: SharedLayout

    @property
    def items(self) -> int:
        """Of attention: row, then key/value head, then part of its group; none where blocks attend by themselves."""
        return 0 if self.whole else self.rows * self.shape.kv_heads * self.parts

    @property
    def parts_bytes(self) -> int:
        """Of what splits leave for who merges them, or of each block's copy of a new key and value."""
        d = self.shape.head_dim
        if self.whole:
            return self.blocks * 2 * kernels.cache_row_bytes(self.shape.cache, d)
        return 4 * self.items * self.splits * self.heads * (d + 2)

    @property
    def entries(self) -> int:
        """Of a block, END among them."""
        return int(self.table.shape[1])

    def units(self) -> NDArray[np.int64]:
        """Units of each entry, [blocks, entries]; 0 where it streams nothing, or octets (MLP_DOWN)."""
        return _units(self.shape, self.table, self.down_parts)

    def entry_bytes(self) -> NDArray[np.int64]:
        """Of each entry in its block's stream, [blocks, entries]."""
        nbytes: NDArray[np.int64] = self.units() * UNIT_BYTES[self.shape.format]
        down = self.table[:, :, KIND] == MLP_DOWN
        nbytes[down] = self.table[down][:, COUNT] * down_groups(self.shape) * octet_bytes(self.shape)
        return nbytes

    def stream_bytes(self) -> NDArray[np.int64]:
        """Of each block, for a step."""
        nbytes: NDArray[np.int64] = self.entry_bytes().sum(axis=1)
        return nbytes

    def offsets(self) -> NDArray[np.uint64]:
        """Where each block's stream begins, from the first one's; the last is the size of all."""
        sizes = -(-self.stream_bytes() // 128) * 128
        ends: NDArray[np.uint64] = np.cumsum(np.append(0, sizes)).astype(np.uint64)
        return ends


def make_plan(
    shape: MegaShape,
    *,
    rows: int,
    multiprocessors: int,
    shared: int,
    sampled: bool = False,
    warps: int = 8,
    stage_bytes: int = STAGE_BYTES,
    fused_mlp: bool = False,
    by_head: bool = False,
    whole: bool = False,
    down_parts: int = 0,
) -> Plan:
    """The table for a device, one block a multiprocessor.

    Args:
        rows: sequences of a step, 1 to 8.
        shared: bytes of shared memory that a block may have.
        fused_mlp: see the module; not for q8_0, whose blocks lie along the neurons.
        by_head, whole: see the module; `whole` only with `by_head`.
        down_parts: 0: as many as the device wants, see the module.
    Raises:
        Unsuited: it does not fit; says what.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise Unsuited(f"{rows} sequences in a step: at most {MOST_ROWS}")
    if fused_mlp and (shape.format == "q8_0" or shape.ffn % ROWS):
        raise Unsuited(f"gate·up and down in one phase want whole octets of neurons in bf16 or fp8, not {shape.format}")
    if by_head and shape.format == "q8_0" and (head_columns(shape, np.arange(head_groups(shape)))[1] % 32).any():
        raise Unsuited(f"blocks of 32 of q8_0 lie across the head groups of {shape.head_dim} values a head")
    assert by_head or not whole
    blocks = min(multiprocessors, groups_of(shape, HEAD))  # every block has rows of the head: see check.py
    heads, parts = heads_at_once(shape.cache, shape.group), parts_of(shape)
    splits = 1 if whole else split_count(rows * shape.kv_heads * parts, blocks)
    down_parts = 1 if fused_mlp else down_parts or parts_of_down(shape, by_head, shared)
    down_whole = True
    builder = _Builder(shape, blocks, rows, parts, splits, sampled, fused_mlp, by_head, whole, down_parts)
    table, arrivals = builder.build(), builder.arrivals
    products = np.isin(table[:, :, KIND], (*PRODUCTS, MLP_UP, GROUP_OUTPUT))
    octets = int(np.max(table[:, :, COUNT][table[:, :, KIND] == MLP_DOWN], initial=0))
    most_groups = min(8, int(table[:, :, COUNT][products].max()))
    terms, unit, wanted = terms_of(rows), UNIT_BYTES[shape.format], stage_bytes
    room = shared - RESERVED_SHARED
    while True:
        most_k = most_k_of(shape, octets, by_head, 1 if down_whole else down_parts)
        layout = shared_layout(
            shape, rows, terms, warps, most_groups, heads, octets * ROWS, most_k, whole, table.shape[1]
        )
        stage_units = max(warps, stage_bytes // unit // warps * warps)
        stages = (room - layout.total) // (stage_units * unit)
        if stages >= LEAST_STAGES:
            break
        if stage_bytes > STAGE_BYTES // 2 and stage_units > warps:
            stage_bytes //= 2
        elif down_whole and down_parts > 1:
            down_whole, stage_bytes = False, wanted
        elif stage_bytes > STAGE_BYTES // 4 and stage_units > warps:
            stage_bytes //= 2
        elif most_groups > 1:
            most_groups //= 2
        elif terms > 2:
            terms -= 1
        else:
            raise Unsuited(
                f"{rows} rows of {most_k:,} values take {layout.total:,} of {max(room, 0):,} bytes of a "
                f"block's shared memory, which leaves no room for weights"
            )
    stages = min(stages, 32)
    layout = SharedLayout(**{**layout.__dict__, "ring": stages * stage_units * unit})
    units = _units(shape, table, down_parts)
    table[:, :, STAGES] = -(-units // stage_units)
    down = table[:, :, KIND] == MLP_DOWN
    if octets:  # stages of whole row groups, as many for each warp
        at_once = stage_units * unit // (table[down][:, COUNT] * octet_bytes(shape)) // warps * warps
        if at_once.min() < warps:
            raise Unsuited(
                f"{octets * ROWS} neurons of a block in one phase: a stage has no room for {warps} row groups"
            )
        table[down, STAGES] = -(-down_groups(shape) // at_once)
    waits = table[:, :, WAIT]
    table[:, :, TARGET] = np.where(waits >= 0, arrivals[waits], 0)
    attention, rest = (splits, heads, parts), (octets * ROWS, by_head, whole, down_parts, down_whole, sampled)
    ring = (terms, stage_units, stages, most_groups)
    return Plan(shape, rows, blocks, warps, *ring, *attention, *rest, table, arrivals, layout)


def _units(shape: MegaShape, table: NDArray[np.int32], down_parts: int) -> NDArray[np.int64]:
    per_group = np.zeros(len(NAMES) + 1, np.int64)  # the last is END's
    for kind in PRODUCTS:
        per_group[kind] = k_units(shape, kind)
    per_group[MLP_UP] = k_units(shape, GATE_UP)
    units: NDArray[np.int64] = per_group[table[:, :, KIND]] * table[:, :, COUNT]
    mine = table[:, :, KIND] == GROUP_OUTPUT
    units[mine] = head_output_units(shape, table[mine][:, FIRST]) * table[mine][:, COUNT]
    mine = table[:, :, KIND] == DOWN
    _, columns = down_columns(shape, table[mine][:, FIRST] // down_groups(shape), down_parts)
    units[mine] = -(-columns // UNIT_K) * table[mine][:, COUNT]
    return units


def whole_positions(shape: MegaShape, rows: int) -> int:
    """How many positions of each row blocks attend to by themselves at most: `WHOLE_BYTES` of keys and values."""
    most = WHOLE_BYTES // (rows * 2 * kernels.cache_row_bytes(shape.cache, shape.head_dim))
    return 1 << 30 if shape.window is not None and shape.window <= most else most


def split_count(items: int, blocks: int) -> int:
    """Into how many stretches of positions each attention item is cut: the busiest block shall have the least to do.

    An entry costs about as much as a fiftieth of an item of typical depth, whatever its stretch.
    """
    return min(range(1, MOST_SPLITS + 1), key=lambda splits: -(-items * splits // blocks) * (1 / splits + 0.02))


class _Builder:
    """Entries phase by phase; weights are shared out so that streams are of equal length too."""

    def __init__(
        self,
        shape: MegaShape,
        blocks: int,
        rows: int,
        parts: int,
        splits: int,
        sampled: bool,
        fused_mlp: bool,
        by_head: bool,
        whole: bool,
        down_parts: int,
    ) -> None:
        self._shape, self._blocks, self._rows, self._fused_mlp = shape, blocks, rows, fused_mlp
        self._by_head, self._whole, self._down_parts = by_head, whole, down_parts
        self._parts, self._splits, self._sampled = parts, splits, sampled
        self._load = np.zeros(blocks, np.int64)  # units
        self._chunks: list[NDArray[np.int32]] = []  # of entries, each with its block before it
        self.arrivals = np.zeros(counters(shape), np.int32)

    def build(self) -> NDArray[np.int32]:
        """int32 [blocks, entries, 8], ended by END; targets and stages are not there yet."""
        shape = self._shape
        before = NOTHING
        for layer in range(shape.layers):
            self._product(QKV, layer, before)
            if not self._whole:
                self._attention(layer)
            if self._by_head:
                self._head_groups(layer)
            else:
                self._product(OUTPUT, layer, counter(shape, ATTEND, layer))
            if self._fused_mlp:
                self._mlp(layer)
            else:
                self._product(GATE_UP, layer, counter(shape, OUTPUT, layer))
                self._product(DOWN, layer, counter(shape, GATE_UP, layer))
            before = counter(shape, DOWN, layer)
        self._product(HEAD, 0, before)
        last = counter(shape, HEAD)
        if self._sampled:
            rows = np.arange(self._rows)
            self._add(self._least_loaded()[rows % self._blocks], SAMPLE, 0, rows, 1, last, counter(shape, SAMPLE))
            last = counter(shape, SAMPLE)
        self._add(np.arange(self._blocks), TOKEN, 0, 0, 0, last, NOTHING)
        return self._table()

    def _table(self) -> NDArray[np.int32]:
        entries = np.concatenate(self._chunks)
        entries = entries[np.argsort(entries[:, 0], kind="stable")]
        block = entries[:, 0]
        lengths = np.bincount(block, minlength=self._blocks)
        at = np.arange(len(block)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        table = np.zeros((self._blocks, int(lengths.max()) + 1, ENTRY), np.int32)
        table[:, :, KIND] = END
        table[block, at] = entries[:, 1:]
        return table

    def _least_loaded(self) -> NDArray[np.int64]:
        return np.argsort(self._load, kind="stable")

    def _add(
        self, block: Numbers, kind: int, layer: int, first: Numbers, count: Numbers, wait: Numbers, signal: Numbers
    ) -> None:
        columns = np.broadcast_arrays(block, kind, layer, first, count, wait, 0, signal, 0)
        self._chunks.append(np.stack(columns, axis=1).astype(np.int32))
        if kind == ATTEND:  # who merges an item signals
            self.arrivals[signal] = self._rows * self._shape.kv_heads * self._parts
        else:
            np.add.at(self.arrivals, columns[7][columns[7] >= 0], 1)

    def _product(self, kind: int, layer: int, wait: int) -> None:
        shape = self._shape
        groups, units = groups_of(shape, kind), k_units(shape, kind)
        each, more = divmod(groups, self._blocks)
        counts = np.full(self._blocks, each)
        counts[self._least_loaded()[:more]] += 1
        self._load += counts * units
        ends = np.cumsum(counts)
        # Where blocks attend by themselves all residuals must be there too, which every block of QKV copies a part of.
        heads = shape.kv_heads if kind == QKV and not self._whole else 1
        # Cut where the block changes and where the counter does.
        cuts = np.unique(np.concatenate([ends, np.arange(1, heads + 1) * (groups // heads) if heads > 1 else ends]))
        first = np.concatenate([[0], cuts[:-1]])
        first, cuts = first[cuts > first], cuts[cuts > first]
        block = np.searchsorted(ends, first, side="right")
        signal = counter(shape, kind, layer) + first // (groups // heads)
        parts = self._down_parts if kind == DOWN else 1
        for part in range(parts):  # one after another in each block: the first waits, the last one signals
            begins, ends_here = wait if part == 0 else NOTHING, signal if part == parts - 1 else NOTHING
            self._add(block, kind, layer, part * groups + first, cuts - first, begins, ends_here)

    def _mlp(self, layer: int) -> None:
        shape = self._shape
        octets = shape.ffn // ROWS
        each, more = divmod(octets, self._blocks)
        counts = np.full(self._blocks, each)
        counts[self._least_loaded()[:more]] += 1
        first = np.cumsum(counts) - counts
        self._load += counts * (2 * k_units(shape, GATE_UP) + down_groups(shape) // 4)
        block = np.flatnonzero(counts)
        first, counts = first[block], counts[block]
        # Block by block one after the other: the table is sorted by block alone, and keeps this order.
        self._add(block, MLP_UP, layer, 2 * first, 2 * counts, counter(shape, OUTPUT, layer), NOTHING)
        self._add(block, MLP_DOWN, layer, first, counts, NOTHING, counter(shape, DOWN, layer))

    def _head_groups(self, layer: int) -> None:
        """Each head group's columns to a team of blocks, its row groups shared out among them."""
        shape, blocks, signal = self._shape, self._blocks, counter(self._shape, OUTPUT, layer)
        numbers, groups = np.arange(head_groups(shape)), groups_of(shape, OUTPUT)
        units = head_output_units(shape, numbers * groups)
        for number, (begin, end) in enumerate(_teams(units, blocks)):
            each, more = divmod(groups, end - begin)
            counts = np.full(end - begin, each)
            counts[np.argsort(self._load[begin:end], kind="stable")[:more]] += 1
            first, block = number * groups + np.cumsum(counts) - counts, np.flatnonzero(counts) + begin
            self._load[begin:end] += counts * units[number]
            first, counts = first[counts > 0], counts[counts > 0]
            if self._whole:
                keeps = (number % self._parts == 0) & (np.arange(len(block)) == 0)  # one of all blocks of a head
                does = np.where(keeps, ATTENDS_AND_KEEPS, ATTENDS)
                self._add(block, GROUP_ATTEND, layer, number, does, counter(shape, QKV, layer), NOTHING)
                self._add(block, GROUP_OUTPUT, layer, first, counts, NOTHING, signal)
            else:
                self._add(block, GROUP_OUTPUT, layer, first, counts, counter(shape, ATTEND, layer), signal)

    def _attention(self, layer: int) -> None:
        shape, splits, blocks = self._shape, self._splits, self._blocks
        pairs = self._rows * shape.kv_heads * self._parts * splits
        pair = np.arange(pairs)
        block = pair * blocks // pairs if pairs < blocks else pair % blocks
        item, split = np.divmod(pair, splits)
        wait = counter(shape, QKV, layer) + item // self._parts % shape.kv_heads
        self._add(block, ATTEND, layer, item, split | splits << 16, wait, counter(shape, ATTEND, layer))


def _teams(units: NDArray[np.int64], blocks: int) -> list[tuple[int, int]]:
    """Which blocks have each head group, by its units; with fewer blocks than groups each group has one."""
    count = len(units)
    if blocks < count:
        return [(number % blocks, number % blocks + 1) for number in range(count)]
    # Everybody has one, the others go to whoever has most for each block of its own.
    sizes = np.ones(count, np.int64)
    for _ in range(blocks - count):
        sizes[np.argmax(units / sizes)] += 1
    ends = np.cumsum(sizes)
    return list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))


def _positions_at_once(shape: MegaShape, heads: int) -> int:
    """Of a team of lanes in attention: as many as registers hold, which int8 needs most of, 16 values of a lane."""
    if shape.cache == "q8_0":
        return 1 if heads > 1 else 2
    return 4 if shape.head_dim <= 128 and shape.cache == "bf16" and heads <= 2 else 2


# --- the kernel -------------------------------------------------------------------------------------------------------


def kernel(plan: Plan, page_size: int, *, bulk: bool = True, least: int = 128) -> Kernel:
    """See mega.cuh.

    Args:
        bulk: stages come by bulk copies, which a device has from compute capability 9.0.
        least: positions that a stretch of attention has at least.
    """
    shape = plan.shape
    return kernels.mega(
        warps=plan.warps,
        shared=plan.shared.total,
        Format=kernels.FORMATS[shape.format][0],
        Embed=kernels.FORMATS[shape.embed][0],
        Cache=f"{kernels.CACHES[shape.cache][0]}<{shape.head_dim}>",
        L=shape.layers,
        D=shape.width,
        H=shape.heads,
        KV=shape.kv_heads,
        HD=shape.head_dim,
        F=shape.ffn,
        V=shape.vocab,
        B=plan.rows,
        TERMS=plan.terms,
        STAGES=plan.stages,
        STAGE_UNITS=plan.stage_units,
        GA=plan.most_groups,
        SPLITS=plan.splits,
        LEAST=least,
        BULK=bulk,
        GB=plan.heads,
        U=_positions_at_once(shape, plan.heads),
        PAGE=page_size,
        WINDOW=shape.window or 0,
        EPS=float(shape.eps),
        ROPE_SCALE=float(shape.rope_scale),
        SCALE=float(shape.scale),
        NORMED=shape.normed,
        BIAS=shape.bias,
        SAMPLED=plan.sampled,
        MLP=plan.own > 0,
        OWN=plan.own,
        DOWN_PARTS=plan.down_parts,
        DOWN_WHOLE=plan.down_whole,
        BY_HEAD=plan.by_head,
        WHOLE=plan.whole,
        ENTRIES=plan.entries,
        SCRATCH=plan.shared.scratch,
    )
