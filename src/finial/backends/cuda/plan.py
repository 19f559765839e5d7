"""Which nodes of a graph become one kernel: products as on the CPU, and attention with what prepares it.

Knows graphs; nothing of kernels or devices.

    for item in plan(graph, formats): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finial.backends import fuse
from finial.backends.fuse import Product, Products
from finial.graph import Graph, Node


@dataclass
class Attention:
    """attention(rope(norm?(q)), cache_write(cache, rope(norm?(k)), v)) of one layer.

    Attributes:
        q, k, v: values before head norm and rotation.
        norms: the two head-norm nodes (of q, of k), or None.
        rope: the rotation of q; that of k has the same constants.
        write: the cache_write node.
    """

    node: Node
    q: str
    k: str
    v: str
    norms: tuple[Node, Node] | None
    rope: Node
    write: Node

    @property
    def inputs(self) -> list[str]:
        """Values that it reads, weights included."""
        norms = [node.inputs[1] for node in self.norms] if self.norms else []
        return [self.q, self.k, self.v, *norms, *self.rope.inputs[1:], *self.write.inputs, *self.node.inputs[2:]]

    @property
    def outputs(self) -> list[str]:
        """Values that it makes; the cache's next version is one."""
        return [*self.node.outputs, *self.write.outputs]


Item = Node | Products | Attention


def plan(graph: Graph, formats: Mapping[str, str]) -> list[Item]:
    """The graph's nodes in order, gathered.

    Args:
        formats: by a matrix's name; only products of one format share a kernel.
    """
    items = fuse.plan(graph, lambda weight: f"weights in {formats[weight]}")
    fused = {id(node): found for node in graph.nodes if node.op == "attention" and (found := _attention(graph, node))}
    taken: set[int] = set()
    for found in fused.values():
        rope_k = _maker(graph, found.write.inputs[1])
        taken |= {id(node) for node in (found.rope, rope_k, found.write, *(found.norms or ())) if node}
    out: list[Item] = []
    for item in items:
        if isinstance(item, Node) and id(item) in fused:
            out.append(fused[id(item)])
        elif id(item) not in taken:
            out.append(item)
    return out


def _attention(graph: Graph, node: Node) -> Attention | None:
    write, rope_q = _maker(graph, node.inputs[1]), _maker(graph, node.inputs[0])
    if write is None or rope_q is None or write.op != "cache_write" or rope_q.op != "rope":
        return None
    rope_k = _maker(graph, write.inputs[1])
    if rope_k is None or rope_k.op != "rope" or graph.values[write.inputs[0]].kind != "state":
        return None
    same = rope_k.inputs[1:] == rope_q.inputs[1:] and dict(rope_k.attrs) == dict(rope_q.attrs)
    if not same or rope_q.inputs[1] != node.inputs[2]:
        return None
    alone = [write.outputs[0], rope_q.outputs[0], rope_k.outputs[0]]
    q, k, norms = rope_q.inputs[0], rope_k.inputs[0], None
    norm_q, norm_k = _head_norm(graph, q, node), _head_norm(graph, k, node)
    if norm_q is not None and norm_k is not None and norm_q.attrs["eps"] == norm_k.attrs["eps"]:
        alone += [q, k]
        q, k, norms = norm_q.inputs[0], norm_k.inputs[0], (norm_q, norm_k)
    if any(_uses(graph, name) != 1 for name in alone):
        return None
    return Attention(node, q, k, write.inputs[2], norms, rope_q, write)


def _head_norm(graph: Graph, name: str, attention: Node) -> Node | None:
    node = _maker(graph, name)
    if node is None or node.op != "rms_norm":
        return None
    return node if graph.values[node.inputs[1]].shape == (attention.attrs["head_dim"],) else None


def _maker(graph: Graph, name: str) -> Node | None:
    return next((node for node in graph.nodes if name in node.outputs), None)


def _uses(graph: Graph, name: str) -> int:
    return sum(node.inputs.count(name) for node in graph.nodes) + graph.outputs.count(name)


def joined(item: Products) -> Iterator[list[Product]]:
    """The products of one kernel each: plain ones side by side, gated ones and those with an addition alone."""
    plain = [product for product in item.products if product.up is None and product.add is None]
    if plain:
        yield plain
    yield from ([product] for product in item.products if product.up is not None or product.add is not None)


def weight_names(members: Sequence[Product], which: int = 1) -> tuple[str, ...]:
    """Their matrices' names (which = 1) or biases' (2; "" where a product has none), () when nobody has one."""
    nodes = [node for member in members for node in member.nodes]
    names = tuple(node.inputs[which] if len(node.inputs) > which else "" for node in nodes)
    return names if any(names) else ()
