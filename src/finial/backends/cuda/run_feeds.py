"""What a run of decode steps is given, where the host makes it up itself: a trial, and what is left of another run.

Knows the meaning of a step's integers; nothing of kernels, launches and memory.

    feeds, ahead = trial(rows=2, page_size=32, vocab=1000, steps=8)
    rows, feeds, ahead = rest(feeds, ahead, done=3, last=[5, 6], left=[1, 0], page_size=32)
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping

import numpy as np

from finial.backends import ENDED, Ahead, Draw
from finial.backends.cuda.feeds import Ints

# How the two ways to decode are compared: so many steps from this depth on.
TRIAL_DEPTH, TRIAL_STEPS = 64, 24


def trial(
    rows: int, page_size: int, vocab: int, *, steps: int, depth: int = TRIAL_DEPTH
) -> tuple[dict[str, np.ndarray], Ahead]:
    """Greedy steps of so many rows from position `depth` on, on pages 0, 1, … one row after another."""
    pages = np.arange(rows * -(-(depth + steps) // page_size), dtype=np.int32).reshape(rows, -1)
    feeds = _first_step(np.arange(rows, dtype=np.int32) % vocab, np.full(rows, depth, np.int32), pages, page_size)
    draws = [Draw(0.0, 0, 1.0, 0.0, 0.0)] * rows
    return feeds, Ahead(draws, np.zeros((steps, rows)), [frozenset()] * rows, np.full(rows, steps, np.int32))


def rest(
    feeds: Mapping[str, np.ndarray], ahead: Ahead, *, done: int, last: list[int], left: list[int], page_size: int
) -> tuple[Ints, dict[str, np.ndarray], Ahead]:
    """The run of those rows that may get more tokens, after so many steps of another one.

    Args:
        feeds: of that run's first step; last: tokens of its last step; left: tokens that each row may still get.
    Returns:
        (which rows, the feeds of the next step, how tokens are chosen from it on).
    """
    rows = np.flatnonzero(np.array(left) > 0).astype(np.int32)
    which = rows.tolist()
    tokens = np.array([last[row] for row in which], np.int32)
    less = Ahead(
        [ahead.draws[row] for row in which],
        ahead.uniforms[done:, rows],
        [ahead.stop_ids[row] for row in which],
        np.array([left[row] for row in which], np.int32),
    )
    return rows, _first_step(tokens, feeds["positions"][rows] + np.int32(done), feeds["pages"][rows], page_size), less


def spread(steps: Generator[Ints, None, None], rows: Ints, count: int) -> Generator[Ints, None, None]:
    """Tokens of some of `count` rows as those of all, of which the others have ended."""
    with contextlib.closing(steps):
        for tokens in steps:
            out = np.full(count, ENDED, np.int32)
            out[rows] = tokens
            yield out


def _first_step(tokens: Ints, positions: Ints, pages: Ints, page_size: int) -> dict[str, np.ndarray]:
    at = np.arange(len(tokens), dtype=np.int32)
    return {
        "tokens": tokens,
        "positions": positions,
        "starts": np.arange(len(tokens) + 1, dtype=np.int32),
        "lengths": positions + 1,
        "pages": pages,
        "slots": (pages[at, positions // page_size] * page_size + positions % page_size).astype(np.int32),
        "wanted": at,
    }
