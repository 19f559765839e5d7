"""Which nodes of a graph a native backend runs together: one decision for the cpu and the cuda backend.

Products that share an input become one instruction: the norm in front of it and the rounding of it are done once, and
what follows a product alone is done while its result is at hand: an addition, or silu of one product times another.
No result changes by it.  Knows the graph and which products take their input alike; no buffers and no kernels.

    for item in plan(graph, kind_of): ...      # Node or Products, in an order that can be run
    normed_ropes(graph, items)                 # heads turned as they are normalised; cuda does more in its own plan.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from finial.graph import Graph, Node


@dataclass
class Product:
    """One matrix product and what is done to its result."""

    node: Node
    output: str
    up: Node | None = None  # the output is silu(node) * up
    add: str | None = None  # a value added to the result

    @property
    def nodes(self) -> Iterator[Node]:
        """The products."""
        yield self.node
        if self.up is not None:
            yield self.up


@dataclass
class Products:
    """Products of one input, normalised first where `norm` says so."""

    x: str
    norm: Node | None
    products: list[Product] = field(default_factory=list)

    @property
    def inputs(self) -> list[str]:
        """Values that it reads, weights included."""
        names = [self.x, *(self.norm.inputs[1:] if self.norm else [])]
        for product in self.products:
            names += [name for node in product.nodes for name in node.inputs[1:]]
            names += [product.add] if product.add else []
        return names

    @property
    def outputs(self) -> list[str]:
        """Values that it makes."""
        return [product.output for product in self.products]


@dataclass
class NormedRope:
    """rope of heads that are normalised first, each on its own."""

    norm: Node
    rope: Node

    @property
    def inputs(self) -> list[str]:
        """Values that it reads, weights included."""
        return [*self.norm.inputs, *self.rope.inputs[1:]]

    @property
    def outputs(self) -> list[str]:
        """Values that it makes."""
        return list(self.rope.outputs)


def normed_ropes(graph: Graph, items: list[Node | Products]) -> list[Node | Products | NormedRope]:
    """The items, a norm of heads that one rope alone reads together with it: a head is read and written once."""
    readers: dict[str, list[Node | Products]] = {}
    for item in items:
        for name in item.inputs:
            readers.setdefault(name, []).append(item)
    norms: dict[int, Node] = {}  # by the rope that reads it
    for item in items:
        if not isinstance(item, Node) or item.op != "rms_norm" or item.outputs[0] in graph.outputs:
            continue
        reader, *others = readers.get(item.outputs[0], [None])
        if isinstance(reader, Node) and not others and reader.op == "rope" and reader.inputs[0] == item.outputs[0]:
            width, half = graph.values[item.inputs[1]].shape[0], graph.values[reader.inputs[2]].shape[0]
            if isinstance(half, int) and width == 2 * half:
                norms[id(reader)] = item
    gone = {id(norm) for norm in norms.values()}
    return [
        NormedRope(norms[id(item)], item) if isinstance(item, Node) and id(item) in norms else item
        for item in items
        if id(item) not in gone
    ]


def plan(graph: Graph, kind_of: Callable[[str], str]) -> list[Node | Products]:
    """The graph's nodes in order, products gathered.

    Args:
        kind_of: by a weight's name, how its products take their input: those of one kind run together.  "": as it is,
            with weights where they lie; such products gate none.
    """
    users: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    makers = {name: node for node in graph.nodes for name in node.outputs}
    kept = set(graph.outputs)
    known = {name for name, value in graph.values.items() if name not in makers}
    gone: set[int] = set()  # nodes that run within another item
    items: list[Node | Products] = []

    def only_user(name: str, op: str) -> Node | None:
        found = users.get(name, [])
        return found[0] if len(found) == 1 and found[0].op == op and name not in kept else None

    def fused_norm(name: str) -> Node | None:
        """The norm that makes a value for products alone, over whole rows."""
        norm = makers.get(name)
        if norm is None or norm.op != "rms_norm" or name in kept:
            return None
        whole = graph.values[norm.inputs[1]].shape[0] == graph.values[name].shape[1]
        return norm if whole and all(user.op == "linear" for user in users[name]) else None

    def gather(first: Node) -> Products:
        x, kind = first.inputs[0], kind_of(first.inputs[1])
        norm = fused_norm(x)
        group = Products(norm.inputs[0] if norm else x, norm)
        same = [n for n in users[x] if n.op == "linear" and n.inputs[0] == x and kind_of(n.inputs[1]) == kind]
        for node in same:
            if id(node) in gone:
                continue
            gone.add(id(node))
            product = Product(node, node.outputs[0])
            gated = only_user(product.output, "silu_mul") if kind else None
            if gated is not None and gated.inputs[0] == product.output != gated.inputs[1]:
                up = makers.get(gated.inputs[1])
                if up is not None and any(up is n for n in same) and id(up) not in gone and only_user(*gated_by(up)):
                    product.up, product.output = up, gated.outputs[0]
                    gone.update((id(up), id(gated)))
            added = only_user(product.output, "add")
            if added is not None and id(added) not in gone:
                other = next((name for name in added.inputs if name != product.output), product.output)
                if other in known:
                    product.add, product.output = other, added.outputs[0]
                    gone.add(id(added))
            group.products.append(product)
        return group

    def gated_by(node: Node) -> tuple[str, str]:
        return node.outputs[0], "silu_mul"

    for node in graph.nodes:
        if id(node) in gone:
            continue
        if node.op == "linear":
            group = gather(node)
            items.append(group)
            known.update(group.outputs)
        elif node.op == "rms_norm" and users.get(node.outputs[0]) and fused_norm(node.outputs[0]) is node:
            continue
        else:
            items.append(node)
            known.update(node.outputs)
    return items
