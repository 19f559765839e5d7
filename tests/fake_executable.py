"""An executable without a model: its logits are a hash of what the page tables lead to.

A wrong page, slot, position or length gives other logits, and a step that breaks the contract of `Step` fails at once.
"""

from __future__ import annotations

import numpy as np

from finial.engine.generate import Engine
from finial.graph import Step


class FakeExecutable:
    """`run` counts its rows and can be told to fail, to interrupt, or to return NaN at a given step."""

    def __init__(self, vocab_size: int = 50) -> None:
        self.vocab_size = vocab_size
        self.steps: list[int] = []  # rows of each step
        self.fail_at: dict[int, BaseException] = {}
        self.nan_at: set[int] = set()
        self.wanted_rows = 0

    def reserve(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.cache = np.full(pages * page_size, 12345, np.uint64)  # what nobody wrote is not zero

    def run(self, step: Step) -> np.ndarray:
        number = len(self.steps)
        self.steps.append(len(step.tokens))
        check(step, self.page_size, len(self.cache), self.vocab_size)
        half = len(step.slots) // 2
        self.cache[step.slots[:half]] = step.tokens[:half] + 1
        if number in self.fail_at:
            raise self.fail_at[number]
        self.cache[step.slots] = step.tokens + 1
        logits = np.empty((len(step.wanted), self.vocab_size), np.float32)
        for out, row in enumerate(step.wanted):
            sequence = int(np.searchsorted(step.starts, row, side="right")) - 1
            at = np.arange(step.positions[row] + 1)
            slots = step.pages[sequence, at // self.page_size] * self.page_size + at % self.page_size
            logits[out] = hashed(self.cache[slots], self.vocab_size)
        if number in self.nan_at:
            logits[:, 3] = np.nan
        self.wanted_rows += len(step.wanted)
        return logits


def hashed(values: np.ndarray, vocab_size: int) -> np.ndarray:
    """Logits [vocab_size], different for every sequence of values (token + 1, uint64)."""
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(values), 0x9E3779B97F4A7C15, np.uint64))
        state = (values * powers).sum(dtype=np.uint64)
        mixed = (state + np.arange(vocab_size, dtype=np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return ((mixed >> np.uint64(44)).astype(np.float32) / 2**17 - 4).astype(np.float32)


def expected_logits(tokens: list[int], vocab_size: int = 50) -> np.ndarray:
    """What any correct schedule must give for the last position of these tokens."""
    return hashed(np.asarray(tokens, np.uint64) + np.uint64(1), vocab_size)


def check(step: Step, page_size: int, slots: int, vocab_size: int) -> None:
    """Assert the contract of `Step`."""
    rows, batch = len(step.tokens), len(step.lengths)
    for array in (step.tokens, step.positions, step.starts, step.lengths, step.pages, step.slots, step.wanted):
        assert array.dtype == np.int32 and array.flags.c_contiguous
    assert rows > 0 and len(step.positions) == len(step.slots) == rows
    assert step.starts[0] == 0 and step.starts[-1] == rows and (np.diff(step.starts) > 0).all()
    assert len(step.starts) == batch + 1 and len(step.pages) == batch
    assert (step.tokens >= 0).all() and (step.tokens < vocab_size).all()
    assert len(set(step.slots.tolist())) == rows, "two rows write one slot"
    assert (np.diff(step.wanted) > 0).all() and (step.wanted >= 0).all() and (step.wanted < rows).all()
    for b in range(batch):
        at = step.positions[step.starts[b] : step.starts[b + 1]]
        assert (np.diff(at) == 1).all() and step.lengths[b] == at[-1] + 1
        held = step.pages[b][step.pages[b] >= 0]
        assert len(held) * page_size >= step.lengths[b] and len(set(held.tolist())) == len(held)
        assert (step.pages[b][: len(held)] == held).all(), "a hole in a page table"
        assert (held < slots // page_size).all()
        mine = step.pages[b, at // page_size] * page_size + at % page_size
        assert (step.slots[step.starts[b] : step.starts[b + 1]] == mine).all()


def new_engine(executable: FakeExecutable | None = None, **options: object) -> Engine:
    """A small engine over a fake."""
    executable = executable or FakeExecutable()
    settings: dict = {"pages": 64, "page_size": 4, "max_context": 128, "max_batch": 4, "max_step_tokens": 16}
    return Engine(executable, vocab_size=executable.vocab_size, **{**settings, **options})
