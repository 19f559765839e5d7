"""Launches of products: matvecs for a few rows, tiles of tensor cores beyond, and the norm before those.

Knows which kernel takes which rows; see `lower.py` for the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from finial.backends.cuda import kernels
from finial.backends.cuda.lower_values import SMALL_ROWS, Values, number
from finial.backends.cuda.model import Matrix
from finial.backends.cuda.plan import joined, weight_names
from finial.backends.cuda.workspace import Place
from finial.backends.fuse import Product, Products


class ProductLowering(Values):
    """See `finial.backends.cuda.lower.Lowering`."""

    def _products(self, item: Products) -> None:
        for members in joined(item):
            matrix = self._model.matrix(weight_names(members), weight_names(members, 2))
            names = [member.output for member in members]
            rows = self._count(self._graph.values[names[0]])
            if self._tensor_cores(rows) and matrix.format != "f32":
                x = self._rounded(item, matrix.k, rows)
                self._gemm(
                    members, matrix, x, self._make_half(names[0]) if names[0] in self._half else self._make(*names)
                )
                if x.block is not None and x.block.users == 0:
                    self._workspace.give(x.block)
            else:
                self._matvec(item, members, matrix, self._make(*names), rows)

    def _rounded(self, item: Products, k: int, rows: int) -> Place:
        """The rows of x, normed where the item says so, in bf16 and with zeros up to a multiple of 64."""
        x = self.places[item.x]
        if x.half:
            return x
        width = kernels.padded(k)
        block = self._workspace.take(rows * width * 2)
        kernel = kernels.norm(k, normed=item.norm is not None, pick=bool(x.pick), half=True)
        self._launch(
            kernel,
            (-(-rows // (kernel.threads // 32)), 1, 1),
            x=x.address,
            weight=self._model.vector((item.norm.inputs[1],)) if item.norm is not None else 0,
            out=block.address,
            pick=x.pick,
            x_stride=x.stride,
            out_stride=width,
            eps=number(item.norm, "eps") if item.norm is not None else 0.0,
            rows=rows,
            groups=1,
        )
        return Place(block.address, width, block, half=True)

    def _gemm(self, members: Sequence[Product], matrix: Matrix, x: Place, out: Place) -> None:
        first = members[0]
        rows, tile = (
            self._count(self._graph.values[first.output]),
            kernels.gemm_tile(self._count(self._graph.values[first.output])),
        )
        split = kernels.gemm_split(rows, matrix.out, matrix.k, self._device.multiprocessors)
        across, down = -(-matrix.out // tile.bn), -(-rows // tile.bm)
        added = self.places[first.add] if first.add is not None else None
        kernel = kernels.gemm(
            matrix.format,
            k=matrix.k,
            out=matrix.out,
            tile=tile,
            split=split,
            bias=bool(matrix.bias),
            add=added is not None,
            gated=first.up is not None,
            half=out.half,
        )
        self._launch(
            kernel,
            (across, down, split),
            weight=matrix.data,
            scales=matrix.scales,
            bias=matrix.bias,
            x=x.address,
            add=added.address if added else 0,
            out=out.address,
            parts=self._once("sums", split * rows * matrix.out * 4) if split > 1 else 0,
            tickets=self._once("gemm tickets", across * down * 4),
            x_stride=x.stride,
            add_stride=added.stride if added else 0,
            out_stride=out.stride,
            rows=rows,
        )

    def _matvec(self, item: Products, members: Sequence[Product], matrix: Matrix, out: Place, rows: int) -> None:
        first, x = members[0], self.places[item.x]
        at_once, gated = min(rows, SMALL_ROWS), first.up is not None
        nr, warps = kernels.matvec_shape(matrix.out, at_once, self._device.multiprocessors, gated)
        kernel = kernels.matvec(
            matrix.format,
            k=matrix.k,
            out=matrix.out,
            rows=at_once,
            nr=nr,
            warps=warps,
            norm=item.norm is not None,
            eps=number(item.norm, "eps") if item.norm is not None else 0.0,
            bias=bool(matrix.bias),
            add=first.add is not None,
            gated=gated,
            pick=bool(x.pick),
        )
        tiles = -(-matrix.out // (nr * warps))
        most = 2 * self._device.multiprocessors  # more tiles than that: blocks stay and take several
        added = self.places[first.add] if first.add is not None else None
        self._launch(
            kernel,
            (tiles if tiles <= 2 * most else most, rows // at_once, 1),
            weight=matrix.data,
            scales=matrix.scales,
            bias=matrix.bias,
            norm=self._model.vector((item.norm.inputs[1],)) if item.norm is not None else 0,
            x=x.address,
            pick=x.pick,
            add=added.address if added else 0,
            out=out.address,
            x_stride=x.stride,
            add_stride=added.stride if added else 0,
            out_stride=out.stride,
        )
