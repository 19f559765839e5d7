"""The phase table: which block computes which rows, what it waits for, what it signals.

Knows shapes and layouts; nothing of graphs, weights, devices and of what shared memory holds.

    builder = TableBuilder(shape, blocks=132, rows=1, parts=1, splits=8, sampled=False, …); builder.build()

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

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda import kernels
from finial.backends.cuda.mega.layout import (
    ATTEND,
    ATTENDS,
    ATTENDS_AND_KEEPS,
    DOWN,
    END,
    ENTRY,
    GATE_UP,
    GROUP_ATTEND,
    GROUP_OUTPUT,
    HEAD,
    KIND,
    MLP_DOWN,
    MLP_UP,
    MOST_SPLITS,
    NOTHING,
    OUTPUT,
    QKV,
    ROWS,
    SAMPLE,
    TOKEN,
    Numbers,
    counter,
    counters,
    down_groups,
    groups_of,
    head_groups,
    head_output_units,
    k_units,
)
from finial.backends.cuda.mega.shape import MegaShape

# What a block reads of keys and values at most where it attends by itself: about what a split of at least 128 positions
# reads and the wait that this saves takes to read, at 40 GB/s a multiprocessor from L2 (reckoned, not measured).
WHOLE_BYTES = 128 << 10


def whole_positions(shape: MegaShape, rows: int) -> int:
    """How many positions of each row blocks attend to by themselves at most: `WHOLE_BYTES` of keys and values."""
    most = WHOLE_BYTES // (rows * 2 * kernels.cache_row_bytes(shape.cache, shape.head_dim))
    return 1 << 30 if shape.window is not None and shape.window <= most else most


def split_count(items: int, blocks: int) -> int:
    """Into how many stretches of positions each attention item is cut: the busiest block shall have the least to do.

    An entry costs about as much as a fiftieth of an item of typical depth, whatever its stretch.
    """
    return min(range(1, MOST_SPLITS + 1), key=lambda splits: -(-items * splits // blocks) * (1 / splits + 0.02))


class TableBuilder:
    """Entries phase by phase; weights are shared out so that streams are of equal length too.

    Args:
        blocks: of the launch; rows: sequences of a step; parts: items of attention for a key/value head and row.
        splits: of each attention item; the others: see the module.

    Attributes:
        arrivals: int32 [counters], of a step, once the table is built.
    """

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
