"""Tokens chosen by the native program: those of engine/sampling.py, bit for bit, or none.

Rows of every kind of shape and every instruction set; where no choice is made, an edge really is near.
"""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from finial import _native
from finial.engine.sampling import SamplingParams, candidates, choose, greedy

ISAS = _native.isas_available()


def native(logits: np.ndarray, params: SamplingParams, draw: float, isa: str = "") -> int:
    return _native.choose(logits, params.temperature, params.top_k, params.top_p, params.min_p, draw, isa)


def row(random: np.random.Generator, size: int, kind: str) -> np.ndarray:
    logits = random.standard_normal(size).astype(np.float32) * np.float32(random.choice([0.1, 1, 5, 30]))
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "flat":
        logits[:] = logits[0]
    elif kind == "peaked":
        logits[random.integers(size)] += 50
    elif kind == "forbidden":
        logits[random.random(size) < 0.5] = -np.inf
        logits[random.integers(size)] = 1
    return logits


@settings(max_examples=400)
@given(
    size=st.one_of(st.integers(1, 200), st.integers(1000, 9000)),
    kind=st.sampled_from(["plain", "ties", "flat", "peaked", "forbidden"]),
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 0.8, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 20, 64, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 1e-4]),
    min_p=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
    isa=st.sampled_from(ISAS),
)
def test_the_choice_is_the_engines_or_none(
    size: int, kind: str, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, isa: str
) -> None:
    random = np.random.default_rng(seed)
    logits = row(random, size, kind)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for draw in random.random(5):
        token = native(logits, params, float(draw), isa)
        if token == -1:
            assert temperature > 0 and near_an_edge(logits, params, float(draw))
        else:
            assert token == choose(logits, params, float(draw))


def near_an_edge(logits: np.ndarray, params: SamplingParams, draw: float) -> bool:
    """Whether a bound or the draw is within 1e-8 of where the choice would be another."""
    if params.top_p < 1:
        _, weights = candidates(logits, SamplingParams(temperature=params.temperature, top_k=params.top_k))
        shares = np.cumsum(-np.sort(-weights)) / weights.sum()
        if np.abs(shares - params.top_p).min() < 1e-8:
            return True
    _, weights = candidates(logits, params)
    shares = np.cumsum(weights) / weights.sum()
    if min(np.abs(shares - draw).min(), draw) < 1e-8:
        return True
    exact = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
    return params.min_p > 0 and float(np.abs(exact / params.min_p - 1).min()) < 1e-8


@pytest.mark.parametrize("isa", ISAS)
def test_a_large_vocabulary_is_chosen_from(isa: str) -> None:
    """What a model of 151,936 tokens is asked, in all ways; few draws are left to the host."""
    random = np.random.default_rng(7)
    left = 0
    for kind in ("plain", "peaked", "ties"):
        logits = row(random, 151_936, kind)
        for options in ({}, {"top_k": 20, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 3000}):
            params = SamplingParams(temperature=float(random.choice([0.6, 1.0])), **options)  # type: ignore[arg-type]
            for draw in random.random(3):
                token = native(logits, params, float(draw), isa)
                left += token == -1
                assert token in (-1, choose(logits, params, float(draw)))
    assert left <= 2


@pytest.mark.parametrize("isa", ISAS)
def test_the_highest_is_numpys(isa: str) -> None:
    random = np.random.default_rng(3)
    for size in (*range(1, 70), 1023, 1024, 1025, 4096, 5000, 151_936):
        for kind in ("plain", "ties", "flat"):
            logits = row(random, size, kind)
            assert native(logits, SamplingParams(), 0.0, isa) == greedy(logits)
            at = int(random.integers(size))
            logits[at] = -np.inf
            if size > 1:
                assert native(logits, SamplingParams(), 0.0, isa) == greedy(logits)
            for bad in (np.nan, np.inf):
                logits[at] = bad
                for temperature in (0.0, 1.0):
                    assert native(logits, SamplingParams(temperature=temperature), 0.5, isa) == -1
        assert native(np.full(size, -np.inf, np.float32), SamplingParams(), 0.5, isa) == -1


def test_too_close_to_call_is_left_to_the_host() -> None:
    """Shares that a last bit decides: two equal halves, a nucleus of exactly half, a weight of exactly min_p."""
    two = np.zeros(2, np.float32)
    assert native(two, SamplingParams(temperature=1.0), 0.5) == -1
    assert native(two, SamplingParams(temperature=1.0, top_p=0.5), 0.2) == -1
    third = np.array([0, -math.log(4)], np.float32)
    exact = float(np.exp(np.float64(third[1])))
    assert native(third, SamplingParams(temperature=1.0, min_p=exact), 0.2) == -1
    assert native(two, SamplingParams(temperature=1.0, min_p=1.0), 0.7) == 1
