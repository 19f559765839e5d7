"""Sampling against transformers' processors, naive rewritings, and its own promises."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from finial.engine.sampling import (
    History,
    SamplingParams,
    adjusted,
    candidates,
    choose,
    greedy,
    log_probabilities,
    log_softmax,
    uniform,
)
from finial.errors import ModelError, RequestError


def row(seed: int = 0, size: int = 1000, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, weights = candidates(logits, params)
    probabilities = np.zeros(len(logits))
    probabilities[slice(None) if ids is None else ids] = weights / weights.sum()
    return probabilities


def test_greedy_takes_the_lowest_id_among_ties() -> None:
    assert greedy(np.asarray([1, 5, 3, 5], np.float32)) == 1
    assert choose(np.asarray([1, 5, 3, 5], np.float32), SamplingParams(), 0.9) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=5, top_p=0.5)])
def test_logits_that_are_not_finite_are_an_error(bad: float, params: SamplingParams) -> None:
    logits = row()
    logits[[17, 400]] = bad
    with pytest.raises(ModelError, match="not finite: 2 of 1000, token 17 has"):
        choose(logits, params, 0.5)
    with pytest.raises(ModelError, match="not finite"):
        log_probabilities(logits, 0, 3)


def test_a_row_of_minus_infinity_is_an_error_but_some_are_tokens_that_cannot_be() -> None:
    with pytest.raises(ModelError):
        greedy(np.full(5, -np.inf, np.float32))
    logits = row(size=5)
    logits[[0, 2, 4]] = -np.inf
    assert {choose(logits, SamplingParams(temperature=5.0), draw) for draw in np.linspace(0, 0.9999, 50)} == {1, 3}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.6, "top_k": 50, "top_p": 0.95},
        {"temperature": 1.8, "top_k": 200, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 3.0, "top_p": 0.9999},
        {"temperature": 0.8, "repetition_penalty": 1.3, "top_p": 0.9},
        {"temperature": 0.8, "repetition_penalty": 0.7, "top_k": 30},
    ],
)
def test_the_distribution_is_that_of_transformers(options: dict, seed: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as lp

    params = SamplingParams(**options)
    logits = row(seed, 2000)
    prompt = [1, 2, 2, 5, 900, int(logits.argmax())]
    chain = [
        lp.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        lp.TemperatureLogitsWarper(params.temperature),
    ]
    if params.top_k:
        chain.append(lp.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(lp.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(lp.MinPLogitsWarper(params.min_p))
    # float64, because transformers' float32 cumulative sums put tokens at the very edge of top-p on either side
    scores = torch.from_numpy(logits).double()[None]
    for step in chain:
        scores = step(torch.tensor([prompt]), scores)
    wanted = torch.softmax(scores, -1)[0].numpy()
    got = distribution(adjusted(logits, params, History(prompt)), params)
    assert ((got > 0) == (wanted > 0)).all()
    np.testing.assert_allclose(got, wanted, rtol=1e-5)  # float32 logits after the penalty


@settings(max_examples=200)
@given(
    logits=arrays(np.float32, st.integers(1, 60), elements=st.floats(-20, 20, width=32)),
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_keep_what_their_definitions_say(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Rewritten with sorting and loops; ties and rounding at the edge of top-p are allowed for."""
    got = distribution(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    kept = set(np.flatnonzero(got).tolist())
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if 0 < top_k < len(order):
        order = [i for i in order if logits[i] >= logits[order[top_k - 1]]]
    weights = {i: math.exp((float(logits[i]) - float(logits[order[0]])) / temperature) for i in order}
    total = math.fsum(weights.values())
    assert order[0] in kept
    mass = 0.0
    for i in order:
        inside = mass < top_p * total
        at_edge = abs(mass - top_p * total) < 1e-9 * total or abs(weights[i] - min_p) < 1e-12
        if not at_edge and weights[i] > 0:
            assert (i in kept) == (i == order[0] or (inside and weights[i] >= min_p)), i
        mass += weights[i]
    assert got.sum() == pytest.approx(1)


def test_draws_follow_the_distribution() -> None:
    logits = row(3, 8, 1.0)
    params = SamplingParams(temperature=0.8)
    draws = 20_000
    counts = np.zeros(8)
    for position in range(draws):
        counts[choose(logits, params, uniform(1, 0, position))] += 1
    wanted = distribution(logits, params) * draws
    # chi-square with 7 degrees of freedom exceeds 29.9 once in 10,000
    assert ((counts - wanted) ** 2 / wanted).sum() < 29.9


@given(draw=st.floats(0, 1, exclude_max=True), temperature=st.floats(1e-6, 100))
def test_every_draw_gives_a_token_that_can_be(draw: float, temperature: float) -> None:
    logits = np.asarray([-np.inf, 2.0, -80.0, 1.5, -np.inf], np.float32)
    assert choose(logits, SamplingParams(temperature=temperature), draw) in (1, 2, 3)


def test_temperature_towards_zero_is_greedy() -> None:
    logits = row(5)
    assert choose(logits, SamplingParams(temperature=1e-5), 0.999) == greedy(logits)


def test_random_numbers_depend_on_seed_sample_and_position_alone() -> None:
    assert uniform(7, 1, 100) == uniform(7, 1, 100)
    values = {uniform(seed, sample, at) for seed in (0, 1, 2**64 - 1) for sample in (0, 1, 127) for at in range(50)}
    assert len(values) == 450 and all(0 <= value < 1 for value in values)
    for seed, sample, position in ((0, 0, 0), (7, 3, 12), (2**64 - 1, 127, 40_000)):
        assert uniform(seed, sample, position) == (philox(position + 1, seed, sample) >> 11) * 2.0**-53


def philox(counter: int, *keys: int) -> int:
    """First word of Philox-4x64-10 in plain integers (Salmon et al. 2011, figure 2 and table 2)."""
    mask = 2**64 - 1
    words, (key0, key1) = [counter, 0, 0, 0], keys
    for _ in range(10):
        low, high = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [high >> 64 ^ words[1] ^ key0, high & mask, low >> 64 ^ words[3] ^ key1, low & mask]
        key0, key1 = key0 + 0x9E3779B97F4A7C15 & mask, key1 + 0xBB67AE8584CAA73B & mask
    return words[0]


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    history = History([1, 1, 2])
    for token in (3, 3, 1):
        history.add(token)
    logits = np.ones(6, np.float32)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    np.testing.assert_allclose(adjusted(logits, params, history), [1, 0.25, 1, 0, 1, 1])
    assert (logits == 1).all(), "the model's logits are not touched"


def test_repetition_penalty_counts_prompt_and_generated_and_lowers_negative_logits() -> None:
    history = History([0])
    history.add(1)
    logits = np.asarray([2, -2, 2, -2], np.float32)
    np.testing.assert_allclose(adjusted(logits, SamplingParams(repetition_penalty=2), history), [1, -4, 2, -2])


def test_logit_bias_forces_and_forbids() -> None:
    logits = row(1)
    assert choose(logits, SamplingParams(logit_bias={5: 100}), 0) == 5
    best = greedy(logits)
    assert choose(logits, SamplingParams(logit_bias={best: -100}), 0) != best


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32)), st.data())
def test_log_probabilities(logits: np.ndarray, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    top = data.draw(st.integers(0, 45))
    got = log_probabilities(logits, token, top)
    total = math.log(math.fsum(math.exp(float(x) - float(logits.max())) for x in logits)) + float(logits.max())
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    assert got.logprob == pytest.approx(float(logits[token]) - total, abs=1e-9)
    assert [i for i, _ in got.top] == order[:top]
    assert [p for _, p in got.top] == pytest.approx([float(logits[i]) - total for i in order[:top]], abs=1e-9)
    assert got.rank == order.index(token)
    np.testing.assert_allclose(log_softmax(logits), logits.astype(np.float64) - total, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": -1}, "max_tokens=-1 is out of range"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 is not an integer"),
        ({"max_tokens": True}, "max_tokens=True is not an integer"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range"),
        ({"temperature": math.nan}, "temperature=nan is out of range"),
        ({"temperature": "warm"}, "temperature='warm' is not a number"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"top_p": 0}, "top_p=0 is out of range"),
        ({"top_p": 1.01}, "top_p=1.01 is out of range"),
        ({"min_p": 2}, "min_p=2 is out of range"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is out of range"),
        ({"presence_penalty": 3}, "presence_penalty=3 is out of range"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3 is out of range"),
        ({"logit_bias": {-1: 1}}, "logit_bias token=-1 is out of range"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\]=inf is out of range"),
        ({"logit_bias": [1]}, "logit_bias=.* is not a mapping"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"seed": 2**64}, "seed=18446744073709551616 is out of range"),
        ({"stop": [""]}, "empty string"),
        ({"stop": [3]}, "stop=.* is not a string"),
        ({"stop_ids": "ab"}, "stop_ids='ab' is not a list"),
        ({"stop_ids": [-4]}, "stop_ids=-4 is out of range"),
        ({"ignore_eos": 1}, "ignore_eos=1 is not a boolean"),
        ({"logprobs": 101}, "logprobs=101 is out of range"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1 is out of range"),
        ({"n": 0}, "n=0 is out of range"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(options: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        SamplingParams(**options)
    assert caught.value.fix


def test_ids_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(RequestError, match="stop_ids names token 50"):
        SamplingParams(stop_ids=[3, 50]).check_vocabulary(50)
    with pytest.raises(RequestError, match="logit_bias names token 51"):
        SamplingParams(logit_bias={51: 1.0}).check_vocabulary(50)


def test_numpy_numbers_and_a_single_stop_string_are_taken() -> None:
    params = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), stop="end")
    assert (params.max_tokens, params.temperature, params.stop) == (3, 0.5, ("end",))
