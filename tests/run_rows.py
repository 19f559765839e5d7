"""What tests of runs of decode steps share, whatever the backend: sequences, requests, what an engine makes of both."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import numpy as np

from finial.backends import Ahead, Draw
from finial.engine.generate import Engine
from finial.engine.sampling import SamplingParams
from test_engine import Letters

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


def said(engine: Engine, vocab: int, *more: dict[str, Any]) -> list[object]:
    """What an engine with few pages makes of requests with seeds, stop ids and strings, and `more`; of a cancel; and of
    prompts that share pages with what a run left."""
    wishes: list[dict[str, Any]] = [
        {"max_tokens": 12},
        {"max_tokens": 9, "temperature": 1.2, "top_p": 0.9, "seed": 4},
        {"max_tokens": 20, "temperature": 2.0, "seed": 5, "stop_ids": list(range(0, vocab, 9))},
        {"max_tokens": 16, "temperature": 1.0, "top_k": 9, "seed": 6, "stop": ["q", "w"]},
        *more,
    ]
    out: list[object] = []
    for first in (5, 6):
        handles = [
            engine.submit([first, 6, 7 + i], SamplingParams(**wish), detokenizer=Letters())
            for i, wish in enumerate(wishes)
        ]
        while len(handles[0].tokens) < 5:
            engine.step()
        if first == 6:
            engine.cancel(handles[0])
        engine.finish(handles[1:])
        engine.finish(handles)
        out.append([(handle.tokens, handle.text, handle.finish_reason) for handle in handles])
        again = engine.submit([first, 6, 7, *handles[0].tokens], SamplingParams(max_tokens=3))
        engine.finish([again])
        out.append((again.tokens, again.sequence.reused))
        engine._pool.check()
        assert engine.pages_held == 0
    return out
