"""What lowering any item needs: rows of values, their places, scratch memory, and the list of launches.

Knows graphs and memory; not which kernel runs what (`lower.py`, `lower_attention.py`, `lower_products.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from finial.backends.cuda.device import Launch
from finial.backends.cuda.kernels import Kernel
from finial.backends.cuda.model import Model
from finial.backends.cuda.workspace import Place, Workspace
from finial.graph import Node, Value

SMALL_ROWS = 8  # up to this many rows a product is a matvec; beyond, tiles of tensor cores


class Values(ABC):
    """See `finial.backends.cuda.lower.Lowering`."""

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

    @abstractmethod
    def _lower(self) -> None:
        """Launch every item."""

    def _count(self, value: Value) -> int:
        rows = value.shape[0]
        return rows if isinstance(rows, int) else self._rows[rows]

    def _tensor_cores(self, rows: int) -> bool:
        return rows > SMALL_ROWS and self._device.capability >= 80

    def _make_half(self, name: str) -> Place:
        """A place for a value that only tensor cores read."""
        value = self._graph.values[name]
        width = width_of(value)
        block = self._workspace.take(self._count(value) * width * 2)
        block.users += 1
        self.places[name] = Place(block.address, width, block, half=True)
        return self.places[name]

    def _make(self, *names: str) -> Place:
        """A place for values side by side in each row; returns that of the first."""
        values = [self._graph.values[name] for name in names]
        widths = [width_of(value) for value in values]
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

    def _cache(self, name: str) -> tuple[Value, int, int]:
        state = self._graph.state_of(name)
        heads, head_dim = state.shape[2:]
        assert isinstance(heads, int) and isinstance(head_dim, int)
        return state, head_dim, heads


def width_of(value: Value, axis: int = 1) -> int:
    """A dimension that is no symbol."""
    width = value.shape[axis]
    assert isinstance(width, int), f"{value} has no fixed width"
    return width


def number(node: Node, name: str) -> float:
    """An attribute as a float."""
    value = node.attrs[name]
    assert isinstance(value, int | float), f"{node}: {name} is {value!r}"
    return float(value)


def window(node: Node) -> int | None:
    """How many positions attention looks back; None: all."""
    width = node.attrs["window"]
    return None if width is None else int(width)
