"""Sampling: what a request asks for, and pure functions from logits [V] to a token id.

Knows nothing of models, batches, text or the cache; a token depends on its own row, its request and its position only.

    params = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
    token = choose(logits, params, uniform(seed=7, sample=0, position=12))

Order, each step on the result of the one before (transformers' order):
repetition penalty, frequency and presence penalties, logit bias, removal of tokens that are not allowed, temperature,
top-k, top-p, min-p, draw.

- repetition penalty r: a logit l of any token of the prompt or the text so far becomes l / r when l > 0, else l * r.
  Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, in the sign-aware form of transformers'
  `RepetitionPenaltyLogitsProcessor`.
- presence a, frequency b: l - b * count - a * (count > 0), counts over the generated tokens only.
  OpenAI API reference, "Frequency and presence penalties".
- logit bias: added to the logit (OpenAI API reference, `logit_bias`).
- top-k: Fan et al. 2018, arXiv:1805.04833.  Every token whose logit ties with the k-th stays, as in transformers.
- top-p: the smallest set of most likely tokens whose probabilities sum to at least p.  Holtzman et al. 2020,
  arXiv:1904.09751, section 3.1.  Among ties the lower id comes first.
- min-p: tokens at least p times as probable as the most likely one.  Nguyen et al. 2024, arXiv:2407.01082.

Log-probabilities are of the model's own distribution: before every step above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Philox  # NumPy loads it when first named: better now than in a request's first token
from numpy.typing import NDArray

from finial.errors import ModelError, RequestError

Logits = NDArray[np.float32]

MAX_LOGPROBS = 100
MAX_CHOICES = 128
_BLOCK = 64


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of the sampler; every value is checked on construction (RequestError).

    Attributes:
        max_tokens: new tokens at most, >= 0; None: 256, or fewer when the context has less room.
        temperature: 0 is greedy (the lowest id wins a tie); otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        repetition_penalty: > 0; 1 changes nothing.
        presence_penalty, frequency_penalty: in [-2, 2]; 0 changes nothing.
        logit_bias: token id -> number added to its logit.
        seed: 0 .. 2**64 - 1; the same request with the same seed gives the same tokens, whatever runs beside it.
            None draws a fresh one.
        stop: strings that end the text; not part of what is returned.  A single string is taken as one.
        stop_ids: token ids that end the text, beside the model's own end-of-text ids.
        ignore_eos: go on after the model's own end-of-text ids.
        logprobs: None, or how many of the most likely tokens are reported with each token's own log-probability.
        prompt_logprobs: None, or the same for the tokens of the prompt.
        n: independent continuations of the prompt; the i-th draws from stream i of the seed.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 0))
        put("temperature", _number("temperature", self.temperature, 0.0))
        put("top_k", _integer("top_k", self.top_k, 0))
        put("top_p", _number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        put("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.0, open_low=True))
        put("presence_penalty", _number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        put("n", _integer("n", self.n, 1, MAX_CHOICES))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                put(name, _integer(name, getattr(self, name), 0, MAX_LOGPROBS))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos={self.ignore_eos!r} is not a boolean", fix="pass True or False")
        put("logit_bias", _bias(self.logit_bias))
        put("stop", _stop(self.stop))
        if isinstance(self.stop_ids, str | bytes) or not isinstance(self.stop_ids, Sequence):
            raise RequestError(f"stop_ids={self.stop_ids!r} is not a list of token ids", fix="pass integers")
        put("stop_ids", tuple(_integer("stop_ids", token, 0) for token in self.stop_ids))

    @property
    def penalised(self) -> bool:
        """Whether a token depends on those before it other than through the model."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def plain_greedy(self) -> bool:
        """Whether the token is the argmax of the model's own logits."""
        return self.temperature == 0.0 and not self.penalised and not self.logit_bias

    def check_vocabulary(self, size: int) -> None:
        """Raises RequestError for a token id in stop_ids or logit_bias that is not below `size`."""
        for name, ids in (("stop_ids", self.stop_ids), ("logit_bias", self.logit_bias or ())):
            for token in ids:
                if token >= size:
                    raise RequestError(f"{name} names token {token}, the vocabulary has {size}", f"pass 0 … {size - 1}")


class History:
    """Token ids seen so far, kept so that a penalty costs O(distinct ids), and `add` O(1)."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._seen: dict[int, None] = dict.fromkeys(prompt)
        self._counts: dict[int, int] = {}

    def add(self, token: int) -> None:
        """One more generated token."""
        self._seen[token] = None
        self._counts[token] = self._counts.get(token, 0) + 1

    @property
    def seen(self) -> NDArray[np.int64]:
        """Distinct ids of prompt and generated text."""
        return np.fromiter(self._seen, np.int64, len(self._seen))

    @property
    def generated(self) -> NDArray[np.int64]:
        """Distinct ids of the generated text."""
        return np.fromiter(self._counts, np.int64, len(self._counts))

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `generated` occurs."""
        return np.fromiter(self._counts.values(), np.float32, len(self._counts))


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's probabilities for one position.

    Attributes:
        logprob: of the token that stands there.
        rank: 0 for the most likely token.
        top: the most likely (token id, log-probability) pairs, best first.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments only.

    Philox-4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405),
    key (seed, sample), counter position + 1; the top 53 bits of the first output word.
    """
    raw = Philox(key=seed | sample << 64, counter=position).random_raw()
    return int(raw >> 11) * 2.0**-53


def uniforms(seed: int, sample: int, position: int, count: int) -> NDArray[np.float64]:
    """`uniform` of `count` positions in a row, float64 [count]."""
    raw = Philox(key=seed | sample << 64, counter=position).random_raw(4 * count)[::4]
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def greedy(logits: Logits) -> int:
    """The id of the highest logit, the lowest id among ties.  Raises ModelError when that logit is not finite."""
    token = int(logits.argmax())  # NumPy's argmax stops at the first NaN, so looking at the winner sees every NaN
    if not math.isfinite(logits[token]):
        raise _not_finite(logits)
    return token


def adjusted(logits: Logits, params: SamplingParams, history: History | None) -> Logits:
    """The logits after penalties and bias; a copy, or `logits` itself when nothing applies."""
    if not params.penalised and not params.logit_bias:
        return logits
    logits = logits.copy()
    if params.repetition_penalty != 1.0:
        assert history is not None
        seen = history.seen
        values = logits[seen]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        assert history is not None
        logits[history.generated] -= np.float32(params.frequency_penalty) * history.counts + np.float32(
            params.presence_penalty
        )
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        logits[ids] += np.fromiter(params.logit_bias.values(), np.float32, len(ids))
    return logits


def candidates(logits: Logits, params: SamplingParams) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
    """What temperature, top-k, top-p and min-p leave: (ids or None for all, unnormalised probabilities in float64).

    The most likely token always stays.  Raises ModelError when the highest logit is not finite.
    """
    best = logits.max()  # NaN when any logit is
    if not math.isfinite(best):
        raise _not_finite(logits)
    ids: NDArray[np.int64] | None = None
    if 0 < params.top_k < len(logits):
        ids = _largest(logits, params.top_k)
        logits = logits[ids]
    weights = np.exp((logits.astype(np.float64) - np.float64(best)) / params.temperature)
    if params.top_p < 1.0:
        kept = _nucleus(logits, weights, params.top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if params.min_p > 0.0:
        kept = np.flatnonzero(weights >= params.min_p)  # the most likely weighs exp(0) = 1
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    return ids, weights


def choose(
    logits: Logits,
    params: SamplingParams,
    draw: float,
    history: History | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The token for one row of logits [V].

    Args:
        draw: in [0, 1), see `uniform`; not used when temperature is 0.
        history: needed when params.penalised.
        allowed: bool [V], the tokens there are; None: all.
    """
    logits = adjusted(logits, params, history)
    if allowed is not None:
        logits = _only(logits, allowed)
    if params.temperature == 0.0:
        return greedy(logits)
    ids, weights = candidates(logits, params)
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    if index >= len(weights):  # draw * total may round up to the total
        index = int(np.flatnonzero(weights)[-1])
    return index if ids is None else int(ids[index])


def log_probabilities(logits: Logits, token: int, top: int) -> TokenLogprobs:
    """Log-softmax of one row [V] in float64: of `token`, its rank, and the `top` best (lowest id first among ties)."""
    best = float(logits.max())
    if not math.isfinite(best):
        raise _not_finite(logits)
    total = best + math.log(float(np.exp(logits.astype(np.float64) - best).sum()))
    value = logits[token]
    rank = int(np.count_nonzero(logits > value)) + int(np.count_nonzero(logits[:token] == value))
    pairs: tuple[tuple[int, float], ...] = ()
    if top > 0:
        ids = _largest(logits, top)
        order = ids[np.lexsort((ids, -logits[ids]))][:top]
        pairs = tuple((int(i), float(logits[i]) - total) for i in order)
    return TokenLogprobs(float(value) - total, rank, pairs)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural log-probabilities [..., V] in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _only(logits: Logits, allowed: NDArray[np.bool_]) -> Logits:
    """The logits with minus infinity for what is not allowed."""
    if not math.isfinite(logits.max()):  # before what is not finite might be hidden
        raise _not_finite(logits)
    return np.where(allowed, logits, np.float32(-np.inf))


def _largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Ascending indices of the values that are at least the count-th largest one; ties may make them more."""
    if count >= len(values):
        return np.arange(len(values))
    blocks = len(values) // _BLOCK
    ids = None
    if blocks > 4 * count:
        # The count-th largest of the blocks' maxima is a lower bound, found in one pass; selecting among the few
        # values above it takes a tenth of the time of selecting among a vocabulary of 150 k.
        maxima = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        ids = np.flatnonzero(values >= np.partition(maxima, blocks - count)[blocks - count])
        values = values[ids]
    kept = np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])
    return kept if ids is None else ids[kept]


def _nucleus(logits: Logits, weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Ascending indices of the smallest set of the largest logits whose weights are at least top_p of the sum."""
    need = top_p * float(weights.sum())
    size = 256
    while True:
        # Sorting a whole vocabulary costs milliseconds and the set is mostly small: look at the largest few first.
        largest = _largest(logits, size)
        order = largest[np.lexsort((largest, -logits[largest]))]
        cumulative = np.cumsum(weights[order])
        if cumulative[-1] >= need or len(order) == len(weights):
            count = min(int(np.searchsorted(cumulative, need, side="left")) + 1, len(order))
            return np.sort(order[:count])
        size *= 8


def _not_finite(logits: Logits) -> ModelError:
    bad = ~np.isfinite(logits)
    token = int(bad.argmax())
    return ModelError(
        f"the model's logits are not finite: {int(bad.sum())} of {len(logits)}, token {token} has {logits[token]}",
        fix="the weights are damaged or too large for their format: fetch the model again, or try another format",
    )


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    expected = f"{low} or more" if high is None else f"{low} … {high}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestError(f"{name}={value!r} is not an integer", fix=f"pass an integer, {expected}")
    if value < low or (high is not None and value > high):
        raise RequestError(f"{name}={value} is out of range", fix=f"pass {expected}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    bound = f"more than {low:g}" if open_low else f"{low:g} or more"
    expected = bound if high == math.inf else f"{bound}, at most {high:g}"
    if low == -math.inf:
        expected = "finite"
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise RequestError(f"{name}={value!r} is not a number", fix=f"pass a number, {expected}")
    number = float(value)
    if not math.isfinite(number) or number < low or number > high or (open_low and number == low):
        raise RequestError(f"{name}={number:g} is out of range", fix=f"pass {expected}")
    return number


def _bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias={bias!r} is not a mapping", fix="pass {token id: number}")
    pairs = {_integer("logit_bias token", token, 0): value for token, value in bias.items()}
    return {token: _number(f"logit_bias[{token}]", value, -math.inf) for token, value in pairs.items()}


def _stop(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence) or isinstance(stop, bytes) or not all(isinstance(s, str) for s in stop):
        raise RequestError(f"stop={stop!r} is not a string or a list of strings", fix="pass strings")
    if "" in stop:
        raise RequestError("stop contains an empty string, which would end every text at once", fix="leave it out")
    return tuple(stop)
