"""A model as a graph: values, nodes, and the table of operations with their shape rules.

A graph runs over *ragged rows*: one step carries the new token rows of all sequences end to end, so
prefill, decode, chunked prefill and any mixture are the same graph.  Sizes may be symbols: `T` rows in
this step, `B` sequences, `B1` = B + 1, `P` pages per sequence, `R` rows whose logits are wanted, `S`
cache slots.  Weights and states are values known by name; a graph holds no data.

Knows nothing of models, files or devices.

    graph = Graph("tiny")
    tokens = graph.input("tokens", ("T",), "i32")
    rows = graph.apply("embed", tokens, graph.weight("model.embed_tokens.weight", (1024, 64)))
    graph.output(rows)
    print(graph.text())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

Dim = int | str
Shape = tuple[Dim, ...]
Attr = int | float | str | bool | None

KINDS = ("input", "weight", "state", "temp")
DTYPES = ("f32", "bf16", "q8_0", "i32")  # q8_0: caches only, in blocks of 32 along head_dim


@dataclass(frozen=True)
class Value:
    """An array with a name: `kind` says where it comes from (input, weight, state, or a node: temp)."""

    name: str
    shape: Shape
    dtype: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name} : {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Node:
    """One operation: input and output value names, and its constants."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Attr] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        arguments = [*self.inputs, *(f"{name}={value!r}" for name, value in self.attrs.items())]
        return f"{', '.join(self.outputs)} = {self.op}({', '.join(arguments)})"


class GraphError(AssertionError):
    """A graph that does not fit together: our own mistake, never a user's."""


@dataclass(frozen=True)
class Op:
    """An operation's contract: names of inputs (the last `optional` may be absent), attributes, shape rule.

    `shape(inputs, attrs)` returns the output's (shape, dtype) or raises GraphError.
    """

    inputs: tuple[str, ...]
    attrs: tuple[str, ...]
    shape: Callable[[Sequence[Value], Mapping[str, Attr]], tuple[Shape, str]]
    optional: int = 0
    doc: str = ""


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


def _multiple(dim: Dim, of: Dim, what: str) -> None:
    _need(
        isinstance(dim, int) and isinstance(of, int) and of > 0 and dim % of == 0,
        f"{what}: {dim} is no multiple of {of}",
    )


def _rows(value: Value) -> tuple[Dim, Dim]:
    _need(len(value.shape) == 2 and value.dtype == "f32", f"{value} must be f32 rows [N, D]")
    return value.shape[0], value.shape[1]


def _vector(value: Value, size: Dim, dtype: str) -> None:
    _need(value.shape == (size,) and value.dtype == dtype, f"{value} must be {dtype}[{size}]")


def _matrix(value: Value) -> tuple[Dim, Dim]:
    _need(len(value.shape) == 2 and value.kind == "weight", f"{value} must be a weight matrix")
    return value.shape[0], value.shape[1]


def _embed(inputs: Sequence[Value], attrs: Mapping[str, Attr]) -> tuple[Shape, str]:
    tokens, weight = inputs
    _need(len(tokens.shape) == 1, f"{tokens} must be a vector")
    _vector(tokens, tokens.shape[0], "i32")
    return (tokens.shape[0], _matrix(weight)[1]), "f32"


def _linear(inputs: Sequence[Value], attrs: Mapping[str, Attr]) -> tuple[Shape, str]:
    rows, depth = _rows(inputs[0])
    out, into = _matrix(inputs[1])
    _need(depth == into, f"linear: {inputs[0]} does not fit {inputs[1]}")
    if len(inputs) == 3:
        _vector(inputs[2], out, "f32")
    return (rows, out), "f32"


def _rms_norm(inputs: Sequence[Value], attrs: Mapping[str, Attr]) -> tuple[Shape, str]:
    rows, depth = _rows(inputs[0])
    _vector(inputs[1], inputs[1].shape[0], "f32")
    _multiple(depth, inputs[1].shape[0], "rms_norm")
    return (rows, depth), "f32"


def _rope(inputs: Sequence[Value], attrs: Mapping[str, Attr]) -> tuple[Shape, str]:
    rows, depth = _rows(inputs[0])
    head_dim = attrs["head_dim"]
    _need(isinstance(head_dim, int) and head_dim % 2 == 0, f"rope: head_dim {head_dim} is odd")
    assert isinstance(head_dim, int)
    _multiple(depth, head_dim, "rope")
    _vector(inputs[1], rows, "i32")
    _vector(inputs[2], head_dim // 2, "f32")
    return (rows, depth), "f32"


def _cache_write(inputs: Sequence[Value], attrs: Mapping[str, Attr]) -> tuple[Shape, str]:
    cache, keys, values, slots = inputs
    _need(len(cache.shape) == 4 and cache.shape[1] == 2, f"{cache} must be a cache [S, 2, heads, head_dim]")
    rows, depth = _rows(keys)
    heads, head_dim = cache.shape[2], cache.shape[3]
    _need(
        isinstance(heads, int) and isinstance(head_dim, int) and depth == heads * head_dim,
        f"{keys} does not fit {cache}",
    )
    _need(keys.shape == values.shape, f"{keys} and {values} differ")
    if cache.dtype == "q8_0":
        _multiple(head_dim, 32, "cache_write to q8_0")
    _vector(slots, rows, "i32")
    return cache.shape, cache.dtype


def _attention(inputs: Sequence[Value], attrs: Mapping[str, Attr]) -> tuple[Shape, str]:
    queries, cache, positions, starts, lengths, pages = inputs
    rows, depth = _rows(queries)
    _need(len(cache.shape) == 4 and cache.shape[1] == 2, f"{cache} must be a cache [S, 2, heads, head_dim]")
    kv_heads, head_dim = cache.shape[2], cache.shape[3]
    _need(
        attrs["head_dim"] == head_dim and attrs["num_kv_heads"] == kv_heads, f"attention: {dict(attrs)} against {cache}"
    )
    _need(isinstance(kv_heads, int) and isinstance(head_dim, int), f"{cache} must have fixed heads and head_dim")
    assert isinstance(kv_heads, int) and isinstance(head_dim, int)
    _multiple(depth, kv_heads * head_dim, "attention")
    _vector(positions, rows, "i32")
    _vector(starts, "B1", "i32")
    _vector(lengths, "B", "i32")
    _need(pages.shape == ("B", "P") and pages.dtype == "i32", f"{pages} must be i32[B, P]")
    window = attrs["window"]
    _need(window is None or (isinstance(window, int) and window >= 1), f"attention: window {window}")
    return (rows, depth), "f32"


def _same(inputs: Sequence[Value], attrs: Mapping[str, Attr]) -> tuple[Shape, str]:
    _need(inputs[0].shape == inputs[1].shape, f"{inputs[0]} and {inputs[1]} differ")
    _rows(inputs[1])
    return _rows(inputs[0]), "f32"


def _select_rows(inputs: Sequence[Value], attrs: Mapping[str, Attr]) -> tuple[Shape, str]:
    _need(len(inputs[1].shape) == 1 and inputs[1].dtype == "i32", f"{inputs[1]} must be i32[R]")
    return (inputs[1].shape[0], _rows(inputs[0])[1]), "f32"


OPS: Mapping[str, Op] = MappingProxyType(
    {
        "embed": Op(("tokens", "weight"), (), _embed, doc="out[t] = weight[tokens[t]]"),
        "linear": Op(("x", "weight", "bias"), (), _linear, optional=1, doc="out = x · weightᵀ + bias"),
        "rms_norm": Op(
            ("x", "weight"), ("eps",), _rms_norm, doc="each group g of len(weight): g / √(mean(g²) + eps) · weight"
        ),
        "rope": Op(
            ("x", "positions", "frequencies"),
            ("head_dim", "scale"),
            _rope,
            doc="pairs (i, i + head_dim/2) of each head rotated by positions·frequencies[i], cos and sin times scale",
        ),
        "cache_write": Op(
            ("cache", "keys", "values", "slots"),
            (),
            _cache_write,
            doc="cache[slots[t]] = keys[t], values[t], rounded to its dtype",
        ),
        "attention": Op(
            ("queries", "cache", "positions", "starts", "lengths", "pages"),
            ("head_dim", "num_kv_heads", "scale", "window"),
            _attention,
            doc="softmax(scale · q·kᵀ)·v over positions max(0, p - window + 1) … p of the row's own sequence",
        ),
        "silu_mul": Op(("gate", "up"), (), _same, doc="gate / (1 + e^-gate) · up"),
        "add": Op(("a", "b"), (), _same, doc="a + b"),
        "select_rows": Op(("x", "rows"), (), _select_rows, doc="out[r] = x[rows[r]]"),
    }
)


class Graph:
    """Values and nodes in execution order.

    Attributes:
        values: every value by name.
        nodes: in an order in which each input is made before it is used.
        outputs: names of the values that `run` returns, in order.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.outputs: list[str] = []
        self._makers: dict[str, Node] = {}  # output value -> the node that makes it

    def input(self, name: str, shape: Shape, dtype: str = "f32") -> Value:
        """An array that each step brings."""
        return self._declare(Value(name, shape, dtype, "input"))

    def weight(self, name: str, shape: Shape) -> Value:
        """A tensor bound by name at compilation, whatever its format.  The same name gives the same value."""
        known = self.values.get(name)
        if known is not None:
            _need(known.kind == "weight" and known.shape == shape, f"{known} redeclared as weight {shape}")
            return known
        return self._declare(Value(name, shape, "f32", "weight"))

    def state(self, name: str, shape: Shape, dtype: str) -> Value:
        """An array that lives across steps; a node that changes it returns its next version."""
        return self._declare(Value(name, shape, dtype, "state"))

    def apply(self, op: str, *inputs: Value, name: str | None = None, **attrs: Attr) -> Value:
        """Append a node; its output value takes its shape from the op table.

        Raises:
            GraphError: unknown op or attribute, wrong number of inputs, shapes that do not fit.
        """
        spec = OPS.get(op)
        _need(spec is not None, f"unknown op {op}")
        assert spec is not None
        low, high = len(spec.inputs) - spec.optional, len(spec.inputs)
        _need(low <= len(inputs) <= high, f"{op} takes {low} to {high} inputs, got {len(inputs)}")
        _need(set(attrs) == set(spec.attrs), f"{op} takes attributes {spec.attrs}, got {tuple(attrs)}")
        for value in inputs:
            _need(self.values.get(value.name) == value, f"{op}: {value} is not of this graph")
        shape, dtype = spec.shape(inputs, attrs)
        output = self._declare(Value(name or f"%{len(self.nodes)}", shape, dtype, "temp"))
        ordered = MappingProxyType({key: attrs[key] for key in spec.attrs})
        node = Node(op, tuple(value.name for value in inputs), (output.name,), ordered)
        self.nodes.append(node)
        self._makers[output.name] = node
        return output

    def output(self, value: Value) -> None:
        """Add a value to what `run` returns."""
        _need(self.values.get(value.name) == value, f"output {value} is not of this graph")
        self.outputs.append(value.name)

    def of_kind(self, kind: str) -> list[Value]:
        """Values of one kind, in order of declaration."""
        return [value for value in self.values.values() if value.kind == kind]

    def state_of(self, name: str) -> Value:
        """The state that a value is a version of, followed back through cache_write nodes."""
        while self.values[name].kind != "state":
            node = self._makers[name]
            _need(node.op == "cache_write", f"{name} is no version of a state")
            name = node.inputs[0]
        return self.values[name]

    def is_state(self, name: str) -> bool:
        """Whether a value is a state or a later version of one."""
        while name in self._makers and self._makers[name].op == "cache_write":
            name = self._makers[name].inputs[0]
        return self.values[name].kind == "state"

    def _declare(self, value: Value) -> Value:
        _need(value.name not in self.values, f"{value.name} is declared twice")
        _need(value.kind in KINDS and value.dtype in DTYPES, f"{value}: unknown kind or dtype")
        self.values[value.name] = value
        return value

    def text(self) -> str:
        """The graph as a person reads it: inputs, states, nodes with their shapes, outputs."""
        lines = [f"graph {self.name}"]
        lines += [f"  {kind} {value}" for kind in ("input", "state", "weight") for value in self.of_kind(kind)]
        lines += [
            f"  {node}  # {self.values[node.outputs[0]]}".replace(f"# {node.outputs[0]} : ", "# ")
            for node in self.nodes
        ]
        return "\n".join([*lines, f"  return {', '.join(self.outputs)}"]) + "\n"

    def to_json(self) -> str:
        """The graph without weights, as JSON that `from_json` reads back to an equal graph."""
        return json.dumps(
            {
                "name": self.name,
                "values": [[v.name, list(v.shape), v.dtype, v.kind] for v in self.values.values() if v.kind != "temp"],
                "nodes": [[n.op, list(n.inputs), list(n.outputs), dict(n.attrs)] for n in self.nodes],
                "outputs": self.outputs,
            }
        )

    @staticmethod
    def from_json(text: str) -> Graph:
        """Inverse of `to_json`; every shape is derived again and so checked.

        Raises:
            GraphError: JSON of another form, or a graph that does not fit together.
        """
        try:
            form = json.loads(text)
            graph = Graph(form["name"])
            for name, shape, dtype, kind in form["values"]:
                graph._declare(Value(name, tuple(shape), dtype, kind))
            for op, inputs, (output,), attrs in form["nodes"]:
                graph.apply(op, *(graph.values[name] for name in inputs), name=output, **attrs)
            for name in form["outputs"]:
                graph.output(graph.values[name])
        except (ValueError, KeyError, TypeError) as error:
            raise GraphError(f"not a graph in JSON form: {error!r}") from error
        return graph

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and (self.name, self.values, self.nodes, self.outputs) == (
            other.name,
            other.values,
            other.nodes,
            other.outputs,
        )

    __hash__ = None  # type: ignore[assignment]  # mutable


@dataclass(frozen=True)
class Step:
    """What one step brings: the new rows of every sequence, end to end.  All arrays int32.

    Row t of sequence b (starts[b] <= t < starts[b+1]) is token tokens[t] at position positions[t]; it is
    written to cache slot slots[t].  Position j of sequence b lives in slot
    pages[b, j // page_size] * page_size + j % page_size.
    """

    tokens: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    starts: np.ndarray  # [B + 1] first row of each sequence, then T
    lengths: np.ndarray  # [B] cached positions of each sequence once this step is written
    pages: np.ndarray  # [B, P] page ids, -1 where a sequence has fewer
    slots: np.ndarray  # [T]
    wanted: np.ndarray  # [R] rows whose logits are returned
    pooled: np.ndarray | None = None  # [E] rows whose hidden states are returned; for graphs that have them

    def feeds(self) -> dict[str, np.ndarray]:
        """The arrays by the graph's input names."""
        return {name: array for name, array in self.__dict__.items() if array is not None}


STEP_INPUTS: Mapping[str, Shape] = MappingProxyType(
    {
        "tokens": ("T",),
        "positions": ("T",),
        "starts": ("B1",),
        "lengths": ("B",),
        "pages": ("B", "P"),
        "slots": ("T",),
        "wanted": ("R",),
    }
)


def single_step(tokens: Sequence[int], page_size: int, first: int = 0, wanted: Sequence[int] | None = None) -> Step:
    """The step of one sequence alone in a cache, its page j at page j.

    Args:
        tokens: the new rows, at positions first, first + 1, …
        wanted: rows whose logits are returned; None: all.
    """
    count = len(tokens)
    positions = np.arange(first, first + count, dtype=np.int32)
    pages = np.arange(-(-(first + count) // page_size), dtype=np.int32)[None]
    rows = np.arange(count, dtype=np.int32) if wanted is None else np.asarray(wanted, np.int32)
    return Step(
        tokens=np.asarray(tokens, np.int32),
        positions=positions,
        starts=np.array([0, count], np.int32),
        lengths=np.array([first + count], np.int32),
        pages=pages,
        slots=positions.copy(),
        wanted=rows,
    )
