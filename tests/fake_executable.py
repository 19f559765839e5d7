"""An executable without a model: its logits are a hash of what the page tables lead to.

A wrong page, slot, position or length gives other logits, and a step that breaks the contract of `Step` fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np

from finial.backends import ENDED, NOT_FINITE, Ahead
from finial.engine.generate import Engine
from finial.engine.sampling import SamplingParams, choose
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


class FakeRunner(FakeExecutable):
    """Takes decode steps by itself, several ahead of whoever takes their tokens, as `RunsAhead` says.

    Args:
        under_way: steps that it is ahead, and that it does in vain when a run is left.
        whim: decides by its numbers when it refuses a run, or leaves the rest of one to another.
    """

    runs_ahead = True

    def __init__(self, vocab_size: int = 50, under_way: int = 3, whim: np.random.Generator | None = None) -> None:
        super().__init__(vocab_size)
        self.under_way, self.whim = under_way, whim
        self.runs: list[int] = []  # steps that each run yielded
        self.open = False

    def run(self, step: Step) -> np.ndarray:
        assert not self.open, "a step beside a run that goes on"
        return super().run(step)

    def ahead(self, step: Step, ahead: Ahead) -> Generator[np.ndarray, None, None] | None:
        assert not self.open
        rows, size = len(step.tokens), self.page_size
        assert len(step.starts) == rows + 1 and step.wanted.tolist() == list(range(rows))
        assert ahead.uniforms.shape[1] == len(ahead.draws) == len(ahead.stop_ids) == len(ahead.limits) == rows
        assert (ahead.limits >= 1).all() and (ahead.limits <= len(ahead.uniforms)).all()
        assert ((step.pages >= 0).sum(axis=1) >= -(-(step.positions + ahead.limits) // size)).all()
        if self.whim is not None and self.whim.random() < 0.1:
            return None
        step = Step(*(np.array(array) for array in list(vars(step).values())[:7]))
        left, known = ahead.limits.tolist(), []

        def one(number: int) -> None:
            live = [row for row in range(rows) if left[row] > 0]
            found = np.full(rows, ENDED, np.int32)
            if live:
                position = step.positions[live] + number
                slots = step.pages[live, position // size] * size + position % size
                one = Step(
                    step.tokens[live], position, np.arange(len(live) + 1, dtype=np.int32), position + 1,
                    np.ascontiguousarray(step.pages[live]), slots, np.arange(len(live), dtype=np.int32),
                )  # fmt: skip
                for row, logits in zip(live, FakeExecutable.run(self, one), strict=True):
                    draw = ahead.draws[row]
                    params = SamplingParams(
                        temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p
                    )
                    finite = np.isfinite(logits.max())
                    token = choose(logits, params, float(ahead.uniforms[number, row])) if finite else NOT_FINITE
                    found[row] = step.tokens[row] = token
                    left[row] = 0 if token < 0 or token in ahead.stop_ids[row] else left[row] - 1
            known.append(found)

        def more() -> None:
            if len(known) < len(ahead.uniforms):
                one(len(known))

        for _ in range(min(1 + self.under_way, len(ahead.uniforms))):
            one(len(known))
        self.open = True
        self.runs.append(0)
        return FakeRun(self, known, more)  # type: ignore[return-value]


class FakeRun:
    """What a run yields; `close` may come before the first token."""

    def __init__(self, executable: FakeRunner, known: list[np.ndarray], more: Callable[[], None]) -> None:
        self._executable, self._known, self._more, self._at = executable, known, more, 0

    def __next__(self) -> np.ndarray:
        whim = self._executable.whim
        if self._at == len(self._known) or (self._known[self._at] == ENDED).all() or (whim and whim.random() < 0.1):
            self.close()
            raise StopIteration
        self._more()
        self._at += 1
        self._executable.runs[-1] += 1
        return self._known[self._at - 1]

    def close(self) -> None:
        self._executable.open = False
