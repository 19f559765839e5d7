"""The verdict's arithmetic: against closed forms, and against texts that models really wrote."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finial import LLM
from finial.verdict import (
    SLAB,
    Divergence,
    Rows,
    compare,
    compare_top,
    first_divergence,
    judge,
    kl_divergence,
    regret,
    summary,
)


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


# --- top-5, perplexity, and what a few log-probabilities allow -------------------------------------------------------


def test_top5_is_the_shared_part_of_both_lists() -> None:
    reference = f32([9, 8, 7, 6, 5, 4, 3])
    other = f32([3, 8, 7, 6, 5, 9, 4])  # its five: 5, 1, 2, 3, 4; the reference's: 0 to 4
    assert judge(reference, other).top5 == pytest.approx(4 / 5)
    assert judge(reference, reference).top5 == 1.0
    assert judge(f32([1, 1, 1, 1, 1, 1]), f32([1, 1, 1, 1, 1, 1])).top5 == 1.0, "ties go to the lowest ids in both"
    assert judge(f32([1, 2]), f32([2, 1])).top5 == 1.0, "a vocabulary of two has no more than two"


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    found = judge(np.zeros((9, 50), np.float32), np.zeros((9, 50), np.float32), tokens=list(range(9))).perplexity
    assert found is not None and found.tokens == 8
    assert found.value == pytest.approx(50) and found.error == pytest.approx(0, abs=1e-9)
    assert found.ratio == pytest.approx(1) and found.ratio_error == 0


def test_perplexity_and_its_error_follow_the_losses() -> None:
    logits = np.random.default_rng(2).normal(size=(400, 30)).astype(np.float32)
    ids = np.random.default_rng(3).integers(30, size=400).tolist()
    found = judge(logits, 1.05 * logits, tokens=ids).perplexity
    assert found is not None
    losses = [
        float(np.log(np.exp(row.astype(np.float64)).sum()) - row[token])
        for row, token in zip(logits[:-1], ids[1:], strict=True)
    ]
    mean, error = np.mean(losses), np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert found.reference == pytest.approx(math.exp(mean), rel=1e-6)
    assert found.reference_error == pytest.approx(math.exp(mean) * error, rel=1e-6)
    assert found.ratio == pytest.approx(found.value / found.reference)
    assert found.ratio_error < found.error / found.reference / 5, "what both share cancels"


def test_a_broken_distribution_is_not_left_out_of_the_perplexity() -> None:
    broken = np.zeros((4, 5), np.float32)
    broken[1] = np.nan
    verdict = judge(np.zeros((4, 5), np.float32), broken, tokens=[0, 1, 2, 3])
    assert verdict.perplexity is not None and verdict.perplexity.value == math.inf
    assert math.isnan(verdict.kl_mean)


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_what_a_few_logprobs_give_never_exceeds_the_divergence(seed: int, known: int) -> None:
    draw = np.random.default_rng(seed)
    reference = (3 * draw.normal(size=(4, 12))).astype(np.float32)
    other = reference + draw.normal(size=(4, 12)).astype(np.float32) * draw.choice([0, 0.01, 1, 5])
    ids = draw.integers(12, size=4).tolist()
    top, slack = [], []
    for row, expected in zip(other, reference, strict=True):
        best = np.argsort(-row, kind="stable")[:known]
        rest = np.setdiff1d(np.arange(12), best)
        # Float32 log-probabilities leave an error of 2⁻²⁴ · Σ q |ln q| in the mass of the rest: what is missing to 1.
        p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (expected, row))
        slack.append(1e-5 + 2**-24 * math.log(12) * p[rest].sum() / max(q[rest].sum(), 1e-12))
        logprobs = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
        top.append({int(i): float(np.float32(logprobs[i])) for i in best})
    whole, part = compare(reference, other, ids), compare_top(reference, top, ids)
    assert (part.kl <= whole.kl + slack).all()
    assert (part.top1 == whole.top1).all()
    if known == 12:
        assert part.kl == pytest.approx(whole.kl, abs=2e-5), "with everything known it is the divergence itself"
        assert part.top5 == pytest.approx(whole.top5)
        assert part.loss[:-1] == pytest.approx(whole.loss[:-1], rel=1e-5)
    assert part.reference_loss[:-1] == pytest.approx(whole.reference_loss[:-1])


def test_a_bound_sees_a_confident_mistake() -> None:
    reference = f32([math.log(0.9), math.log(0.05), math.log(0.05)])
    found = compare_top(reference, [{1: math.log(0.98), 0: math.log(0.01)}])
    assert found.kl[0] == pytest.approx(
        0.9 * math.log(90) + 0.05 * math.log(0.05 / 0.98) + 0.05 * math.log(5), rel=1e-6
    )
    assert found.top1[0] == 0 and math.isnan(found.top5[0]), "two tokens say nothing of five"


def test_positions_of_several_texts_are_one_verdict() -> None:
    logits = np.random.default_rng(5).normal(size=(20, 9)).astype(np.float32)
    halves = Rows.join([compare(logits[:10], -logits[:10], [1] * 10), compare(logits[10:], -logits[10:], [1] * 10)])
    verdict = summary(halves)
    assert verdict.positions == 20 and verdict.kl_max == pytest.approx(kl_divergence(logits, -logits).max())
    assert verdict.perplexity is not None and verdict.perplexity.tokens == 18


def test_regret_is_a_share_of_the_way_to_random_tokens() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 1000)).astype(np.float32)
    best, random = logits.argmax(-1), np.random.default_rng(1).integers(0, 1000, 200)
    assert regret([(logits, best)]) == 0
    assert regret([(logits, random)]) == pytest.approx(1, abs=0.1)
    assert regret([(logits, best), (logits, random)]) == pytest.approx(0.5, abs=0.1)
    assert not regret([(np.full((2, 4), np.nan, np.float32), [0, 1])]) <= 1, "not a number is not small"


def test_a_repeated_token_is_regretted_once() -> None:
    row = np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32)
    best, other = int(row.argmax()), int(np.abs(row - row.mean()).argmin())
    assert regret([(row.repeat(2, 0), [best, other])]) == pytest.approx(0.5, abs=0.01)
    assert regret([(row.repeat(10, 0), [best] + [other] * 9)]) == pytest.approx(0.5, abs=0.01)
    assert regret([(row, [best]), (row.repeat(9, 0), [other] * 9)]) == pytest.approx(0.5, abs=0.01)
