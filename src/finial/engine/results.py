"""What generation gives back: a completion, a stream of pieces, scores.

Knows handles and who drives them; nothing of models, files or sampling rules.

    for piece in Stream(engine, handle): piece.text, piece.token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finial.engine.generate import Engine
from finial.engine.handle import Handle, Piece, Timings
from finial.engine.sampling import TokenLogprobs, log_softmax


@dataclass(frozen=True)
class Choice:
    """One continuation of a prompt.

    Attributes:
        text: without the stop string, end-of-text or other special tokens that ended it.
        tokens: all generated ids, the one that ended it included.
        finish_reason: "stop", "length" or "cancel".
        logprobs: one per token, when asked for.
        seed: makes it again, together with its place among the choices.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs] | None
    timings: Timings
    seed: int


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt; `text`, `tokens` and so on are those of the first choice.

    Attributes:
        choices: as many as `n` asked for.
        prompt_tokens: ids of the prompt.
        prompt_logprobs: one for each of them, None for the first, which nothing predicts; None when not asked for.
        reused_tokens: how many of the prompt's first positions were found in the cache.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    reused_tokens: int

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def tokens(self) -> list[int]:
        """Generated ids of the first choice."""
        return self.choices[0].tokens

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Log-probabilities of the first choice's tokens."""
        return self.choices[0].logprobs

    @property
    def timings(self) -> Timings:
        """Times of the first choice."""
        return self.choices[0].timings

    @staticmethod
    def of(handles: Sequence[Handle]) -> Completion:
        """What the handles of one prompt have produced so far; raises the error of one that failed."""
        choices = []
        for handle in handles:
            if handle.error is not None:
                raise handle.error
            logprobs = [piece.logprobs for piece in handle.pieces if piece.logprobs is not None]
            choices.append(
                Choice(
                    text=handle.text,
                    tokens=list(handle.tokens),
                    finish_reason=handle.finish_reason or "cancel",
                    logprobs=None if handle.params.logprobs is None else logprobs,
                    timings=handle.timings,
                    seed=handle.seed,
                )
            )
        first = handles[0]
        return Completion(
            choices=tuple(choices),
            prompt_tokens=first.sequence.tokens[: first.sequence.prompt_length],
            prompt_logprobs=None if first.params.prompt_logprobs is None else [None, *first.prompt_logprobs],
            reused_tokens=first.sequence.reused,
        )


@dataclass(frozen=True)
class Score:
    """Teacher-forced predictions for given tokens.

    Attributes:
        tokens: the T ids that were scored.
        logits: float32 [T, vocab]; row i predicts what follows tokens[: i + 1].
    """

    tokens: list[int]
    logits: NDArray[np.float32]

    @cached_property
    def logprobs(self) -> NDArray[np.float64]:
        """Natural log-probability of tokens[1:], each given all before it: float64 [T - 1]."""
        out = np.empty(len(self.tokens) - 1)
        for at in range(0, len(out), 64):  # a slab at a time: float64 of everything would take twice the logits' memory
            rows = log_softmax(self.logits[at : min(at + 64, len(out))])
            out[at : at + len(rows)] = rows[np.arange(len(rows)), self.tokens[at + 1 : at + 1 + len(rows)]]
        return out

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; NaN for a single token."""
        return float(np.exp(-self.logprobs.mean())) if len(self.tokens) > 1 else float("nan")


class _Streaming:
    """What both kinds of stream are: a handle, and how much of it was handed out."""

    def __init__(self, engine: Engine, handle: Handle) -> None:
        self._engine = engine
        self._handle = handle
        self._seen = 0

    @property
    def completion(self) -> Completion:
        """All there is so far; complete once the stream has ended.  Stays available after an interruption."""
        return Completion.of([self._handle])

    def close(self) -> None:
        """Cancel what is not finished; its cache pages go back."""
        if not self._handle.finished:
            self._engine.cancel(self._handle)

    def __del__(self) -> None:
        self.close()

    def _take(self) -> Piece | None:
        """The next piece, None at the end; the error of a request that failed."""
        if self._seen == len(self._handle.pieces):
            return None
        piece = self._handle.pieces[self._seen]
        self._seen += 1
        if piece.finish_reason == "error":
            assert self._handle.error is not None
            raise self._handle.error
        return piece


class Stream(_Streaming):
    """Pieces as they come.  Closing or dropping it, or Ctrl-C while it waits, cancels the request."""

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        try:
            self._engine.wait(self._handle, self._seen)
        except BaseException:
            self.close()
            raise
        piece = self._take()
        if piece is None:
            raise StopIteration
        return piece

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncStream(_Streaming):
    """As `Stream`, for `async for`: other tasks run while it waits, and share its steps."""

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        try:
            await self._engine.wait_async(self._handle, self._seen)
        except BaseException:
            self.close()
            raise
        piece = self._take()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()
