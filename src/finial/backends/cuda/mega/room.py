"""What a block's shared memory holds besides the ring of weights, and what has to give where it is short.

Knows shapes and sizes; nothing of tables and blocks.  kernels/cuda/mega_parts.cuh has the same sums.

    layout = shared_layout(shape, rows=1, terms=3, …); layout.total
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finial.backends.cuda.kernels import heads_at_once
from finial.backends.cuda.mega.layout import (
    DOWN,
    ENTRY,
    MOST_ROWS,
    OUTPUT,
    PRODUCTS,
    ROWS,
    down_columns,
    product_size,
)
from finial.backends.cuda.mega.shape import MegaShape

STATE_SHARED = 4 << 10  # for barriers, rows and sums of squares, after everything else
RESERVED_SHARED = 1 << 10  # of every block, by the system (CUDA C++ programming guide, from 8.0)
STAGE_BYTES = 16 << 10  # about this much is copied at once
LEAST_STAGES = 3
MOST_DOWN_PARTS = 4
LEAST_ELSE = 40 << 10  # of shared memory beside x: three small stages, sums of one row group, the table, the state


@dataclass(frozen=True)
class SharedLayout:
    """Bytes of a block's dynamic shared memory, in this order.

    `scratch` holds x and then sums during a product, and what attention and sampling need during those.
    """

    ring: int
    x: int
    sums: int
    attend: int
    sample: int
    own: int
    table: int

    @property
    def scratch(self) -> int:
        """Of whichever phase needs most."""
        return max(self.x + self.sums, self.attend, self.sample)

    @property
    def total(self) -> int:
        """What the launch asks for."""
        return self.ring + self.scratch + self.own + self.table + STATE_SHARED


def terms_of(rows: int) -> int:
    """bf16 terms of a value of x: three are float32 itself, two are within 2^-17; 16 rows of a tile hold them all."""
    return 3 if rows * 3 <= 16 else 2


def parts_of_down(shape: MegaShape, by_head: bool, shared: int) -> int:
    """As few as let a block have x of eight rows, or else of as many as can be; whatever the plan's rows are."""
    for rows in (MOST_ROWS, 4, 2, 1):
        for parts in range(1, MOST_DOWN_PARTS + 1):
            if rows * terms_of(rows) * most_k_of(shape, 0, by_head, parts) * 2 + LEAST_ELSE <= shared:
                return parts
    return 1


def most_k_of(shape: MegaShape, own: int, by_head: bool, down_parts: int) -> int:
    """Of the products whose x is that of all blocks."""
    sizes = {kind: product_size(shape, kind)[1] for kind in PRODUCTS}
    sizes[DOWN] = int(down_columns(shape, np.arange(down_parts), down_parts)[1].max())
    if own:
        del sizes[DOWN]
    if by_head:
        sizes[OUTPUT] = heads_at_once(shape.cache, shape.group) * shape.head_dim
    return max(sizes.values())


def shared_layout(
    shape: MegaShape,
    rows: int,
    terms: int,
    warps: int,
    most_groups: int,
    heads: int,
    own: int,
    most_k: int,
    whole: bool,
    entries: int,
) -> SharedLayout:
    """Without the ring."""
    k = -(-most_k // 64) * 64 + 32  # see STRIDE in mega_parts.cuh
    x = _aligned(rows * terms * k * 2)
    d = -(-shape.head_dim // 16) * 16
    return SharedLayout(
        ring=0,
        x=x,
        sums=warps * most_groups * 16 * ROWS * 4,
        # Queries and the new key and value, the rotation, and each warp's sums; beyond x where the result lies there.
        attend=_aligned(((heads + 2) * d + d + warps * heads * (d + 2)) * 4) + (x if whole else 0),
        # A histogram of 256, and two numbers of 8 bytes of each thread.
        sample=_aligned(256 * 8 + warps * 32 * 16),
        own=_aligned(rows * terms * (own + 8) * 2) if own else 0,
        table=_aligned(entries * ENTRY * 4),
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 128) * 128
