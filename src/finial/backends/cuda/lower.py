"""A planned graph to a list of launches, for given numbers of rows.

Knows which kernel runs an item, and where each value lies; the numbers of rows are buckets, rows beyond those that
a step has are computed and thrown away.  Knows nothing of steps and their data.

    launches = Lowering(model, state, {"T": 1, "R": 1}, decode=True).launches
"""

from __future__ import annotations

from finial.backends.cuda import kernels
from finial.backends.cuda.lower_attention import AttentionLowering
from finial.backends.cuda.lower_products import ProductLowering
from finial.backends.cuda.lower_values import number, width_of
from finial.backends.cuda.plan import Attention, Item
from finial.backends.cuda.workspace import Place
from finial.backends.fuse import Products
from finial.graph import Node


class Lowering(ProductLowering, AttentionLowering):
    """See the module.

    Args:
        caches: address by state name.
        ints: address of each int32 input by name, and of "sequence", the page table's row of each row.
        page_stride: entries of a row of the page table.
        rows: bucket by the symbol of a first dimension.
            "tiles" counts the tiles of attention over many rows; without it each row attends alone.
        decode: every sequence has one row, and nobody reads what another one writes in this step.
    """

    def _lower(self) -> None:
        items = self._model.items
        last = {name: index for index, item in enumerate(items) for name in item.inputs}
        last |= {name: len(items) for name in self._graph.outputs}
        for index, item in enumerate(items):
            if self._height(item) > 0:
                self._item(item)
            for name in {*item.inputs, *item.outputs}:
                place = self.places.get(name)
                if place is not None and last.get(name, index) == index and place.block is not None:
                    place.block.users -= 1
                    if place.block.users == 0:
                        self._workspace.give(place.block)

    def _height(self, item: Item) -> int:
        outputs = list(item.outputs)
        value = self._graph.values[outputs[0]]
        return 1 if self._graph.is_state(value.name) else self._count(value)

    def _item(self, item: Item) -> None:
        if isinstance(item, Products):
            self._products(item)
        elif isinstance(item, Attention):
            self._fused_attention(item)
        else:
            getattr(self, f"_{item.op}")(item)

    def _embed(self, node: Node) -> None:
        matrix = self._model.matrix((node.inputs[1],))
        out = self._make(node.outputs[0])
        self._launch(
            kernels.embed(matrix.format, matrix.k),
            (self._count(self._graph.values[node.outputs[0]]), 1, 1),
            weight=matrix.data,
            scales=matrix.scales,
            tokens=self._ints[node.inputs[0]],
            out=out.address,
            out_stride=out.stride,
        )

    def _rms_norm(self, node: Node) -> None:
        value = self._graph.values[node.outputs[0]]
        width = width_of(self._graph.values[node.inputs[1]], 0)
        groups, rows = width_of(value) // width, self._count(value)
        x, out = self.places[node.inputs[0]], self._make(node.outputs[0])
        kernel = kernels.norm(width, normed=True, pick=bool(x.pick), half=False)
        self._launch(
            kernel,
            (-(-rows * groups // (kernel.threads // 32)), 1, 1),
            x=x.address,
            weight=self._model.vector((node.inputs[1],)),
            out=out.address,
            pick=x.pick,
            x_stride=x.stride,
            out_stride=out.stride,
            eps=number(node, "eps"),
            rows=rows,
            groups=groups,
        )

    def _rope(self, node: Node) -> None:
        value = self._graph.values[node.outputs[0]]
        x, out = self.places[node.inputs[0]], self._make(node.outputs[0])
        self._launch(
            kernels.rope(int(number(node, "head_dim"))),
            (self._count(value), 1, 1),
            x=x.address,
            frequencies=self._model.vector((node.inputs[2],)),
            positions=self._ints[node.inputs[1]],
            out=out.address,
            x_stride=x.stride,
            out_stride=out.stride,
            width=width_of(value),
            scale=number(node, "scale"),
        )

    def _cache_write(self, node: Node) -> None:
        state, head_dim, heads = self._cache(node.inputs[0])
        keys, values = self.places[node.inputs[1]], self.places[node.inputs[2]]
        assert keys.stride == values.stride
        self._launch(
            kernels.cache_write(state.dtype, head_dim, heads),
            (self._count(self._graph.values[node.inputs[1]]), heads, 1),
            keys=keys.address,
            values=values.address,
            slots=self._ints[node.inputs[3]],
            cache=self._caches[state.name],
            stride=keys.stride,
        )

    def _pointwise(self, node: Node) -> None:
        value = self._graph.values[node.outputs[0]]
        a, b = self.places[node.inputs[0]], self.places[node.inputs[1]]
        out = self._make(node.outputs[0])
        self._launch(
            kernels.pointwise(node.op),
            (self._count(value), 1, 1),
            a=a.address,
            b=b.address,
            out=out.address,
            a_stride=a.stride,
            b_stride=b.stride,
            out_stride=out.stride,
            width=width_of(value),
        )

    _add = _silu_mul = _pointwise

    def _select_rows(self, node: Node) -> None:
        name, pick = node.outputs[0], self._ints[node.inputs[1]]
        x, value = self.places[node.inputs[0]], self._graph.values[node.outputs[0]]
        if name in self._model.picked:  # the product that reads it picks the rows itself
            self.places[name] = Place(x.address, x.stride, x.block, pick)
            if x.block is not None:
                x.block.users += 1
            return
        out = self._make(name)
        self._launch(
            kernels.pointwise("select_rows"),
            (self._count(value), 1, 1),
            a=x.address,
            out=out.address,
            pick=pick,
            a_stride=x.stride,
            out_stride=out.stride,
            width=width_of(value),
        )
