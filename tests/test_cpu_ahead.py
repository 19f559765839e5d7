"""Runs of decode steps in the native program: the tokens that single steps and engine/sampling.py give.

On every instruction set, with one thread and several; what a run means is in test_runs.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import models
from finial import _native
from finial.backends import ENDED, NOT_FINITE, Ahead, Draw, cpu_ahead
from finial.backends.cpu import CpuBackend, CpuProgram
from finial.engine.generate import Engine
from finial.engine.sampling import SamplingParams, choose
from finial.errors import BackendError, ModelError
from finial.executor import Executable, Segment
from finial.files.checkpoint import open_checkpoint
from finial.formats import Tensor
from finial.graph import Graph
from finial.models.decoder import build_graph, constants
from run_rows import Ints, Rows, asked, said

Small = tuple[Graph, dict[str, Tensor], int]


@pytest.fixture(scope="module", params=[False, True], ids=["", "hidden"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    models.save("qwen3", folder)
    checkpoint = open_checkpoint(folder)
    weights = {name: t.to("bf16") if len(t.shape) == 2 else t for name, t in checkpoint.tensors.items()}
    weights |= {name: Tensor.from_array(array) for name, array in constants(checkpoint.config).items()}
    graph = build_graph(checkpoint.config, "bf16", hidden=request.param)
    return graph, weights, checkpoint.config.vocab_size


def program(small: Small, threads: int = 2, isa: str = "") -> CpuProgram:
    return CpuBackend(threads, isa).compile(small[0], small[1])


class Batch(Rows[CpuProgram]):
    """As single steps and runs take it."""

    def feeds(self, rows: list[int], at: list[int] | None = None) -> dict[str, Ints]:
        return {**super().feeds(rows, at), "pooled": np.zeros(0, np.int32)}

    def one_by_one(self, ahead: Ahead) -> list[list[int]]:
        """What a run must yield: by single steps of the rows that are left, chosen by the engine's own rules."""
        left, out = ahead.limits.tolist(), []
        for numbers in ahead.uniforms:
            rows = [row for row, more in enumerate(left) if more > 0]
            if not rows:
                break
            logits = self.program.run(self.feeds(rows), self.state)[0]
            step = [ENDED] * len(left)
            for row, line in zip(rows, logits, strict=True):
                d = ahead.draws[row]
                params = SamplingParams(temperature=d.temperature, top_k=d.top_k, top_p=d.top_p, min_p=d.min_p)
                step[row] = token = choose(line, params, float(numbers[row]))
                left[row] = 0 if token in ahead.stop_ids[row] else left[row] - 1
                self.tokens[row].append(token)
            out.append(step)
        return out

    def by_run(self, ahead: Ahead, most: int | None = None) -> list[list[int]]:
        run = self.program.ahead(self.feeds(list(range(len(self.tokens)))), self.state, ahead)
        assert run is not None
        out = []
        for tokens in run:
            out.append(tokens.tolist())
            for row, token in enumerate(tokens.tolist()):
                if token >= 0:
                    self.tokens[row].append(token)
            if len(out) == most:
                break
        run.close()
        return out


@pytest.mark.parametrize("isa", _native.isas_available())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("lengths", [[5], [3, 12, 8], [1, 2, 3, 4, 5, 7, 8, 9, 10]])
def test_the_tokens_are_those_of_single_steps(small: Small, lengths: list[int], threads: int, isa: str) -> None:
    """Rows that go on, end by a stop id, or by their limit; side by side, over page borders, one run after another."""
    whole, vocab = program(small, threads, isa), small[2]
    alone, ahead = (Batch(whole, vocab, lengths, 3) for _ in range(2))
    for part in range(2):
        wish = asked(len(lengths), 10, vocab, 10 * len(lengths) + part)
        assert ahead.by_run(wish) == alone.one_by_one(wish)
        assert ahead.tokens == alone.tokens


def test_a_run_may_be_left_at_any_step(small: Small) -> None:
    """What was computed beyond is in positions that nobody counts on."""
    whole, vocab = program(small), small[2]
    alone, ahead = (Batch(whole, vocab, [4, 11], 3) for _ in range(2))
    random = np.random.default_rng(0)
    for taken in (1, 2, 3, 7, 1):
        numbers, draws = random.random((8, 2)), [Draw(1.0, 0, 1.0, 0.0, 0.0)] * 2
        most = np.full(2, 8, np.int32)
        short = Ahead(draws, numbers[:taken], [frozenset()] * 2, np.minimum(most, taken))
        assert ahead.by_run(Ahead(draws, numbers, [frozenset()] * 2, most), taken) == alone.one_by_one(short)
    a, b = (batch.program.run(batch.feeds([0, 1]), batch.state)[0] for batch in (alone, ahead))
    assert np.array_equal(a, b)


def test_a_burst_is_short(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step at least, and none that would go beyond the time by what steps were seen to take."""
    whole, vocab = program(small, 1), small[2]
    steps = 200
    wish = Ahead([Draw(0.0, 0, 1.0, 0.0, 0.0)], np.zeros((steps, 1)), [frozenset()], np.array([steps], np.int32))

    def bursts(seconds: float) -> list[int]:
        batch, calls, kept = Batch(whole, vocab, [3], 1), [], _native.Ahead

        class Noted:
            def __init__(self, *args: object) -> None:
                self._run = kept(*args)  # type: ignore[arg-type]

            def burst(self, state: _native.State, seconds: float) -> list[int]:
                tokens = self._run.burst(state, seconds)
                calls.append(len(tokens))
                return tokens

        monkeypatch.setattr(cpu_ahead, "BURST_S", seconds)
        monkeypatch.setattr(_native, "Ahead", Noted)
        assert len(batch.by_run(wish)) == steps
        monkeypatch.setattr(_native, "Ahead", kept)
        return calls[:-1]

    assert bursts(0.0) == [1] * steps
    assert bursts(60.0) == [steps]
    begun = time.perf_counter()
    some = bursts(2e-3)
    assert sum(some) == steps and len(some) > (time.perf_counter() - begun) / 1.0


def test_what_is_not_finite_ends_a_row(small: Small) -> None:
    graph, weights, vocab = small
    name = next(node for node in graph.nodes if node.outputs[0] == graph.outputs[0]).inputs[1]
    head = weights[name].decode().copy()
    head[:, 0] = np.inf
    whole = CpuBackend(2).compile(graph, {**weights, name: Tensor.from_array(head)})
    batch = Batch(whole, vocab, [1, 3], 1)
    run = whole.ahead(batch.feeds([0, 1]), batch.state, asked(2, 5, vocab, 1))
    assert run is not None and [step.tolist() for step in run] == [[NOT_FINITE, NOT_FINITE]]
    got = whole.sample(batch.feeds([0, 1]), batch.state, [Draw(0.0, 0, 1.0, 0.0, 0.0), Draw(1.0, 0, 1.0, 0.0, 0.5)])
    assert got is not None and got.tolist() == [NOT_FINITE, NOT_FINITE]


def test_what_cannot_run_ahead_is_left_to_single_steps_or_refused(small: Small) -> None:
    whole, vocab = program(small), small[2]
    batch = Batch(whole, vocab, [2, 3], 1)
    wish, feeds = asked(2, 5, vocab, 1), batch.feeds([0, 1])
    assert whole.ahead(feeds | {"wanted": np.array([1, 0], np.int32)}, batch.state, wish) is None
    assert whole.ahead(feeds | {"lengths": feeds["lengths"] + 1}, batch.state, wish) is None
    many = np.full(2, 20, np.int32)
    long = Ahead(wish.draws, np.zeros((20, 2)), [frozenset()] * 2, many)
    for pages in (feeds["pages"][:, :1], np.where(np.arange(feeds["pages"].shape[1]) < 1, feeds["pages"], -1)):
        run = whole.ahead(feeds | {"pages": pages.astype(np.int32)}, batch.state, long)
        assert run is not None
        with pytest.raises(BackendError, match=r"on no page|slots holds"):
            list(run)


class StepByStep(Executable):
    runs_ahead = False  # type: ignore[assignment]

    def sample(self, *_: object) -> None:
        return None


def test_the_engine_gives_the_same_with_runs_and_without(small: Small) -> None:
    """Seeds, stop ids and strings, few pages, a cancel, prompts that share pages with what a run left, log-probs."""
    graph, weights, vocab = small
    texts = []
    for kind in (Executable, StepByStep):
        executable = kind(graph, [Segment(CpuBackend(2), graph, tuple(graph.outputs))], weights)
        engine = Engine(
            executable, pages=14, page_size=4, vocab_size=vocab, max_context=48, max_batch=3, eos_ids=[7],
            hidden=len(graph.outputs) > 1,
        )  # fmt: skip
        scored = {"max_tokens": 5, "temperature": 1.0, "min_p": 0.1, "seed": 7, "logprobs": 1}
        texts.append(said(engine, vocab, scored))
    assert texts[0] == texts[1]


def test_logits_that_stop_being_finite_fail_as_in_single_steps(small: Small, tmp_path: Path) -> None:
    """The embedding of one token is infinite: whoever says it fails at the next, others go on."""
    graph, weights, vocab = small
    said = []
    for kind in (Executable, StepByStep):
        plain = kind(graph, [Segment(CpuBackend(2), graph, tuple(graph.outputs))], weights)
        engine = Engine(plain, pages=60, page_size=4, vocab_size=vocab, max_context=64, hidden=len(graph.outputs) > 1)
        first = engine.submit([5, 6], SamplingParams(max_tokens=20, temperature=1.0, seed=1))
        engine.finish([first])
        bad = first.tokens[9]
        name = next(node for node in graph.nodes if node.op == "embed").inputs[1]
        table = weights[name].decode().copy()
        table[bad] = np.inf
        broken = kind(
            graph, [Segment(CpuBackend(2), graph, tuple(graph.outputs))], {**weights, name: Tensor.from_array(table)}
        )
        engine = Engine(broken, pages=60, page_size=4, vocab_size=vocab, max_context=64, hidden=len(graph.outputs) > 1)
        handles = [
            engine.submit([5, i], SamplingParams(max_tokens=20, temperature=1.0, seed=1, stop_ids=stop))
            for i, stop in ((6, []), (7, [bad]))
        ]
        for handle in handles:
            while not handle.finished:
                engine.step()
        assert isinstance(handles[0].error, ModelError) and handles[1].error is None
        said.append([(handle.tokens, handle.finish_reason, str(handle.error)) for handle in handles])
    assert said[0] == said[1]
