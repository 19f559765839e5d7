"""A plan of the scheduler as the arrays of one `Step`.

Knows page tables and positions; nothing of requests, sampling or time.

    step = StepBuilder(page_size=16).build(scheduler.schedule())

A step where the same sequences each decode one more token reuses the arrays of the step before, changed in place:
the cost of a token does not grow with its position.  An executable must therefore not keep a step after its run.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from finial.engine.scheduler import Chunk
from finial.graph import Step


class StepBuilder:
    """Builds the steps of one engine, in order.

    Args:
        pooled: its graph has hidden states, so steps say of which rows they are wanted.
    """

    def __init__(self, page_size: int, pooled: bool = False) -> None:
        self._pooled = pooled
        self._page_size = page_size
        self._step: Step | None = None
        self._tables: list[array[int]] = []  # the page lists behind the rows of _step.pages; empty: not reusable
        self._filled: list[int] = []  # how many entries of each are in _step.pages
        self._next: list[int] = []  # the position that each sequence's next decode row must have

    def build(self, plan: Sequence[Chunk]) -> Step:
        """The step of a plan that is not empty."""
        if len(plan) == len(self._tables) and self._step is not None:
            for i, (sequence, start, stop, wanted) in enumerate(plan):
                if (
                    sequence.pages is not self._tables[i]
                    or start != self._next[i]
                    or stop - start != 1
                    or wanted != start
                    or len(sequence.pages) > self._step.pages.shape[1]
                ):
                    break
            else:
                return self._again(plan, self._step)
        return self._fresh(plan)

    def _again(self, plan: Sequence[Chunk], step: Step) -> Step:
        size = self._page_size
        tokens, positions, lengths, slots = step.tokens, step.positions, step.lengths, step.slots
        for i, (sequence, start, stop, _) in enumerate(plan):
            pages = sequence.pages
            if len(pages) != self._filled[i]:
                step.pages[i, self._filled[i] : len(pages)] = pages[self._filled[i] :]
                self._filled[i] = len(pages)
            tokens[i] = sequence.tokens[start]
            positions[i] = start
            lengths[i] = stop
            slots[i] = pages[start // size] * size + start % size
            self._next[i] = stop
        return step

    def _fresh(self, plan: Sequence[Chunk]) -> Step:
        size = self._page_size
        rows = sum(chunk.stop - chunk.start for chunk in plan)
        width = max(len(chunk.sequence.pages) for chunk in plan)
        width += -width % 8  # room for the pages of the next tokens
        tokens = np.empty(rows, np.int32)
        positions = np.empty(rows, np.int32)
        slots = np.empty(rows, np.int32)
        starts = np.zeros(len(plan) + 1, np.int32)
        lengths = np.empty(len(plan), np.int32)
        pages = np.full((len(plan), width), -1, np.int32)
        wanted: list[int] = []
        pooled: list[int] = []
        row = 0
        for i, chunk in enumerate(plan):
            sequence, start, stop, first = chunk
            end = row + stop - start
            pages[i, : len(sequence.pages)] = sequence.pages
            tokens[row:end] = sequence.tokens[start:stop]
            at = np.arange(start, stop, dtype=np.int32)
            positions[row:end] = at
            slots[row:end] = pages[i, at // size] * size + at % size
            starts[i + 1] = end
            lengths[i] = stop
            wanted.extend(range(row + first - start, end))
            if chunk.sequence.pool_from is not None:
                pooled.extend(range(row + max(0, chunk.sequence.pool_from - start), end))
            row = end
        rows_pooled = np.asarray(pooled, np.int32) if self._pooled else None
        step = Step(tokens, positions, starts, lengths, pages, slots, np.asarray(wanted, np.int32), rows_pooled)
        self._step = None
        self._tables = []
        if rows == len(plan) == len(wanted):
            self._step = step
            self._tables = [chunk.sequence.pages for chunk in plan]
            self._filled = [len(table) for table in self._tables]
            self._next = [chunk.stop for chunk in plan]
        return step
