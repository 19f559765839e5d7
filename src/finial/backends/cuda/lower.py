"""A planned graph to a list of launches, for given numbers of rows.

Knows which kernel runs an item, and where each value lies; the numbers of rows are buckets, rows beyond those that
a step has are computed and thrown away.  Knows nothing of steps and their data.

    launches = Lowering(model, state, {"T": 1, "R": 1}, decode=True).launches
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from finial.backends.cpu_plan import Product, Products
from finial.backends.cuda import kernels
from finial.backends.cuda.device import Device, Launch, free_all
from finial.backends.cuda.kernels import Kernel
from finial.backends.cuda.model import Matrix, Model
from finial.backends.cuda.plan import Attention, Item, joined, weight_names
from finial.graph import Node, Value

SMALL_ROWS = 8  # up to this many rows a product is a matvec; beyond, tiles of tensor cores


@dataclass
class Block:
    """Memory that values share; free for others when nobody uses it."""

    address: int
    nbytes: int
    users: int = 0


@dataclass(frozen=True)
class Place:
    """Where a value's rows lie: `stride` elements apart, float32 or (half) bf16.

    `pick` is the address of the numbers that say which row of there is row r; 0: row r itself.
    """

    address: int
    stride: int
    block: Block | None = None
    pick: int = 0
    half: bool = False


class Workspace:
    """Device memory for the values of one list of launches, taken again as values die; goes with the object."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: dict[int, list[Block]] = {}
        self.addresses: list[int] = []
        self.nbytes = 0
        weakref.finalize(self, free_all, device, self.addresses).atexit = False

    def take(self, nbytes: int) -> Block:
        """Memory with whatever was there before."""
        free = self._free.get(nbytes)
        return free.pop() if free else Block(self.keep(nbytes), nbytes)

    def give(self, block: Block) -> None:
        """Nobody uses it any more."""
        self._free.setdefault(block.nbytes, []).append(block)

    def keep(self, nbytes: int) -> int:
        """Memory that is not taken again."""
        self.addresses.append(self._device.allocate(max(nbytes, 16)))
        self.nbytes += nbytes
        return self.addresses[-1]


class Lowering:
    """See the module.

    Args:
        caches: address by state name.
        ints: address of each int32 input by name, and of "sequence", the page table's row of each row.
        page_stride: entries of a row of the page table.
        rows: bucket by the symbol of a first dimension.
            "tiles" counts the tiles of attention over many rows; without it each row attends alone.
        decode: every sequence has one row, and nobody reads what another one writes in this step.
    """

    def __init__(
        self,
        model: Model,
        workspace: Workspace,
        *,
        caches: dict[str, int],
        ints: dict[str, int],
        page_size: int,
        page_stride: int,
        rows: dict[str, int],
        decode: bool,
    ) -> None:
        self._model, self._graph, self._device = model, model.graph, model.device
        self._workspace = workspace
        self._caches, self._ints, self._rows = caches, ints, rows
        self._page_size, self._page_stride = page_size, page_stride
        self._decode = decode
        self._scratch: dict[str, tuple[int, int]] = {}
        self._half = {name for name in model.half if self._tensor_cores(self._count(self._graph.values[name]))}
        self.launches: list[Launch] = []
        self.places: dict[str, Place] = {}
        for value in self._graph.of_kind("input"):
            if value.dtype == "f32":
                self._make(value.name)
        self._lower()

    # --- values -------------------------------------------------------------------------------------------------------

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

    def _count(self, value: Value) -> int:
        rows = value.shape[0]
        return rows if isinstance(rows, int) else self._rows[rows]

    def _tensor_cores(self, rows: int) -> bool:
        return rows > SMALL_ROWS and self._device.capability >= 80

    def _make_half(self, name: str) -> Place:
        """A place for a value that only tensor cores read."""
        value = self._graph.values[name]
        width = _width(value)
        block = self._workspace.take(self._count(value) * width * 2)
        block.users += 1
        self.places[name] = Place(block.address, width, block, half=True)
        return self.places[name]

    def _make(self, *names: str) -> Place:
        """A place for values side by side in each row; returns that of the first."""
        values = [self._graph.values[name] for name in names]
        widths = [_width(value) for value in values]
        stride = sum(widths)
        block = self._workspace.take(self._count(values[0]) * stride * 4)
        at = block.address
        for name, width in zip(names, widths, strict=True):
            self.places[name] = Place(at, stride, block)
            block.users += 1
            at += width * 4
        return self.places[names[0]]

    def _launch(self, kernel: Kernel, grid: tuple[int, int, int], **args: float) -> None:
        self.launches.append(Launch(kernel, grid, kernel.pack(**args)))

    def _once(self, what: str, nbytes: int) -> int:
        """Scratch memory that all layers share."""
        address, size = self._scratch.get(what, (0, 0))
        if size < nbytes:
            address = self._workspace.keep(nbytes)
            self._scratch[what] = (address, nbytes)
        return address

    # --- items --------------------------------------------------------------------------------------------------------

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
        width = _width(self._graph.values[node.inputs[1]], 0)
        groups, rows = _width(value) // width, self._count(value)
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
            eps=_number(node, "eps"),
            rows=rows,
            groups=groups,
        )

    def _rope(self, node: Node) -> None:
        value = self._graph.values[node.outputs[0]]
        x, out = self.places[node.inputs[0]], self._make(node.outputs[0])
        self._launch(
            kernels.rope(int(_number(node, "head_dim"))),
            (self._count(value), 1, 1),
            x=x.address,
            frequencies=self._model.vector((node.inputs[2],)),
            positions=self._ints[node.inputs[1]],
            out=out.address,
            x_stride=x.stride,
            out_stride=out.stride,
            width=_width(value),
            scale=_number(node, "scale"),
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

    def _attention(self, node: Node) -> None:
        q, out = self.places[node.inputs[0]], self._make(node.outputs[0])
        self._attend(node, out, fused=False, normed=False, q=q.address, q_stride=q.stride)

    def _fused_attention(self, item: Attention) -> None:
        node = item.node
        state, head_dim, heads = self._cache(item.write.inputs[0])
        q, k, v = (self.places[name] for name in (item.q, item.k, item.v))
        assert k.stride == v.stride
        args: dict[str, float] = {
            "q": q.address,
            "k": k.address,
            "v": v.address,
            "frequencies": self._model.vector((item.rope.inputs[2],)),
            "slots": self._ints[item.write.inputs[3]],
            "q_stride": q.stride,
            "kv_stride": k.stride,
            "rope_scale": _number(item.rope, "scale"),
        }
        if item.norms is not None:
            args["q_norm"], args["k_norm"] = (self._model.vector((norm.inputs[1],)) for norm in item.norms)
            args["eps"] = _number(item.norms[0], "eps")
        name = node.outputs[0]
        out = self._make_half(name) if name in self._half else self._make(name)
        if self._decode:
            self._attend(node, out, fused=True, normed=item.norms is not None, **args)
            return
        rows, width = self._count(self._graph.values[name]), _width(self._graph.values[name])
        group = width // (heads * head_dim)
        flash = self._rows.get("tiles", 0) > 0 and kernels.has_flash(state.dtype, head_dim, group)
        ready = self._workspace.take(rows * width * (2 if flash else 4))
        self._launch(
            kernels.prepare_rows(
                state.dtype, head_dim=head_dim, heads=heads, group=group, normed=item.norms is not None, half=flash
            ),
            (rows, heads * (group + 2), 1),
            cache=self._caches[state.name],
            positions=self._ints[node.inputs[2]],
            out=ready.address,
            out_stride=width,
            scale=_number(node, "scale"),
            **args,
        )
        if flash:
            self._flash(node, ready.address, out)
        else:
            self._attend(node, out, fused=False, normed=False, q=ready.address, q_stride=width)
        self._workspace.give(ready)

    def _flash(self, node: Node, queries: int, out: Place) -> None:
        state, head_dim, heads = self._cache(node.inputs[1])
        width = _width(self._graph.values[node.outputs[0]])
        kernel = kernels.flash(
            state.dtype,
            head_dim=head_dim,
            heads=heads,
            group=width // (heads * head_dim),
            page_size=self._page_size,
            window=_window(node),
            half=out.half,
        )
        self._launch(
            kernel,
            (self._rows["tiles"], heads, 1),
            q=queries,
            cache=self._caches[state.name],
            tiles=self._ints["tiles"],
            pages=self._ints[node.inputs[5]],
            out=out.address,
            q_stride=width,
            out_stride=out.stride,
            page_stride=self._page_stride,
        )

    def _attend(self, node: Node, out: Place, *, fused: bool, normed: bool, **args: float) -> None:
        state, head_dim, heads = self._cache(node.inputs[1])
        value = self._graph.values[node.outputs[0]]
        rows, group = self._count(value), _width(value) // (heads * head_dim)
        parts = heads * -(-group // kernels.heads_at_once(state.dtype, group))
        splits = min(32, max(1, 2 * self._device.multiprocessors // (rows * parts)))
        self._launch(
            kernels.attend(
                state.dtype,
                head_dim=head_dim,
                heads=heads,
                group=group,
                splits=splits,
                page_size=self._page_size,
                window=_window(node),
                fused=fused,
                normed=normed,
                half=out.half,
            ),
            (splits, parts, rows),
            **{"slots": 0, **args},
            cache=self._caches[state.name],
            positions=self._ints[node.inputs[2]],
            sequence=self._ints["sequence"],
            pages=self._ints[node.inputs[5]],
            out=out.address,
            parts=self._once("parts", rows * heads * group * splits * (head_dim + 2) * 4) if splits > 1 else 0,
            tickets=self._once("tickets", rows * parts * 4),
            out_stride=out.stride,
            page_stride=self._page_stride,
            scale=_number(node, "scale"),
        )

    def _cache(self, name: str) -> tuple[Value, int, int]:
        state = self._graph.state_of(name)
        heads, head_dim = state.shape[2:]
        assert isinstance(heads, int) and isinstance(head_dim, int)
        return state, head_dim, heads

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
            width=_width(value),
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
            width=_width(value),
        )

    # --- products -----------------------------------------------------------------------------------------------------

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
            eps=_number(item.norm, "eps") if item.norm is not None else 0.0,
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
            eps=_number(item.norm, "eps") if item.norm is not None else 0.0,
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


def _width(value: Value, axis: int = 1) -> int:
    width = value.shape[axis]
    assert isinstance(width, int), f"{value} has no fixed width"
    return width


def _number(node: Node, name: str) -> float:
    value = node.attrs[name]
    assert isinstance(value, int | float), f"{node}: {name} is {value!r}"
    return float(value)


def _window(node: Node) -> int | None:
    window = node.attrs["window"]
    return None if window is None else int(window)
