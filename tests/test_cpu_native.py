"""The native CPU backend below the op table: every instruction set, exactness, threads, memory, and refusals."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_ops
from finial import _native, names
from finial.backends.cpu import CpuBackend, create, is_mapped
from finial.config import ModelConfig
from finial.errors import BackendError
from finial.formats import FORMATS, Tensor
from finial.graph import Graph, single_step
from finial.models.decoder import build_graph, constants

ISAS = _native.isas_available()
on_every_isa = pytest.mark.parametrize("isa", ISAS)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def random_tensor(format: str, rows: int, width: int) -> Tensor:
    return test_ops.stored(normal(rows, width, seed=3), format, 3)


def linear_graph(n_out: int, n_in: int, bias: bool = False) -> Graph:
    graph = Graph("linear")
    inputs = [graph.input("x", ("T", n_in)), graph.weight("w", (n_out, n_in))]
    graph.output(graph.apply("linear", *inputs, *([graph.weight("b", (n_out,))] if bias else [])))
    return graph


def compute(
    graph: Graph, weights: dict[str, Tensor], feeds: dict[str, np.ndarray], isa: str = "", threads: int = 2
) -> np.ndarray:
    program = CpuBackend(threads, isa).compile(graph, weights)
    return program.run(feeds, program.new_state(0, 1))[0]


# --- every instruction set ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS[:-1])
@pytest.mark.parametrize("case", test_ops.CASES, ids=lambda case: case.name)
def test_op_table(monkeypatch: pytest.MonkeyPatch, isa: str, case: test_ops.Case) -> None:
    """test_ops.py covers the best instruction set; the same table on all others."""
    monkeypatch.setenv("FINIAL_CPU_ISA", isa)
    test_ops.test_op("cpu", case)


@on_every_isa
@pytest.mark.parametrize("format", CpuBackend.formats)
def test_weights_decode_to_the_bit(isa: str, format: str) -> None:
    """Through embed, and through linear with one input of 127, which every rounding of activations leaves as it is.

    There q4_k and q5_k may take their two terms apart: three roundings of at most their sizes.
    """
    width = 512 if FORMATS[format].block > 1 else 517
    tensor = random_tensor(format, 9, width)
    expected = tensor.decode()
    graph = Graph("embed")
    graph.output(graph.apply("embed", graph.input("tokens", ("T",), "i32"), graph.weight("w", (9, width))))
    rows = compute(graph, {"w": tensor}, {"tokens": np.arange(9, dtype=np.int32)}, isa)
    assert np.array_equal(bits(rows), bits(expected))
    for count in (1, 5):
        at = np.random.default_rng(count).integers(0, width, (width // count, count))
        for picked in at[:: max(1, len(at) // 40)]:
            x = np.zeros((count, width), np.float32)
            x[np.arange(count), picked] = 127
            got = compute(linear_graph(9, width), {"w": tensor}, {"x": x}, isa, threads=1)
            want = expected[:, picked].T * np.float32(127)
            if (least := test_ops.minimums(tensor)).any():
                assert (np.abs(got - want) <= 3 * test_ops.U * 127 * (np.abs(expected) + 2 * least)[:, picked].T).all()
            else:
                assert np.array_equal(got, want)


@on_every_isa
def test_half_precision_extremes_decode_to_the_bit(isa: str) -> None:
    """Every 16-bit pattern of f16 and bf16: subnormals, infinities, zeros of both signs (NaN stays NaN)."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    for format in ("f16", "bf16"):
        tensor = Tensor(format, (64, 1024), every)
        graph = Graph("embed")
        graph.output(graph.apply("embed", graph.input("tokens", ("T",), "i32"), graph.weight("w", (64, 1024))))
        got, expected = compute(graph, {"w": tensor}, {"tokens": np.arange(64, dtype=np.int32)}, isa), tensor.decode()
        number = ~np.isnan(expected)
        assert np.array_equal(np.isnan(got), ~number)
        assert np.array_equal(bits(got[number]), bits(expected[number]))


@on_every_isa
def test_exponential(isa: str) -> None:
    """Within 1.1 ulp of float32 from underflow to overflow; limits and NaN as C's expf."""
    x = np.concatenate([np.linspace(-104, 88.72, 1_000_003), np.linspace(-1, 1, 100_003), [0.0, -0.0]]).astype(
        np.float32
    )
    y = np.empty((1, len(x)), np.float32)
    _native.exp(x, y, isa)
    true = np.exp(x.astype(np.float64))
    ulp = np.maximum(np.spacing(true.astype(np.float32)).astype(np.float64), 2.0**-149)
    assert (np.abs(y[0] - true) / ulp).max() < 1.1
    special = np.array([np.inf, -np.inf, np.nan, 89, 1e38, -1e38, -105, 88.73], np.float32)
    out = np.empty((1, 8), np.float32)
    _native.exp(special, out, isa)
    np.testing.assert_array_equal(out[0], [np.inf, 0, np.nan, np.inf, np.inf, 0, 0, np.inf])


@on_every_isa
def test_exponential_does_not_depend_on_the_lane(isa: str) -> None:
    x = normal(1, 67)[0] * 10
    whole = np.empty((1, 67), np.float32)
    _native.exp(x, whole, isa)
    for at in range(67):
        alone = np.empty((1, 1), np.float32)
        _native.exp(x[at : at + 1], alone, isa)
        assert bits(alone)[0, 0] == bits(whole)[0, at]


def out_of_a_cache(isa: str, dtype: str, kv_heads: int, values: np.ndarray) -> np.ndarray:
    """[64, kv_heads * 32] values as rows that attend to themselves alone return them."""
    width = 32 * kv_heads
    graph = Graph("one")
    q, k, value = (graph.input(name, ("T", width)) for name in "qkv")
    shapes = {"positions": ("T",), "starts": ("B1",), "lengths": ("B",), "pages": ("B", "P"), "slots": ("T",)}
    step = {name: graph.input(name, shape, "i32") for name, shape in shapes.items()}
    cache = graph.apply("cache_write", graph.state("kv", ("S", 2, kv_heads, 32), dtype), k, value, step["slots"])
    where = [step[name] for name in ("positions", "starts", "lengths", "pages")]
    graph.output(graph.apply("attention", q, cache, *where, head_dim=32, num_kv_heads=kv_heads, scale=1.0, window=1))
    program = CpuBackend(1, isa).compile(graph, {})
    at = np.arange(64, dtype=np.int32)
    feeds = {"q": normal(64, width), "k": normal(64, width), "v": values, "positions": at, "slots": at}
    feeds |= {"starts": np.array([0, 64]), "lengths": np.array([64]), "pages": np.array([[0]])}
    feeds = {name: a if a.dtype == np.float32 else a.astype(np.int32) for name, a in feeds.items()}
    return program.run(feeds, program.new_state(1, 64))[0]


@on_every_isa
def test_cache_rounds_to_nearest_even(isa: str) -> None:
    """A row that attends to itself alone returns its value: as written, for ties, subnormals and large numbers."""
    pattern = np.random.default_rng(1).integers(0, 1 << 32, 64 * 32, dtype=np.uint32).reshape(64, 32)
    pattern[:16] &= 0xFFFF0000
    pattern[8:16] |= 0x8000  # ties
    pattern[16:24] &= 0x807FFFFF  # subnormals
    v = pattern.view(np.float32)
    v = np.where(np.isfinite(v) & (np.abs(v) < 3e38), v, np.float32(1.5)).astype(np.float32)
    got = out_of_a_cache(isa, "bf16", 1, v)
    expected = Tensor.from_array(v, "bf16").decode() + np.float32(0)
    if CpuBackend(1, isa).attention_precision("bf16") == "bf16":  # the instruction takes subnormals for zero
        expected[np.abs(expected) < np.finfo(np.float32).tiny] = 0
    assert np.array_equal(bits(got + 0.0), bits(expected))


@on_every_isa
def test_q8_0_cache_is_rounded_as_the_format_says(isa: str) -> None:
    """As above: halves away from zero, scales that are subnormal or nothing in f16, the largest there are."""
    values = normal(64, 64)
    values[:8] = np.round(values[:8] * 40) / 2  # with an extreme of 127: integers and halves, all of them ties
    values[:8, ::32] = 127
    values[8:16] *= np.logspace(-12, 6, 8, dtype=np.float32)[:, None]
    values[16:20] *= np.float32(1e-38)
    values[20, :32] = 0
    values[21, 5] = 65504.0 * 127
    values[22:40] *= np.logspace(-6.5, -4, 18, dtype=np.float32)[:, None]
    got = out_of_a_cache(isa, "q8_0", 2, values)
    assert np.array_equal(bits(got + 0.0), bits(Tensor.from_array(values, "q8_0").decode() + np.float32(0)))
    values[3, 40], values[7, 2] = np.nan, np.inf
    got = out_of_a_cache(isa, "q8_0", 2, values)
    assert np.isnan(got[3, 32:]).all() and np.isnan(got[7, :32]).all() and np.isfinite(got[3, :32]).all()


@on_every_isa
@pytest.mark.parametrize("format", CpuBackend.formats)
@pytest.mark.parametrize("n_in", [256, 768, 2049])
def test_a_row_of_linear_is_the_same_in_any_company(isa: str, format: str, n_in: int) -> None:
    n_in -= n_in % FORMATS[format].block
    graph, tensor = linear_graph(37, n_in, bias=True), random_tensor(format, 37, n_in)
    weights = {"w": tensor, "b": Tensor.from_array(normal(37))}
    x = normal(41, n_in)
    whole = compute(graph, weights, {"x": x}, isa, threads=3)
    for threads, cuts in ((1, [0, 1, 3, 6, 10, 15, 41]), (2, [0, 17, 18, 41]), (3, [*range(0, 41, 8), 41])):
        parts = [compute(graph, weights, {"x": x[a:b]}, isa, threads) for a, b in pairwise(cuts)]
        assert np.array_equal(bits(np.concatenate(parts)), bits(whole))


@on_every_isa
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("window", [None, 45])
def test_attention_does_not_see_the_pages(
    monkeypatch: pytest.MonkeyPatch, isa: str, dtype: str, window: int | None
) -> None:
    monkeypatch.setenv("FINIAL_CPU_ISA", isa)
    results = [
        test_ops.run("cpu", test_ops.attention([[130, 20], [2, 1]], 6, 2, 80, dtype, window, page_size))
        for page_size in (1, 7, 16, 32, 64, 256)
    ]
    assert all(np.array_equal(bits(result), bits(results[0])) for result in results)


# --- programs -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_buffers_and_barriers(data: st.DataObject) -> None:
    """Random graphs of shared, reused and dying values: what the arena reuses and where threads wait is right."""
    width = data.draw(st.sampled_from([16, 48, 130]))
    weights = {f"w{i}": Tensor.from_array(normal(width, width, seed=i) / np.float32(width)) for i in range(3)}
    graph = Graph("random")
    values = [graph.input("a", ("T", width)), graph.input("b", ("T", width))]
    arrays = {"a": normal(5, width, seed=8), "b": normal(5, width, seed=9)}
    known = [arrays["a"].astype(np.float64), arrays["b"].astype(np.float64)]
    for _ in range(data.draw(st.integers(1, 25))):
        first, second = (data.draw(st.integers(max(0, len(values) - 6), len(values) - 1)) for _ in range(2))
        if data.draw(st.booleans()):
            values.append(graph.apply("add", values[first], values[second]))
            known.append(known[first] + known[second])
        else:
            name = data.draw(st.sampled_from(sorted(weights)))
            values.append(graph.apply("linear", values[first], graph.weight(name, (width, width))))
            known.append(known[first] @ weights[name].decode().T.astype(np.float64))
    outputs = sorted(data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1, max_size=4)))
    for at in outputs:
        graph.output(values[at])
    program = CpuBackend(3).compile(graph, weights)
    state = program.new_state(0, 1)
    for _ in range(3):
        for got, at in zip(program.run(arrays, state), outputs, strict=True):
            np.testing.assert_allclose(got, known[at], rtol=1e-4, atol=1e-4 * max(1.0, np.abs(known[at]).max()))


def test_independent_instructions_share_a_barrier() -> None:
    graph = Graph("qkv")
    x = graph.input("x", ("T", 32))
    q, k, v = (graph.apply("linear", x, graph.weight(name, (32, 32))) for name in "qkv")
    graph.output(graph.apply("add", graph.apply("add", q, k), v))
    program = CpuBackend(2).compile(graph, {name: random_tensor("f32", 32, 32) for name in "qkv"})
    assert (program._native.instructions, program._native.barriers) == (3, 2)


@pytest.mark.parametrize("format", ["f32", "bf16", "q8_0", "q4_k"])
@on_every_isa
def test_weights_may_lie_anywhere(isa: str, format: str) -> None:
    """A tensor in a file starts at any byte, and the program keeps what it points at alive."""
    tensor, x = random_tensor(format, 17, 256), normal(3, 256)
    expected = compute(linear_graph(17, 256), {"w": tensor}, {"x": x}, isa)
    room = np.zeros(tensor.nbytes + 3, np.uint8)
    room[3:] = tensor.data
    program = CpuBackend(2, isa).compile(linear_graph(17, 256), {"w": Tensor(format, tensor.shape, room[3:])})
    del room
    gc.collect()
    junk = [np.full(tensor.nbytes + 3, 255, np.uint8) for _ in range(50)]
    got = program.run({"x": x}, program.new_state(0, 1))[0]
    assert np.array_equal(bits(got), bits(expected)) and len(junk) == 50


def test_no_rows_are_no_work() -> None:
    tensor = random_tensor("bf16", 8, 32)
    assert compute(linear_graph(8, 32), {"w": tensor}, {"x": np.empty((0, 32), np.float32)}).shape == (0, 8)


def test_shapes_of_a_step_are_checked() -> None:
    graph = Graph("add")
    graph.output(graph.apply("add", graph.input("a", ("T", 4)), graph.input("b", ("T", 4))))
    program = create(1).compile(graph, {})
    state = program.new_state(0, 1)
    with pytest.raises(BackendError, match=r"b : f32\[T, 4\] is \[3, 4\], expected T to be 2"):
        program.run({"a": normal(2, 4), "b": normal(3, 4)}, state)
    with pytest.raises(AssertionError, match="float64"):
        program.run({"a": np.zeros((2, 4)), "b": normal(2, 4)}, state)


def test_the_builder_refuses_what_does_not_fit() -> None:
    program = _native.Program(_native.Pool(1))
    rows = program.dimension()
    x, y = program.input(rows, 64), program.output(rows, 8)
    data = np.zeros(8 * 64 * 2, np.uint8)
    w, other = program.weight(data, "f16", 8, 64), program.weight(np.zeros(8 * 68, np.uint8), "q8_0", 8, 64)
    for bad in (
        lambda: program.weight(data[:-1], "bf16", 8, 64),
        lambda: program.weight(data, "bf16", 1 << 40, 64),
        lambda: program.weight(data, "q8_0", 8, 63),
        lambda: program.weight(data, "int3", 8, 64),
        lambda: program.weight(data, "bf16", 8, 64, np.zeros(7, np.float32)),
        lambda: program.linears(x, [(x, w, -1, -1)]),
        lambda: program.linears(99, [(y, w, -1, -1)]),
        lambda: program.linears(x, [(99, w, -1, -1)]),
        lambda: program.linears(x, [(y, 99, -1, -1)]),
        lambda: program.linears(x, [(y, w, 99, -1)]),
        lambda: program.linears(x, [(y, w, -1, x)]),
        lambda: program.linears(x, [(y, w, -1, -1), (y, other, -1, -1)]),
        lambda: program.linears(x, []),
        lambda: program.linears(x, [(y, w, -1, -1)], np.ones(63, np.float32), 1e-6),
        lambda: program.rms_norm(x, x, np.ones(64, np.float32), 1e-6),
        lambda: program.rope(y, x, 0, np.ones(4, np.float32), 1.0),
        lambda: program.rope(x, x, 0, np.ones(32, np.float32), 1.0, np.ones(63, np.float32), 1e-6),
        lambda: program.add(y, x, x),
        lambda: program.buffer(rows, 8, 5),
        lambda: program.cache(0, 64, "f32"),
        lambda: program.cache(1, 64, "f16"),
    ):
        with pytest.raises(ValueError, match=r"."):
            bad()
    with pytest.raises(TypeError):
        program.weight(data[::2], "bf16", 8, 64)  # a copy would not be what the caller keeps


def test_a_state_of_another_program_is_refused() -> None:
    case, other = test_ops.attention([[3]], 2, 1, 32, "f32"), test_ops.attention([[3]], 2, 1, 32, "bf16")
    program, stranger = (create(1).compile(c.graph, c.weights) for c in (case, other))
    with pytest.raises(BackendError, match="another program"):
        program.run(case.feeds, stranger.new_state(1, 16))


def test_a_cache_takes_memory_as_it_is_written() -> None:
    case = test_ops.attention([[3]], 2, 1, 64, "bf16")
    program = create(1).compile(case.graph, case.weights)
    before = resident()
    state = program.new_state(pages=1 << 17, page_size=64)
    assert state.nbytes == (1 << 23) * 2 * 64 * 2  # 2 GiB
    program.run(case.feeds, state)
    assert resident() - before < 32 << 20
    for pages, page_size in ((-1, 16), (1, 0), (1 << 30, 1 << 30)):
        with pytest.raises(BackendError, match="max-context"):
            program.new_state(pages, page_size)


def resident() -> int:
    """Bytes of this process in memory now; where only the peak is known, the peak."""
    if (statm := Path("/proc/self/statm")).exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def decoder(hidden: int = 64, layers: int = 3, format: str = "bf16") -> tuple[Graph, dict[str, Tensor]]:
    """A decoder of Qwen3's shape with random weights."""
    config = config_of(hidden, layers)
    shapes = names.weight_shapes(config)
    weights = {
        name: Tensor.from_array(normal(*shape, seed=at) * 0.1) for at, (name, shape) in enumerate(shapes.items())
    }
    weights = {name: t.to(format) if len(t.shape) == 2 else t for name, t in weights.items()}
    weights |= {name: Tensor.from_array(array) for name, array in constants(config).items()}
    return build_graph(config), weights


def config_of(hidden: int, layers: int) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 96,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        }
    )


def test_six_barriers_a_layer() -> None:
    graph, weights = decoder(layers=10)
    assert CpuBackend(2).compile(graph, weights)._native.barriers <= 6 * 10 + 3


@on_every_isa
@pytest.mark.parametrize("format", ["bf16", "q8_0", "f16"])
def test_gathered_products_change_no_bit(isa: str, format: str) -> None:
    """Norms, additions and gates done with a product against each as an instruction of its own: outputs keep it so."""
    graph, weights = decoder(format=format)
    apart = Graph.from_json(graph.to_json())
    for node in graph.nodes:
        if node.op not in ("cache_write", "embed", "attention") and node.outputs[0] not in apart.outputs:
            apart.output(apart.values[node.outputs[0]])
    for rows in (1, 5, 40):
        step = single_step(list(range(rows)), 64, wanted=[rows - 1]).feeds()
        results = []
        for which in (graph, apart):
            program = CpuBackend(2, isa).compile(which, weights)
            results.append((program._native.instructions, program.run(step, program.new_state(1, 64))[0]))
        assert results[0][0] < results[1][0]
        assert np.array_equal(bits(results[0][1]), bits(results[1][1]))


def test_packed_weights_give_their_file_pages_back(tmp_path: Path) -> None:
    """Only of a read-only map, whose bytes come back from the file; the table of an embedding stays readable."""
    tensor = random_tensor("bf16", 8192, 1024)
    (tmp_path / "weights").write_bytes(bytes(7) + tensor.data.tobytes())
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")[7:]
    writable = np.memmap(tmp_path / "weights", np.uint8, "c")[7:]
    assert is_mapped(mapped) and not is_mapped(writable) and not is_mapped(tensor.data)
    x, results = normal(3, 1024), []
    for data in (mapped, writable, tensor.data):
        held = Tensor("bf16", tensor.shape, data)
        before = resident()
        program = CpuBackend(2).compile(linear_graph(8192, 1024), {"w": held})
        state = program.new_state(0, 1)  # waits until all are packed
        if data is mapped and _native.packs("bf16"):
            assert resident() - before < 1.15 * tensor.nbytes + (4 << 20)
        results.append(program.run({"x": x}, state)[0])
        assert np.array_equal(data, tensor.data)
    assert np.array_equal(bits(results[0]), bits(results[1])) and np.array_equal(bits(results[0]), bits(results[2]))


def test_mapped_weights_are_packed_beside_other_work(tmp_path: Path) -> None:
    """A program may be dropped while its weights are packed; a step waits for them, also for those declared late."""
    tensor = random_tensor("bf16", 8192, 1024)
    (tmp_path / "weights").write_bytes(tensor.data.tobytes())
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    x, graph, backend = normal(3, 1024), linear_graph(8192, 1024), CpuBackend(2)
    weights = {"w": Tensor("bf16", tensor.shape, mapped)}
    expected = backend.compile(graph, {"w": tensor}).run({"x": x}, _native.Program(_native.Pool(1)).new_state(0, 1))[0]
    for _ in range(4):
        del_me, kept = backend.compile(graph, weights), backend.compile(graph, weights)
        del del_me
        assert np.array_equal(bits(kept.run({"x": x}, kept.new_state(0, 1))[0]), bits(expected))
    late = _native.Program(_native.Pool(2))
    rows = late.dimension()
    members = []
    for index in range(2):  # one before and one after `pack`; a map that is known is not packed again
        own = np.memmap(tmp_path / "weights", np.uint8, "r")
        members.append((late.output(rows, 8192), late.weight(own, "bf16", 8192, 1024, mapped=True), -1, -1))
        if index == 0:
            late.pack()
    late.linears(late.input(rows, 1024), members)
    outputs = [np.empty((3, 8192), np.float32) for _ in members]
    late.run([3], [], [x], outputs, late.new_state(0, 1))
    for output in outputs:
        assert np.array_equal(bits(output), bits(expected))


def test_profile() -> None:
    graph, weights = decoder()
    program = CpuBackend(2).compile(graph, weights)
    state, step = program.new_state(1, 64), single_step([1, 2, 3], 64).feeds()
    assert program.timings() == []
    quiet = program.run(step, state)[0]
    program.profile(True)
    for _ in range(3):
        assert np.array_equal(bits(program.run(step, state)[0]), bits(quiet))
    rows = {row.what: row for row in program.timings()}
    assert rows["embed"].calls == 3 and rows["attention"].calls == 9
    assert rows["norm + rope"].calls == 18 and "norm" not in rows and "rope" not in rows  # of queries and of keys
    head = next(row for what, row in rows.items() if what.endswith("> 96"))
    assert head.bytes == 3 * weights["model.embed_tokens.weight"].nbytes and head.seconds > 0 <= head.waiting
    program.profile(False)
    program.run(step, state)
    assert program.timings() == []


def test_an_activation_that_is_no_number_is_not_hidden() -> None:
    for format in ("bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k"):
        x = normal(3, 256)
        x[1, 40] = np.nan
        x[2, 3] = np.inf
        got = compute(linear_graph(5, 256), {"w": random_tensor(format, 5, 256)}, {"x": x})
        assert np.isfinite(got[0]).all() and not np.isfinite(got[1:]).any()


# --- threads --------------------------------------------------------------------------------------------------------


def test_programs_of_one_backend_run_from_many_threads() -> None:
    backend, graph = CpuBackend(3), linear_graph(200, 300)
    programs = [backend.compile(graph, {"w": Tensor.from_array(normal(200, 300, seed=i))}) for i in range(3)]
    x = normal(4, 300)
    expected = [program.run({"x": x}, program.new_state(0, 1))[0] for program in programs]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(60):
            which = (turn + seed) % 3
            if not np.array_equal(programs[which].run({"x": x}, programs[which].new_state(0, 1))[0], expected[which]):
                wrong.append(which)

    team = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert not wrong


PRELUDE = """
import os, sys, time, numpy as np
from finial.backends.cpu import CpuBackend
from finial.formats import Tensor
from finial.graph import Graph
graph = Graph("linear")
graph.output(graph.apply("linear", graph.input("x", ("T", 64)), graph.weight("w", (64, 64))))
x = np.ones((2, 64), np.float32)
program = CpuBackend(3).compile(graph, {"w": Tensor.from_array(np.eye(64, dtype=np.float32))})
state = program.new_state(0, 1)
assert np.array_equal(program.run({"x": x}, state)[0], x)
"""


def script(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, env=variables)


@pytest.mark.parametrize("ending", ["", "time.sleep(0.05)", "sys.exit(0)", "del program; import gc; gc.collect()"])
def test_the_process_ends_with_threads_alive(ending: str) -> None:
    done = script(PRELUDE + ending)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    done = script(
        PRELUDE
        + """
child = os.fork()
assert np.array_equal(program.run({"x": x}, state)[0], x)
if child == 0:
    print("child")
else:
    assert os.waitpid(child, 0)[1] == 0
    print("parent")
"""
    )
    assert done.returncode == 0 and done.stdout == "child\nparent\n", done.stderr


# --- the machine ----------------------------------------------------------------------------------------------------


@on_every_isa
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    done = script("from finial import _native; print(_native.isa())", FINIAL_CPU_ISA=isa)
    assert done.stdout == f"{isa}\n", done.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2", " "])
def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FINIAL_CPU_ISA", name)
    with pytest.raises(BackendError, match=f"FINIAL_CPU_ISA={name} is not .* have baseline"):
        create(None)


def test_cores_and_features() -> None:
    cores = _native.cores()
    assert 1 <= cores["physical"] <= cores["logical"]
    assert create(None).threads == cores["physical"] and create(5).threads == 5
    assert ISAS[0] == "baseline" and _native.isa() in ISAS
    features = _native.cpu_features()
    assert ("avx2" in ISAS) <= features.get("avx2", False)
    assert ("neon_dot" in ISAS) <= features.get("dotprod", False)


def test_peak_flops() -> None:
    assert 0.1 < _native.peak_flops(1, "f32", 0.02) < 100_000
    for kind in {_native.activations(format) for format in ("bf16", "q8_0")}:
        assert _native.peak_flops(2, kind, 0.02) > 0.1
    for bad in ((0, "f32"), (1, "f8")):
        with pytest.raises(ValueError, match="peak_flops"):
            _native.peak_flops(*bad)


def test_read_bandwidth() -> None:
    for threads in (1, 2):
        reader = _native.BandwidthProbe(threads, 64 << 20)
        assert all(0.1 < reader.gb_s(0.02) < 10_000 for _ in range(2))
    for bad in ((0, 1 << 20), (1, 8)):
        with pytest.raises(RuntimeError, match="BandwidthProbe: threads"):
            _native.BandwidthProbe(*bad)
    with pytest.raises(RuntimeError, match="seconds"):
        reader.gb_s(float("nan"))
