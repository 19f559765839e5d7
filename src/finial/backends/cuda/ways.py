"""The two ways to decode several steps, a graph of kernels and the megakernel: which one runs, and why.

The faster one is found by running both, once for each bucket of rows, for a single row at load; FINIAL_CUDA=graph,
mega or mega-fused decides instead.  Knows no steps; who runs them is the program.

    ways = Ways(model, weights, device)
    if ways.mega_runs(rows, trial): ...
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.device import Device
from finial.backends.cuda.feeds import bucket
from finial.backends.cuda.mega.layout import MOST_ROWS
from finial.backends.cuda.mega.program import Mega
from finial.backends.cuda.mega.shape import Unsuited
from finial.backends.cuda.model import Model
from finial.errors import BackendError
from finial.formats import Tensor

VARIABLE = "FINIAL_CUDA"
CHOICES = ("auto", "graph", "mega", "mega-fused")  # the last one: gate·up and down in one phase, see mega/table.py


@dataclass(frozen=True)
class Trial:
    """What some steps of a trial run gave: seconds of a step, and the tokens [steps, rows]."""

    step_s: float
    tokens: NDArray[np.int32]


# (rows, by the megakernel) -> what came of it
TryOut = Callable[[int, bool], Trial]


class Ways:
    """See the module.

    Attributes:
        mega: None where only the graph runs.
        notes: what a person may want to know, one line a decision.

    Raises:
        BackendError: FINIAL_CUDA names no way, or the megakernel, which cannot run this model here.
    """

    def __init__(self, model: Model, weights: Mapping[str, Tensor], device: Device) -> None:
        self.asked = os.environ.get(VARIABLE) or "auto"
        if self.asked not in CHOICES:
            raise BackendError(f"{VARIABLE} is {self.asked!r}", fix=f"choose one of {', '.join(CHOICES)}")
        self.mega: Mega | None = None
        self.notes: list[str] = []
        self._chosen: dict[int, bool] = {}
        if self.asked == "graph":
            self.notes.append(f"decoding by graph, as {VARIABLE} says")
            return
        try:
            self.mega = Mega(model, weights, device, fused_mlp=self.asked == "mega-fused")
        except (Unsuited, BackendError) as error:  # the latter: memory, or a compiler that refuses
            reason = error.what if isinstance(error, BackendError) else str(error)
            if self.forced:
                raise BackendError(
                    f"the megakernel does not run this model here: {reason}", fix=f"leave {VARIABLE} away"
                ) from error
            self.notes.append(f"decoding by graph, not by megakernel: {reason}")

    @property
    def forced(self) -> bool:
        """Whether the megakernel was asked for."""
        return self.asked.startswith("mega")

    def mega_runs(self, rows: int, try_out: TryOut) -> bool:
        """Whether the megakernel runs steps of so many rows; tries both the first time.

        Raises:
            BackendError: the device is of no use after a trial.
        """
        if self.mega is None or rows > MOST_ROWS:
            return False
        size = bucket(rows)
        if size not in self._chosen:
            self._chosen[size] = True  # so that the trial itself asks nothing
            self._chosen[size] = self._choose(size, try_out)
        return self._chosen[size] and self.mega is not None

    def _choose(self, rows: int, try_out: TryOut) -> bool:
        assert self.mega is not None
        what = "1 row" if rows == 1 else f"up to {rows} rows"
        try:
            self.mega.plan(rows, False)
        except Unsuited as reason:
            self.notes.append(f"decoding {what} by graph, not by megakernel: {reason}")
            return False
        if self.forced:
            self.notes.append(f"decoding {what} by megakernel, as {VARIABLE} says")
            return True
        try:
            graph = try_out(rows, False)
        except BackendError as error:
            self.notes.append(f"decoding {what} by graph: no trial, {error.what}")
            return False
        try:
            mega = try_out(rows, True)
        except BackendError as error:
            self._failed(error)
            return False
        if not self._there():  # it gave up, and that was said
            return False
        times = f"megakernel {1e3 * mega.step_s:.3f} ms a step, graph {1e3 * graph.step_s:.3f} ms"
        if not np.array_equal(graph.tokens, mega.tokens):
            self.notes.append(f"decoding {what} by graph: the megakernel's tokens differ ({times})")
            return False
        faster = mega.step_s < graph.step_s
        self.notes.append(f"decoding {what} by {'megakernel' if faster else 'graph'}: {times}")
        return faster

    def _there(self) -> bool:
        return self.mega is not None

    def _failed(self, error: BackendError) -> None:
        try:
            self.give_up(f"a trial of the megakernel failed, {error.what}")
        except BackendError as worse:
            raise BackendError(
                f"a trial of the megakernel failed: {worse.what}", fix=f"set {VARIABLE}=graph"
            ) from error

    def give_up(self, reason: str, *, warn: bool = True) -> None:
        """From now on only the graph."""
        if self.mega is None:
            return
        self.mega.close()
        self.mega = None
        self.notes.append(f"decoding by graph from now on: {reason}")
        if warn:
            logging.getLogger("finial.cuda").warning("decoding goes on by graph: %s", reason)
