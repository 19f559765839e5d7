"""How many rows of prompts a step may have beside those that generate, so that these are not held up for long.

Learns from measured steps; knows nothing of sequences or models.

    pace = Pace(stall_s=0.05, most=512)
    pace.note(decoding=3, prompt=64, seconds=0.02); pace.rows
"""

from __future__ import annotations

LEAST = 16  # rows: fewer would read all weights for next to nothing
WEIGHT = 0.25  # of a new measurement in the running mean


class Pace:
    """A bound on a prompt's part of a step, from what its rows were measured to take.

    Args:
        stall_s: by how much a step may become longer through prompts; where a step without prompts takes longer
            than this, it may become twice as long.
        most: rows of a step.
    """

    def __init__(self, stall_s: float, most: int) -> None:
        self._stall_s = stall_s
        self._most = most
        self._decode_s: float | None = None
        self._row_s: float | None = None

    @property
    def rows(self) -> int:
        """Rows of prompts that fit."""
        if self._row_s is None:
            return min(self._most, 4 * LEAST)  # nothing is known yet
        room = max(self._stall_s, self._decode_s or 0.0)
        return max(min(LEAST, self._most), min(self._most, int(room / max(self._row_s, 1e-9))))

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step with so many rows of either kind took that long."""
        if prompt == 0:
            if decoding:
                self._decode_s = _mean(self._decode_s, seconds)
        elif prompt >= LEAST or self._row_s is None:
            self._row_s = _mean(self._row_s, max(seconds - (self._decode_s or 0.0), 0.0) / prompt)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
