"""Weights in the order in which blocks read them: for each block one stream of bytes, a whole step long.

A stream is the units of the block's entries one after another, group by group and along k; a unit is 8 rows of 32
weights.  bf16: 512 bytes, row by row.  fp8 (e4m3): 256 bytes, row by row; a row's scale is one of the vectors.  q8_0:
the 8 rows of 32 int8 + 128, then their 8 f16 scales, 272 bytes.  Where gate·up and down are one phase, down comes by
octets: 8 rows of 8 of the block's neurons, row by row, group by group.  Rows and weights beyond a matrix are zeros.

Knows the table and finial's formats; nothing of devices.  A piece at a time: nothing is held but one entry's weights.

    packer = Packer(plan, recognised, weights)
    for offset, data in packer.pieces(): ...
    packer.vectors()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.mega import layout
from finial.backends.cuda.mega.layout import (
    COUNT,
    DOWN,
    FIRST,
    GATE_UP,
    GROUP_OUTPUT,
    HEAD,
    KIND,
    LAYER,
    MLP_DOWN,
    MLP_UP,
    OUTPUT,
    QKV,
    ROWS,
    UNIT_K,
)
from finial.backends.cuda.mega.plan import Plan
from finial.backends.cuda.mega.shape import Recognised
from finial.backends.cuda.weights import pack_matrix
from finial.formats import Tensor

Bytes = NDArray[np.uint8]


def matrices(recognised: Recognised, kind: int, layer: int) -> tuple[str, ...]:
    """The names of a product's matrices, as `layout.row_order` counts them."""
    names = recognised.layers[layer]
    return {
        QKV: names.qkv,
        OUTPUT: (names.output,),
        GROUP_OUTPUT: (names.output,),
        GATE_UP: (names.gate, names.up),
        DOWN: (names.down,),
        MLP_UP: (names.gate, names.up),
        MLP_DOWN: (names.down,),
        HEAD: (recognised.head,),
    }[kind]


class Packer:
    """See the module.

    Args:
        weights: by name; fp8 is made here, the other formats must be the shape's.
    """

    def __init__(self, plan: Plan, recognised: Recognised, weights: Mapping[str, Tensor]) -> None:
        self._plan, self._recognised, self._weights = plan, recognised, weights
        self._shape = plan.shape
        self._offsets, self._stride, self._after, total = layout.vectors(plan.shape)
        self._vectors = np.zeros(total, np.float32)
        self._whole: tuple[Tensor | None, Bytes] = None, np.zeros((0, 0), np.uint8)
        self._orders = {kind: layout.row_order(plan.shape, kind) for kind in layout.PRODUCTS}

    def pieces(self) -> Iterator[tuple[int, Bytes]]:
        """(where, from the first block's stream; bytes), matrix by matrix."""
        entries, sizes = self._plan.table, self._plan.entry_bytes()
        starts = np.cumsum(sizes, axis=1) - sizes
        base = self._plan.offsets().astype(np.int64)
        block, at = np.nonzero(sizes)
        order = np.lexsort((entries[block, at, FIRST], entries[block, at, KIND], entries[block, at, LAYER]))
        tensors: list[Tensor] = []
        now = (-1, -1)
        for b, a in zip(block[order].tolist(), at[order].tolist(), strict=True):
            entry = entries[b, a]
            kind, layer = int(entry[KIND]), int(entry[LAYER])
            if (kind, layer) != now:
                now, tensors = (kind, layer), [self._weights[n] for n in matrices(self._recognised, kind, layer)]
            where = int(base[b]) + int(starts[b, a])
            yield where, self._entry(kind, layer, tensors, int(entry[FIRST]), int(entry[COUNT]))

    def vectors(self) -> NDArray[np.float32]:
        """What `layout.vectors` lays out; scales of fp8 rows are there once all pieces were taken."""
        for layer, names in enumerate(self._recognised.layers):
            self._put("attn_norm", layer, self._floats(names.attn_norm))
            self._put("mlp_norm", layer, self._floats(names.mlp_norm))
            if self._shape.normed:
                self._put("q_norm", layer, self._floats(names.head_norms[0]))
                self._put("k_norm", layer, self._floats(names.head_norms[1]))
            if self._shape.bias:
                bias, order = np.zeros(len(self._orders[QKV]), np.float32), self._orders[QKV]
                for which, name in enumerate(names.biases):
                    if name:
                        mine = order[:, 0] == which
                        bias[mine] = self._floats(name)[order[mine, 1]]
                self._put("qkv_bias", layer, bias)
        final = self._floats(self._recognised.final_norm)
        self._vectors[self._after["final_norm"] :][: len(final)] = final
        return self._vectors

    def _floats(self, name: str) -> NDArray[np.float32]:
        return self._weights[name].decode().reshape(-1)

    def _put(self, name: str, layer: int, values: NDArray[np.float32], first: int = 0) -> None:
        at = layer * self._stride + self._offsets[name] + first
        self._vectors[at : at + len(values)] = values

    def _entry(self, kind: int, layer: int, tensors: list[Tensor], first: int, count: int) -> Bytes:
        """The units of these groups."""
        if kind == MLP_DOWN:
            return self._octets(layer, tensors[0], first, count)
        if kind == GROUP_OUTPUT:
            return self._columns(layer, tensors[0], first, count)
        kind, parts = GATE_UP if kind == MLP_UP else kind, self._plan.down_parts
        begin, columns = 0, layout.product_size(self._shape, kind)[1]
        if kind == DOWN and parts > 1:
            number, first = divmod(first, layout.down_groups(self._shape))
            begin, columns = (int(n) for n in layout.down_columns(self._shape, number, parts))
        order = self._orders[kind][first * ROWS : (first + count) * ROWS]
        k_units, format = -(-columns // UNIT_K), self._shape.format
        rows = _rows(tensors, order)
        if format == "fp8":
            k = tensors[0].shape[1]
            part = Tensor(tensors[0].format, (len(order), k), np.ascontiguousarray(rows).reshape(-1))
            data, scales = pack_matrix([part], "fp8", interleave=False)
            names = {QKV: "qkv_scales", OUTPUT: "o_scales", GATE_UP: "gate_up_scales", DOWN: "down_scales"}
            if kind == HEAD:
                self._vectors[self._after["head_scales"] + first * ROWS :][: len(order)] = scales[:, 0]
            else:
                self._put(names[kind], layer, scales[:, 0], first * ROWS)
            return _units(data[:, begin : begin + columns], count, k_units, UNIT_K).reshape(-1)
        assert tensors[0].format == format, (tensors[0].format, format)
        if format == "bf16":
            return _units(rows[:, 2 * begin : 2 * (begin + columns)], count, k_units, 2 * UNIT_K).reshape(-1)
        size = 2 + UNIT_K
        return _q8_units(rows[:, begin // UNIT_K * size :][:, : k_units * size], count, k_units)

    def _columns(self, layer: int, tensor: Tensor, first: int, count: int) -> Bytes:
        """The units of these row groups of the product after attention in the columns of a head group."""
        number, group = divmod(first, layout.groups_of(self._shape, OUTPUT))
        (column, columns), k_units = (
            layout.head_columns(self._shape, number),
            layout.head_output_units(self._shape, first),
        )
        begin, end, some = int(column), int(column + columns), slice(group * ROWS, (group + count) * ROWS)
        if self._shape.format == "fp8":
            data = self._packed(tensor, "o_scales", layer)
            return _units(data[some, begin:end], count, int(k_units), UNIT_K).reshape(-1)
        stored = tensor.data.view(np.uint8).reshape(tensor.shape[0], -1)[some]
        if self._shape.format == "bf16":
            return _units(stored[:, 2 * begin : 2 * end], count, int(k_units), 2 * UNIT_K).reshape(-1)
        size = 2 + UNIT_K
        return _q8_units(stored[:, begin // UNIT_K * size : end // UNIT_K * size], count, int(k_units))

    def _packed(self, tensor: Tensor, scales_name: str, layer: int) -> Bytes:
        """A whole matrix in fp8, as a scale is a row's."""
        if self._whole[0] is not tensor:
            data, scales = pack_matrix([tensor], "fp8", interleave=False)
            self._put(scales_name, layer, scales[:, 0])
            self._whole = tensor, data[:, : tensor.shape[1]]
        return self._whole[1]

    def _octets(self, layer: int, tensor: Tensor, first: int, count: int) -> Bytes:
        """All rows of down for these octets of neurons."""
        if self._shape.format == "fp8":
            data, size = self._packed(tensor, "down_scales", layer), 1
        else:
            data, size = tensor.data.view(np.uint8).reshape(tensor.shape[0], -1), 2
        part = data[:, first * ROWS * size : (first + count) * ROWS * size]
        return _units(part, layout.down_groups(self._shape), count, ROWS * size).reshape(-1)


def _rows(tensors: list[Tensor], order: NDArray[np.int64]) -> Bytes:
    """Rows as they are stored, [rows, bytes]; a view where they are neighbours."""
    stored = [tensor.data.reshape(tensor.shape[0], -1) for tensor in tensors]
    which, row = order[:, 0], order[:, 1]
    if (which == which[0]).all() and (np.diff(row) == 1).all():
        together: Bytes = stored[which[0]][row[0] : row[-1] + 1]
        return together
    out = np.empty((len(order), stored[0].shape[1]), np.uint8)
    for number, matrix in enumerate(stored):
        mine = which == number
        out[mine] = matrix[row[mine]]
    return out


def _q8_units(rows: Bytes, count: int, k_units: int) -> Bytes:
    raw = _by_unit(rows, count, k_units, 2 + UNIT_K)  # an f16, then 32 int8
    out = np.empty((count, k_units, layout.UNIT_BYTES["q8_0"]), np.uint8)
    split = ROWS * UNIT_K
    weights, scales = (part.reshape(count, k_units, ROWS, -1) for part in (out[:, :, :split], out[:, :, split:]))
    assert np.shares_memory(weights, out) and np.shares_memory(scales, out)
    np.bitwise_xor(raw[:, :, :, 2:], np.uint8(128), out=weights)
    scales[:] = raw[:, :, :, :2]
    return out.reshape(-1)


def _units(rows: Bytes, count: int, k_units: int, width: int) -> Bytes:
    """[rows, bytes] as units of 8 rows of `width` bytes, [count, k_units, 8, width]; zeros where there is nothing."""
    return np.ascontiguousarray(_by_unit(rows, count, k_units, width))


def _by_unit(rows: Bytes, count: int, k_units: int, width: int) -> Bytes:
    """The same without a copy where there are rows enough."""
    if rows.shape != (count * ROWS, k_units * width):
        padded = np.zeros((count * ROWS, k_units * width), np.uint8)
        padded[: len(rows), : rows.shape[1]] = rows
        rows = padded
    units: Bytes = rows.reshape(count, ROWS, k_units, width).transpose(0, 2, 1, 3)
    return units
