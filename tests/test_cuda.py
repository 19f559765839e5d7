"""The cuda backend without a GPU: its kernels' own sources on the CPU (see cuda_twin.py), against the reference.

What a GPU adds to this (its own memory order, its tensor cores' sums, its speed) is tested by `make gpu` on one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import models
from cuda_twin import CXX, TwinDevice
from finial.backends import Draw, get_backend
from finial.backends.cuda import CudaBackend, kernels
from finial.backends.cuda.device import Launch
from finial.backends.cuda.kernels import Kernel
from finial.backends.cuda.program import CudaProgram
from finial.engine.generate import Engine
from finial.engine.sampling import SamplingParams, choose
from finial.errors import BackendError
from finial.executor import Executable, Segment
from finial.files.checkpoint import Checkpoint, open_checkpoint
from finial.formats import Tensor
from finial.graph import Graph, Step, single_step
from finial.models.decoder import build_graph, constants
from rounded import product_rounding, rounding_reference
from test_ops import CASES, Case, run, runs

if CXX is None:
    assert os.environ.get("CI") != "true", "no g++: see .ci/run"
    pytest.skip("no g++ here; install it to run the CUDA kernels on the CPU", allow_module_level=True)

PAGE = 16
# Each kind of op, of rows and of cache; the whole table runs on a GPU.
CHOSEN = [
    case
    for index, case in enumerate(CASES)
    if runs(CudaBackend, case)
    and not case.name.startswith("attention")
    and (index % 3 == 0 or "q8_0" in case.name or "q4_0" in case.name or "silu" in case.name)
] + [case for index, case in enumerate(c for c in CASES if c.name.startswith("attention")) if index % 4 == 0]


def on_twin(case: Case, device: TwinDevice) -> np.ndarray:
    program = CudaBackend(device).compile(case.graph, case.weights)
    state = program.new_state(case.pages, case.page_size)
    for feeds in case.steps:
        program.run(feeds, state)
    return program.run(case.feeds, state)[0]


@pytest.fixture(scope="module")
def ops_compiled() -> None:
    """All kernels of all cases in one go of the compiler."""
    gathered: set[Kernel] = set()
    for case in CHOSEN:
        on_twin(case, TwinDevice(gather=gathered))
    TwinDevice().preload(gathered)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_op(ops_compiled: None, case: Case) -> None:
    device = TwinDevice(seed=len(case.name))
    backend = CudaBackend(device)
    assert all(backend.supports(case.graph, node) for node in case.graph.nodes)
    expected, got = run("reference", case), on_twin(case, device)
    assert got.dtype == np.float32 and got.shape == expected.shape and np.isfinite(got).all()
    allowed = case.tolerance(expected)
    for weight in case.weights.values() if case.graph.nodes[0].op == "linear" else ():
        if len(weight.shape) == 2:
            allowed = allowed + case.rounding(backend.activation_precision(weight.format))
    excess = np.abs(got.astype(np.float64) - expected) - allowed
    assert (excess <= 0).all(), f"{(excess > 0).sum()} of {got.size} values off, worst by {excess.max():.3g}"


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Checkpoint:
        if not (root / name).exists():
            models.save(name, root / name)
        return open_checkpoint(root / name)

    return of


def graph_and_weights(checkpoint: Checkpoint, format: str, kv: str) -> tuple[Graph, dict[str, Tensor]]:
    weights = {name: t.to(format) if len(t.shape) == 2 else t for name, t in checkpoint.tensors.items()}
    more = {name: Tensor.from_array(array) for name, array in constants(checkpoint.config).items()}
    return build_graph(checkpoint.config, kv), weights | more


def batch_steps(vocab: int) -> list[Step]:
    """Three sequences on scattered pages: two prompts, a third beside a decoding first, then decoding together."""
    random = np.random.default_rng(5)
    tables = np.array([[7, 2, 11], [0, 9, 4], [5, 1, 8]], np.int32)
    done = [0, 0, 0]
    steps = []
    for chunk in ([13, 9, 0], [1, 4, 12], [1, 1, 1], [0, 1, 1], [1, 1, 1], [2, 1, 0]):
        live = [b for b in range(3) if chunk[b]]
        positions = [np.arange(done[b], done[b] + chunk[b]) for b in live]
        for b in live:
            done[b] += chunk[b]
        slots = [tables[b, p // PAGE] * PAGE + p % PAGE for b, p in zip(live, positions, strict=True)]
        rows = sum(chunk)
        steps.append(
            Step(
                tokens=random.integers(0, vocab, rows).astype(np.int32),
                positions=np.concatenate(positions).astype(np.int32),
                starts=np.cumsum([0] + [chunk[b] for b in live]).astype(np.int32),
                lengths=np.array([done[b] for b in live], np.int32),
                pages=tables[live],
                slots=np.concatenate(slots).astype(np.int32),
                wanted=np.arange(rows, dtype=np.int32),
            )
        )
    return steps


def both(
    graph: Graph, weights: dict[str, Tensor], device: TwinDevice, steps: list[Step]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    results = []
    for backend in (get_backend("reference"), CudaBackend(device)):
        program = backend.compile(graph, weights)
        state = program.new_state(12, PAGE)
        results.append([program.run(step.feeds(), state)[0] for step in steps])
    return results[0], results[1]


def root_mean_square(got: np.ndarray, expected: np.ndarray) -> float:
    """Of a difference, over the spread of what is expected."""
    return float(np.sqrt(((got - expected) ** 2).mean() / expected.var()))


def worst(got: np.ndarray, expected: np.ndarray) -> float:
    """Of a row's differences over that row's own spread."""
    return float((np.abs(got - expected).max(axis=-1) / expected.std(axis=-1)).max())


# Without tensor cores every product multiplies in float32: the bound of test_models.py.
PLAIN = 1e-4


@pytest.mark.parametrize(
    "name, format, kv",
    [
        ("qwen3", "bf16", "f32"),
        ("llama-biases", "f16", "f32"),
        ("mistral-window", "f32", "f32"),
        ("qwen2-tied-yarn", "f32", "f32"),
    ],
)
def test_model_in_float32(saved: Callable[[str], Checkpoint], name: str, format: str, kv: str) -> None:
    """A device without tensor cores: prompts, mixed steps and decoding, rows of three sequences side by side."""
    checkpoint = saved(name)
    graph, weights = graph_and_weights(checkpoint, format, kv)
    steps = batch_steps(checkpoint.config.vocab_size)
    expected, got = both(graph, weights, TwinDevice(capability=75, seed=3), steps)
    assert max(map(worst, got, expected)) < PLAIN


@pytest.mark.parametrize(
    "name, format, kv",
    [
        ("qwen3", "bf16", "bf16"),
        ("qwen3-tied", "q8_0", "q8_0"),
        ("qwen3-yarn-mqa", "q4_0", "bf16"),
        ("llama-biases", "fp8", "bf16"),
    ],
)
def test_model_on_tensor_cores(saved: Callable[[str], Checkpoint], name: str, format: str, kv: str) -> None:
    """Off by what the reference is off by when it rounds as much, at the same places; see test_models.py."""
    checkpoint = saved(name)
    graph, weights = graph_and_weights(checkpoint, format, kv)
    device = TwinDevice(seed=4)
    steps = batch_steps(checkpoint.config.vocab_size)
    exact, got = both(graph, weights, device, steps)
    assert {launch.kernel.template for launch in device.launched} >= {"matvec", "embed"}
    engine = CudaBackend(device)
    program = get_backend("reference").compile(graph, weights)
    state, rounded = program.new_state(12, PAGE), []
    for step in steps:
        many = engine.attention_precision(kv) if (np.diff(step.starts) > 1).any() else "f32"  # else each row by itself
        with rounding_reference(**product_rounding(engine, format), queries=many, cached=many):
            rounded.append(program.run(step.feeds(), state)[0])
    pairs = [(got, exact), (got, rounded), (rounded, exact)]
    off, apart, cost = (root_mean_square(*map(np.concatenate, pair)) for pair in pairs)
    # Both round at the same places, but where the last bit before a rounding decides, they go apart by a whole step.
    assert 2**-11 < cost < 0.05 and off < 1.25 * cost and apart < 0.75 * cost, (off, apart, cost)


def test_decoding_takes_five_kernels_a_layer(saved: Callable[[str], Checkpoint]) -> None:
    checkpoint = saved("qwen3")
    graph, weights = graph_and_weights(checkpoint, "bf16", "bf16")
    device = TwinDevice(gather=set())
    program = CudaBackend(device).compile(graph, weights)
    launches: list[int] = []
    device.record = lambda launched: launches.append(len(launched))  # type: ignore[method-assign,assignment,return-value,func-returns-value]
    device.replay = lambda recording: None  # type: ignore[method-assign]
    program.run(single_step([1], PAGE).feeds(), program.new_state(2, PAGE))
    assert launches == [2 + 5 * checkpoint.config.num_layers]


def test_same_step_same_bits(saved: Callable[[str], Checkpoint]) -> None:
    """Whatever the order of the blocks: also where the last block to finish merges what the others left."""
    checkpoint = saved("qwen3")
    graph, weights = graph_and_weights(checkpoint, "bf16", "bf16")
    steps = batch_steps(checkpoint.config.vocab_size)
    runs = []
    for seed in (10, 99):
        program = CudaBackend(TwinDevice(seed=seed)).compile(graph, weights)
        state = program.new_state(12, PAGE)
        runs.append([program.run(step.feeds(), state)[0] for step in steps])
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.timeout(400)  # hundreds of threads under a sanitizer: minutes when the machine is busy
def test_no_thread_races_with_another(saved: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """ThreadSanitizer watches each CUDA thread of a mixed step and of a decoding step of one layer, as an OS thread."""
    checkpoint = saved("qwen3")
    config = replace(checkpoint.config, num_layers=1, windows=(None,))
    graph = build_graph(config, "bf16")
    weights = graph_and_weights(checkpoint, "bf16", "bf16")[1]
    device = TwinDevice(arena=8 << 20, multiprocessors=2)
    program = CudaBackend(device).compile(graph, weights)
    state = program.new_state(12, PAGE)
    launches = []
    for step in batch_steps(config.vocab_size)[:3]:
        program.run(step.feeds(), state)
        launches.append(device.launched)
    device.launched = launches[1] + launches[2]
    done = device.replay_under("thread", tmp_path)
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.parametrize("safe", [True, False])
def test_a_missing_barrier_is_found(safe: bool, tmp_path: Path) -> None:
    device = TwinDevice(arena=1 << 16)
    constants = (f"static constexpr bool SAFE = {str(safe).lower()}",)
    kernel = Kernel("racy", str(Path(__file__).parent / "cuda" / "racy.cuh"), "PointwiseArgs", constants, threads=64)
    args = kernel.pack(a=device.allocate(256), out=device.allocate(256))
    device.replay(device.record([Launch(kernel, (2, 1, 1), args)]))
    done = device.replay_under("thread", tmp_path)
    assert (done.returncode == 0) == safe and ("data race" in done.stderr) != safe, done.stderr[:2000]


# --- choosing tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_chosen_as_the_host_does(seed: int) -> None:
    """Greedy, temperature, top-k, top-p, min-p, ties and rows that are not finite, over one head of 1,531 tokens."""
    random = np.random.default_rng(seed)
    vocab, rows = 1531, 16
    head = random.standard_normal((vocab, 64)).astype(np.float32)
    head[random.integers(0, vocab, 300)] = head[3]  # ties, many of them
    graph = Graph("head")
    graph.input("tokens", ("T",), "i32")
    wanted = graph.input("wanted", ("R",), "i32")
    rows_in = graph.apply("select_rows", graph.input("x", ("T", 64)), wanted)
    graph.output(graph.apply("linear", rows_in, graph.weight("w", (vocab, 64)), name="logits"))
    program = CudaBackend(TwinDevice(capability=75, seed=seed)).compile(graph, {"w": Tensor.from_array(head)})
    state = program.new_state(1, PAGE)
    options = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
        for t, k, p, m in (
            (0.0, 0, 1.0, 0.0),
            (1.0, 0, 1.0, 0.0),
            (0.7, 40, 1.0, 0.0),
            (1.0, 0, 0.9, 0.0),
            (1.5, 0, 1.0, 0.05),
            (0.8, 100, 0.95, 0.02),
            (1.0, 1, 1.0, 0.0),
            (2.0, 0, 0.01, 0.0),
        )
    ] * 2
    draws = random.random(rows)
    x = random.standard_normal((rows, 64)).astype(np.float32)
    feeds = {"tokens": np.zeros(rows, np.int32), "wanted": np.arange(rows, dtype=np.int32), "x": x}
    logits = program.run(feeds, state)[0]
    asked = [Draw(p.temperature, p.top_k, p.top_p, p.min_p, u) for p, u in zip(options, draws.tolist(), strict=True)]
    got = program.sample(feeds, state, asked)
    assert got is not None
    # A draw within float32's rounding of an edge may fall to either side; none of these does.
    assert got.tolist() == [choose(row, p, u) for row, p, u in zip(logits, options, draws.tolist(), strict=True)]
    x[5, 0] = np.inf
    x[6, 1] = np.nan
    broken = program.sample(feeds, state, asked)
    assert broken is not None and broken[[5, 6]].tolist() == [-1, -1] and np.array_equal(broken[:5], got[:5])


def test_the_engine_takes_tokens_from_the_device(saved: Callable[[str], Checkpoint]) -> None:
    """The same text as by way of logits, greedy and drawn; where logits are needed the host still chooses."""
    checkpoint = saved("qwen3")
    graph, weights = graph_and_weights(checkpoint, "bf16", "bf16")
    texts = []
    for there in (True, False):
        device = TwinDevice(capability=75)
        executable = Executable(graph, [Segment(CudaBackend(device), graph, tuple(graph.outputs))], weights)
        if not there:
            executable.sample = lambda step, draws: None  # type: ignore[method-assign]
        engine = Engine(executable, pages=12, page_size=PAGE, vocab_size=checkpoint.config.vocab_size, max_context=64)
        params = [
            SamplingParams(max_tokens=6),
            SamplingParams(max_tokens=5, temperature=0.9, top_p=0.9, seed=4),
            SamplingParams(max_tokens=3, repetition_penalty=1.3),
        ]
        for batch in (params[:2], params[2:]):
            handles = [engine.submit([5, 6, 7 + i], p) for i, p in enumerate(batch)]
            engine.finish(handles)
            texts.append([handle.tokens for handle in handles])
            sampled = any(launch.kernel.template == "sample" for launch in device.launched)
            assert sampled == (there and not batch[0].penalised)
    assert texts[:2] == texts[2:]


# --- what a user meets ------------------------------------------------------------------------------------------------


def test_no_driver_is_said() -> None:
    try:
        get_backend("cuda")
    except BackendError as error:
        assert "driver" in error.what or "cuda-bindings" in error.what
        assert error.fix
    with pytest.raises(BackendError, match="no device cpu:1"):
        get_backend("cpu:1")


def test_cache_that_does_not_fit_is_refused(saved: Callable[[str], Checkpoint]) -> None:
    checkpoint = saved("qwen3")
    graph, weights = graph_and_weights(checkpoint, "bf16", "bf16")
    program = CudaBackend(TwinDevice(gather=set())).compile(graph, weights)
    with pytest.raises(
        BackendError, match=r"a cache of [\d,]+ positions takes [\d,]+ bytes, twin has [\d,]+ free"
    ) as caught:
        program.new_state(100_000, PAGE)
    longest = int(caught.value.fix.split()[3].replace(",", ""))
    pages = longest // PAGE
    assert pages > 0 and program.new_state(pages, PAGE).nbytes > 0


@pytest.mark.parametrize("format", ["q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"])
def test_other_formats_are_named_and_re_encoded_when_asked(format: str) -> None:
    case = next(case for case in CASES if case.name == f"linear 5x256x33 {format}")
    with pytest.raises(BackendError, match=rf"no kernel for w in {format}") as caught:
        CudaBackend(TwinDevice(gather=set())).compile(case.graph, case.weights)
    asked = re.search(r"--format (\w+)", caught.value.fix)
    assert asked is not None
    weights = {"w": case.weights["w"].later(asked[1], "w")}
    device = TwinDevice()
    got = on_twin(replace(case, weights=weights), device)
    expected = run("reference", replace(case, weights=weights))
    assert (np.abs(got - expected) <= case.tolerance(expected) * 1.01).all()


def test_weights_that_do_not_fit_are_refused(saved: Callable[[str], Checkpoint]) -> None:
    graph, weights = graph_and_weights(saved("qwen3"), "bf16", "bf16")
    with pytest.raises(BackendError, match=r"the weights take [\d,]+ bytes, twin has [\d,]+ free"):
        CudaProgram(graph, weights, TwinDevice(arena=1 << 16))


def test_memory_is_given_back(saved: Callable[[str], Checkpoint]) -> None:
    graph, weights = graph_and_weights(saved("qwen3"), "bf16", "bf16")
    device = TwinDevice(gather=set())
    program = CudaBackend(device).compile(graph, weights)
    after_weights = device.memory()[0]
    for _ in range(3):
        state = program.new_state(12, PAGE)
        program.run(single_step([1, 2], PAGE).feeds(), state)
        assert device.memory()[0] < after_weights
        del state
        assert device.memory()[0] == after_weights
    del program
    assert device.memory()[0] == device.arena[1]


@pytest.mark.parametrize("group", range(1, 65))
def test_a_group_is_shared_out_evenly(group: int) -> None:
    for cache in kernels.CACHES:
        at_once = kernels.heads_at_once(cache, group)
        parts = -(-group // at_once)
        assert at_once * parts >= group and at_once * (parts - 1) < group and at_once <= 4
