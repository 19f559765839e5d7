"""One table of cases: every operation on every backend against the NumPy reference.

Tolerances are derived.  With u = 2^-24 (float32 rounding), a sum of n products has the error bound
gamma(n) · Σ|a·b|, gamma(n) = n·u / (1 - n·u), whatever the order of summation (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1); both sides may be off by it.  A backend that rounds the input
of a product says so (`activation_precision`), and what that rounding may cost is added; so does one that rounds queries
and attention weights (`attention_precision`), which is also held to the reference with the same rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from finial.backends import get_backend
from finial.errors import BackendError
from finial.formats import FORMATS, Tensor, get_format
from finial.graph import Graph, Value
from here import BACKENDS
from rounded import rounding_reference

U = 2.0**-24
OTHERS = [name for name in BACKENDS if name != "reference"]
Arrays = dict[str, np.ndarray]


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


@dataclass
class Case:
    """A graph of one operation, what goes in, and how far off its result may be."""

    name: str
    graph: Graph
    weights: dict[str, Tensor]
    feeds: Arrays
    tolerance: Callable[[np.ndarray], np.ndarray | float]
    pages: int = 1
    page_size: int = 16
    steps: list[Arrays] = field(default_factory=list)  # earlier steps on the same state
    rounding: Callable[[str], np.ndarray | float] = lambda precision: (
        0.0
    )  # added where the input of a product is rounded, or queries and attention weights are
    cache: str | None = None  # what dtype of an attention's


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(shape: tuple[int, ...], *seed: int) -> np.ndarray:
    return rng(*seed).standard_normal(shape).astype(np.float32)


def stored(values: np.ndarray, format: str, *seed: int) -> Tensor:
    """A tensor in `format`: encoded where finial can, else random blocks with scales of a sane size."""
    spec = get_format(format)
    if spec.encode is not None:
        return Tensor.from_array(values, format)
    blocks = values.size // spec.block
    raw = rng(*seed, 7).integers(0, 256, (blocks, spec.block_bytes), dtype=np.uint8)
    scale = rng(*seed, 8).uniform(0.01, 0.03, blocks).astype(np.float16).view(np.uint8).reshape(blocks, 2)
    for at in {"q6_k": (208,), "q4_k": (0, 2), "q5_k": (0, 2), "q4_1": (0, 2), "q5_1": (0, 2)}.get(format, (0,)):
        raw[:, at : at + 2] = scale
    return Tensor(format, values.shape, raw.reshape(-1))


def minimums(w: Tensor) -> np.ndarray:
    """The second term of each weight's value, |m t| of q4_k and q5_k: their value where the level is 0; else zeros."""
    spec = get_format(w.format)
    if w.format not in ("q4_k", "q5_k"):
        return np.zeros(w.shape, np.float32)
    blocks = w.data.reshape(-1, spec.block_bytes).copy()
    blocks[:, 16:] = 0
    return -Tensor(w.format, w.shape, blocks.reshape(-1)).decode()


def linear(rows: int, into: int, out: int, format: str, bias: bool = False) -> Case:
    graph = Graph("linear")
    x, w = normal((rows, into), 1, rows), stored(normal((out, into), 2, out), format, 3, into)
    inputs: list[Value] = [graph.input("x", ("T", into)), graph.weight("w", (out, into))]
    weights = {"w": w}
    if bias:
        inputs.append(graph.weight("b", (out,)))
        weights["b"] = Tensor.from_array(normal((out,), 4))
    graph.output(graph.apply("linear", *inputs))
    size = np.abs(x) @ np.abs(w.decode()).T + (np.abs(weights["b"].decode()) if bias else 0)
    name = f"linear {rows}x{into}x{out} {format}{' bias' if bias else ''}"
    # A K-quant's two terms may be summed apart, in n / 16 steps; |w| + 2 |m t| is at least the sum of their magnitudes.
    apart = (gamma(into // 16 + 4) * np.abs(x) @ (np.abs(w.decode()) + 2 * minimums(w)).T) if "k" in format else 0
    # The rounded activations are a little larger than the given ones, so is the sum's own error.
    return Case(
        name,
        graph,
        weights,
        {"x": x},
        lambda _: 3 * gamma(into + 2) * size + 1.01 * apart,
        rounding=lambda precision: rounding_error(x, precision) @ np.abs(w.decode()).T,
    )


def rounding_error(x: np.ndarray, precision: str) -> np.ndarray | float:
    """The most by which each activation [T, I] may change when it is rounded to `precision`.

    bf16 has 8 significant bits.  int8 has steps of absmax / 127 in each block of 32, rounded up to five significant
    bits (by a sixteenth at most), of which half may be lost; float32 rounds that step, its inverse and the product with
    it, worth 127 · 4u steps more.
    """
    if precision == "bf16":
        return np.abs(x) * 2.0**-8
    if precision == "int8":
        step = np.abs(x.reshape(len(x), -1, 32)).max(-1).repeat(32, axis=1) / 127 * 17 / 16
        return step * (0.5 + 127 * 4 * U)
    assert precision == "f32"
    return np.zeros_like(x)


def embed(rows: int, width: int, format: str) -> Case:
    graph = Graph("embed")
    tokens = rng(5, rows).integers(0, 40, rows).astype(np.int32)
    graph.output(graph.apply("embed", graph.input("tokens", ("T",), "i32"), graph.weight("w", (40, width))))
    # Decoding multiplies or adds a scale at most twice: a fused multiply-add may skip one rounding.
    exact = format in ("f32", "f16", "bf16", "q8_0", "q4_0", "q5_0")
    weights = {"w": stored(normal((40, width), 6), format, 6)}
    size = float(np.abs(weights["w"].decode()).max())
    return Case(
        f"embed {rows}x{width} {format}", graph, weights, {"tokens": tokens}, lambda _: 0 if exact else 4 * U * size
    )


def rms_norm(rows: int, width: int, group: int, scale: float = 1.0) -> Case:
    graph = Graph("rms_norm")
    graph.output(graph.apply("rms_norm", graph.input("x", ("T", width)), graph.weight("w", (group,)), eps=1e-6))
    x, w = normal((rows, width), 7) * np.float32(scale), Tensor.from_array(normal((group,), 8))
    # sum of squares: gamma(group) relative, halved by the root; then divide, root and two products.
    return Case(
        f"rms_norm {rows}x{width}/{group} {scale:g}",
        graph,
        {"w": w},
        {"x": x},
        lambda y: (gamma(group) + 10 * U) * np.abs(y),
    )


def rope(rows: int, heads: int, head_dim: int, first: int, scale: float = 1.0, normed: bool = False) -> Case:
    graph = Graph("rope")
    source = graph.input("x", ("T", heads * head_dim))
    x = normal((rows, heads * head_dim), 9)
    frequencies = (10_000.0 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    weights, largest, before = {"f": Tensor.from_array(frequencies)}, np.abs(x).max(), 0.0
    if normed:
        source = graph.apply("rms_norm", source, graph.weight("w", (head_dim,)), eps=1e-6)
        weights["w"] = Tensor.from_array(normal((head_dim,), 8))
        largest = np.sqrt(head_dim) * np.abs(weights["w"].decode()).max()  # what a norm leaves of one that is alone
        before = gamma(head_dim) + 10 * U  # rms_norm's, of both elements that a turn takes
    inputs = (graph.input("positions", ("T",), "i32"), graph.weight("f", (head_dim // 2,)))
    graph.output(graph.apply("rope", source, *inputs, head_dim=head_dim, scale=scale))
    feeds = {"x": x, "positions": np.arange(first, first + rows, dtype=np.int32)}
    # The angle is one float32 product on both sides; cos and sin of it are good to 2 ulp, then 3 roundings.
    return Case(
        f"rope {rows}x{heads}x{head_dim} at {first}{' normed' * normed}",
        graph,
        weights,
        feeds,
        lambda _: (12 * U + 2 * before) * scale * largest,
    )


def pointwise(op: str, rows: int, width: int, scale: float = 1.0) -> Case:
    graph = Graph(op)
    a, b = normal((rows, width), 10) * np.float32(scale), normal((rows, width), 11)
    graph.output(graph.apply(op, graph.input("a", ("T", width)), graph.input("b", ("T", width))))
    # silu: exp to 4 ulp, a sum, a quotient, a product; below the smallest normal number precision ends.
    return Case(f"{op} {rows}x{width} {scale:g}", graph, {}, {"a": a, "b": b}, lambda y: 16 * U * np.abs(y) + 1e-36)


def select_rows() -> Case:
    graph = Graph("select_rows")
    graph.output(graph.apply("select_rows", graph.input("x", ("T", 33)), graph.input("wanted", ("R",), "i32")))
    feeds = {"x": normal((7, 33), 12), "wanted": np.array([6, 0, 0, 3], np.int32)}
    return Case("select_rows", graph, {}, feeds, lambda _: 0)


def attention(
    chunks: list[list[int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    window: int | None = None,
    page_size: int = 16,
) -> Case:
    """Sequences grown chunk by chunk: chunks[step][b] new rows of sequence b; pages dealt out of order."""
    graph = Graph("attention")
    step = {
        name: graph.input(name, shape, "i32")
        for name, shape in {
            "positions": ("T",),
            "starts": ("B1",),
            "lengths": ("B",),
            "pages": ("B", "P"),
            "slots": ("T",),
        }.items()
    }
    q, k, v = (
        graph.input("q", ("T", heads * head_dim)),
        graph.input("k", ("T", kv_heads * head_dim)),
        graph.input("v", ("T", kv_heads * head_dim)),
    )
    cache = graph.apply("cache_write", graph.state("kv", ("S", 2, kv_heads, head_dim), dtype), k, v, step["slots"])
    graph.output(
        graph.apply(
            "attention",
            q,
            cache,
            *(step[name] for name in ("positions", "starts", "lengths", "pages")),
            head_dim=head_dim,
            num_kv_heads=kv_heads,
            scale=head_dim**-0.5,
            window=window,
        )
    )
    sequences = len(chunks[0])
    longest = max(sum(chunk[b] for chunk in chunks) for b in range(sequences))
    per = -(-longest // page_size)
    order = rng(13).permutation(sequences * per).astype(np.int32).reshape(sequences, per)
    done, steps = [0] * sequences, []
    for number, chunk in enumerate(chunks):
        positions = [np.arange(done[b], done[b] + chunk[b], dtype=np.int32) for b in range(sequences)]
        done = [done[b] + chunk[b] for b in range(sequences)]
        rows = sum(chunk)
        steps.append(
            {
                "positions": np.concatenate(positions),
                "starts": np.cumsum([0, *chunk]).astype(np.int32),
                "lengths": np.array(done, np.int32),
                "pages": np.where(np.arange(per)[None] < -(-np.array(done)[:, None] // page_size), order, -1).astype(
                    np.int32
                ),
                "slots": np.concatenate(
                    [order[b, p // page_size] * page_size + p % page_size for b, p in enumerate(positions)]
                ).astype(np.int32),
                "q": normal((rows, heads * head_dim), 14, number) * 2,
                "k": normal((rows, kv_heads * head_dim), 15, number),
                "v": normal((rows, kv_heads * head_dim), 16, number),
            }
        )
    biggest = {name: max(float(np.abs(s[name]).max()) for s in steps) for name in "qkv"}
    longest_row = {name: max(row_norm(s[name], head_dim) for s in steps) for name in "qk"}
    # A score is a sum of head_dim products, so e^score is off by that much relatively, on both sides; the
    # weighted mean of the values adds gamma(longest). |q·k|·scale <= |q||k|: taken from the data's extremes.
    score = 2 * gamma(head_dim + 2) * biggest["q"] * biggest["k"] * head_dim**0.5
    tolerance = (2 * score + 2 * gamma(longest) + 16 * U) * biggest["v"]
    name = f"attention {chunks} {heads}/{kv_heads}x{head_dim} {dtype} window {window} page {page_size}"
    # Rounded to bf16, a query is off by 2^-8 of each element, a score therefore by 2^-8 |q||k| scale at most, and each
    # weight is rounded by 2^-8 once more; that is what a fraction of the weights' sum can lose, above and below.
    off = np.expm1(2 * (longest_row["q"] * longest_row["k"] * head_dim**-0.5 + 1) * 2**-8) * biggest["v"]
    return Case(
        name, graph, {}, steps[-1], lambda _: tolerance, sequences * per, page_size, steps[:-1],
        rounding=lambda precision: off if precision == "bf16" else 0.0, cache=dtype,
    )  # fmt: skip


def row_norm(x: np.ndarray, head_dim: int) -> float:
    return float(np.linalg.norm(x.reshape(-1, head_dim), axis=1).max())


CASES = [
    *(linear(rows, 256, 33, format) for format in FORMATS for rows in (1, 5)),
    *(
        linear(rows, into, out, "bf16")
        for rows, into, out in ((1, 1, 1), (2, 31, 7), (3, 96, 64), (17, 129, 5), (33, 512, 40), (4, 1000, 130))
    ),
    *(linear(rows, 97, 65, format, bias=True) for format in ("f32", "f16", "bf16") for rows in (1, 4, 16)),
    *(
        linear(rows, 96, 34, format, bias=True)
        for format in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
        for rows in (1, 3, 33)
    ),
    *(linear(2, 768, 9, format) for format in ("q4_k", "q5_k", "q6_k")),
    *(linear(rows, 512, 70, format, bias=True) for format in ("q4_k", "q5_k", "q6_k") for rows in (1, 7, 12, 13, 25)),
    *(
        linear(rows, 64, 70, format, bias=True)
        for format in ("bf16", "q8_0", "q4_0")
        for rows in (2, 7, 11, 12, 13, 25)
    ),
    *(embed(rows, 256, format) for format in FORMATS for rows in (1, 9)),
    embed(3, 31, "bf16"),
    *(
        rms_norm(rows, width, group)
        for rows, width, group in ((1, 64, 64), (5, 1000, 1000), (3, 256, 64), (2, 33, 33), (1, 96, 8))
    ),
    rms_norm(2, 64, 64, 1e-3),
    rms_norm(2, 64, 64, 1e4),
    *(
        rope(rows, heads, head_dim, first)
        for rows, heads, head_dim, first in (
            (1, 1, 2, 0),
            (5, 3, 64, 7),
            (2, 2, 80, 40_000),
            (33, 4, 128, 0),
            (3, 1, 6, 100),
        )
    ),
    rope(3, 2, 64, 5, scale=1.25),
    *(rope(rows, heads, dim, 7, normed=True) for rows, heads, dim in ((1, 1, 2), (1, 4, 128), (5, 3, 80), (33, 2, 96))),
    *(pointwise("silu_mul", rows, width) for rows, width in ((1, 1), (3, 100), (17, 257))),
    pointwise("silu_mul", 4, 64, 1e3),
    pointwise("silu_mul", 4, 64, 1e-6),
    pointwise("silu_mul", 2, 64, 1e30),
    *(pointwise("add", rows, width) for rows, width in ((1, 1), (3, 100), (17, 257))),
    select_rows(),
    *(
        attention([[1]], heads, kv, dim, dtype)
        for heads, kv, dim, dtype in ((1, 1, 64, "f32"), (4, 2, 80, "bf16"), (8, 1, 96, "bf16"))
    ),
    *(
        attention([[40, 3]], heads, kv, dim, dtype)
        for dtype in ("f32", "bf16")
        for heads, kv, dim in ((6, 2, 64), (3, 3, 128), (7, 1, 32), (2, 1, 256))
    ),
    attention([[17, 70], [1, 1], [30, 1]], 4, 2, 64, "bf16"),
    attention([[150, 33]], 4, 4, 16, "f32", window=32),
    attention([[90], [1], [1]], 4, 2, 32, "bf16", window=7, page_size=5),
    attention([[700], [1]], 2, 1, 64, "bf16", page_size=64),
    # every head_dim and group size, with 1 to 33 rows, odd lengths, and the three cache formats in turn
    *(
        attention(
            [[19 + group, 5], [rows, 1]],
            group * kv,
            kv,
            dim,
            ("bf16", "f32", "q8_0")[at % 3],
            page_size=(16, 5, 1)[at % 3],
        )
        for at, (group, kv, dim, rows) in enumerate(
            (group, 1 + group % 2, dim, rows)
            for group, rows in zip(range(1, 9), (1, 2, 3, 7, 8, 17, 32, 33), strict=True)
            for dim in (64, 96, 128, 256)
        )
    ),
    *(attention([[33, 4]], group, 1, 80, "bf16", page_size=7) for group in (1, 2, 3, 4, 5)),
    *(attention([[21]], group, 1, dim, "f32") for group in (1, 2, 5) for dim in (2, 6, 20, 40)),
    *(attention([[21]], group, 1, dim, "bf16") for group in (1, 2, 5) for dim in (2, 6, 20, 40)),
    # several chunks of positions
    *(
        attention([[300, 9], [257, 1], [3, 1]], heads, 2, 64, dtype, window, page_size)
        for heads in (2, 4, 6)
        for dtype in ("f32", "bf16", "q8_0")
        for window, page_size in ((None, 32), (100, 3), (301, 64))
    ),
    *(attention([[n], [1]], 4, 2, 32, "bf16", page_size=32) for n in (254, 255, 256, 257, 511, 512, 1025)),
]
SPLIT = [case for case in CASES if case.name.startswith("attention") and case.pages * case.page_size > 256]


def run(backend: str, case: Case, threads: int | None = None) -> np.ndarray:
    program = get_backend(backend, threads).compile(case.graph, case.weights)
    state = program.new_state(case.pages, case.page_size)
    for feeds in case.steps:
        program.run(feeds, state)
    return program.run(case.feeds, state)[0]


def runs(engine: object, case: Case) -> bool:
    """Whether a backend has the formats of the case's matrices; one that says nothing has all."""
    formats = getattr(engine, "formats", FORMATS)
    return all(weight.format in formats for weight in case.weights.values() if len(weight.shape) == 2)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op(backend: str, case: Case) -> None:
    engine = get_backend(backend)
    if not runs(engine, case):
        with pytest.raises(BackendError, match=r"no kernel for \w+ in"):
            run(backend, case)
        return
    assert all(engine.supports(case.graph, node) for node in case.graph.nodes)
    expected, got = run("reference", case), run(backend, case)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.isfinite(got).all()
    allowed = case.tolerance(expected)
    for weight in case.weights.values() if case.graph.nodes[0].op == "linear" else ():
        if len(weight.shape) == 2:
            allowed = allowed + case.rounding(engine.activation_precision(weight.format))  # type: ignore[attr-defined]
    if case.cache is not None:
        precision = engine.attention_precision(case.cache)  # type: ignore[attr-defined]
        allowed = allowed + case.rounding(precision)
        if precision != "f32":
            with rounding_reference(queries=precision):
                rounded = run("reference", case)
            # Where the last bit of float32 decides a rounding, a weight goes apart by 2^-7: seldom, and never all of
            # them; what is wrong in any other way is as far from this as rounding is from the exact result.
            flipped = case.tolerance(expected) + 2**-7 * np.abs(expected).max()
            assert (np.abs(got - rounded) <= flipped).all()
            cost = np.sqrt(np.mean((rounded - expected) ** 2))
            assert np.sqrt(np.mean((got - rounded) ** 2)) <= cost / 8 + np.mean(case.tolerance(expected))
    excess = np.abs(got.astype(np.float64) - expected) - allowed
    assert (excess <= 0).all(), (
        f"{case.name}: {(excess > 0).sum()} of {got.size} values off, worst by {excess.max():.3g} beyond the bound"
    )


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("case", CASES[::3] + SPLIT, ids=lambda case: case.name)
def test_thread_count_changes_no_bit(backend: str, case: Case) -> None:
    if not runs(get_backend(backend), case):
        return
    one = run(backend, case, threads=1)
    for threads in (2, 3):
        assert np.array_equal(one.view(np.uint32), run(backend, case, threads).view(np.uint32))


def _broken(name: str, index: int, value: int) -> tuple[Case, str]:
    case = {"tokens": embed(4, 32, "bf16"), "wanted": select_rows()}.get(name) or attention([[20, 3]], 2, 1, 32, "f32")
    feeds = {key: array.copy() for key, array in case.feeds.items()}
    feeds[name].reshape(-1)[index] = value
    case.feeds = feeds
    return case, name


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(
    "name, value", [("tokens", 40), ("tokens", -1), ("wanted", 7), ("wanted", -1), ("slots", 1 << 30), ("slots", -1)]
)
def test_indices_outside_are_errors(backend: str, name: str, value: int) -> None:
    case, name = _broken(name, 1, value)
    with pytest.raises(BackendError, match=name):
        run(backend, case)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    "name, index, value",
    [
        ("pages", 0, 9999),
        ("pages", 1, -1),
        ("positions", 5, 999),
        ("positions", 2, -1),
        ("lengths", 0, 1 << 20),
        ("lengths", 1, -5),
        ("starts", 1, 99),
        ("starts", 1, -1),
    ],
)
def test_native_memory_is_never_left(backend: str, name: str, index: int, value: int) -> None:
    """Steps that a correct engine never makes must not read outside the cache either."""
    case, name = _broken(name, index, value)
    with pytest.raises(BackendError, match=r"positions|pages|lengths|starts|slots"):
        run(backend, case)
