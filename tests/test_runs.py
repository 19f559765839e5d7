"""Runs of decode steps that the executable takes by itself: the tokens, pages and ends of single steps.

Over an executable whose logits betray any wrong page, slot, position or length, and that goes ahead of whoever takes
its tokens (fake_executable.py); the cuda backend's own runs are in test_cuda_ahead.py.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fake_executable import FakeExecutable, FakeRunner, expected_logits, new_engine
from finial.engine import runs
from finial.engine.handle import Handle
from finial.engine.sampling import SamplingParams, greedy, uniform, uniforms
from finial.errors import BackendError, ModelError
from test_engine import Letters

KINDS = {
    "greedy": {},
    "seeded": {"temperature": 1.5, "seed": 11},
    "drawn": {"temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    "stop ids": {"stop_ids": list(range(0, 50, 7)), "temperature": 2.0, "seed": 5},
    "stop strings": {"stop": ["e", "kl", "a"], "temperature": 2.0, "seed": 6},
    "penalised": {"repetition_penalty": 1.4, "temperature": 0.7, "seed": 3},
    "reported": {"logprobs": 2},
}
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=12),
        st.integers(1, 30),
        st.sampled_from(sorted(KINDS)),
        st.integers(0, 25),  # the step at which it comes
        st.one_of(st.none(), st.integers(1, 20)),  # how many tokens it has when it is cancelled
    ),
    min_size=1,
    max_size=6,
)


def test_numbers_drawn_beforehand_are_the_same() -> None:
    for seed, sample, position in ((0, 0, 1), (7, 3, 1000), (2**64 - 1, 127, 131071)):
        assert uniforms(seed, sample, position, 9).tolist() == [uniform(seed, sample, position + i) for i in range(9)]


@settings(max_examples=150)
@given(
    requests=REQUESTS,
    page_size=st.integers(1, 9),
    spare=st.integers(0, 30),
    max_batch=st.integers(1, 5),
    under_way=st.integers(0, 9),
    interrupts=st.sets(st.integers(0, 60), max_size=2),
    seed=st.integers(0, 9),
)
def test_tokens_do_not_depend_on_runs(
    requests: list[tuple[list[int], int, str, int, int | None]],
    page_size: int,
    spare: int,
    max_batch: int,
    under_way: int,
    interrupts: set[int],
    seed: int,
) -> None:
    """Ends of all kinds in one batch, arrivals, cancels, few pages, reuse, interruptions: as in single steps, alone."""
    whim = np.random.default_rng(seed)
    executable = FakeRunner(under_way=under_way, whim=whim)
    executable.fail_at = {number: KeyboardInterrupt() for number in interrupts}
    engine = new_engine(executable, pages=-(-44 // page_size) + spare, page_size=page_size, max_batch=max_batch)
    handles: list[tuple[Handle, int | None]] = []
    number = 0
    while len(handles) < len(requests) or any(not handle.finished for handle, _ in handles):
        for tokens, count, kind, arrival, cancel in sorted(requests, key=lambda r: r[3])[len(handles) :]:
            if arrival <= number:
                params = SamplingParams(max_tokens=count, **KINDS[kind])
                handles.append((engine.submit(tokens, params, detokenizer=Letters()), cancel))
        before = [len(handle.tokens) for handle, _ in handles]
        try:
            engine.step()
        except KeyboardInterrupt:
            assert engine.pages_held == 0
        assert all(len(h.tokens) - had <= 1 for (h, _), had in zip(handles, before, strict=True)), "not one by one"
        for handle, cancel in handles:
            if cancel is not None and len(handle.tokens) >= cancel:
                engine.cancel(handle)
        engine._pool.check()
        number += 1
    assert engine.pages_held == 0
    for handle, _ in handles:
        assert handle.error is None, repr(handle.error)
        plain = new_engine(FakeExecutable(), pages=200, page_size=1, prefix_reuse=False)
        prompt = handle.sequence.tokens[: handle.sequence.prompt_length]
        alone = plain.submit(prompt, handle.params, detokenizer=Letters())
        plain.finish([alone])
        assert handle.tokens == alone.tokens[: len(handle.tokens)]
        if handle.finish_reason != "cancel":
            assert handle.pieces == alone.pieces


def test_a_run_begins_when_everybody_decodes_and_goes_on_by_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0, 10**6) * 1e-3)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: float(next(clock)))
    executable = FakeRunner()
    engine = new_engine(executable, pages=400, max_context=1024)
    handle = engine.submit([1, 2, 3], SamplingParams(max_tokens=600))
    engine.finish([handle])
    # First a few steps; then as many as 0.2 s hold of what was measured: two looks at this clock a step.
    assert executable.runs[0] == runs.FIRST and 95 < executable.runs[1] < 110
    assert sum(executable.runs) == 599 and engine.steps == 600


def test_a_run_that_was_held_up_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    executable = FakeRunner()
    engine = new_engine(executable, pages=400, max_context=1024)
    handle = engine.submit([1, 2, 3], SamplingParams(max_tokens=100))
    while not handle.finished:
        now[0] += 1.0 if len(handle.tokens) < 5 else 1e-3
        engine.step()
    assert executable.runs[:2] == [runs.FIRST, 2] and executable.runs[2] > 50 and engine.steps == 100


def test_nobody_who_comes_waits_for_the_end_of_a_run() -> None:
    executable = FakeRunner()
    engine = new_engine(executable, pages=200, max_context=512)
    first = engine.submit([1, 2, 3], SamplingParams(max_tokens=300))
    while len(executable.runs) < 2:
        engine.step()
    second = engine.submit([4, 5], SamplingParams(max_tokens=3))
    engine.step()
    assert len(second.tokens) == 1, "the next step has the newcomer's prompt"
    engine.finish([first, second])


def test_who_cannot_be_admitted_leaves_a_run_alone() -> None:
    executable = FakeRunner()
    engine = new_engine(executable, pages=400, max_batch=2, max_context=256)
    handles = [engine.submit([i], SamplingParams(max_tokens=20 if i else 5)) for i in range(3)]
    engine.finish(handles[:1])
    assert executable.runs, "all places are taken, so nothing is gained by looking at those who wait"
    engine.finish(handles)
    for handle in handles:
        assert handle.tokens == by_hand(handle.sequence.tokens[:1], len(handle.tokens))


def test_pages_of_a_run_that_is_left_go_back_and_hold_nothing_to_reuse() -> None:
    """What was computed beyond the taken tokens is in no page that a later prompt may find."""
    executable = FakeRunner(under_way=9)
    engine = new_engine(executable, pages=40, page_size=2)
    handle = engine.submit([1, 2, 3], SamplingParams(max_tokens=60))
    while len(handle.tokens) < 7:
        engine.step()
    assert engine.pages_held > -(-10 // 2)
    engine.cancel(handle)
    engine.step()
    assert engine.pages_held == 0
    said = by_hand([1, 2, 3], 30)
    for length in range(1, 20):
        again = engine.submit([1, 2, 3, *said[:length]], SamplingParams(max_tokens=1))
        engine.finish([again])
        assert again.tokens == [said[length]] and again.sequence.reused <= 3 + max(length, 7)


def test_only_rows_that_need_no_host_go_ahead() -> None:
    for options in ({"repetition_penalty": 1.2}, {"logprobs": 1}, {"logit_bias": {3: 1.0}}, {"presence_penalty": 1.0}):
        executable = FakeRunner()
        engine = new_engine(executable)
        handles = [engine.submit([i], SamplingParams(max_tokens=9, **o)) for i, o in enumerate(({}, options))]
        engine.finish(handles)
        assert not executable.runs
    engine = new_engine(executable := FakeRunner(), cache=False)
    engine.finish([engine.submit([1], SamplingParams(max_tokens=9))])
    assert not executable.runs


def test_a_row_that_is_not_finite_is_told_by_the_host() -> None:
    executable = FakeRunner()
    engine = new_engine(executable, pages=200)
    bad, good = (engine.submit([i, 2], SamplingParams(max_tokens=12, temperature=t)) for i, t in ((1, 0.0), (2, 1.0)))
    plain, pages = FakeExecutable.run, bad.sequence.pages

    def run(self: FakeExecutable, step: object) -> np.ndarray:
        logits = plain(self, step)  # type: ignore[arg-type]
        for out, row in enumerate(step.wanted):  # type: ignore[attr-defined]
            sequence = int(np.searchsorted(step.starts, row, side="right")) - 1  # type: ignore[attr-defined]
            if pages and step.pages[sequence, 0] == pages[0] and step.positions[row] == 6:  # type: ignore[attr-defined]
                logits[out, 3] = np.nan
        return logits

    FakeExecutable.run, kept = run, FakeExecutable.run  # type: ignore[method-assign]
    try:
        engine.finish([good])
    finally:
        FakeExecutable.run = kept  # type: ignore[method-assign]
    assert isinstance(bad.error, ModelError) and "token 3" in str(bad.error) and len(bad.tokens) == 5
    assert good.finish_reason == "length", repr(good.error)
    assert engine.pages_held == 0


def test_a_device_that_fails_in_a_run_fails_its_rows() -> None:
    executable = FakeRunner(under_way=2)
    engine = new_engine(executable, pages=200)
    handles = [engine.submit([i], SamplingParams(max_tokens=30)) for i in range(2)]
    executable.fail_at = {12: BackendError("the device is gone")}
    for handle in handles:
        while not handle.finished:
            engine.step()
    assert [handle.finish_reason for handle in handles] == ["error", "error"] and engine.pages_held == 0
    after = engine.submit([3], SamplingParams(max_tokens=5))
    engine.finish([after])
    assert after.tokens == by_hand([3], 5)


def test_closing_leaves_the_run() -> None:
    engine = new_engine(executable := FakeRunner(), pages=200)
    handle = engine.submit([1], SamplingParams(max_tokens=50))
    for _ in range(4):
        engine.step()
    assert executable.open
    engine.close()
    assert not executable.open and handle.finish_reason == "cancel"


def by_hand(tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(greedy(expected_logits(tokens)))
    return tokens[-count:]
