"""The verdict's arithmetic: against closed forms, and against texts that models really wrote."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finial import LLM
from finial.verdict import SLAB, Divergence, first_divergence, judge, kl_divergence


def f32(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_kl_of_two_classes() -> None:
    p, q = 0.7, 0.4
    reference, other = f32([math.log(p), math.log(1 - p)]), f32([math.log(q), math.log(1 - q)])
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl_divergence(reference, other)[0] == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(reference, other + np.float32(5))[0] == pytest.approx(expected, rel=1e-5), (
        "logits shift freely"
    )


def test_kl_is_zero_for_equals_and_positive_otherwise() -> None:
    logits = np.random.default_rng(0).normal(size=(2 * SLAB + 3, 50)).astype(np.float32)
    assert (kl_divergence(logits, logits) == 0).all()
    assert (kl_divergence(logits, logits[::-1].copy())[:10] > 0).all()


def test_kl_where_probabilities_vanish() -> None:
    never, possible = f32([0.0, -np.inf]), f32([0.0, 0.0])
    assert kl_divergence(never, possible)[0] == pytest.approx(math.log(2))
    assert kl_divergence(possible, never)[0] == math.inf
    assert math.isnan(kl_divergence(possible, f32([0.0, np.nan]))[0])
    assert math.isnan(kl_divergence(f32([np.nan, 0.0]), possible)[0])


def test_first_divergence_and_its_margin() -> None:
    reference = f32([0, 3, 1], [5, 4.5, 0], [0, 0, 9])
    assert first_divergence(reference, [1, 0, 2]) is None
    assert first_divergence(reference, [1, 1, 0]) == Divergence(1, 1, 0, 0.5)
    assert first_divergence(reference[:0], []) is None


def test_a_tie_goes_to_the_lowest_id_as_in_greedy_decoding() -> None:
    assert first_divergence(f32([2, 2, 0]), [0]) is None
    assert first_divergence(f32([2, 2, 0]), [1]) == Divergence(0, 1, 0, 0.0)


def test_judge_puts_it_together() -> None:
    reference = np.random.default_rng(1).normal(size=(200, 30)).astype(np.float32)
    other = reference.copy()
    other[7] = -other[7]
    verdict = judge(reference, other)
    assert verdict.positions == 200 and verdict.top1 == 199 / 200 and verdict.greedy_tokens == 0
    assert verdict.kl_max == pytest.approx(200 * verdict.kl_mean) and verdict.kl_p99 < verdict.kl_max


def test_one_pass_of_the_reference_finds_where_free_running_texts_part() -> None:
    prompt = "First Citizen:\nWe are"
    with LLM("demo", backend="reference", kv_format="f32", max_batch=1) as exact, LLM("demo", format="q4_0") as coarse:
        told = coarse.generate(prompt, max_tokens=64, ignore_eos=True)
        free = exact.generate(prompt, max_tokens=64, ignore_eos=True)
        scored = exact.score(told.prompt_tokens + told.tokens).logits[len(told.prompt_tokens) - 1 : -1]
    found = first_divergence(scored, told.tokens)
    parted = next((i for i, (a, b) in enumerate(zip(told.tokens, free.tokens, strict=True)) if a != b), None)
    assert (found.position if found else None) == parted
    if found is not None:
        assert found.reference_token == free.tokens[found.position] and found.margin >= 0
