"""Tokens chosen by the CPU backend's native program, and runs of decode steps without Python between them.

Knows what a step's inputs are called and what a choice is made of; nothing of lowering and weights.

    chooser = Chooser(native, outputs, ints, dimensions); chooser.steps(feeds, state, ahead)

A run is taken in bursts: one native call does as many steps as fit into `BURST_S`, one where a step takes longer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finial.backends import Ahead, Draw
from finial.errors import BackendError
from finial.graph import STEP_INPUTS, Value

if TYPE_CHECKING:
    from finial import _native

Ints = NDArray[np.int32]

# Long enough that what a call costs is nothing, short enough that text flows and that nothing is lost when somebody
# comes or leaves.
BURST_S = 0.002
_PER_SEQUENCE = {"T", "B", "R"}  # dimensions that have one row a sequence when everybody decodes


class Chooser:
    """How tokens come out of one native program.

    Args:
        outputs: of the program, in the order of declaration; the first output of the graph is `logits`.
        ints: its integer inputs, likewise; dimensions: likewise.
    """

    def __init__(
        self,
        native: _native.Program,
        logits: str,
        outputs: Sequence[Value],
        ints: Sequence[Value],
        dimensions: Iterable[int | str],
    ) -> None:
        self._native = native
        self._output = [value.name for value in outputs].index(logits)
        self._others = [value for value in outputs if value.name != logits]
        self._names = [value.name for value in ints]
        self._per_sequence = [dim in _PER_SEQUENCE for dim in dimensions]
        self._roles = [self._names.index(name) for name in STEP_INPUTS] if self._whole else []

    @property
    def _whole(self) -> bool:
        return set(STEP_INPUTS) <= set(self._names) <= {*STEP_INPUTS, "pooled"}

    def tokens(
        self,
        rows: Sequence[int],
        ints: Sequence[Ints],
        inputs: Sequence[NDArray[np.float32]],
        state: _native.State,
        draws: Sequence[Draw],
    ) -> Ints:
        """Of one step; -1 where the caller must choose.  Arguments as `CpuProgram.run` makes them."""
        choices = [(draw.temperature, draw.top_k, draw.top_p, draw.min_p) for draw in draws]
        uniforms = [draw.uniform for draw in draws]
        try:
            found = self._native.sample(rows, ints, inputs, state, self._output, choices, uniforms)
        except ValueError as error:
            raise BackendError(str(error)) from error
        return np.array(found, np.int32)

    def steps(
        self, feeds: Mapping[str, np.ndarray], state: _native.State, ahead: Ahead
    ) -> Generator[Ints, None, None] | None:
        """A run; see `finial.backends.RunsAhead.ahead`.  None: this is no step of a whole decoder."""
        count = len(ahead.draws)
        at = np.arange(count + 1)
        if (
            not self._roles
            or not np.array_equal(feeds["starts"], at)
            or not np.array_equal(feeds["wanted"], at[:-1])
            or not np.array_equal(feeds["lengths"], feeds["positions"] + 1)
            or len(feeds.get("pooled", ())) > 0
        ):
            return None
        rows = [
            ((draw.temperature, draw.top_k, draw.top_p, draw.min_p), sorted(stops), token, position, left)
            for draw, stops, token, position, left in zip(
                ahead.draws,
                ahead.stop_ids,
                feeds["tokens"].tolist(),
                feeds["positions"].tolist(),
                ahead.limits.tolist(),
                strict=True,
            )
        ]
        from finial import _native

        pages = np.ascontiguousarray(feeds["pages"])
        draws = np.ascontiguousarray(ahead.uniforms)
        run = _native.Ahead(self._native, self._roles, self._per_sequence, self._output, rows, draws, pages)
        return _bursts(run, state, count)


def _bursts(run: _native.Ahead, state: _native.State, count: int) -> Generator[Ints, None, None]:
    while True:
        try:
            tokens = run.burst(state, BURST_S)
        except ValueError as error:
            raise BackendError(str(error)) from error
        if not tokens:
            return
        yield from np.array(tokens, np.int32).reshape(-1, count)
