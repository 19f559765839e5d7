"""Runs of decode steps on the device without the host: the same tokens as step by step, whatever ends them.

The device is the twin of cuda_twin.py, which does what it was asked for late and in pieces, as a GPU does.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import models
from cuda_twin import CXX, TwinDevice
from finial.backends import ENDED, NOT_FINITE, Ahead, Draw
from finial.backends.cuda import CudaBackend
from finial.backends.cuda.ahead import UNDER_WAY
from finial.backends.cuda.program import CudaProgram
from finial.backends.cuda.ring import STEPS, Ring
from finial.engine.generate import Engine
from finial.errors import BackendError
from finial.executor import Executable, Segment
from finial.files.checkpoint import open_checkpoint
from finial.formats import Tensor
from finial.graph import Graph
from finial.models.decoder import build_graph, constants
from run_rows import Ints, Rows, asked, said

if CXX is None:
    assert os.environ.get("CI") != "true", "no g++: see .ci/run"
    pytest.skip("no g++ here; install it to run the CUDA kernels on the CPU", allow_module_level=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, dict[str, Tensor], int]:
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    models.save("qwen3", folder)
    checkpoint = open_checkpoint(folder)
    weights = {name: t.to("bf16") if len(t.shape) == 2 else t for name, t in checkpoint.tensors.items()}
    weights |= {name: Tensor.from_array(array) for name, array in constants(checkpoint.config).items()}
    return build_graph(checkpoint.config, "bf16"), weights, checkpoint.config.vocab_size


class Batch(Rows[CudaProgram]):
    """As single steps and runs take it."""

    def one_by_one(self, ahead: Ahead) -> list[list[int]]:
        """What a run must yield, by steps of the rows that are left and of those that have ended."""
        left, out = ahead.limits.tolist(), []
        for numbers in ahead.uniforms:
            rows = [row for row, more in enumerate(left) if more > 0]
            if not rows:
                break
            draws = [Draw(*ahead.draws[r].__dict__.values()) for r in rows]
            draws = [
                Draw(d.temperature, d.top_k, d.top_p, d.min_p, float(numbers[r]))
                for d, r in zip(draws, rows, strict=True)
            ]
            got = self.program.sample(self.feeds(rows), self.state, draws)
            assert got is not None
            step = [ENDED] * len(left)
            for row, token in zip(rows, got.tolist(), strict=True):
                step[row] = token
                left[row] = 0 if token < 0 or token in ahead.stop_ids[row] else left[row] - 1
                if token >= 0:
                    self.tokens[row].append(token)
            out.append(step)
        return out

    def by_runs(self, ahead: Ahead) -> list[list[int]]:
        """The same through runs, one after another until all rows have ended."""
        left, out = ahead.limits.copy(), []
        while (left > 0).any():
            rows = [row for row, more in enumerate(left.tolist()) if more > 0]
            part = Ahead(
                [ahead.draws[r] for r in rows],
                ahead.uniforms[len(out) :, rows],
                [ahead.stop_ids[r] for r in rows],
                left[rows],
            )
            run = self.program.ahead(self.feeds(rows), self.state, part)
            assert run is not None
            for tokens in run:
                step = [ENDED] * len(left)
                for row, token in zip(rows, tokens.tolist(), strict=True):
                    step[row] = token
                    ended = token < 0 or token in ahead.stop_ids[row]
                    left[row] = 0 if ended else left[row] - 1
                    if token >= 0:
                        self.tokens[row].append(token)
                out.append(step)
        return out


def programs(small: tuple[Graph, dict[str, Tensor], int], **options: int) -> CudaProgram:
    graph, weights, _ = small
    return CudaBackend(TwinDevice(**options)).compile(graph, weights)


@pytest.mark.parametrize(
    "lengths, capability", [([5], 75), ([9], 90), ([3, 12, 8], 90), ([1, 2, 3, 4, 5, 7, 8, 9, 10], 90)]
)
def test_the_tokens_are_those_of_single_steps(
    small: tuple[Graph, dict[str, Tensor], int], lengths: list[int], capability: int
) -> None:
    """Rows that go on, end by a stop id, or by their limit; side by side, over page borders, one run after another."""
    program, vocab = programs(small, capability=capability, seed=len(lengths)), small[2]
    alone, ahead = (Batch(program, vocab, lengths, 3) for _ in range(2))
    for part in range(2):
        wish = asked(len(lengths), 10, vocab, 10 * len(lengths) + part)
        assert ahead.by_runs(wish) == alone.one_by_one(wish)
        assert ahead.tokens == alone.tokens


def test_a_run_may_be_left_at_any_step(small: tuple[Graph, dict[str, Tensor], int]) -> None:
    """What was under way writes to positions that nobody counts on, before anything that is asked for next."""
    program, vocab = programs(small, seed=5), small[2]
    alone, ahead = (Batch(program, vocab, [4, 11], 3) for _ in range(2))
    random = np.random.default_rng(0)
    for part in range(6):
        steps = UNDER_WAY + 4
        draws, numbers = [Draw(1.0, 0, 1.0, 0.0, 0.0)] * 2, random.random((steps, 2))
        taken = [1, 2, 3, 0, steps - 1, 1][part]
        if taken:
            wish = Ahead(draws, numbers[:taken], [frozenset()] * 2, np.full(2, taken, np.int32))
            expected = alone.one_by_one(wish)
        run = program.ahead(
            ahead.feeds([0, 1]), ahead.state, Ahead(draws, numbers, [frozenset()] * 2, np.full(2, steps, np.int32))
        )
        assert run is not None
        for step in range(taken):
            tokens = next(run).tolist()
            assert tokens == expected[step]
            for row, token in enumerate(tokens):
                ahead.tokens[row].append(token)
        run.close()
        assert program.device._queue or taken >= steps - 1  # the twin still has work of it
    a, b = (batch.program.run(batch.feeds([0, 1]), batch.state)[0] for batch in (alone, ahead))
    assert np.array_equal(a, b)


def test_epochs_go_round(small: tuple[Graph, dict[str, Tensor], int]) -> None:
    """Over the end of 32 bits, and never 0, which is what the ring holds in the beginning."""
    program, vocab = programs(small, seed=7), small[2]
    alone, ahead = (Batch(program, vocab, [2], 3) for _ in range(2))
    wish = asked(1, 1, vocab, 0)
    ahead.by_runs(wish), alone.one_by_one(wish)
    assert program._ring is not None
    program._ring._next = 2**32 - 5
    for part in range(3):
        wish = Ahead(wish.draws, np.random.default_rng(part).random((9, 1)), [frozenset()], np.array([9], np.int32))
        assert ahead.by_runs(wish) == alone.one_by_one(wish)


def test_what_is_not_finite_ends_a_row(small: tuple[Graph, dict[str, Tensor], int]) -> None:
    graph, weights, vocab = small
    head = weights[graph.nodes[-1].inputs[1]].decode().copy()
    head[:, 0] = np.inf
    program = CudaBackend(TwinDevice()).compile(graph, {**weights, graph.nodes[-1].inputs[1]: Tensor.from_array(head)})
    batch = Batch(program, vocab, [1, 3], 1)
    run = program.ahead(batch.feeds([0, 1]), batch.state, asked(2, 5, vocab, 1))
    assert run is not None and [step.tolist() for step in run] == [[NOT_FINITE, NOT_FINITE]]


def test_what_cannot_run_ahead_is_left_to_single_steps(small: tuple[Graph, dict[str, Tensor], int]) -> None:
    program, vocab = programs(small), small[2]
    batch = Batch(program, vocab, [2, 3], 1)
    wish, feeds = asked(2, 5, vocab, 1), batch.feeds([0, 1])

    def refused(feeds: dict[str, Ints], wish: Ahead) -> bool:
        return program.ahead(feeds, batch.state, wish) is None

    many = frozenset(range(33))
    assert refused(feeds, Ahead(wish.draws, wish.uniforms, [many, frozenset()], wish.limits))
    assert refused(feeds, Ahead(wish.draws, np.zeros((STEPS + 1, 2)), wish.stop_ids, wish.limits))
    assert refused(feeds | {"wanted": np.array([1, 0], np.int32)}, wish)
    shared = feeds["pages"].copy()
    shared[1, 0] = shared[0, 0]
    assert refused(feeds | {"pages": shared}, wish)
    short = feeds["pages"][:, :1]
    with pytest.raises(BackendError, match="pages has 1 pages a sequence"):
        program.ahead(
            feeds | {"pages": short},
            batch.state,
            Ahead(wish.draws, wish.uniforms, wish.stop_ids, np.full(2, 20, np.int32)),
        )


def test_a_device_that_stops_is_no_endless_wait() -> None:
    device = TwinDevice(arena=1 << 20)
    ring = Ring(device)
    with pytest.raises(BackendError, match="without the tokens of a step"):
        ring.wait(ring.epochs(3), rows=1)


def test_no_thread_races_with_another(small: tuple[Graph, dict[str, Tensor], int], tmp_path: Path) -> None:
    """ThreadSanitizer over a step of a run that goes on: every way to choose a token, and what prepares the next."""
    program, vocab = programs(small, arena=8 << 20, multiprocessors=2), small[2]
    batch = Batch(program, vocab, [3, 5, 2], 1)
    draws = [Draw(0.0, 0, 1.0, 0.0, 0.0), Draw(1.0, 20, 1.0, 0.0, 0.0), Draw(1.0, 0, 0.9, 0.05, 0.0)]
    steps = UNDER_WAY + 4
    numbers = np.random.default_rng(2).random((steps, 3))
    run = program.ahead(
        batch.feeds([0, 1, 2]),
        batch.state,
        Ahead(draws, numbers, [frozenset({vocab})] * 3, np.full(3, steps, np.int32)),
    )
    assert run is not None
    next(run)
    run.close()
    device = program.device
    assert isinstance(device, TwinDevice)
    device.launched = [launch for launch in device.launched if launch.kernel.template in ("embed", "sample_ahead")] * 2
    done = device.replay_under("thread", tmp_path)
    assert done.returncode == 0, done.stderr[:4000]


class StepByStep(Executable):
    runs_ahead = False  # type: ignore[assignment]


def test_the_engine_lets_the_device_go_ahead(small: tuple[Graph, dict[str, Tensor], int]) -> None:
    """Seeds, stop ids and strings, few pages, a cancel, prompts that share pages with what a run left: as by steps."""
    graph, weights, vocab = small
    texts, used = [], []
    for kind in (Executable, StepByStep):
        device = TwinDevice(seed=11)
        executable = kind(graph, [Segment(CudaBackend(device), graph, tuple(graph.outputs))], weights)
        engine = Engine(executable, pages=14, page_size=4, vocab_size=vocab, max_context=48, max_batch=3, eos_ids=[7])
        texts.append(said(engine, vocab))
        used.append("sample_ahead" in device.templates)
    assert texts[0] == texts[1] and used == [True, False]
