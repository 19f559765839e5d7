"""The verdict: how far one set of logits is from the reference's, and where two greedy texts part.

Knows arrays of logits and token ids; nothing of models, backends or how either was computed.

    verdict = judge(reference_logits, logits); verdict.kl_mean, verdict.top1

Definitions.  p is the reference's distribution at a position, q the other's, after the same tokens (teacher forcing).
- KL divergence D(p ‖ q) = Σ p ln(p / q), in nats (Kullback & Leibler 1951, "On information and sufficiency", eq. 2.4).
- top-1 agreement: the share of positions where argmax p = argmax q; ties go to the lowest id, as in greedy decoding.
- top-5 agreement: the mean share of p's five most likely tokens that are among q's five; ties as above.
- perplexity: exp of the mean of −ln q(next token).  Its standard error is that of the mean, times the perplexity (the
  delta method, first order).  The ratio to the reference's is exp of the mean difference, with the error of that mean:
  most of the spread between tokens is common to both and cancels.
- first divergence: free-running greedy texts from one prompt are equal up to the first position where the reference,
  given the other's text so far, prefers another token.  So one pass of the reference over the other's text finds it.
- KL from a few log-probabilities: where q is known for a set K of tokens only, everything outside K counts as one
  outcome.  Merging outcomes never increases the divergence (the log-sum inequality; Cover & Thomas 2006, theorem
  2.7.1), so the result is a lower bound; no upper bound exists, since q may be anything within the rest.
- regret of a text: the mean of (best logit − chosen logit) over the mean of (best − mean logit), both the reference's.
  0 is its own greedy text, 1 as far behind as tokens drawn at random: whether a text is a model's at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.engine.sampling import log_softmax

Logits = NDArray[np.float32]

SLAB = 64  # rows turned to float64 at a time: 80 MB for a vocabulary of 151,936
REST = 1e-6  # least probability that the unknown rest is taken to have: engines round log-probabilities to float32


@dataclass(frozen=True)
class Divergence:
    """Where a greedy text leaves the reference's.

    Attributes:
        position: index of the first differing token among the generated ones.
        token, reference_token: what each chose there.
        margin: by how many nats the reference prefers its own choice; near zero is a tie that rounding decides.
    """

    position: int
    token: int
    reference_token: int
    margin: float


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted, beside the reference.

    Attributes:
        value, error: perplexity and its standard error; reference, reference_error: the reference's.
        ratio, ratio_error: value / reference, by token-wise differences.
        tokens: how many were predicted.
    """

    value: float
    error: float
    reference: float
    reference_error: float
    ratio: float
    ratio_error: float
    tokens: int


@dataclass(frozen=True)
class Verdict:
    """How close to the reference.

    Attributes:
        positions: how many distributions were compared.
        kl_mean, kl_p99, kl_max: nats.
        top1: share of positions with the same most likely token.
        greedy_tokens: length of the greedy text that was looked at; 0 when none was.
        divergence: where it parts from the reference's, None when it does not.
        top5: share of the reference's five most likely tokens that are among the other's five.
        perplexity: None when the tokens that follow were not given.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    greedy_tokens: int = 0
    divergence: Divergence | None = None
    top5: float = math.nan
    perplexity: Perplexity | None = None


@dataclass(frozen=True)
class Rows:
    """What was found at each of T positions; float64 [T], NaN where unknown.

    Attributes:
        kl: D(reference ‖ other), or a lower bound of it; top1, top5: agreement there, 0 to 1.
        reference_loss, loss: −ln of the probability of the token that follows.
    """

    kl: NDArray[np.float64]
    top1: NDArray[np.float64]
    top5: NDArray[np.float64]
    reference_loss: NDArray[np.float64]
    loss: NDArray[np.float64]

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """Those of several texts, one after the other."""
        names = ("kl", "top1", "top5", "reference_loss", "loss")
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def kl_divergence(reference: Logits, logits: Logits) -> NDArray[np.float64]:
    """D(reference ‖ logits) of each row in nats: [T, V], [T, V] -> float64 [T].  NaN logits give NaN."""
    return compare(reference, logits).kl


def compare(reference: Logits, logits: Logits, tokens: Sequence[int] = ()) -> Rows:
    """Position by position.

    Args:
        reference, logits: float32 [T, V]; row i predicts what follows tokens[: i + 1].
        tokens: the T ids of the text; without them no losses.  Nothing follows the last one.
    """
    assert reference.shape == logits.shape and reference.ndim == 2 and len(tokens) in (0, len(reference))
    count = len(reference)
    kl, own, other = np.empty(count), np.full(count, np.nan), np.full(count, np.nan)
    top5 = np.empty(count)
    for at in range(0, count, SLAB):
        rows = slice(at, min(at + SLAB, count))
        ours, theirs = log_softmax(logits[rows]), log_softmax(reference[rows])
        p = np.exp(theirs)
        with np.errstate(invalid="ignore"):
            terms = np.where(p == 0, 0.0, p * (theirs - ours))  # p ln p goes to 0 with p
        kl[rows] = terms.sum(axis=-1)
        top5[rows] = [_shared(a, b) for a, b in zip(reference[rows], logits[rows], strict=True)]
        follow = np.asarray(tokens[at + 1 : at + 1 + SLAB], np.int64)
        place = np.arange(len(follow))
        own[at : at + len(follow)] = _loss(theirs[place, follow])
        other[at : at + len(follow)] = _loss(ours[place, follow])
    kl = np.where(kl < 0, 0.0, kl)  # rounding can put the divergence of equal rows a hair below zero
    top1 = (reference.argmax(axis=-1) == logits.argmax(axis=-1)).astype(np.float64)
    return Rows(kl, top1, top5, own, other)


def compare_top(
    reference: Logits, top: Sequence[Mapping[int, float]], tokens: Sequence[int] = (), losses: Sequence[float] = ()
) -> Rows:
    """As `compare` where the other gives its most likely tokens only; `kl` is then a lower bound.

    Args:
        reference: float32 [T, V].
        top: of each position the natural log-probabilities of the known tokens; all that are more likely than any
            left out.  Empty: nothing is known there.
        tokens: the T ids of the text.
        losses: the other's −ln of the token that follows, NaN where unknown; without them, what `top` knows.
    """
    count = len(reference)
    assert len(top) == count and len(tokens) in (0, count) and len(losses) in (0, count)
    out = Rows(*(np.full(count, np.nan) for _ in range(5)))
    for at, known in enumerate(top):
        row = log_softmax(reference[at])
        if at + 1 < len(tokens):
            out.reference_loss[at] = -row[tokens[at + 1]]
            given = losses[at] if len(losses) else math.nan
            out.loss[at] = -known[tokens[at + 1]] if tokens[at + 1] in known else given
        if not known:
            continue
        ids = np.fromiter(known, np.int64, len(known))
        q = np.fromiter(known.values(), np.float64, len(known))
        out.kl[at] = _coarse_kl(row, ids, q)
        ranked = ids[np.lexsort((ids, -q))]
        out.top1[at] = float(row.argmax() == ranked[0])
        if len(ranked) >= 5:
            out.top5[at] = len(set(_first5(row)) & set(ranked[:5].tolist())) / 5
    return out


def first_divergence(reference: Logits, tokens: Sequence[int]) -> Divergence | None:
    """Where a greedy text first differs from what the reference would choose after the same beginning.

    Args:
        reference: float32 [N, V]; row i is the reference's prediction for tokens[i], given all before it.
        tokens: the greedy text's N ids.
    """
    assert len(reference) == len(tokens)
    chosen = reference.argmax(axis=-1) if len(tokens) else np.empty(0, np.int64)
    wrong = np.flatnonzero(chosen != np.asarray(tokens, np.int64))
    if not len(wrong):
        return None
    at = int(wrong[0])
    token, best = int(tokens[at]), int(chosen[at])
    return Divergence(at, token, best, float(reference[at, best]) - float(reference[at, token]))


def regret(texts: Sequence[tuple[Logits, Sequence[int]]]) -> float:
    """How far texts are on their way from the reference's own choices to random ones; NaN stays NaN.

    A token counts once in a text, however often the text repeats it: a model that repeats itself has chosen once.

    Args:
        texts: at least one token in all; of each the reference's predictions, float32 [N, V], and its N tokens.
    """
    lost, possible = 0.0, 0.0
    for reference, tokens in texts:
        rows, ids = np.asarray(reference, np.float64), np.asarray(tokens, np.int64)
        best, mean = rows.max(axis=-1), rows.mean(axis=-1)
        _, which, times = np.unique(ids, return_inverse=True, return_counts=True)
        weights = 1 / times[which]
        lost += float(weights @ (best - rows[np.arange(len(rows)), ids]))
        possible += float(weights @ (best - mean))
    return lost / max(possible, 1e-9)


def perplexity(rows: Rows) -> Perplexity | None:
    """Of the positions where both losses are known; None when there are none."""
    known = ~(np.isnan(rows.loss) | np.isnan(rows.reference_loss))
    if not known.any():
        return None
    loss, reference = rows.loss[known], rows.reference_loss[known]
    with np.errstate(over="ignore", invalid="ignore"):  # what cannot happen has an infinite loss
        return Perplexity(*_exp_mean(loss), *_exp_mean(reference), *_exp_mean(loss - reference), len(loss))


def judge(
    reference: Logits,
    logits: Logits,
    greedy_reference: Logits | None = None,
    greedy_tokens: Sequence[int] = (),
    tokens: Sequence[int] = (),
) -> Verdict:
    """Everything above in one.

    Args:
        reference, logits: float32 [T, V], T >= 1: both models over the same tokens.
        greedy_reference: float32 [N, V], the reference's predictions for each of `greedy_tokens`.
        tokens: the T ids that were scored, for the perplexity.
    """
    divergence = None if greedy_reference is None else first_divergence(greedy_reference, greedy_tokens)
    count = 0 if greedy_reference is None else len(greedy_tokens)
    return summary(compare(reference, logits, tokens), count, divergence)


def summary(rows: Rows, greedy_tokens: int = 0, divergence: Divergence | None = None) -> Verdict:
    """The verdict of what was found at each position; NaN where nothing was, and where a logit was NaN."""
    top5 = rows.top5[~np.isnan(rows.top5)]
    return Verdict(
        positions=len(rows.kl),
        kl_mean=float(rows.kl.mean()),
        kl_p99=float(np.percentile(rows.kl, 99)),
        kl_max=float(rows.kl.max()),
        top1=float(rows.top1.mean()),
        greedy_tokens=greedy_tokens,
        divergence=divergence,
        top5=float(top5.mean()) if len(top5) else math.nan,
        perplexity=perplexity(rows),
    )


def _loss(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """−ln; a distribution that is not a number predicts nothing."""
    return np.where(np.isnan(logprobs), np.inf, -logprobs)


def _exp_mean(losses: NDArray[np.float64]) -> tuple[float, float]:
    """exp of the mean, and its standard error."""
    value = float(np.exp(losses.mean()))
    return value, value * float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan


def _first5(row: NDArray[np.floating]) -> list[int]:
    """Ids of the five largest values, ties to the lowest id."""
    if len(row) <= 5:
        return list(range(len(row)))
    fifth = np.partition(row, len(row) - 5)[len(row) - 5]
    able = np.flatnonzero(~(row < fifth))  # NaN counts as large, as it does for argmax
    return able[np.argsort(-row[able], kind="stable")][:5].tolist()  # type: ignore[no-any-return]


def _shared(reference: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    ours, theirs = _first5(reference), _first5(other)
    return len(set(ours) & set(theirs)) / len(ours)


def _coarse_kl(row: NDArray[np.float64], ids: NDArray[np.int64], q: NDArray[np.float64]) -> float:
    """D of the two distributions over {each known token, all others}; row are log-probabilities [V]."""
    p = np.exp(row[ids])
    terms = np.where(p == 0, 0.0, p * (row[ids] - q)).sum()
    rest = max(0.0, 1.0 - float(p.sum()))
    other = max(REST, 1.0 - float(np.exp(q).sum()))
    return max(0.0, float(terms) + (rest * math.log(rest / other) if rest > 0 else 0.0))
