"""What the asker of one sequence sees: its pieces, its text, why it ended and when.

Knows token ids and pieces of text; nothing of logits, pages, steps or threads.

    handle.pieces[3].text, handle.finish_reason, handle.timings.ttft_s
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from finial.engine.sampling import History, SamplingParams, TokenLogprobs
from finial.engine.scheduler import Sequence as Scheduled

Pooling = Literal["last", "mean"]
FINISH_REASONS = ("stop", "length", "cancel", "error")


class Detokenizer(Protocol):
    """Token ids in, text out, never half a character."""

    def push(self, token: int) -> str:
        """The text that is certain with this token."""

    def finish(self) -> str:
        """What was held back."""


class Constraint(Protocol):
    """What one sequence may say; used by the thread that drives the engine."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next, bool [V]; None: all."""

    def advance(self, token: int) -> bool:
        """The next token is this one; True when the text is complete with it."""

    def restart(self, tokens: Sequence[int]) -> None:
        """Begin anew, with these tokens said."""


class Piece(NamedTuple):
    """One token of a sequence, or its end.

    Attributes:
        token: None for an end without a token (a cancelled or failed request, max_tokens=0).
        text: what became certain with this token: empty while a character is incomplete or the text may be the
            beginning of a stop string; the last piece carries what was held back.
        logprobs: None unless asked for.
        finish_reason: "stop", "length", "cancel", "error", or None while it goes on.
    """

    token: int | None
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None


@dataclass
class Timings:
    """Host clock (time.perf_counter, seconds) at submission, and when the first and the last token were known."""

    submitted: float
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0
    gap_s: float | None = None  # between the last token and the one before it

    @property
    def ttft_s(self) -> float | None:
        """Seconds from submission to the first token, waiting in the queue included."""
        return None if self.first_token is None else self.first_token - self.submitted

    @property
    def decode_tok_s(self) -> float | None:
        """(N - 1) / (last - first); None below two tokens."""
        if self.first_token is None or self.last_token is None or self.last_token <= self.first_token:
            return None
        return (self.tokens - 1) / (self.last_token - self.first_token)


class StopText:
    """Ends a stream of text at the first of some strings, and holds back what might be the beginning of one.

    When several strings match, the one that begins first ends the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that is certain now, whether a stop string was met).  Nothing may be pushed after a stop."""
        text = self._held + piece
        found = min((at for at in map(text.find, self._stops) if at >= 0), default=-1)
        if found >= 0:
            self._held = ""
            return text[:found], True
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def finish(self) -> str:
        """What is still held back: the text ended without becoming a stop string."""
        held, self._held = self._held, ""
        return held


class Handle:
    """One submitted sequence.  The engine writes, anybody reads; lists only ever grow.

    Attributes:
        tokens: generated ids, a stop id that ended the text included.
        pieces: one per token, and one more when the end came without a token.
        prompt_logprobs: for the prompt's tokens 1, 2, … (the first has no prediction), when asked for.
        prompt_logits: float32 arrays [rows, V] in order of position, when asked for.
        error: what made it fail; finish_reason is "error".
        embedding: float64 [hidden_size], when it was asked for by `pooling`: of the last position, or the mean of all.
        constraint: what it may say; None: anything.
        listener: called with the handle after each piece, in the thread that drives the engine; it must not wait.
    """

    __slots__ = (
        "constraint",
        "detokenizer",
        "embedding",
        "error",
        "finish_reason",
        "history",
        "keep_logits",
        "listener",
        "params",
        "pieces",
        "plain_greedy",
        "pooling",
        "prompt_logits",
        "prompt_logprobs",
        "sample",
        "seed",
        "sequence",
        "stop_ids",
        "stop_text",
        "timings",
        "tokens",
    )

    def __init__(
        self,
        sequence: Scheduled,
        params: SamplingParams,
        *,
        seed: int,
        sample: int,
        stop_ids: frozenset[int],
        detokenizer: Detokenizer | None,
        keep_logits: bool,
        submitted: float,
        listener: Callable[[Handle], None] | None = None,
        constraint: Constraint | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        self.sequence = sequence
        self.params = params
        self.constraint = constraint
        self.pooling = pooling
        self.embedding: NDArray[np.float64] | None = None
        self.plain_greedy = params.plain_greedy and constraint is None
        self.seed = seed
        self.sample = sample
        self.stop_ids = stop_ids
        self.detokenizer = detokenizer
        self.keep_logits = keep_logits
        self.listener = listener
        self.stop_text = StopText(params.stop) if params.stop else None
        self.history = History(sequence.tokens) if params.penalised else None
        self.tokens: list[int] = []
        self.pieces: list[Piece] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.prompt_logits: list[NDArray[np.float32]] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.timings = Timings(submitted)

    @property
    def row_alone(self) -> bool:
        """Whether a token is chosen from its own row of logits, with nothing else looked at or reported."""
        params = self.params
        return not (params.penalised or params.logit_bias or params.logprobs is not None or self.constraint is not None)

    @property
    def finished(self) -> bool:
        """Whether no further piece will come."""
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join([piece.text for piece in self.pieces])

    def emit(self, token: int, logprobs: TokenLogprobs | None, now: float, complete: bool = False) -> bool:
        """Take one generated token, known on the host at `now`; True when the sequence ended with it.

        Args:
            complete: nothing may follow this token.
        """
        reason = None
        count = len(self.tokens) + 1
        if token in self.stop_ids:
            text, reason = "", "stop"
        else:
            text = self.detokenizer.push(token) if self.detokenizer is not None else ""
            if self.stop_text is not None and text:
                text, met = self.stop_text.push(text)
                if met:
                    self.detokenizer = None  # what it holds lies behind the stop string
                    reason = "stop"
        if reason is None and complete:
            reason = "stop"
        if reason is None and count >= self.sequence.max_new:
            reason = "length"
        if reason is not None:
            tail, met = self._tail()
            text += tail
            if met:
                reason = "stop"
        timings = self.timings
        timings.tokens = count
        if timings.last_token is not None:
            timings.gap_s = now - timings.last_token
        timings.last_token = now
        if count == 1:
            timings.first_token = now
        self.tokens.append(token)
        self.pieces.append(Piece(token, text, logprobs, reason))
        self.finish_reason = reason
        if self.listener is not None:
            self.listener(self)
        return reason is not None

    def pool(self, rows: NDArray[np.float32], first: bool, last: bool) -> None:
        """Hidden states [rows, hidden_size] of the positions that follow those seen.

        Args:
            first: these are the first ones, perhaps once more.
            last: no more will come.
        """
        if self.pooling == "last":
            self.embedding = rows[-1].astype(np.float64)
            return
        total = rows.sum(axis=0, dtype=np.float64)
        if not first:
            assert self.embedding is not None
            total += self.embedding
        self.embedding = total / self.sequence.prompt_length if last else total

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """The end without a token.  A second end changes nothing."""
        if self.finish_reason is None:
            tail, _ = self._tail()
            self.error = error
            self.pieces.append(Piece(None, tail, None, reason))
            self.finish_reason = reason
            if self.listener is not None:
                self.listener(self)

    def _tail(self) -> tuple[str, bool]:
        """The text still held back, and whether a stop string appeared in it."""
        text, met = (self.detokenizer.finish() if self.detokenizer is not None else ""), False
        self.detokenizer = None
        if self.stop_text is not None and text:
            text, met = self.stop_text.push(text)
        if self.stop_text is not None:
            text += self.stop_text.finish()
        return text, met


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
