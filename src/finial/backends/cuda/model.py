"""A graph with its weights on the device, independent of how many rows a step has.

model = Model(graph, weights, device)
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from finial.backends.cuda.device import Device, free_all
from finial.backends.cuda.kernels import FORMATS
from finial.backends.cuda.plan import Attention, Item, joined, plan, weight_names
from finial.backends.cuda.weights import pack_matrix
from finial.backends.fuse import Products
from finial.errors import BackendError
from finial.formats import Tensor
from finial.graph import Graph


@dataclass(frozen=True)
class Matrix:
    """A matrix [out, k] on the device: addresses of its rows, scales and bias (0: none)."""

    format: str
    out: int
    k: int
    data: int
    scales: int
    bias: int


class Model:
    """See the module.

    Attributes:
        items: what runs, in order.
        formats: of matrices, by name.
        exact: all matrices are f32, so that nothing is rounded for tensor cores, in attention neither.
        picked: outputs of select_rows that are read by products alone.
        half: values that are made by attention or by a gated product and read by nothing but products that round
            them to bf16 anyway where they run on tensor cores.
        nbytes: of all weights on the device.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor], device: Device) -> None:
        self.graph, self.device = graph, device
        self._weights = weights
        self.formats = {
            value.name: _format(value.name, weights[value.name])
            for value in graph.of_kind("weight")
            if len(value.shape) == 2
        }
        self.exact = set(self.formats.values()) == {"f32"}
        self.items: list[Item] = plan(graph, self.formats)
        readers: dict[str, list[Item]] = {}
        for item in self.items:
            for name in item.inputs:
                readers.setdefault(name, []).append(item)
        self.picked = {
            node.outputs[0]
            for node in graph.nodes
            if node.op == "select_rows"
            and node.outputs[0] not in graph.outputs
            and all(isinstance(r, Products) and r.x == node.outputs[0] for r in readers.get(node.outputs[0], []))
            and all(
                p.add != node.outputs[0] for r in readers.get(node.outputs[0], []) for p in getattr(r, "products", [])
            )
        }
        self.half = self._half_values(readers)
        self.nbytes = 0
        self._addresses: list[int] = []
        weakref.finalize(self, free_all, device, self._addresses).atexit = False
        self._matrices: dict[tuple[tuple[str, ...], tuple[str, ...]], Matrix] = {}
        self._vectors: dict[tuple[str, ...], int] = {}
        self._upload()
        self._weights = {}

    def _half_values(self, readers: Mapping[str, list[Item]]) -> set[str]:
        made = {item.node.outputs[0] for item in self.items if isinstance(item, Attention)}
        for item in self.items:
            if isinstance(item, Products):
                gated = (p for p in item.products if p.up is not None and self.formats[p.node.inputs[1]] != "f32")
                made |= {product.output for product in gated}

        def rounds(item: Item, name: str) -> bool:
            return (
                isinstance(item, Products)
                and item.x == name
                and item.norm is None
                and all(p.add != name and self.formats[n.inputs[1]] != "f32" for p in item.products for n in p.nodes)
            )

        return {
            name
            for name in made - set(self.graph.outputs)
            if int(self.graph.values[name].shape[1]) % 64 == 0 and all(rounds(r, name) for r in readers.get(name, []))
        }

    def matrix(self, names: tuple[str, ...], biases: tuple[str, ...] = ()) -> Matrix:
        """The matrices of these names as one, rows in turn where they are a gate and what it gates."""
        return self._matrices[names, biases]

    def vector(self, names: tuple[str, ...]) -> int:
        """The address of float32 vectors end to end."""
        return self._vectors[names]

    def close(self) -> None:
        """Give the device's memory back now."""
        free_all(self.device, self._addresses)

    def _upload(self) -> None:
        for item in self.items:
            if isinstance(item, Products):
                if item.norm is not None:
                    self._add_vector((item.norm.inputs[1],))
                for members in joined(item):
                    gated = members[0].up is not None
                    self._add_matrix(weight_names(members), weight_names(members, 2), interleave=gated)
            elif isinstance(item, Attention):
                self._add_vector((item.rope.inputs[2],))
                for norm in item.norms or ():
                    self._add_vector((norm.inputs[1],))
            elif item.op == "embed":
                self._add_matrix((item.inputs[1],), (), interleave=False)
            elif item.op in ("rms_norm", "rope"):
                self._add_vector((item.inputs[-1],))

    def _add_matrix(self, names: tuple[str, ...], biases: tuple[str, ...], *, interleave: bool) -> None:
        if (names, biases) in self._matrices:
            return
        tensors = [self._weights[name] for name in names]
        format, out, k = self.formats[names[0]], sum(t.shape[0] for t in tensors), tensors[0].shape[1]
        data, scales = pack_matrix(tensors, format, interleave)
        bias = 0
        if biases:
            rows = [
                np.zeros(t.shape[0], np.float32) if not name else self._weights[name].decode().reshape(-1)
                for name, t in zip(biases, tensors, strict=True)
            ]
            bias = self._place(np.stack(rows, axis=1).reshape(-1) if interleave else np.concatenate(rows))
        self._matrices[names, biases] = Matrix(
            format, out, k, self._place(data), self._place(scales) if scales.size else 0, bias
        )

    def _add_vector(self, names: tuple[str, ...]) -> None:
        if names not in self._vectors:
            self._vectors[names] = self._place(
                np.concatenate([self._weights[name].decode().reshape(-1) for name in names]).astype(np.float32)
            )

    def _place(self, array: np.ndarray) -> int:
        address = self.device.allocate(array.nbytes)
        self._addresses.append(address)
        self.nbytes += array.nbytes
        self.device.upload(address, np.ascontiguousarray(array))
        return address


def _format(name: str, tensor: Tensor) -> str:
    if tensor.format not in FORMATS:
        others = ", ".join(format for format in FORMATS if format != "q8_0")
        raise BackendError(
            f"the cuda backend has no kernel for {name} in {tensor.format}",
            fix=f"re-encode the weights as they are loaded: --format q8_0 (or {others})",
        )
    return tensor.format
