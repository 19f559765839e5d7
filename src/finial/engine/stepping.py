"""One step: plan, compute, choose tokens, hand them out.

Knows sequences, their handles and logits; nothing of threads, queues of requests, files or graphs.

    stepper = Stepper(executable, scheduler, builder); stepper.handles[sequence] = handle; stepper.step()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finial.backends import NOT_FINITE, Draw
from finial.engine.batch import StepBuilder
from finial.engine.handle import Handle
from finial.engine.pace import Pace
from finial.engine.runs import Run, Runs
from finial.engine.sampling import TokenLogprobs, choose, greedy, log_probabilities, uniform
from finial.engine.scheduler import Chunk, Scheduler
from finial.engine.scheduler import Sequence as Scheduled
from finial.graph import Step


class Executable(Protocol):
    """What the engine needs of a compiled graph."""

    def reserve(self, pages: int, page_size: int) -> object:
        """Allocate the cache."""

    def run(self, step: Step) -> NDArray[np.float32]:
        """Logits [R, vocab] of the wanted rows.  The step's arrays change after the call."""

    def outputs(self, step: Step) -> list[NDArray[np.float32]]:
        """Logits, and the hidden states [E, hidden_size] of the pooled rows."""


class Stepper:
    """See the module.  One thread at a time.

    Attributes:
        handles: of the sequences that are not finished, in order of submission.
        steps: how many there were.
    """

    def __init__(
        self, executable: Executable, scheduler: Scheduler, builder: StepBuilder, pace: Pace | None = None
    ) -> None:
        self._executable = executable
        self.handles: dict[Scheduled, Handle] = {}
        self.steps = 0
        self._scheduler = scheduler
        self._builder = builder
        self._pace = pace
        self._runs = Runs(scheduler)
        self._run: Run | None = None
        self._single = False  # the next step is no run: something in the last one needs the host

    def step(self) -> bool:
        """Compute, choose and hand out one step; False when there is nothing to do.

        An error of the executable fails the sequences of the step.
        """
        if self._run is not None and self._go_on(self._run):
            return True
        scheduler = self._scheduler
        plan = scheduler.schedule()
        if not plan:
            return False
        try:
            if not self._single:
                self._run = self._runs.begin(self._executable, self._builder, plan, self.handles)
        except Exception as error:
            for chunk in plan:
                self._fail(chunk.sequence, error)
            return True
        self._single = False
        if self._run is not None and self._go_on(self._run):
            return True
        self.steps += 1
        started = time.perf_counter()
        try:
            step = self._builder.build(plan)
            logits: NDArray[np.float32] | None = None
            hidden: NDArray[np.float32] | None = None
            tokens = self._chosen_there(plan, step)
            if step.pooled is not None and len(step.pooled):
                logits, hidden = self._executable.outputs(step)
            elif tokens is None:
                logits = self._executable.run(step)
        except Exception as error:
            for chunk in plan:
                self._fail(chunk.sequence, error)
            return True
        if self._pace is not None:
            decoding = sum(1 for chunk in plan if chunk.stop - chunk.start == 1)
            total = sum(chunk.stop - chunk.start for chunk in plan)
            self._pace.note(decoding, total - decoding, time.perf_counter() - started)
            scheduler.prompt_rows = self._pace.rows
        scheduler.advance(plan)
        if logits is None:
            assert tokens is not None
            for sequence, token in zip((c.sequence for c in plan if c.wanted != c.stop), tokens.tolist(), strict=True):
                try:
                    self._emit(sequence, token, None)
                except Exception as error:
                    self._fail(sequence, error)
            return True
        row = 0
        for sequence, _, stop, wanted in plan:
            if wanted != stop:
                rows = logits[row : row + stop - wanted]
                row += stop - wanted
                try:
                    self._consume(sequence, rows, wanted)
                except Exception as error:
                    self._fail(sequence, error)
        assert row == len(logits), (row, logits.shape)
        if hidden is not None:
            self._pool_rows(plan, hidden)
        return True

    def _go_on(self, run: Run) -> bool:
        """Hand out the next step of a run; False when it was left, so that the next step is to be planned."""
        live = [(row, sequence) for row, sequence in enumerate(run.sequences) if sequence in self.handles]
        if not live or self._scheduler.admits:
            self._leave(run)
            return False
        try:
            tokens = run.next()
        except Exception as error:
            self._leave(run)
            for _, sequence in live:
                self._fail(sequence, error)
            return True
        if tokens is None:
            self._leave(run)
            return False
        if any(tokens[row] == NOT_FINITE for row, _ in live):  # the host chooses, or says in which logits
            self._leave(run)
            self._single = True
            return False
        self.steps += 1
        for row, sequence in live:
            assert tokens[row] >= 0, f"a row that goes on ended in a run: {tokens[row]}"
            self._scheduler.ran(sequence)
            try:
                self._emit(sequence, tokens[row], None)
            except Exception as error:
                self._fail(sequence, error)
        return True

    def _leave(self, run: Run) -> None:
        self._run = None
        step_s = self._runs.end(run)
        if step_s is not None and self._pace is not None:
            self._pace.note(len(run.sequences), 0, step_s)

    def _pool_rows(self, plan: list[Chunk], hidden: NDArray[np.float32]) -> None:
        row = 0
        for sequence, start, stop, _ in plan:
            if sequence.pool_from is None or stop <= sequence.pool_from:
                continue
            rows = hidden[row : row + stop - max(start, sequence.pool_from)]
            row += len(rows)
            handle, last = self.handles[sequence], stop == sequence.prompt_length
            handle.pool(rows, start <= sequence.pool_from, last)
            if last:
                handle.end("length")
                self._remove(handle)
        assert row == len(hidden), (row, hidden.shape)

    def _chosen_there(self, plan: Sequence[Chunk], step: Step) -> NDArray[np.int32] | None:
        """The next tokens of a step, chosen where the executable has the logits.

        None, with nothing done that running the step does not do again, when the host must see logits: some are asked
        for, a choice depends on more than its own row, a row is not finite or too close
        to call there, or the executable chooses nothing.
        """
        sample: Callable[[Step, Sequence[Draw]], NDArray[np.int32] | None] | None
        sample = getattr(self._executable, "sample", None)
        if sample is None or (step.pooled is not None and len(step.pooled)):
            return None
        draws = []
        for sequence, _, stop, wanted in plan:
            if wanted == stop:
                continue
            handle, params = self.handles[sequence], self.handles[sequence].params
            if stop - wanted != 1 or sequence.all_logits or sequence.max_new == 0 or not handle.row_alone:
                return None
            number = uniform(handle.seed, handle.sample, len(sequence.tokens)) if params.temperature else 0.0
            draws.append(Draw(params.temperature, params.top_k, params.top_p, params.min_p, number))
        tokens = sample(step, draws)
        return None if tokens is None or (tokens < 0).any() else tokens

    def _consume(self, sequence: Scheduled, logits: NDArray[np.float32], first: int) -> None:
        """Logits [rows, V] of positions first, first + 1, …: prompt log-probabilities, then the next token."""
        handle = self.handles[sequence]
        params = handle.params
        if sequence.all_logits and first < sequence.prompt_length:
            self._consume_prompt(handle, logits, first)
            if first + len(logits) < sequence.prompt_length:
                return
        if sequence.max_new == 0:
            handle.end("length")
            self._remove(handle)
            return
        row = logits[-1]
        if handle.plain_greedy:
            token = greedy(row)
        else:
            draw = uniform(handle.seed, handle.sample, len(sequence.tokens)) if params.temperature else 0.0
            allowed = None if handle.constraint is None else handle.constraint.allowed()
            token = choose(row, params, draw, handle.history, allowed)
        self._emit(sequence, token, None if params.logprobs is None else log_probabilities(row, token, params.logprobs))

    def _emit(self, sequence: Scheduled, token: int, logprobs: TokenLogprobs | None) -> None:
        handle = self.handles[sequence]
        complete = handle.constraint is not None and handle.constraint.advance(token)
        if handle.emit(token, logprobs, time.perf_counter(), complete):
            self._remove(handle)
            return
        if handle.history is not None:
            handle.history.add(token)
        self._scheduler.append(sequence, token)

    def _consume_prompt(self, handle: Handle, logits: NDArray[np.float32], first: int) -> None:
        sequence, top = handle.sequence, handle.params.prompt_logprobs
        if handle.keep_logits:
            handle.prompt_logits.append(logits.copy())
        if top is not None:
            for row, position in zip(logits, range(first, sequence.prompt_length - 1), strict=False):
                handle.prompt_logprobs.append(log_probabilities(row, sequence.tokens[position + 1], top))
        sequence.wanted_from = first + len(logits)

    def _remove(self, handle: Handle, *, forget: bool = False) -> None:
        self._scheduler.finish(handle.sequence, forget=forget)
        self.handles.pop(handle.sequence, None)

    def _fail(self, sequence: Scheduled, error: Exception) -> None:
        """End one sequence with an error.  What it wrote to the cache is not shared: it may be half-written, or NaN."""
        handle = self.handles[sequence]
        self._remove(handle, forget=True)
        handle.end("error", error)

    def close(self) -> None:
        """Let go of the executable; all sequences must have been removed."""
        if self._run is not None:
            self._leave(self._run)
        self.__dict__.pop("_executable", None)  # with nothing queued no step will ask for it

    def restart(self) -> None:
        """All sequences start over from their tokens: for when a step was torn apart."""
        run, self._run = self._run, None
        if run is not None:
            run.steps.close()
        for handle in list(self.handles.values()):
            sequence = handle.sequence
            if handle.finished:
                del self.handles[sequence]
                continue
            prompt = sequence.prompt_length
            if sequence.tokens[prompt:] != handle.tokens:
                sequence.tokens[prompt:] = handle.tokens
            sequence.wanted_from = len(sequence.tokens) - 1
            if sequence.all_logits and not handle.tokens:
                sequence.wanted_from = 0
                handle.prompt_logits.clear()
                handle.prompt_logprobs.clear()
            if handle.history is not None:
                handle.history = type(handle.history)(sequence.tokens[:prompt])
                for token in handle.tokens:
                    handle.history.add(token)
            if handle.constraint is not None:
                handle.constraint.restart(handle.tokens)
        self._scheduler.restart(self.handles)
