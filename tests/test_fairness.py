"""Nobody waits for long because somebody else asks for much: turns in the queue, room in a step, bounds from time."""

from __future__ import annotations

import time
from collections import deque

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fake_executable import FakeExecutable
from finial.engine.generate import Engine
from finial.engine.kvcache import PagePool
from finial.engine.pace import LEAST, Pace
from finial.engine.queue import FairQueue
from finial.engine.sampling import SamplingParams
from finial.engine.scheduler import Scheduler, Sequence
from finial.graph import Step


def test_owners_take_turns() -> None:
    queue = FairQueue[str]()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.append(item, item[0])
    expected = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert list(queue) == expected
    assert [queue.popleft() for _ in expected] == expected and not queue


def test_who_comes_back_goes_first() -> None:
    queue = FairQueue[str]()
    queue.append("a1", "a")
    queue.appendleft("b0")
    queue.appendleft("c0")
    assert queue[0] == "c0" and list(queue) == ["c0", "b0", "a1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3))))
def test_a_queue_of_one_owner_is_first_in_first_out(moves: list[tuple[str, int]]) -> None:
    queue, plain = FairQueue[int](), deque[int]()
    for number, (_, move) in enumerate(moves):
        if move == 0 and plain:
            assert queue.popleft() == plain.popleft()
        elif move == 1 and plain:
            victim = plain[len(plain) // 2]
            plain.remove(victim)
            assert queue.remove(victim) and not queue.remove(victim)
        elif move == 2:
            queue.appendleft(number)
            plain.appendleft(number)
        else:
            queue.append(number)
            plain.append(number)
        assert list(queue) == list(plain) and len(queue) == len(plain)
        assert not plain or queue[0] == plain[0]


@given(st.lists(st.sampled_from("aab"), min_size=1, max_size=30))
def test_everything_leaves_once_and_no_owner_twice_in_a_row_while_others_wait(owners: list[str]) -> None:
    queue = FairQueue[tuple[str, int]]()
    for number, owner in enumerate(owners):
        queue.append((owner, number), owner)
    order = list(queue)
    left = [queue.popleft() for _ in owners]
    assert left == order and sorted(left, key=lambda item: item[1]) == list(
        zip(owners, range(len(owners)), strict=True)
    )
    for i in range(1, len(left)):
        if left[i][0] == left[i - 1][0]:
            assert all(item[0] == left[i][0] for item in left[i:])


def test_a_long_prompt_leaves_room_to_those_behind_it() -> None:
    scheduler = Scheduler(PagePool(64, 4), max_batch=4, max_step_tokens=16, max_context=200)
    long, short = Sequence(list(range(100)), 1), Sequence([1, 2, 3], 1)
    scheduler.add(long)
    scheduler.add(short)
    plan = scheduler.schedule()
    assert [(chunk.sequence, chunk.stop - chunk.start) for chunk in plan] == [(long, 8), (short, 3)]
    scheduler.advance(plan)
    scheduler.finish(short)
    assert [chunk.stop - chunk.start for chunk in scheduler.schedule()] == [16]  # alone it has everything


def test_prompts_have_few_rows_beside_those_that_generate() -> None:
    scheduler = Scheduler(PagePool(64, 4), max_batch=4, max_step_tokens=16, max_context=200)
    first, long = Sequence([1], 9), Sequence(list(range(100)), 1)
    scheduler.add(first)
    scheduler.advance(scheduler.schedule())
    scheduler.append(first, 5)
    scheduler.add(long)
    scheduler.prompt_rows = 6
    assert [chunk.stop - chunk.start for chunk in scheduler.schedule()] == [1, 6]


def test_the_pace_follows_what_rows_take() -> None:
    pace = Pace(stall_s=0.05, most=512)
    assert 0 < pace.rows <= 512
    for _ in range(30):
        pace.note(decoding=1, prompt=0, seconds=0.01)
        pace.note(decoding=1, prompt=100, seconds=0.01 + 100 * 0.001)
    assert pace.rows == pytest.approx(50, abs=2)
    for _ in range(30):
        pace.note(decoding=1, prompt=100, seconds=0.01 + 100 * 0.1)
    assert pace.rows == LEAST
    for _ in range(60):
        pace.note(decoding=1, prompt=100, seconds=0.0101)
    assert pace.rows == 512
    for _ in range(60):  # a step that takes longer than the bound anyway may double
        pace.note(decoding=1, prompt=0, seconds=0.2)
        pace.note(decoding=1, prompt=100, seconds=0.2 + 100 * 0.001)
    assert pace.rows == pytest.approx(200, abs=10)


class Slow(FakeExecutable):
    """A millisecond a row."""

    def run(self, step: Step) -> np.ndarray:
        time.sleep(0.001 * len(step.tokens))
        return super().run(step)


def test_a_long_prompt_does_not_hold_up_others() -> None:
    executable = Slow()
    engine = Engine(
        executable, pages=512, page_size=4, vocab_size=50, max_context=2000, max_step_tokens=512, stall_s=0.02
    )
    first = engine.submit([1, 2, 3], SamplingParams(max_tokens=400))
    engine.step()
    second = engine.submit(list(range(40)) * 15, SamplingParams(max_tokens=1))
    engine.finish([second])
    alone = executable.steps[1:]
    assert max(alone[1:]) <= 4 * LEAST + 1  # the guess before anything was measured
    assert max(alone[len(alone) // 2 :]) <= 30  # about 20 rows in 20 ms; sleep takes its own time
    assert len(first.tokens) > 15
    engine.close()


def test_the_prefix_cache_has_a_cap() -> None:
    for cap, kept in ((None, 8), (3, 3), (0, 0)):
        engine = Engine(FakeExecutable(), pages=32, page_size=4, vocab_size=50, max_context=100, prefix_pages=cap)
        handle = engine.submit(list(range(32)), SamplingParams(max_tokens=1))
        engine.finish([handle])
        assert engine.pages_held == 0 and engine.pages_cached == kept
        engine._pool.check()
        again = engine.submit(list(range(32)), SamplingParams(max_tokens=1))
        engine.finish([again])
        assert again.sequence.reused == (28 if cap is None else 4 * kept)
        assert again.tokens == handle.tokens
        engine.close()
