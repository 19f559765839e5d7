"""The native CPU backend: a graph lowered once to a flat program, then one native call per step.

Weights keep their stored precision: repacked once into the order in which products read them, or used where they are
(usually a memory map).  The residual stream, accumulation and softmax are float32; the input of a packed `linear` is
rounded first, see `CpuBackend.activation_precision`.  A row's result is bit-equal whatever shares its step, however it
was chunked, wherever its pages lie and however many threads there are, within one instruction set.  Knows nothing of
models and files.

    program = create(threads=None).compile(graph, weights)
    outputs = program.run(step.feeds(), program.new_state(pages=64, page_size=32))
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.backends import Ahead, Draw, Timing
from finial.backends.cpu_ahead import Chooser
from finial.backends.fuse import NormedRope, Product, Products, normed_ropes, plan
from finial.errors import BackendError
from finial.formats import FORMATS, Reencoded, Tensor
from finial.graph import Dim, Graph, Node, Value

try:
    from finial import _native
except ImportError as error:  # a source tree that was never built; `create` says so when the backend is asked for
    _native = None  # type: ignore[assignment]
    _why = str(error)


class _Slots:
    """Which arena slot each value takes: a slot is free again after its value's last use, for values of its shape.

    Only those, because threads need not wait between instructions that share out equal shapes alike.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Dim, ...], list[int]] = {}
        self._count = 0

    def take(self, value: Value) -> int:
        free = self._free.get(value.shape)
        if free:
            return free.pop()  # freed last: still in the cache
        self._count += 1
        return self._count - 1

    def give(self, value: Value, slot: int) -> None:
        self._free.setdefault(value.shape, []).append(slot)


PANEL = 32  # outputs that native products make at a time: kernels.h

Item = Node | Products | NormedRope  # of the work that a graph is lowered to


class CpuProgram:
    """A compiled graph; see `finial.backends.Program`."""

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor], pool: _native.Pool, isa: str = "") -> None:
        self._graph = graph
        self._weights = weights
        self._native = _native.Program(pool, isa)
        self._dimensions: dict[Dim, int] = {}
        self._buffers: dict[str, int] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._bytes: dict[str, NDArray[np.uint8]] = {}  # of matrices used in place
        self._matrices: dict[tuple[str, ...], int] = {}  # weight and bias -> the native matrix
        self._lower()
        self._native.pack()  # beside what is done until the first state or step is asked for
        self._weights, self._bytes = {}, {}  # the native program holds what it points at
        self._chooser = None
        if self._outputs and self._outputs[0].name == graph.outputs[0] and self._outputs[0].shape[0] == "R":
            self._chooser = Chooser(self._native, graph.outputs[0], self._outputs, self._ints, self._dimensions)

    @property
    def isa(self) -> str:
        """The instruction set of its kernels."""
        return self._native.isa

    def new_state(self, pages: int, page_size: int) -> _native.State:
        """Zeroed caches; memory is taken as positions are written.

        Raises:
            BackendError: not enough address space, or more than 2^31 positions.
        """
        try:
            return self._native.new_state(pages, page_size)
        except (MemoryError, ValueError) as error:
            raise BackendError(
                f"no cache of {pages:,} pages of {page_size} positions: {error or 'not enough memory'}",
                fix="ask for a smaller --max-context",
            ) from error

    def run(self, feeds: Mapping[str, np.ndarray], state: _native.State) -> list[np.ndarray]:
        """One step; see `finial.backends.Program.run`.

        Raises:
            BackendError: an input that points outside the vocabulary, the cache or the step; names it.
        """
        rows, ints, inputs = self._given(feeds)
        made = {
            value.name: np.empty((rows[self._dimensions[value.shape[0]]], _width(value)), np.float32)
            for value in self._outputs
        }
        try:
            self._native.run(rows, ints, inputs, list(made.values()), state)
        except ValueError as error:
            raise BackendError(str(error)) from error
        return [made[name] if name in made else np.array(feeds[name]) for name in self._graph.outputs]

    def sample(
        self, feeds: Mapping[str, np.ndarray], state: _native.State, draws: Sequence[Draw]
    ) -> NDArray[np.int32] | None:
        """One step, and the token chosen for each row of the graph's first output.

        Returns:
            int32 [R]; -1 where the highest logit is not finite or the choice is too close to call natively.  None:
            this output is no logits of rows R, or another output is asked for too.
        Raises:
            BackendError: as `run`.
        """
        if self._chooser is None:
            return None
        rows, ints, inputs = self._given(feeds)
        if any(rows[self._dimensions[value.shape[0]]] for value in self._outputs[1:]):
            return None
        return self._chooser.tokens(rows, ints, inputs, state, draws)

    def ahead(
        self, feeds: Mapping[str, np.ndarray], state: _native.State, ahead: Ahead
    ) -> Generator[NDArray[np.int32], None, None] | None:
        """A run of decode steps; see `finial.backends.RunsAhead.ahead`."""
        return None if self._chooser is None else self._chooser.steps(feeds, state, ahead)

    def _given(self, feeds: Mapping[str, np.ndarray]) -> tuple[list[int], list[NDArray[Any]], list[NDArray[Any]]]:
        """Rows of each dimension, integer inputs and the others, as the native program takes them."""
        sizes: dict[Dim, int] = {}
        ints = [_checked(value, feeds, np.int32, sizes) for value in self._ints]
        inputs = [_checked(value, feeds, np.float32, sizes) for value in self._inputs]
        return [dim if isinstance(dim, int) else sizes[dim] for dim in self._dimensions], ints, inputs

    def profile(self, on: bool) -> None:
        """From now on note what each instruction of a step takes, from zero; or stop noting."""
        self._native.profile(on)

    def timings(self) -> list[Timing]:
        """What was noted, instructions of a kind together, in the order of the step."""
        kinds: dict[str, Timing] = {}
        for what, size, calls, seconds, waiting in self._native.timings():
            t = kinds.get(what, Timing(what, 0, 0, 0.0, 0.0))
            kinds[what] = Timing(
                what, t.calls + calls, t.bytes + size * calls, t.seconds + seconds, t.waiting + waiting
            )
        return list(kinds.values())

    # --- lowering -----------------------------------------------------------------------------------------------------

    def _lower(self) -> None:
        graph, native = self._graph, self._native
        made = {name for node in graph.nodes for name in node.outputs}
        self._ints = [value for value in graph.of_kind("input") if value.dtype == "i32"]
        self._inputs = [value for value in graph.of_kind("input") if value.dtype == "f32"]
        self._outputs = [graph.values[name] for name in dict.fromkeys(graph.outputs) if name in made]
        self._int_ids = {value.name: native.int_input(value.name) for value in self._ints}
        for value in self._inputs:
            self._buffers[value.name] = native.input(self._dimension(value), _width(value))
        for value in self._outputs:
            self._buffers[value.name] = native.output(self._dimension(value), _width(value))
        self._caches = {value.name: native.cache(*_heads(value), value.dtype) for value in graph.of_kind("state")}
        current = {name: name for name in self._caches}  # state -> its newest version; older ones are overwritten
        work = normed_ropes(graph, plan(graph, self._kind))
        last = {name: index for index, item in enumerate(work) for name in item.inputs}
        readers: dict[str, list[Item]] = {}
        for item in work:
            for name in item.inputs:
                readers.setdefault(name, []).append(item)
        slots, held = _Slots(), dict[str, int]()
        for index, item in enumerate(work):
            for name in item.inputs:
                assert name not in self._caches or name in current.values(), f"{item}: {name} was overwritten before"
            for output in item.outputs:
                if isinstance(item, Node) and item.op == "cache_write":
                    self._caches[output] = self._caches[item.inputs[0]]
                    current[graph.state_of(output).name] = output
                elif output not in self._buffers:
                    value = graph.values[output]
                    held[output] = slots.take(value)
                    self._buffers[output] = native.buffer(self._dimension(value), _width(value), held[output])
                    if isinstance(item, Products) and (
                        format := self._rounded_for(item, output, readers.get(output, []))
                    ):
                        native.keep_rounded(self._buffers[output], format)
            if isinstance(item, Products):
                self._products(item)
            elif isinstance(item, NormedRope):
                self._rope(item.rope, item.norm)
            else:
                _EMIT[item.op](self, item)
            for name in {*item.inputs, *item.outputs} & held.keys():
                if last.get(name, index) == index:
                    slots.give(graph.values[name], held.pop(name))

    def _rounded_for(self, maker: Products, name: str, readers: list[Item]) -> str:
        """The format of the weights that a gated product's result is for alone, which it can round for them; or ""."""
        gated = next(product for product in maker.products if product.output == name).up is not None
        if not gated or len(readers) != 1 or not isinstance(reader := readers[0], Products):
            return ""
        if reader.norm is not None or reader.x != name or _width(self._graph.values[name]) % PANEL != 0:
            return ""
        weights = [node.inputs[1] for product in reader.products for node in product.nodes]
        return self._weights[weights[0]].format if all(map(self._packs, weights)) else ""

    def _packs(self, weight: str) -> bool:
        return _native.packs(self._weights[weight].format, self.isa)

    def _kind(self, weight: str) -> str:
        return _native.activations(self._weights[weight].format, self.isa) if self._packs(weight) else ""

    def _dimension(self, value: Value) -> int:
        rows = value.shape[0]
        if rows not in self._dimensions:
            self._dimensions[rows] = self._native.dimension()
        return self._dimensions[rows]

    def _vector(self, name: str) -> NDArray[np.float32]:
        """A small weight as float32, decoded once; the same name gives the same array."""
        if name not in self._vectors:
            self._vectors[name] = np.array(self._weights[name].decode(), np.float32)
        return self._vectors[name]

    def _matrix(self, name: str) -> tuple[NDArray[np.uint8], str, int, int]:
        """A matrix as native code takes it: bytes (the same each time where they are kept), format, rows, width."""
        tensor = self._weights[name]
        if (data := self._bytes.get(name)) is None:
            data = tensor.data
        if not self._packs(name):
            self._bytes[name] = data
        return data, tensor.format, *tensor.shape  # type: ignore[return-value]  # a matrix has two

    def _embed(self, node: Node) -> None:
        tokens, weight = node.inputs
        out, ids = self._buffers[node.outputs[0]], self._int_ids[tokens]
        if isinstance(self._weights[weight], Reencoded) and self._packs(weight):
            self._native.embed_packed(out, ids, self._packed(weight))  # rather than keep its bytes beside the panels
        else:
            self._native.embed(out, ids, *self._matrix(weight))

    def _packed(self, weight: str, *bias: str, room: str = "", first: int = -1) -> int:
        """The index of a matrix with its bias, packed by now where its format is; `room` and `first` as in `weight`."""
        key = (weight, *bias)
        if key not in self._matrices:
            tensor, matrix = self._weights[weight], self._matrix(weight)
            vector = self._vector(bias[0]) if bias else None
            self._matrices[key] = self._native.weight(*matrix, vector, is_mapped(matrix[0]), room, first)
            if isinstance(tensor, Reencoded):
                forget(tensor.source.data)
        return self._matrices[key]

    def _weights_of(self, product: Product) -> tuple[int, int]:
        """The matrix of a product and, or -1, that of the product which it gates."""
        _, weight, *bias = product.node.inputs
        if product.up is None:
            return self._packed(weight, *bias), -1
        _, up, *up_bias = product.up.inputs
        first = self._packed(weight, *bias, room=self._weights[up].format)
        return first, self._packed(up, *up_bias, first=first)

    def _products(self, item: Products) -> None:
        members = [
            (
                self._buffers[product.output],
                *self._weights_of(product),
                self._buffers[product.add] if product.add else -1,
            )
            for product in item.products
        ]
        if item.norm is None:
            self._native.linears(self._buffers[item.x], members)
        else:
            norm = self._vector(item.norm.inputs[1])
            self._native.linears(self._buffers[item.x], members, norm, _number(item.norm, "eps"))

    def _rms_norm(self, node: Node) -> None:
        x, weight = node.inputs
        out, eps = self._buffers[node.outputs[0]], _number(node, "eps")
        self._native.rms_norm(out, self._buffers[x], self._vector(weight), eps)

    def _rope(self, node: Node, norm: Node | None = None) -> None:
        x, positions, frequencies = node.inputs
        self._native.rope(
            self._buffers[node.outputs[0]],
            self._buffers[x if norm is None else norm.inputs[0]],
            self._int_ids[positions],
            self._vector(frequencies),
            _number(node, "scale"),
            *(() if norm is None else (self._vector(norm.inputs[1]), _number(norm, "eps"))),
        )

    def _cache_write(self, node: Node) -> None:
        cache, keys, values, slots = node.inputs
        self._native.cache_write(self._caches[cache], self._buffers[keys], self._buffers[values], self._int_ids[slots])

    def _attention(self, node: Node) -> None:
        queries, cache, positions, starts, lengths, pages = node.inputs
        self._native.attention(
            self._buffers[node.outputs[0]],
            self._buffers[queries],
            self._caches[cache],
            self._int_ids[positions],
            self._int_ids[starts],
            self._int_ids[lengths],
            self._int_ids[pages],
            int(_number(node, "window")) if node.attrs["window"] is not None else 0,
            _number(node, "scale"),
        )

    def _pointwise(self, node: Node) -> None:
        a, b = (self._buffers[name] for name in node.inputs)
        getattr(self._native, node.op)(self._buffers[node.outputs[0]], a, b)

    def _select_rows(self, node: Node) -> None:
        x, rows = node.inputs
        self._native.select_rows(self._buffers[node.outputs[0]], self._buffers[x], self._int_ids[rows])


_EMIT: dict[str, Callable[[CpuProgram, Node], None]] = {
    "embed": CpuProgram._embed,
    "rms_norm": CpuProgram._rms_norm,
    "rope": CpuProgram._rope,
    "cache_write": CpuProgram._cache_write,
    "attention": CpuProgram._attention,
    "silu_mul": CpuProgram._pointwise,
    "add": CpuProgram._pointwise,
    "select_rows": CpuProgram._select_rows,
}

# Inputs that are bound when the program is compiled; every other one is rows, integers of the step, or a cache.
_WEIGHTS = {"embed": (1,), "linear": (1, 2), "rms_norm": (1,), "rope": (2,)}


def is_mapped(data: np.ndarray) -> bool:
    """Whether an array is a view of a read-only memory map of a file, whose pages the system can fetch again."""
    return _map_of(data) is not None


def forget(data: np.ndarray) -> None:
    """Give back the memory of an array that is a view of a file, a hint: it is read again where it is used again."""
    if (file := _map_of(data)) is None or not hasattr(file, "madvise") or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = data.ctypes.data - np.frombuffer(file, np.uint8).ctypes.data
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        file.madvise(mmap.MADV_DONTNEED, first, last - first)


def _map_of(data: np.ndarray) -> mmap.mmap | None:
    base: Any = data
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) and memoryview(base).readonly else None


def _width(value: Value) -> int:
    width = value.shape[1]
    assert isinstance(width, int), f"{value} has no fixed width"
    return width


def _heads(state: Value) -> tuple[int, int]:
    heads, head_dim = state.shape[2:]
    assert isinstance(heads, int) and isinstance(head_dim, int), f"{state} has no fixed heads and head_dim"
    return heads, head_dim


def _number(node: Node, name: str) -> float:
    value = node.attrs[name]
    assert isinstance(value, int | float), f"{node}: {name} is {value!r}"
    return float(value)


def _checked(
    value: Value, feeds: Mapping[str, np.ndarray], dtype: type[np.generic], sizes: dict[Dim, int]
) -> NDArray[Any]:
    """The array of an input, its dtype and shape checked; symbols that it is the first to bear get their size."""
    array = feeds.get(value.name)
    assert array is not None, f"step input {value} was not given"
    assert array.dtype == dtype and array.ndim == len(value.shape), f"step input {value} is {array.dtype} {array.shape}"
    for dim, size in zip(value.shape, array.shape, strict=True):
        expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
        if size != expected:
            raise BackendError(f"step input {value} is {list(array.shape)}, expected {dim} to be {expected}")
    return np.ascontiguousarray(array)


class CpuBackend:
    """See the module.

    Attributes:
        threads: how many threads a step runs on.
        isa: instruction set of the kernels: "baseline", "avx2", "avx2_vnni" (with AVX-VNNI), "avx512_vnni" (AVX-512
            without BF16), "avx512" or "amx"; "neon" or "neon_dot" on ARM.
        formats: of matrices that it multiplies.
    """

    name = "cpu"
    formats = tuple(name for name in FORMATS if name != "fp8")  # fp8 would have to be decoded for each step

    def __init__(self, threads: int | None = None, isa: str = "") -> None:
        self._pool = _native.Pool(threads or 0)
        self._isa = isa

    @property
    def threads(self) -> int:
        """Threads of the pool, which every program of this backend shares."""
        return self._pool.threads

    def supports(self, graph: Graph, node: Node) -> bool:
        """Every operation of the table, with weights bound by name and rows of fixed width."""
        values = [graph.values[name] for name in node.inputs]
        bound = _WEIGHTS.get(node.op, ())
        return (
            (node.op in _EMIT or node.op == "linear")
            and all((value.kind == "weight") == (at in bound) for at, value in enumerate(values))
            and all(value.kind == "input" for value in values if value.dtype == "i32")
            and all(isinstance(dim, int) for value in values if value.dtype == "f32" for dim in value.shape[1:])
        )

    def activation_precision(self, format: str) -> str:
        """What the input of a `linear` with weights of this format is rounded to, by the instruction set.

        "f32" is not at all; "bf16" to nearest even, at most 2^-8 of each value; "int8" to a step of absmax / 127 in
        each block of 32 along the input, that itself rounded up to five significant bits, to nearest even, so at most
        half a step.
        """
        return _native.activations(format, self._isa)

    def attention_precision(self, dtype: str) -> str:
        """What attention over a cache of this dtype rounds to: "f32" is not at all.

        "bf16": the scaled query, and each weight exp(score - largest score of its chunk of 256 positions), to nearest
        even, so by at most 2^-8 of itself; what is below 2^-126 counts as zero. Sums are float32, and the weights' sum
        is that of the rounded ones.
        """
        return _native.attention_precision(dtype, self._isa)

    def compile(self, graph: Graph, weights: Mapping[str, Tensor]) -> CpuProgram:
        """See `finial.backends.Backend.compile`; every format of formats.py but fp8, packed or in place.

        Raises:
            BackendError: a matrix in another format.
        """
        for value in graph.of_kind("weight"):
            if len(value.shape) == 2 and (format := weights[value.name].format) not in self.formats:
                raise BackendError(
                    f"the cpu backend has no kernel for {value.name} in {format}",
                    fix="use --backend cuda, or another --format: q8_0 is as small",
                )
        return CpuProgram(graph, weights, self._pool, self._isa)


def create(threads: int | None) -> CpuBackend:
    """The backend on the best instruction set of this CPU, or the one that FINIAL_CPU_ISA names.

    Raises:
        BackendError: the native module is not built, or FINIAL_CPU_ISA names what this CPU or build lacks.
    """
    if _native is None:
        raise BackendError(
            f"finial's native module is not built for this Python ({_why})",
            fix="run `pip install .` in finial's directory, with a C++17 compiler installed",
        )
    try:
        _native.isa()
    except RuntimeError as error:
        raise BackendError(str(error), fix="unset FINIAL_CPU_ISA or set it to one of these") from error
    return CpuBackend(threads)
