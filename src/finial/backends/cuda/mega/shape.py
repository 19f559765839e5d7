"""Which graphs the megakernel runs: a decoder whose layers are all alike, by its numbers and its weights' names.

Knows planned graphs; nothing of blocks, kernels and devices.

    recognised = recognise(graph, plan(graph, formats), formats)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finial.backends.cuda.kernels import FORMATS
from finial.backends.cuda.plan import Attention, Item
from finial.backends.fuse import Product, Products
from finial.graph import Graph, Node

STREAMED = ("bf16", "fp8", "q8_0")  # formats of matrices that have a unit; see stream.py


class Unsuited(Exception):
    """Why the megakernel does not run something; the graph of kernels does."""


@dataclass(frozen=True)
class MegaShape:
    """The numbers of a decoder.

    Attributes:
        width: of the residual stream.
        heads, kv_heads, head_dim, ffn, vocab: as in a model's configuration.
        format: of all matrices that are streamed (everything but the embedding).
        embed: format of the embedding.
        cache: what keys and values are kept in.
        window: positions that attention sees, None: all.
        eps: of every norm.
        rope_scale: factor of the rotation; scale: of the scores.
        normed: queries and keys are normed by head; bias: queries, keys and values have one.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    format: str = "bf16"
    embed: str = "bf16"
    cache: str = "bf16"
    window: int | None = None
    eps: float = 1e-6
    rope_scale: float = 1.0
    scale: float = 1.0
    normed: bool = False
    bias: bool = False

    @property
    def group(self) -> int:
        """Query heads of each key/value head."""
        return self.heads // self.kv_heads

    @property
    def qkv_rows(self) -> int:
        """Rows of queries, keys and values together."""
        return self.kv_heads * (self.group + 2) * self.head_dim


@dataclass(frozen=True)
class LayerNames:
    """The weights of a layer; "" where there is none.  `biases`, `head_norms`: of q, k (and v)."""

    attn_norm: str
    qkv: tuple[str, str, str]
    biases: tuple[str, str, str]
    head_norms: tuple[str, str]
    cache: str
    output: str
    mlp_norm: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Recognised:
    """A graph that the megakernel runs; attributes not named by `MegaShape` are names of weights and inputs."""

    shape: MegaShape
    layers: tuple[LayerNames, ...]
    embed: str
    final_norm: str
    head: str
    frequencies: str
    tokens: str
    positions: str
    pages: str


def recognise(graph: Graph, items: Sequence[Item], formats: Mapping[str, str]) -> Recognised:
    """Names and numbers of a planned graph.

    Args:
        items: of `plan.plan`.
        formats: by a matrix's name.
    Raises:
        Unsuited: it is something else; says what.
    """
    return _Reader(graph, items, formats).read()


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsuited(reason)


class _Reader:
    def __init__(self, graph: Graph, items: Sequence[Item], formats: Mapping[str, str]) -> None:
        self._graph, self._items, self._formats = graph, list(items), formats
        self._eps: set[float] = set()

    def read(self) -> Recognised:
        items, graph = self._items, self._graph
        embed = items[0] if items else None
        _need(isinstance(embed, Node) and embed.op == "embed", "the graph does not begin with an embedding")
        assert isinstance(embed, Node)
        tail = items[-1]
        body, residual = items[1:-1], embed.outputs[0]
        wanted = ""
        if body and isinstance(body[-1], Node) and body[-1].op == "select_rows":
            wanted = body[-1].outputs[0]
            body = body[:-1]
        _need(len(body) >= 5 and len(body) % 5 == 0, "the graph is no chain of attention and gated layers")
        layers, attentions = [], []
        for at in range(0, len(body), 5):
            names, attention, residual = self._layer(body[at : at + 5], residual)
            layers.append(names)
            attentions.append(attention)
        if wanted:
            _need(next(iter(items[-2].inputs)) == residual, "the rows for the head are not those of the last layer")
            residual = wanted
        head, norm = self._plain(tail, residual, "the head")
        _need(head.add is None, "something is added to the logits")
        _need(len(head.node.inputs) == 2, "the head has a bias")
        _need(graph.outputs == [head.output], "the graph has outputs besides logits")
        first = attentions[0]
        return Recognised(
            self._shape(embed, layers, attentions, head),
            tuple(layers),
            embed=embed.inputs[1],
            final_norm=norm,
            head=head.node.inputs[1],
            frequencies=first.rope.inputs[2],
            tokens=embed.inputs[0],
            positions=first.node.inputs[2],
            pages=first.node.inputs[5],
        )

    def _layer(self, items: Sequence[Item], residual: str) -> tuple[LayerNames, Attention, str]:
        qkv, attention, output, gated, down = items
        _need(isinstance(attention, Attention), "a layer's attention is not of one piece")
        assert isinstance(attention, Attention)
        _need(isinstance(qkv, Products) and qkv.x == residual, "queries, keys and values do not share their input")
        assert isinstance(qkv, Products)
        _need(qkv.norm is not None, "a layer does not begin with a norm")
        assert qkv.norm is not None
        self._eps.add(_number(qkv.norm, "eps"))
        by_output = {p.output: p for p in qkv.products if p.up is None and p.add is None}
        names = (attention.q, attention.k, attention.v)
        _need(len(qkv.products) == 3 and by_output.keys() == set(names), "attention reads something else than q, k, v")
        nodes = [by_output[name].node for name in names]
        o, _ = self._plain(output, attention.node.outputs[0], "the product after attention", normed=False)
        _need(o.add == residual, "the residual is not added after attention")
        _need(len(o.node.inputs) == 2, "the product after attention has a bias")
        _need(isinstance(gated, Products) and gated.x == o.output and len(gated.products) == 1, "a layer has no gate")
        assert isinstance(gated, Products)
        gate = gated.products[0]
        _need(gated.norm is not None and gate.up is not None and gate.add is None, "a layer has no normed gate")
        assert gated.norm is not None and gate.up is not None
        _need(len(gate.node.inputs) == 2 and len(gate.up.inputs) == 2, "gate and up have biases")
        self._eps.add(_number(gated.norm, "eps"))
        d, _ = self._plain(down, gate.output, "the product after the gate", normed=False)
        _need(d.add == o.output, "the residual is not added after the gate")
        _need(len(d.node.inputs) == 2, "the product after the gate has a bias")
        norms = ("", "")
        if attention.norms is not None:
            self._eps |= {_number(norm, "eps") for norm in attention.norms}
            norms = (attention.norms[0].inputs[1], attention.norms[1].inputs[1])
        biases = [node.inputs[2] if len(node.inputs) > 2 else "" for node in nodes]
        layer = LayerNames(
            attn_norm=qkv.norm.inputs[1],
            qkv=(nodes[0].inputs[1], nodes[1].inputs[1], nodes[2].inputs[1]),
            biases=(biases[0], biases[1], biases[2]),
            head_norms=norms,
            cache=attention.write.inputs[0],
            output=o.node.inputs[1],
            mlp_norm=gated.norm.inputs[1],
            gate=gate.node.inputs[1],
            up=gate.up.inputs[1],
            down=d.node.inputs[1],
        )
        return layer, attention, d.output

    def _plain(self, item: Item, x: str, what: str, *, normed: bool = True) -> tuple[Product, str]:
        """The one product of x, and the weight of the norm before it."""
        _need(isinstance(item, Products) and item.x == x and len(item.products) == 1, f"{what} is not of one piece")
        assert isinstance(item, Products)
        _need((item.norm is not None) == normed and item.products[0].up is None, f"{what} is not of one piece")
        if item.norm is None:
            return item.products[0], ""
        self._eps.add(_number(item.norm, "eps"))
        return item.products[0], item.norm.inputs[1]

    def _shape(
        self, embed: Node, layers: Sequence[LayerNames], attentions: Sequence[Attention], head: Product
    ) -> MegaShape:
        graph = self._graph
        kinds = set()
        for attention in attentions:
            state = graph.state_of(attention.node.inputs[1])
            kinds.add(
                (
                    (attention.node.attrs["window"], _number(attention.node, "scale")),
                    (_number(attention.rope, "scale"), attention.rope.inputs[1:], attention.node.inputs[2:]),
                    (state.dtype, state.shape, attention.norms is not None),
                )
            )
        windows = {attention.node.attrs["window"] for attention in attentions}
        _need(len(windows) == 1, "layers have different windows")
        _need(len(kinds) == 1, "layers attend in different ways")
        _need(len(self._eps) == 1, "norms have different eps")
        ((window, scale), (rope_scale, _, _), (cache, state_shape, normed)) = kinds.pop()
        matrices = [name for layer in layers for name in (*layer.qkv, layer.output, layer.gate, layer.up, layer.down)]
        matrices.append(head.node.inputs[1])
        formats = {self._formats[name] for name in matrices}
        _need(len(formats) == 1, f"matrices have several formats: {', '.join(sorted(formats))}")
        format = formats.pop()
        _need(format in STREAMED, f"weights in {format} are not streamed, only {', '.join(STREAMED)}")
        embed_format = self._formats[embed.inputs[1]]
        _need(embed_format in FORMATS, f"an embedding in {embed_format}")
        vocab, width = _ints(graph, embed.inputs[1])
        shape = MegaShape(
            layers=len(layers),
            width=width,
            heads=_ints(graph, layers[0].qkv[0])[0] // int(state_shape[3]),
            kv_heads=int(state_shape[2]),
            head_dim=int(state_shape[3]),
            ffn=_ints(graph, layers[0].gate)[0],
            vocab=_ints(graph, head.node.inputs[1])[0],
            format=format,
            embed=embed_format,
            cache=cache,
            window=None if window is None else int(window),
            eps=self._eps.pop(),
            rope_scale=rope_scale,
            scale=scale,
            normed=normed,
            bias=any(name for layer in layers for name in layer.biases),
        )
        _need(shape.head_dim % 8 == 0, f"head_dim is {shape.head_dim}, no multiple of 8")
        _need(shape.width % 4 == 0 and shape.ffn % 4 == 0, "widths are no multiples of 4")
        _need(shape.vocab == vocab, f"{shape.vocab} logits for {vocab} tokens")
        rows = {tuple(_ints(graph, name) for name in (*layer.qkv, layer.gate)) for layer in layers}
        _need(len(rows) == 1, "layers differ in size")
        return shape


def _ints(graph: Graph, name: str) -> tuple[int, int]:
    out, k = graph.values[name].shape
    assert isinstance(out, int) and isinstance(k, int)
    return out, k


def _number(node: Node, name: str) -> float:
    value = node.attrs[name]
    assert isinstance(value, int | float), f"{node}: {name} is {value!r}"
    return float(value)
