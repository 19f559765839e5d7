"""What the kernel and its host must agree on: kinds and fields of entries, row order, places of counters and vectors.

kernels/cuda/mega_parts.cuh has the same numbers.  Knows shapes; nothing of blocks and plans.

    layout.row_order(shape, QKV); layout.counter(shape, ATTEND, layer=3)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.kernels import heads_at_once
from finial.backends.cuda.mega.shape import MegaShape

Numbers = int | NDArray[np.int64]

# Kinds of entries.
QKV, ATTEND, OUTPUT, GATE_UP, DOWN, HEAD, SAMPLE, TOKEN, MLP_UP, MLP_DOWN, GROUP_ATTEND, GROUP_OUTPUT = range(12)
END = -1
NAMES = (
    *("QKV", "ATTEND", "OUTPUT", "GATE_UP", "DOWN", "HEAD", "SAMPLE", "TOKEN", "MLP_UP", "MLP_DOWN"),
    *("GROUP_ATTEND", "GROUP_OUTPUT"),
)
PRODUCTS = (QKV, OUTPUT, GATE_UP, DOWN, HEAD)
# Fields of an entry, int32 each.
KIND, LAYER, FIRST, COUNT, WAIT, TARGET, SIGNAL, STAGES = range(8)
ENTRY = 8
NOTHING = -1  # instead of a counter

COUNTER_STRIDE = 32  # u32 from one counter to the next: a line of memory each
ROWS = 8  # weight rows of a group
UNIT_K = 32  # weights of each of them in a unit
UNIT_BYTES = {"bf16": 512, "fp8": 256, "q8_0": 272}
MOST_ROWS = 8  # sequences of a step
MOST_SPLITS = 32
ATTENDS, ATTENDS_AND_KEEPS = 1, 2  # count of GROUP_ATTEND: whether the block also writes the new key and value
STOPS = 8  # tokens that may end a row


def row_order(shape: MegaShape, kind: int) -> NDArray[np.int64]:
    """Where each row of a product comes from, in the order in which the table counts rows: int64 [rows, 2].

    Column 0: which matrix (of q, k, v for QKV, of gate and up for GATE_UP, else the one there is); 1: its row.
    """
    rows = np.zeros((product_size(shape, kind)[0], 2), np.int64)
    if kind == QKV:  # head by head: its queries, its key, its value
        d, group = shape.head_dim, shape.group
        by_head = rows.reshape(shape.kv_heads, group + 2, d, 2)
        by_head[:, :group, :, 1] = np.arange(shape.heads * d).reshape(shape.kv_heads, group, d)
        for which in (1, 2):
            by_head[:, group + which - 1, :, 0] = which
            by_head[:, group + which - 1, :, 1] = np.arange(shape.kv_heads * d).reshape(shape.kv_heads, d)
    elif kind == GATE_UP:  # in turn
        rows[1::2, 0] = 1
        rows[:, 1] = np.arange(len(rows)) // 2
    else:
        rows[:, 1] = np.arange(len(rows))
    return rows


def product_size(shape: MegaShape, kind: int) -> tuple[int, int]:
    """(rows, k) of a product."""
    return {
        QKV: (shape.qkv_rows, shape.width),
        OUTPUT: (shape.width, shape.heads * shape.head_dim),
        GATE_UP: (2 * shape.ffn, shape.width),
        DOWN: (shape.width, shape.ffn),
        HEAD: (shape.vocab, shape.width),
    }[kind]


def groups_of(shape: MegaShape, kind: int) -> int:
    """Row groups of a product."""
    return -(-product_size(shape, kind)[0] // ROWS)


def k_units(shape: MegaShape, kind: int) -> int:
    """Units of a row group."""
    return -(-product_size(shape, kind)[1] // UNIT_K)


# --- counters ---------------------------------------------------------------------------------------------------------


def counter(shape: MegaShape, kind: int, layer: int = 0, head: int = 0) -> int:
    """The number of the counter that a phase signals: one a key/value head for QKV, one a layer, one a step."""
    per = shape.kv_heads + 4
    if kind == QKV:
        return layer * per + head
    if kind in (ATTEND, OUTPUT, GATE_UP, DOWN):
        return layer * per + shape.kv_heads + (ATTEND, OUTPUT, GATE_UP, DOWN).index(kind)
    return shape.layers * per + (HEAD, SAMPLE).index(kind)


def counters(shape: MegaShape) -> int:
    """How many there are."""
    return counter(shape, SAMPLE) + 1


# --- constants of the model beside its matrices -----------------------------------------------------------------------


def vectors(shape: MegaShape) -> tuple[dict[str, int], int, dict[str, int], int]:
    """Offsets in floats: of a layer's vectors, the stride from layer to layer, of those after the layers, and the sum.

    What a model has none of has no room.  Vectors of rows are in the order of the table's rows.
    """

    def rows(kind: int) -> int:
        return groups_of(shape, kind) * ROWS

    scales, d = shape.format == "fp8", shape.head_dim
    layer = {
        "attn_norm": shape.width,
        "mlp_norm": shape.width,
        "q_norm": d if shape.normed else 0,
        "k_norm": d if shape.normed else 0,
        "qkv_bias": rows(QKV) if shape.bias else 0,
        "qkv_scales": rows(QKV) if scales else 0,
        "o_scales": rows(OUTPUT) if scales else 0,
        "gate_up_scales": rows(GATE_UP) if scales else 0,
        "down_scales": rows(DOWN) if scales else 0,
    }
    after = {"final_norm": shape.width, "head_scales": rows(HEAD) if scales else 0}
    offsets, stride = _offsets(layer, 0)
    after_offsets, total = _offsets(after, shape.layers * stride)
    return offsets, stride, after_offsets, total


def _offsets(sizes: dict[str, int], at: int) -> tuple[dict[str, int], int]:
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = at
        at += -(-size // 4) * 4  # 16-byte loads
    return offsets, at


def octet_bytes(shape: MegaShape) -> int:
    """Of 8 rows by 8 neurons of down."""
    return UNIT_BYTES[shape.format] // 4


def down_groups(shape: MegaShape) -> int:
    """Row groups of down, all of which every block has for its own neurons."""
    return groups_of(shape, DOWN)


# --- head groups: what a block attends for by itself ------------------------------------------------------------------


def parts_of(shape: MegaShape) -> int:
    """Head groups of a key/value head: its query heads in as many parts as registers want."""
    return -(-shape.group // heads_at_once(shape.cache, shape.group))


def head_groups(shape: MegaShape) -> int:
    """Of a row; a group's number is key/value head · parts + part."""
    return shape.kv_heads * parts_of(shape)


def head_columns(shape: MegaShape, number: Numbers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first, how many) of the columns of the product after attention that a head group's results meet."""
    parts, heads = parts_of(shape), heads_at_once(shape.cache, shape.group)
    head, part = np.divmod(np.asarray(number, np.int64), parts)
    first = head * shape.group + part * heads
    return first * shape.head_dim, np.minimum(heads, shape.group - part * heads) * shape.head_dim


def head_output_units(shape: MegaShape, first: Numbers) -> NDArray[np.int64]:
    """Units of a row group of GROUP_OUTPUT, whose `first` is head group · row groups + row group."""
    _, columns = head_columns(shape, np.asarray(first, np.int64) // groups_of(shape, OUTPUT))
    units: NDArray[np.int64] = -(-columns // UNIT_K)
    return units


# --- down in parts: where x of many rows is too wide ------------------------------------------------------------------


def down_columns(shape: MegaShape, part: Numbers, parts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first, how many) of the columns of a part of down, whole units each; DOWN's `first` is part · row groups + row
    group."""
    units, part = k_units(shape, DOWN), np.asarray(part, np.int64)
    first = units * part // parts * UNIT_K
    return first, np.minimum(units * (part + 1) // parts * UNIT_K, shape.ffn) - first
