"""What the tests of runs of decode steps begin with, on whatever backend: sequences, and what is asked of a run."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import numpy as np

from finial.backends import Ahead, Draw

PAGE, PAGES = 8, 40
Ints = np.ndarray
P = TypeVar("P")


class Rows(Generic[P]):
    """Sequences on scattered pages of their own, prompts of several lengths computed one row at a time."""

    def __init__(self, program: P, vocab: int, lengths: list[int], seed: int) -> None:
        random = np.random.default_rng(seed)
        whole: Any = program
        self.program, self.state = program, whole.new_state(PAGES, PAGE)
        per = PAGES // len(lengths)
        self.tables = random.permutation(PAGES).astype(np.int32)[: per * len(lengths)].reshape(len(lengths), per)
        self.tokens = [random.integers(0, vocab, length).tolist() for length in lengths]
        for row, tokens in enumerate(self.tokens):
            for at in range(len(tokens) - 1):
                whole.run(self.feeds([row], [at]), self.state)

    def feeds(self, rows: list[int], at: list[int] | None = None) -> dict[str, Ints]:
        position = np.array([len(self.tokens[r]) - 1 for r in rows] if at is None else at, np.int32)
        tables = self.tables[rows]
        return {
            "tokens": np.array([self.tokens[r][p] for r, p in zip(rows, position, strict=True)], np.int32),
            "positions": position,
            "starts": np.arange(len(rows) + 1, dtype=np.int32),
            "lengths": position + 1,
            "pages": tables,
            "slots": (tables[np.arange(len(rows)), position // PAGE] * PAGE + position % PAGE).astype(np.int32),
            "wanted": np.arange(len(rows), dtype=np.int32),
        }


def asked(rows: int, steps: int, vocab: int, seed: int) -> Ahead:
    """Rows of all kinds; each may end by a stop id or its limit, one goes on to the end unless it meets a stop id."""
    random = np.random.default_rng(seed)
    kinds = [Draw(0.0, 0, 1.0, 0.0, 0.0), Draw(1.5, 0, 1.0, 0.0, 0.0), Draw(0.8, 20, 0.9, 0.02, 0.0)]
    limits = random.integers(1, steps + 1, rows).astype(np.int32)
    limits[random.integers(rows)] = steps
    return Ahead(
        [kinds[i] for i in random.integers(0, 3, rows)],
        random.random((steps, rows)),
        [frozenset(random.choice(vocab, random.choice([0, 8]), replace=False).tolist()) for _ in range(rows)],
        limits,
    )
