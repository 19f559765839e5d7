"""The verdict: how far one set of logits is from the reference's, and where two greedy texts part.

Knows arrays of logits and token ids; nothing of models, backends or how either was computed.

    verdict = judge(reference_logits, logits); verdict.kl_mean, verdict.top1

Definitions.  p is the reference's distribution at a position, q the other's, after the same tokens (teacher forcing).
- KL divergence D(p ‖ q) = Σ p ln(p / q), in nats (Kullback & Leibler 1951, "On information and sufficiency", eq. 2.4).
- top-1 agreement: the share of positions where argmax p = argmax q; ties go to the lowest id, as in greedy decoding.
- first divergence: free-running greedy texts from one prompt are equal up to the first position where the reference,
  given the other's text so far, prefers another token.  So one pass of the reference over the other's text finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.engine.sampling import log_softmax

Logits = NDArray[np.float32]

SLAB = 64  # rows turned to float64 at a time: 80 MB for a vocabulary of 151,936


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
class Verdict:
    """How close to the reference.

    Attributes:
        positions: how many distributions were compared.
        kl_mean, kl_p99, kl_max: nats.
        top1: share of positions with the same most likely token.
        greedy_tokens: length of the greedy text that was looked at; 0 when none was.
        divergence: where it parts from the reference's, None when it does not.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    greedy_tokens: int = 0
    divergence: Divergence | None = None


def kl_divergence(reference: Logits, logits: Logits) -> NDArray[np.float64]:
    """D(reference ‖ logits) of each row in nats: [T, V], [T, V] -> float64 [T].  NaN logits give NaN."""
    assert reference.shape == logits.shape and reference.ndim == 2
    out = np.empty(len(reference))
    for at in range(0, len(out), SLAB):
        ours, theirs = log_softmax(logits[at : at + SLAB]), log_softmax(reference[at : at + SLAB])
        p = np.exp(theirs)
        with np.errstate(invalid="ignore"):
            terms = np.where(p == 0, 0.0, p * (theirs - ours))  # p ln p goes to 0 with p
        out[at : at + SLAB] = terms.sum(axis=-1)
    return np.where(out < 0, 0.0, out)  # rounding can put the divergence of equal rows a hair below zero


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


def judge(
    reference: Logits,
    logits: Logits,
    greedy_reference: Logits | None = None,
    greedy_tokens: Sequence[int] = (),
) -> Verdict:
    """Everything above in one.

    Args:
        reference, logits: float32 [T, V], T >= 1: both models over the same tokens.
        greedy_reference: float32 [N, V], the reference's predictions for each of `greedy_tokens`.
    """
    kl = kl_divergence(reference, logits)
    divergence = None if greedy_reference is None else first_divergence(greedy_reference, greedy_tokens)
    return Verdict(
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        kl_max=float(kl.max()),
        top1=float((reference.argmax(axis=-1) == logits.argmax(axis=-1)).mean()),
        greedy_tokens=0 if greedy_reference is None else len(greedy_tokens),
        divergence=divergence,
    )
