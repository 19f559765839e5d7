"""Runs: decode steps that an executable takes by itself, one after another, while the host takes their tokens.

Knows when a plan can begin a run, how far it may go and what it needs; nothing of logits, text or threads.

    runs = Runs(scheduler); run = runs.begin(executable, builder, plan, handles)
    for tokens in run.steps: ...
    runs.end(run)

A run gives the tokens that single steps give.  Its rows hold pages for all positions that it may reach; what it did
beyond the tokens that were taken is forgotten, and the pages go back (`Scheduler.trim`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from finial.backends import Ahead, Draw
from finial.engine.batch import StepBuilder
from finial.engine.handle import Handle
from finial.engine.sampling import uniforms
from finial.engine.scheduler import Chunk, Scheduler
from finial.engine.scheduler import Sequence as Scheduled
from finial.graph import Step

Tokens = NDArray[np.int32]

# So much work at most is done before somebody who comes, or leaves, is noticed by the device; the host notices after
# each token.  Below it the cost of a new run, a few tenths of a millisecond, is nothing.
AHEAD_S = 0.2
FIRST, MOST = 8, 256  # steps of a run: before anything was measured, and ever


class RunsAhead(Protocol):
    """What the executable has for it; `runs_ahead` says whether asking is worth while."""

    runs_ahead: bool

    def ahead(self, step: Step, ahead: Ahead) -> Generator[Tokens, None, None] | None:
        """See `finial.backends.RunsAhead.ahead`."""


@dataclass
class Run:
    """One that is under way: its rows, and what it yields."""

    sequences: list[Scheduled]
    steps: Generator[Tokens, None, None]
    started: float
    taken: int = 0
    last: float = 0.0

    def next(self) -> list[int] | None:
        """The tokens of its next step; None: it has ended."""
        tokens = next(self.steps, None)
        if tokens is None:
            return None
        self.taken, self.last = self.taken + 1, time.perf_counter()
        found: list[int] = tokens.tolist()
        return found


class Runs:
    """Begins and ends the runs of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._step_s: float | None = None

    def begin(
        self, executable: object, builder: StepBuilder, plan: Sequence[Chunk], handles: Mapping[Scheduled, Handle]
    ) -> Run | None:
        """A run whose first step is this plan; None, with nothing done, when single steps must do it."""
        if not getattr(executable, "runs_ahead", False) or not self._suits(plan, handles):
            return None
        left = [c.sequence.prompt_length + c.sequence.max_new - len(c.sequence.tokens) for c in plan]
        # Two at least: a run that was held up, by its reader or by the system, is not the last that is measured.
        steps = FIRST if self._step_s is None else max(2, int(AHEAD_S / max(self._step_s, 1e-9)))
        steps = self._scheduler.reserve([c.sequence for c in plan], left, min(steps, MOST, max(left)))
        if steps < 2:
            return None
        params = [handles[chunk.sequence].params for chunk in plan]
        numbers = np.zeros((steps, len(plan)))
        for row, chunk in enumerate(plan):
            handle = handles[chunk.sequence]
            if handle.params.temperature:
                numbers[:, row] = uniforms(handle.seed, handle.sample, chunk.stop, steps)
        ahead = Ahead(
            [Draw(p.temperature, p.top_k, p.top_p, p.min_p, 0.0) for p in params],
            numbers,
            [handles[chunk.sequence].stop_ids for chunk in plan],
            np.minimum(left, steps).astype(np.int32),
        )
        sequences = [chunk.sequence for chunk in plan]
        started = cast(RunsAhead, executable).ahead(builder.build(plan), ahead)
        if started is None:
            self._trim(sequences)
            return None
        return Run(sequences, started, time.perf_counter())

    def end(self, run: Run) -> float | None:
        """Leave it where it stands; the seconds of one of its steps, None when it had too few to say."""
        run.steps.close()
        self._trim(run.sequences)
        if run.taken < 2:
            return None
        self._step_s = (run.last - run.started) / run.taken
        return self._step_s

    def _suits(self, plan: Sequence[Chunk], handles: Mapping[Scheduled, Handle]) -> bool:
        """Everybody who runs decodes, nobody could be admitted, and each token depends on its own row alone."""
        scheduler = self._scheduler
        if not scheduler.cache or scheduler.admits or len(plan) != len(scheduler.running):
            return False
        for sequence, start, stop, wanted in plan:
            if stop - start != 1 or stop != len(sequence.tokens) or wanted != start:
                return False
            if sequence.all_logits or sequence.max_new == 0 or not handles[sequence].row_alone:
                return False
        return True

    def _trim(self, sequences: Sequence[Scheduled]) -> None:
        for sequence in sequences:
            self._scheduler.trim(sequence)
