"""Quality: how far an engine's output is from a float32 reference, from whatever the engine lets one see.

The one place where a verdict comes about, for `finial quality` as for the verdicts beside a bench's numbers.  Knows
scorers (things that score and continue token ids) and the arithmetic of `finial.verdict`; nothing of processes, files
of engines or how a verdict is shown.

    quality = assess(reference, scorer, text); quality.verdict.kl_mean, quality.basis

What is computed depends on what an engine gives; `basis` says which, from the most to the least:
- "logits": every distribution over the text, teacher-forced.  All of it.
- "top": of each position of the text the most likely tokens' log-probabilities and, where given, the text's own.  KL is
  a lower bound (see finial.verdict), agreement exact, perplexity exact where the text's own are given.
- "generated": the same, but along the greedy text that the engine itself writes, which the reference then scores.
- "tokens": that greedy text alone: at what share of its positions the reference chooses the same token.  No KL.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from finial.errors import ModelError
from finial.lab.quality_texts import Text
from finial.verdict import Logits, Rows, Verdict, compare, compare_top, first_divergence, regret, summary

GREEDY = 64
PROMPT = 32  # ids of a text that the greedy text continues

# Bounds of the regret of an engine's greedy text (finial.verdict); another model's text or none is close to 1.  Weights
# as stored stay far below the first.  Weights rounded to a few bits are held against the checkpoint that they were made
# from, and random weights forgive rounding least: one choice of theirs can be as far off as a random token, and
# fewer than CHOICES of them say nothing.
REGRET, REGRET_ROUNDED, CHOICES = 0.25, 0.75, 4
EXACT = ("stored", "bf16", "f16", "f32")

BASES = {
    "logits": "teacher-forced over the whole vocabulary",
    "top": "teacher-forced; KL is a lower bound from the most likely tokens",
    "generated": "along the engine's own greedy text; KL is a lower bound from its most likely tokens",
    "tokens": "along the engine's own greedy text; it gives tokens alone, so there is no KL",
}


@dataclass(frozen=True)
class Scored:
    """What an engine says of T given ids.

    Attributes:
        logits: float32 [T, V], row i predicts what follows ids[: i + 1]; None where it gives fewer.
        top: of each position the log-probabilities of its most likely tokens; empty where unknown.
        losses: −ln of the id that follows, NaN where unknown; empty: unknown everywhere.
    """

    logits: Logits | None = None
    top: Sequence[Mapping[int, float]] = ()
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class Written:
    """A greedy continuation; `top` as in `Scored`, one for each token, empty when it gives none."""

    tokens: list[int]
    top: Sequence[Mapping[int, float]] = ()


class Scorer(Protocol):
    """An engine with a model in it.

    Attributes:
        basis: the best of `BASES` that it can do; engine, format, precision: what it is, in words.
    """

    basis: str
    engine: str
    format: str
    precision: str

    def score(self, ids: Sequence[int]) -> Scored:
        """Teacher-forced; asked for when the basis is "logits" or "top"."""

    def greedy(self, ids: Sequence[int], count: int) -> Written:
        """The `count` tokens that it continues with, past any end of text."""


class Exact(Protocol):
    """What others are held against; `description` says what it is."""

    description: str

    def score(self, ids: Sequence[int]) -> Logits:
        """Float32 [T, V], row i predicts what follows ids[: i + 1]."""


@dataclass(frozen=True)
class Quality:
    """A verdict and how it came about.

    Attributes:
        engine, format, precision: of what was judged; reference: what it was held against.
        basis: of `BASES`; top: how many log-probabilities a position had, 0 for whole logits.
        text: name of the text; tokens: its ids that were scored.
        verdict: KL is a lower bound unless the basis is "logits", and NaN for "tokens".
        greedy_agreement: share of the positions of its own greedy text where the reference chooses the same token.
        repeat_kl_max: of its own second run against its first; None where it gives no logits.
        repeat_same_text: whether a second greedy run gave the same tokens.
        rounding: the verdict of the format alone: the reference on weights rounded to it.  None: not asked for.
        flaws: what makes the numbers worthless, in words.
    """

    engine: str
    format: str
    precision: str
    reference: str
    basis: str
    top: int
    text: str
    tokens: int
    verdict: Verdict
    greedy_agreement: float
    repeat_kl_max: float | None
    repeat_same_text: bool
    rounding: Verdict | None = None
    flaws: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not a finite number is None there, and named in `flaws` when it is wrong."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


def assess(
    reference: Exact, scorer: Scorer, text: Text, greedy: int = GREEDY, rounding: Exact | None = None
) -> Quality:
    """The verdict on one engine over one text.

    Args:
        greedy: length of the greedy text that is looked at, at least 1.
        rounding: a reference on weights rounded to the scorer's format, to tell the format's share.
    """
    assert greedy >= 1 and text.windows
    prompt = list(text.windows[0][:PROMPT])
    written, again = (scorer.greedy(prompt, greedy) for _ in range(2))
    along = reference.score([*prompt, *written.tokens])[len(prompt) - 1 : -1]
    same = along.argmax(axis=-1) == np.asarray(written.tokens)
    rows, repeat, basis = _rows(reference, scorer, text, prompt, written, along)
    verdict = summary(rows, len(written.tokens), first_divergence(along, written.tokens))
    alone = None
    if rounding is not None:
        alone = summary(Rows.join([compare(reference.score(w), rounding.score(w), w) for w in text.windows]))
    flaws = []
    if np.isnan(rows.kl).any() and basis != "tokens":
        flaws.append(f"logits that are not numbers at {int(np.isnan(rows.kl).sum())} of {len(rows.kl)} positions")
    elif np.isinf(rows.kl).any():
        flaws.append("tokens that the reference deems possible have no probability at all")
    foreign = not_the_models("greedy text", [(along, written.tokens)], scorer.format)
    flaws += [foreign] if foreign else []
    return Quality(
        engine=scorer.engine,
        format=scorer.format,
        precision=scorer.precision,
        reference=reference.description,
        basis=basis,
        top=_known(scorer, text, written) if basis in ("top", "generated") else 0,
        text=text.name,
        tokens=len(rows.kl),
        verdict=verdict,
        greedy_agreement=float(same.mean()),
        repeat_kl_max=repeat,
        repeat_same_text=written.tokens == again.tokens,
        rounding=alone,
        flaws=flaws,
    )


def not_the_models(what: str, texts: Sequence[tuple[Logits, Sequence[int]]], format: str) -> str:
    """The flaw of texts that this model would not write in this format; empty when it would, or they say too little.

    Args:
        what: their name in the sentence.
        texts: of each float32 [N, V], the reference's predictions for each of the N tokens, and those.
    """
    bound, together = REGRET, [[text] for text in texts]  # each text must be the model's
    if format not in EXACT:
        bound, together = REGRET_ROUNDED, [list(texts)]
        if sum(len(set(tokens)) for _, tokens in texts) < CHOICES:
            return ""
    for found in map(regret, together):
        if not found <= bound:  # or not a number
            return f"{what} is not this model's: {found:.0%} of the way to random tokens"
    return ""


def _rows(
    reference: Exact, scorer: Scorer, text: Text, prompt: list[int], written: Written, along: Logits
) -> tuple[Rows, float | None, str]:
    """What there is at each position, KL of its own repeat, and the basis that it was done on."""
    tokens = [prompt[-1], *written.tokens[:-1]]  # row i of `along` predicts written.tokens[i]
    if scorer.basis in ("logits", "top"):
        parts = []
        for window in text.windows:
            exact, scored = reference.score(window), scorer.score(window)
            if scored.logits is None:
                rows = compare_top(exact, scored.top, window, scored.losses)
                parts.append(_only(rows, [bool(top) for top in scored.top]))
                continue
            if scored.logits.shape != exact.shape:
                raise ModelError(
                    f"{scorer.engine} gives logits {list(scored.logits.shape)}, the reference {list(exact.shape)}",
                    fix="both must be made from the same checkpoint",
                )
            parts.append(compare(exact, scored.logits, window))
        repeat = None
        if scorer.basis == "logits":
            first, second = (scorer.score(text.windows[0]).logits for _ in range(2))
            assert first is not None and second is not None
            repeat = float(compare(first, second).kl.max())
        return Rows.join(parts), repeat, scorer.basis
    if written.top:
        rows = compare_top(along, written.top, tokens)
        return _only(rows, [bool(top) for top in written.top]), None, "generated"
    count = len(written.tokens)
    blank = np.full(count, np.nan)
    top1 = (along.argmax(axis=-1) == np.asarray(written.tokens)).astype(np.float64)
    return Rows(blank, top1, blank, blank, blank), None, "tokens"


def _only(rows: Rows, known: list[bool]) -> Rows:
    return Rows(*(getattr(rows, item.name)[known] for item in dataclasses.fields(rows)))


def _known(scorer: Scorer, text: Text, written: Written) -> int:
    tops = written.top or scorer.score(text.windows[0]).top
    return min((len(top) for top in tops if top), default=0)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
