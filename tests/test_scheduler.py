"""Admission, chunks, preemption and fairness, without arrays."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from finial.engine.kvcache import PagePool
from finial.engine.scheduler import Chunk, Scheduler, Sequence
from finial.errors import RequestError


def new_scheduler(pages: int = 16, page_size: int = 4, *, reuse: bool = True, **options: object) -> Scheduler:
    sizes: dict = {"max_batch": 4, "max_step_tokens": 8, "max_context": 64}
    return Scheduler(PagePool(pages, page_size, reuse=reuse), **{**sizes, **options})


def work(scheduler: Scheduler, plan: list[Chunk]) -> None:
    """What an engine does with a plan: every sequence that asked for its last logits gets a token."""
    scheduler.advance(plan)
    for sequence, _, stop, wanted in plan:
        if wanted == stop:
            continue
        if sequence.all_logits and stop < sequence.prompt_length:
            sequence.wanted_from = stop
        else:
            assert stop == len(sequence.tokens)
            if len(sequence.tokens) - sequence.prompt_length + 1 >= sequence.max_new:
                sequence.tokens.append(7)
                scheduler.finish(sequence)
            else:
                scheduler.append(sequence, 7)
    scheduler.pool.check()


def shape(plan: list[Chunk]) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.stop) for chunk in plan]


def test_a_long_prompt_is_split_and_only_its_last_row_is_wanted() -> None:
    scheduler = new_scheduler()
    scheduler.add(Sequence(list(range(20)), 3))
    seen = []
    while scheduler.busy:
        plan = scheduler.schedule()
        seen.append((*shape(plan), plan[0].wanted))
        work(scheduler, plan)
    assert seen == [((0, 8), 8), ((8, 16), 16), ((16, 20), 19), ((20, 21), 20), ((21, 22), 21)]


def test_decode_rows_come_first_and_the_rest_of_the_step_is_prefill() -> None:
    scheduler = new_scheduler()
    first, second = Sequence([1, 2], 9), Sequence(list(range(30)), 2)
    scheduler.add(first)
    work(scheduler, scheduler.schedule())
    scheduler.add(second)
    plan = scheduler.schedule()
    assert [(chunk.sequence, chunk.stop - chunk.start) for chunk in plan] == [(first, 1), (second, 7)]


def test_arrival_order_is_kept() -> None:
    scheduler = new_scheduler(max_batch=2, max_step_tokens=4)
    sequences = [Sequence([i] * 3, 1) for i in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    order: list[Sequence] = []
    while scheduler.busy:
        plan = scheduler.schedule()
        assert len(plan) <= 2
        order += [chunk.sequence for chunk in plan if chunk.wanted < chunk.stop]
        work(scheduler, plan)
    assert order == sequences


def test_when_pages_run_out_the_youngest_waits_at_the_front() -> None:
    scheduler = new_scheduler(pages=4, page_size=2, reuse=False)
    old, young, late = (Sequence([i, i, i], 5) for i in range(3))
    scheduler.add(old)
    scheduler.add(young)
    work(scheduler, scheduler.schedule())
    assert scheduler.running == [old, young]
    scheduler.add(late)
    while not young.preempted:
        work(scheduler, scheduler.schedule())
    assert scheduler.running == [old] and list(scheduler.waiting) == [young, late]
    assert young.computed == 0 and not young.pages
    while scheduler.busy:
        work(scheduler, scheduler.schedule())
    assert not old.preempted and scheduler.pool.held == 0
    assert [len(s.tokens) for s in (old, young, late)] == [8, 8, 8]


def test_a_decode_row_already_planned_is_taken_out_when_an_older_prompt_needs_its_page() -> None:
    scheduler = new_scheduler(pages=6, page_size=2, reuse=False, max_step_tokens=4)
    old = Sequence(list(range(9)), 1)
    young = Sequence([1, 2], 6)
    scheduler.add(young)
    work(scheduler, scheduler.schedule())
    scheduler.running.clear()  # turn the order round: `old` is older than what already decodes
    scheduler.add(old)
    scheduler.schedule()
    scheduler.advance([Chunk(old, 0, 4, 4)])
    scheduler.running.append(young)
    while not young.preempted:
        plan = scheduler.schedule()
        assert not (young.preempted and any(chunk.sequence is young for chunk in plan))
        work(scheduler, plan)
        assert len(young.tokens) < 8
    while scheduler.busy:
        work(scheduler, scheduler.schedule())
    assert scheduler.pool.held == 0


def test_sequences_of_one_step_share_their_prompt() -> None:
    scheduler = new_scheduler(max_step_tokens=16)
    sequences = [Sequence(list(range(9)), 2) for _ in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert shape(scheduler.schedule()) == [(0, 9), (8, 9), (8, 9)]
    assert [s.reused for s in sequences] == [0, 8, 8]
    assert sequences[0].pages[:2] == sequences[2].pages[:2]
    assert len({s.pages[2] for s in sequences}) == 3


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = new_scheduler()
    for _ in range(2):
        sequence = Sequence(list(range(8)), 1)
        scheduler.add(sequence)
        plan = scheduler.schedule()
        work(scheduler, plan)
    assert shape(plan) == [(4, 8)]


def test_generated_text_is_found_by_the_next_turn() -> None:
    scheduler = new_scheduler()
    first = Sequence([1, 2, 3], 7)
    scheduler.add(first)
    while scheduler.busy:
        work(scheduler, scheduler.schedule())
    scheduler.add(Sequence([*first.tokens, 5], 1))
    assert shape(scheduler.schedule()) == [(8, 11)]


def test_prompt_logits_are_wanted_once_in_bounded_chunks_and_never_skipped() -> None:
    scheduler = new_scheduler(max_logit_rows=3)
    scheduler.add(Sequence(list(range(8)), 1))
    work(scheduler, scheduler.schedule())
    sequence = Sequence(list(range(8)), 2, all_logits=True)
    scheduler.add(sequence)
    seen = []
    while scheduler.busy:
        plan = scheduler.schedule()
        seen += [(chunk.start, chunk.stop, chunk.wanted) for chunk in plan]
        work(scheduler, plan)
    assert seen == [(0, 3, 0), (3, 6, 3), (6, 8, 6), (8, 9, 8)]


def test_without_cache_every_token_recomputes_all() -> None:
    scheduler = new_scheduler(cache=False, max_step_tokens=4)
    scheduler.add(Sequence([1, 2, 3], 3))
    seen = []
    while scheduler.busy:
        plan = scheduler.schedule()
        seen += shape(plan)
        work(scheduler, plan)
    assert seen == [(0, 3), (0, 4), (0, 4), (4, 5)]


def test_what_can_never_run_is_refused_with_its_numbers() -> None:
    scheduler = new_scheduler(pages=4, page_size=4, max_context=20)
    with pytest.raises(RequestError, match=r"15 prompt tokens \+ 6 new tokens = 21, over the context of 20") as caught:
        scheduler.add(Sequence([1] * 15, 6))
    assert "max_tokens=5" in caught.value.fix
    with pytest.raises(RequestError, match="need 20 cache positions, there are 16"):
        scheduler.add(Sequence([1] * 15, 3))
    scheduler.add(Sequence([1] * 15, 2))  # the last token is never written: 16 positions
    while scheduler.busy:
        work(scheduler, scheduler.schedule())


def test_finish_works_at_every_stage() -> None:
    scheduler = new_scheduler(max_batch=1)
    running, waiting = Sequence([1, 2], 3), Sequence([3], 3)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    for sequence in (waiting, running, running):
        scheduler.finish(sequence)
    assert not scheduler.busy and scheduler.pool.held == 0
    assert scheduler.schedule() == []


def test_restart_frees_all_and_keeps_the_order() -> None:
    scheduler = new_scheduler()
    sequences = [Sequence([i] * 5, 3) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    work(scheduler, scheduler.schedule())
    scheduler.restart(sequences)
    scheduler.pool.check()
    assert scheduler.pool.held == 0 and list(scheduler.waiting) == sequences
    while scheduler.busy:
        work(scheduler, scheduler.schedule())
    assert all(len(sequence.tokens) == 8 for sequence in sequences)


@settings(max_examples=150)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 10), st.integers(0, 12), st.booleans()), min_size=1, max_size=8
    ),
    page_size=st.integers(1, 7),
    spare=st.integers(0, 10),
    max_batch=st.integers(1, 4),
    extra=st.integers(0, 12),
    reuse=st.booleans(),
    cache=st.booleans(),
    cancels=st.sets(st.tuples(st.integers(0, 30), st.integers(0, 7))),
)
def test_everything_ends_and_all_pages_come_back(
    requests: list[tuple[int, int, int, bool]],
    page_size: int,
    spare: int,
    max_batch: int,
    extra: int,
    reuse: bool,
    cache: bool,
    cancels: set[tuple[int, int]],
) -> None:
    pages = -(-30 // page_size) + spare
    scheduler = new_scheduler(
        pages, page_size, reuse=reuse, cache=cache, max_batch=max_batch, max_step_tokens=max_batch + extra
    )
    arrivals = [
        (step, Sequence([i % 3 for i in range(length)], new, all_logits=every)) for length, new, step, every in requests
    ]
    cancelled: set[Sequence] = set()
    number = 0
    while scheduler.busy or number <= 12:
        for step, sequence in arrivals:
            if step == number:
                scheduler.add(sequence)
        for step, which in cancels:
            if step == number and which < len(arrivals):
                scheduler.finish(arrivals[which][1])
                if arrivals[which][0] <= number:
                    cancelled.add(arrivals[which][1])
        oldest = scheduler.running[0] if scheduler.running else None
        plan = scheduler.schedule()
        rows = [chunk.stop - chunk.start for chunk in plan]
        assert all(row > 0 for row in rows) and sum(rows) <= scheduler.max_step_tokens
        assert len({chunk.sequence for chunk in plan}) == len(plan) <= max_batch
        assert bool(plan) == scheduler.busy
        if oldest is not None:
            assert plan[0].sequence is oldest or any(chunk.sequence is oldest for chunk in plan)
        for chunk in plan:
            assert len(chunk.sequence.pages) * page_size >= chunk.stop
        work(scheduler, plan)
        number += 1
        assert number < 2000
    for _, sequence in arrivals:
        done = len(sequence.tokens) - sequence.prompt_length == sequence.max_new
        assert done or sequence in cancelled
    assert scheduler.pool.held == 0
