"""The plan of a launch: the phase table for a device, the ring of weights that shared memory has room for, the kernel.

Knows shapes, layouts and sizes; nothing of graphs, weights and devices.  What is in the table is table.py's.

    plan = make_plan(shape, rows=1, multiprocessors=132, shared=227 << 10)
    plan.table[block]; plan.kernel(page_size=32)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda import kernels
from finial.backends.cuda.kernels import Kernel, heads_at_once
from finial.backends.cuda.mega.layout import (
    COUNT,
    DOWN,
    FIRST,
    GATE_UP,
    GROUP_OUTPUT,
    HEAD,
    KIND,
    MLP_DOWN,
    MLP_UP,
    MOST_ROWS,
    NAMES,
    PRODUCTS,
    ROWS,
    STAGES,
    TARGET,
    UNIT_BYTES,
    UNIT_K,
    WAIT,
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
from finial.backends.cuda.mega.table import TableBuilder, split_count


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
        by_head, whole: see table.py.
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

    def kernel(self, page_size: int, *, bulk: bool = True, least: int = 128) -> Kernel:
        """What runs it, see mega.cuh.

        Args:
            bulk: stages come by bulk copies, which a device has from compute capability 9.0.
            least: positions that a stretch of attention has at least.
        """
        shape = self.shape
        return kernels.mega(
            warps=self.warps,
            shared=self.shared.total,
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
            B=self.rows,
            TERMS=self.terms,
            STAGES=self.stages,
            STAGE_UNITS=self.stage_units,
            GA=self.most_groups,
            SPLITS=self.splits,
            LEAST=least,
            BULK=bulk,
            GB=self.heads,
            U=_positions_at_once(shape, self.heads),
            PAGE=page_size,
            WINDOW=shape.window or 0,
            EPS=float(shape.eps),
            ROPE_SCALE=float(shape.rope_scale),
            SCALE=float(shape.scale),
            NORMED=shape.normed,
            BIAS=shape.bias,
            SAMPLED=self.sampled,
            MLP=self.own > 0,
            OWN=self.own,
            DOWN_PARTS=self.down_parts,
            DOWN_WHOLE=self.down_whole,
            BY_HEAD=self.by_head,
            WHOLE=self.whole,
            ENTRIES=self.entries,
            SCRATCH=self.shared.scratch,
        )


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
        fused_mlp: see table.py; not for q8_0, whose blocks lie along the neurons.
        by_head, whole: see table.py; `whole` only with `by_head`.
        down_parts: 0: as many as the device wants, see table.py.
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
    builder = TableBuilder(shape, blocks, rows, parts, splits, sampled, fused_mlp, by_head, whole, down_parts)
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


def _positions_at_once(shape: MegaShape, heads: int) -> int:
    """Of a team of lanes in attention: as many as registers hold, which int8 needs most of, 16 values of a lane."""
    if shape.cache == "q8_0":
        return 1 if heads > 1 else 2
    return 4 if shape.head_dim <= 128 and shape.cache == "bf16" and heads <= 2 else 2
