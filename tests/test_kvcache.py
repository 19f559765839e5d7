"""Page tables and prefix reuse."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from finial.engine.kvcache import ROOT, PagePool


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """The pages of a sequence that shares what it can and registers the rest."""
    pages, chain = pool.match(tokens, len(tokens))
    pool.acquire(pages)
    size = pool.page_size
    for start in range(len(pages) * size, len(tokens), size):
        pages.append(pool.allocate())
        if start + size <= len(tokens):
            chain = pool.register(pages[-1], chain, tokens[start : start + size])
    pool.check()
    return pages


def test_a_common_beginning_is_shared_in_full_pages() -> None:
    pool = PagePool(8, 4)
    first = fill(pool, list(range(10)))
    second = fill(pool, [*range(8), 99, 98, 97])
    assert second[:2] == first[:2] and second[2] != first[2]
    assert pool.held == 4


def test_the_same_page_after_another_beginning_is_not_shared() -> None:
    pool = PagePool(8, 2)
    fill(pool, [1, 2, 7, 7])
    assert pool.match([3, 4, 7, 7], 4) == ([], ROOT)
    assert pool.match([7, 7], 2) == ([], ROOT)


def test_a_finished_sequence_is_found_again() -> None:
    pool = PagePool(4, 2)
    pages = fill(pool, [1, 2, 3, 4, 5])
    pool.release(pages)
    pool.check()
    assert pool.held == 0 and pool.available == 4
    assert pool.match([1, 2, 3, 4, 5], 4)[0] == pages[:2]
    assert pool.match([1, 2, 3, 4, 5], 3)[0] == pages[:1], "the limit counts positions"


def test_without_reuse_nothing_is_found() -> None:
    pool = PagePool(4, 2, reuse=False)
    pool.release(fill(pool, [1, 2, 3, 4]))
    assert pool.match([1, 2, 3, 4], 4) == ([], ROOT)


def test_eviction_takes_the_least_recently_used_and_the_end_of_a_sequence_first() -> None:
    pool = PagePool(4, 1)
    old, new = fill(pool, [1, 2]), fill(pool, [5, 6])
    pool.release(old)
    pool.release(new)
    touched = pool.match([1], 1)[0]
    pool.acquire(touched)
    pool.release(touched)  # now the page of [1] is the most recently used
    assert [pool.allocate() for _ in range(4)] == [old[1], new[1], new[0], old[0]]


def test_a_page_whose_predecessor_was_evicted_is_never_reached_by_another_prefix() -> None:
    pool = PagePool(3, 1)
    first = fill(pool, [1, 2])
    serial = pool.match([1], 1)[1]
    pool.forget(first[0])
    again = pool.allocate()
    assert pool.register(again, ROOT, [1]) != serial
    assert pool.match([1, 2], 2)[0] == [again]


def test_a_duplicate_stays_private() -> None:
    pool = PagePool(4, 2)
    first, second = pool.allocate(), pool.allocate()
    assert pool.register(first, ROOT, [1, 2]) == pool.register(second, ROOT, [1, 2])
    pool.release([second])
    pool.check()
    assert pool.match([1, 2], 2)[0] == [first]


def test_a_forgotten_page_stays_with_its_holder() -> None:
    pool = PagePool(2, 1)
    pages = fill(pool, [1])
    pool.forget(pages[0])
    pool.check()
    assert pool.held == 1 and pool.match([1], 1)[0] == []
    pool.release(pages)
    assert pool.available == 2


def test_sequences_that_grow_side_by_side_keep_their_pages_together() -> None:
    pool = PagePool(34, 32)  # runs of 8 pages, the last of 2
    sequences: list[list[int]] = [[], [], []]
    for _ in range(9):
        for pages in sequences:
            pages.append(pool.allocate(pages[-1] if pages else None))
        pool.check()
    assert [pages[:8] for pages in sequences] == [list(range(at, at + 8)) for at in (0, 8, 16)]
    assert [pages[8] for pages in sequences] == [24, 32, 25], "whole runs first, then what there is"
    pool.release(sequences[1])
    pool.check()
    assert [pool.allocate() for _ in range(2)] == [8, 32], "the runs that became free again"
    pool.check()


def test_double_release_is_caught() -> None:
    pool = PagePool(2, 1)
    page = pool.allocate()
    pool.release([page])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([page])


class PoolMachine(RuleBasedStateMachine):
    """Random sequences come and go; what the pool says is compared with a plain record of page contents."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(7, 2)
        self.sequences: list[tuple[list[int], list[int]]] = []
        self.contents: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to and with it

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=8))
    def begin(self, tokens: list[int]) -> None:
        pool = self.pool
        found, _ = pool.match(tokens, len(tokens))
        for i, page in enumerate(found):
            assert self.contents[page] == tuple(tokens[: 2 * i + 2]), "a page of another prefix"
        if pool.pages_for(len(tokens)) - len(found) + pool.idle_among(found) > pool.available:
            return
        pages = fill(pool, tokens)
        for i in range(len(found), len(pages)):
            self.contents[pages[i]] = tuple(tokens[: 2 * i + 2])
        self.sequences.append((tokens, pages))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        _, pages = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.release(pages)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        _, pages = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        for page in pages:
            self.pool.forget(page)
        self.pool.release(pages)

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        self.pool.check()
        held = {page for _, pages in self.sequences for page in pages}
        assert self.pool.held == len(held)
        for tokens, pages in self.sequences:
            for i, page in enumerate(pages):
                assert self.contents[page] == tuple(tokens[: 2 * i + 2])

    def teardown(self) -> None:
        for _, pages in self.sequences:
            self.pool.release(pages)
        assert self.pool.held == 0
        self.pool.check()


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestPool = PoolMachine.TestCase
