"""The ways to decode several steps, a graph of kernels and the megakernel in its variants: which one runs, and why.

The fastest one is found at load by running all of them for a single row; what loses gives its memory back.  Where a
variant stays it is compared with the graph once more for each further bucket of rows.  FINIAL_CUDA names one instead.
Knows no steps; who runs them is the program.

    ways = Ways(model, weights, device)
    ways.choose(try_out)
    if ways.mega_runs(rows, try_out): ...
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.device import Device
from finial.backends.cuda.feeds import bucket
from finial.backends.cuda.mega.layout import MOST_ROWS
from finial.backends.cuda.mega.program import VARIANTS, Mega
from finial.backends.cuda.mega.shape import Unsuited
from finial.backends.cuda.model import Model
from finial.errors import BackendError
from finial.formats import Tensor

VARIABLE = "FINIAL_CUDA"
CHOICES = ("auto", "graph", *VARIANTS)
# Seconds of a load in which variants are tried.  Each packs the weights anew and compiles: the first one is always
# tried, another one while as long as the one before took is left.
TRIES_S = 30.0
# By so much a variant must be faster than another one before it for the bits of a run to depend on its timing.
UNORDERED = 1.03


@dataclass(frozen=True)
class Trial:
    """What some steps of a trial run gave: seconds of a step, and the tokens [steps, rows]."""

    step_s: float
    tokens: NDArray[np.int32]


# (rows, by the megakernel that `Ways.mega` is) -> what came of it
TryOut = Callable[[int, bool], Trial]


class Ways:
    """See the module.

    Attributes:
        mega: None where only the graph runs.
        name: of the variant that `mega` is, as FINIAL_CUDA names it, or "graph".
        notes: what a person may want to know, one line a decision.

    Raises:
        BackendError: FINIAL_CUDA names no way, or a variant that cannot run this model here.
    """

    def __init__(self, model: Model, weights: Mapping[str, Tensor], device: Device) -> None:
        self.asked = os.environ.get(VARIABLE) or "auto"
        if self.asked not in CHOICES:
            raise BackendError(f"{VARIABLE} is {self.asked!r}", fix=f"choose one of {', '.join(CHOICES)}")
        self.mega: Mega | None = None
        self.name = "graph"
        self.notes: list[str] = []
        self._chosen: dict[int, bool] = {}
        self._trying = ""
        self._model, self._weights, self._device = model, weights, device  # until the choice
        if self.asked == "graph":
            self.notes.append(f"decoding by graph, as {VARIABLE} says")
        if self.forced:
            try:
                self._build(self.asked)
            except (Unsuited, BackendError) as error:
                raise BackendError(
                    f"the megakernel does not run this model here: {_reason(error)}", fix=f"leave {VARIABLE} away"
                ) from error

    @property
    def forced(self) -> bool:
        """Whether a variant of the megakernel was asked for."""
        return self.asked in VARIANTS

    def _build(self, name: str) -> Mega:
        self.mega = Mega(self._model, self._weights, self._device, VARIANTS[name])
        self.name = name
        return self.mega

    # --- one row, at load ---------------------------------------------------------------------------------------------

    def choose(self, try_out: TryOut) -> None:
        """The way for one row; once, before there is any other state.

        Raises:
            BackendError: the device is of no use after a trial.
        """
        if 1 in self._chosen:
            return
        self._chosen[1] = True  # trials ask nothing
        if self.forced:
            self._note_forced(1)
        elif self.asked == "auto":
            self._try_all(try_out)
        self._weights = {}

    def _note_forced(self, size: int) -> None:
        self.notes.append(f"decoding {_rows(size)} by {self.name}, as {VARIABLE} says")

    def _try_all(self, try_out: TryOut) -> None:
        best, best_name, graph = None, "graph", None
        spent = took = 0.0
        times: dict[str, float] = {}
        refused: dict[str, str] = {}
        for name, variant in VARIANTS.items():
            if took and spent + took > TRIES_S:
                refused[name] = f"not tried, the others took {spent:.0f} s of the load"
                continue
            started = time.monotonic()
            self._trying = name
            mega, reason = self._candidate(name)
            if mega is not None:
                if graph is None:
                    paused = time.monotonic()
                    graph = self._graph_trial(try_out)
                    if graph is None:
                        self._drop(mega)
                        break
                    started += time.monotonic() - paused
                trial, reason = self._trial(name, mega, try_out, graph)
                if trial is not None:
                    times[name] = trial.step_s
                    least = times.get(best_name, graph.step_s)
                    # Without an order of sums only where it is worth it.
                    if trial.step_s * (1.0 if variant.ordered else UNORDERED) < least:
                        if best is not None:
                            self._drop(best)
                        best, best_name = mega, name
                    else:
                        self._drop(mega)
            if reason:
                refused[name] = reason
            took = time.monotonic() - started
            spent += took
        self._trying = ""
        self.mega, self.name = best, best_name
        self._say(best_name, times, graph, refused)

    def _candidate(self, name: str) -> tuple[Mega | None, str]:
        """A variant, ready to run; or why not."""
        try:
            return self._build(name), ""
        except (Unsuited, BackendError) as error:  # the latter: memory, or a compiler that refuses
            self.mega = None
            return None, _reason(error)

    def _graph_trial(self, try_out: TryOut) -> Trial | None:
        try:
            return try_out(1, False)
        except BackendError as error:
            self.notes.append(f"decoding 1 row by graph: no trial, {error.what}")
            return None

    def _trial(self, name: str, mega: Mega, try_out: TryOut, graph: Trial) -> tuple[Trial | None, str]:
        """What came of it; or why it is of no use, with its memory given back."""
        before = len(self.notes)
        try:
            trial = try_out(1, True)
        except BackendError as error:
            self._drop(mega, error)
            return None, f"a trial of it failed, {error.what}"
        if self.mega is not mega:  # it gave up
            reason = self.notes[-1] if len(self.notes) > before else "it gave up"
            del self.notes[before:]
            return None, reason
        if not np.array_equal(graph.tokens, trial.tokens):
            self._drop(mega)
            return None, f"its tokens differ from the graph's ({1e3 * trial.step_s:.3f} ms a step)"
        return trial, ""

    def _drop(self, mega: Mega, because: BackendError | None = None) -> None:
        try:
            mega.close()
        except BackendError as worse:
            raise BackendError(
                f"a trial of the megakernel failed: {worse.what}", fix=f"set {VARIABLE}=graph"
            ) from because
        if self.mega is mega:
            self.mega = None

    def _say(self, best: str, times: dict[str, float], graph: Trial | None, refused: dict[str, str]) -> None:
        if graph is not None and times:
            told = [f"graph {1e3 * graph.step_s:.3f} ms a step"]
            told += [f"{name} {1e3 * step_s:.3f} ms" for name, step_s in times.items()]
            self.notes.append(f"decoding 1 row by {best}: {', '.join(told)}")
        reasons = set(refused.values())
        if len(refused) == len(VARIANTS) and len(reasons) == 1:
            self.notes.append(f"decoding by graph, not by megakernel: {reasons.pop()}")
        else:
            self.notes += [f"not by {name}: {reason}" for name, reason in refused.items()]

    # --- further rows -------------------------------------------------------------------------------------------------

    def mega_runs(self, rows: int, try_out: TryOut) -> bool:
        """Whether the megakernel runs steps of so many rows; tries it and the graph the first time.

        Raises:
            BackendError: the device is of no use after a trial.
        """
        if self.mega is None or rows > MOST_ROWS:
            return False
        size = bucket(rows)
        if size not in self._chosen:
            self._chosen[size] = True  # so that the trial itself asks nothing
            self._chosen[size] = self._compare(size, try_out)
        return self._chosen[size] and self.mega is not None

    def _compare(self, rows: int, try_out: TryOut) -> bool:
        assert self.mega is not None
        try:
            self.mega.plan(rows, False)
        except Unsuited as reason:
            self.notes.append(f"decoding {_rows(rows)} by graph, not by {self.name}: {reason}")
            return False
        if self.forced:
            self._note_forced(rows)
            return True
        try:
            graph = try_out(rows, False)
        except BackendError as error:
            self.notes.append(f"decoding {_rows(rows)} by graph: no trial, {error.what}")
            return False
        try:
            trial = try_out(rows, True)
        except BackendError as error:
            self._failed(error)
            return False
        if not self._there():  # it gave up, and that was said
            return False
        times = f"graph {1e3 * graph.step_s:.3f} ms a step, {self.name} {1e3 * trial.step_s:.3f} ms"
        if not np.array_equal(graph.tokens, trial.tokens):
            self.notes.append(f"decoding {_rows(rows)} by graph: the tokens of {self.name} differ ({times})")
            return False
        faster = trial.step_s < graph.step_s
        self.notes.append(f"decoding {_rows(rows)} by {self.name if faster else 'graph'}: {times}")
        return faster

    def _there(self) -> bool:
        return self.mega is not None

    def _failed(self, error: BackendError) -> None:
        try:
            self.give_up(f"a trial of {self.name} failed, {error.what}")
        except BackendError as worse:
            raise BackendError(
                f"a trial of the megakernel failed: {worse.what}", fix=f"set {VARIABLE}=graph"
            ) from error

    def give_up(self, reason: str, *, warn: bool = True) -> None:
        """From now on only the graph; during a trial: without this variant."""
        if self.mega is None:
            return
        self.mega.close()
        self.mega = None
        if self._trying:
            self.notes.append(reason)
            return
        self.name = "graph"
        self.notes.append(f"decoding by graph from now on: {reason}")
        if warn:
            logging.getLogger("finial.cuda").warning("decoding goes on by graph: %s", reason)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"up to {count} rows"


def _reason(error: Unsuited | BackendError) -> str:
    return error.what if isinstance(error, BackendError) else str(error)
