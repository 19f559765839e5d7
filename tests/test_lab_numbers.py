"""What the lab computes before and after it measures: plans, checks of replies, statistics, limits, estimates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finial.errors import RequestError
from finial.files.checkpoint import open_checkpoint
from finial.files.convert import convert
from finial.lab.analysis import growth, limit, share
from finial.lab.checks import check, value
from finial.lab.engines.table import ENGINES, Places
from finial.lab.estimate import estimate
from finial.lab.record import Cell, Reading, Row, Sample
from finial.lab.roofline import Floor, peak_for
from finial.lab.statistics import exponent, median_interval, paired_ratio, spread, unpaired_ratio
from finial.lab.workloads import (
    BATCH_CASES,
    FAMILIES,
    Group,
    Sizes,
    Workload,
    make,
    parse_range,
    powers,
    prompts,
    rounds_for,
)

DECODE = Workload("decode", "decode", depth=4, new=5, rounds=3)
PROMPT = Workload("prompt", "prompt", depth=8, new=1, rounds=3)


# --- statistics --------------------------------------------------------------------------------------------------


def test_paired_ratio_follows_the_pairs_not_the_levels() -> None:
    machine = np.array([1, 2, 1, 2, 1, 2, 1, 2, 1, 2], float)  # the state flips between rounds
    found = paired_ratio(list(1.2 * machine), list(machine))
    assert found.median == pytest.approx(1.2)
    assert found.low == pytest.approx(1.2) and found.high == pytest.approx(1.2) and found.shown
    apart = unpaired_ratio(list(1.2 * machine), list(machine))
    assert apart.low < 1 < apart.high and not apart.shown


def test_interval_that_holds_one_shows_nothing() -> None:
    noise = np.random.default_rng(0).normal(1, 0.1, 20)
    found = paired_ratio(list(noise), list(noise[::-1]))
    assert found.low < 1 < found.high and not found.shown
    assert not paired_ratio([2.0, 2.0], [1.0, 1.0]).shown, "two pairs are too few to show anything"


@pytest.mark.parametrize("samples", [10, 20])
def test_interval_covers_the_truth_about_as_often_as_it_says(samples: int) -> None:
    rng = np.random.default_rng(samples)
    hits, runs = 0, 100
    for seed in range(runs):
        found = paired_ratio(list(1.1 * rng.lognormal(0, 0.1, samples)), [1.0] * samples, seed)
        hits += found.low <= 1.1 <= found.high
    # 95 ± 2.2; the percentile bootstrap of a median of few samples is a little off either way.
    assert 87 <= hits <= 100


def test_growth_exponent_is_found_with_its_interval() -> None:
    rng = np.random.default_rng(3)
    xs = [16, 32, 64, 128, 256]
    found = exponent(xs, [list(2e-3 * x**1.5 * rng.lognormal(0, 0.05, 12)) for x in xs])
    assert found.low < 1.5 < found.high and found.high - found.low < 0.15


def test_spread_is_relative() -> None:
    assert spread([90, 95, 100, 105, 110]) == pytest.approx(0.05)
    assert median_interval([3.0]).low == 3.0


# --- workloads ---------------------------------------------------------------------------------------------------


def test_prompts_are_fresh_unless_the_cache_is_kept() -> None:
    assert prompts(DECODE, 1000, 0) == prompts(DECODE, 1000, 5)
    assert prompts(PROMPT, 1000, 0) != prompts(PROMPT, 1000, 1)
    assert prompts(PROMPT, 1000, 1) == prompts(PROMPT, 1000, 1)
    batch = prompts(replace(DECODE, sequences=3), 1000, 0)
    assert len({tuple(p) for p in batch}) == 3 and all(len(p) == 4 and max(p) < 900 for p in batch)
    mixed = next(w for w in make("batch", Sizes()) if w.name == "batch_3_mixed")
    assert [len(p) for p in prompts(mixed, 1000, 0)] == [8, 32, 96] and mixed.positions == 96 + 32


def test_ranges() -> None:
    assert parse_range("128,512") == (128, 512)
    assert parse_range("1:32:x2") == (1, 2, 4, 8, 16, 32) and parse_range("10:50:20,7") == (10, 30, 50, 7)
    for wrong in ("", "0", "-1:4", "8:4", "1:8:x1", "1:8:0", "a", "1:2:3:4", "1:99999"):
        with pytest.raises(RequestError, match="no range"):
            parse_range(wrong)


def test_the_table_of_workloads() -> None:
    assert {w.name for w in make("batch", Sizes())} == set(BATCH_CASES)
    assert [w.sequences for w in make("batch", Sizes(batch=parse_range("1:64:x2")))] == [1, 2, 4, 8, 16, 32, 64]
    assert [w.depth for w in make("depth", Sizes(limit=1024))] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1015]
    assert powers(8) == (1, 2, 4, 8)
    assert all(w.caches == (True, False) for w in make("cache", Sizes(limit=1024)))
    for family in FAMILIES:
        assert all(w.positions <= 1024 and w.family == family for w in make(family, Sizes(limit=1024)))
    with pytest.raises(RequestError, match="positions"):
        make("depth", Sizes(depth=(4096,), limit=1024))
    with pytest.raises(RequestError, match="choose of"):
        make("dept", Sizes())


def test_short_work_is_repeated_and_long_work_is_not() -> None:
    free = replace(DECODE, rounds=0)
    assert [rounds_for(free, s) for s in (0.02, 0.1, 0.4, 1.0, 10.0)] == [150, 30, 10, 6, 3]
    assert rounds_for(replace(DECODE, rounds=4), 0.001) == 4


def test_values() -> None:
    reply = {"first": [0.5], "last": [0.9], "tokens": [[1] * 5]}
    assert value(DECODE, reply) == pytest.approx(10)  # four steps in 0.4 s
    assert value(replace(DECODE, kind="first"), reply) == pytest.approx(5)  # 0.5 s over 0.1 s
    assert value(replace(DECODE, kind="generate"), reply) == pytest.approx(5 / 0.9)
    assert value(PROMPT, {"first": [0.5], "last": [0.5], "tokens": [[1]]}) == pytest.approx(16)
    assert value(DECODE, {**reply, "at_first": [3]}) == pytest.approx(5), "two tokens after the first three"
    both = {"first": [0.5, 0.6], "last": [0.9, 1.0], "tokens": [[1] * 5] * 2}
    assert value(replace(DECODE, sequences=2), both) == pytest.approx(16)  # eight tokens from 0.5 to 1.0 s


def test_unequal_work_is_named() -> None:
    good: dict[str, Any] = {"first": [0.1], "last": [0.2], "tokens": [[1] * 5], "times": None}
    assert check(DECODE, good, 10, 0.21) == ""
    for change, words in (
        ({"tokens": [[1] * 4]}, "4"),
        ({"tokens": [[1] * 5] * 2}, "unequal"),
        ({"tokens": [[1, 1, 1, 1, 10]]}, "no token"),
        ({"tokens": [[1, 1, 1, 1, 1.0]]}, "no token"),
        ({"tokens": None}, "no lists"),
        ({"first": [0.3]}, "backwards"),
        ({"first": [0.0]}, "backwards"),
        ({"last": [float("nan")]}, "not one time"),
        ({"last": [0.2, 0.2]}, "not one time"),
        ({"last": [0.4]}, "answer after"),
        ({"last": [0.1]}, "one moment"),
        ({"at_first": None}, "no rate"),
        ({"at_first": [0]}, "at_first"),
        ({"at_first": [1, 1]}, "at_first"),
        ({"times": [[0.1, 0.2]]}, "each token"),
        ({"times": [[0.1, 0.15, 0.12, 0.18, 0.2]]}, "backwards"),
        ({"times": [[0.05, 0.1, 0.15, 0.18, 0.2]]}, "begin and end"),
    ):
        assert words in check(DECODE, {**good, **change}, 10, 0.21), change
    assert "is said to" in check(DECODE, good, 10, 3.0)


# --- limits ------------------------------------------------------------------------------------------------------


def test_floor_of_a_decode_step_is_weights_and_cache(tmp_path: Path) -> None:
    path = convert(Places(tmp_path, tmp_path).checkpoint("demo"), tmp_path / "demo.gguf")
    config = open_checkpoint(path).config
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2  # keys and values in bf16
    shallow, deep = (Floor.of(path, replace(DECODE, depth=depth)) for depth in (4, 104))
    assert deep.bytes - shallow.bytes == 100 * row
    assert deep.kv_bytes == (104 + 5) * row
    four = Floor.of(path, replace(DECODE, sequences=4))
    assert four.tokens == 4 and four.bytes < 1.5 * shallow.bytes and four.operations == 4 * shallow.operations
    assert Floor.of(path, PROMPT).tokens == 8
    assert Floor.of(path, DECODE, format="q8_0").bytes < 0.6 * shallow.bytes
    whole = Floor.of(path, replace(DECODE, kind="generate"))
    assert whole.tokens == 5 and 4.9 * shallow.bytes < whole.bytes < 5 * deep.bytes


def _cell(floor: Floor, **rows: Row) -> Cell:
    return Cell("m", "bf16", 2, DECODE, floor, None, dict(rows))


def test_share_takes_the_better_probe_and_the_nearer_limit() -> None:
    floor = Floor(bytes=10**9, operations=10**10, tokens=1, weight_bytes=1, kv_bytes=1)
    sample = Sample(value=25.0, before=Reading(50.0, None, 0), after=Reading(20.0, None, 0))
    cell = _cell(floor, finial=Row(samples=[sample]))
    assert share(cell, "finial", {}) == pytest.approx(0.5)  # 20 ms allowed, 40 ms taken
    assert share(cell, "finial", {"2": {"bf16": 333.3}}) == pytest.approx(0.75, rel=1e-3)  # 30 ms of arithmetic
    assert limit(cell, {}) == (pytest.approx(20.0), "read")
    assert limit(cell, {"2": {"bf16": 100.0}}) == (pytest.approx(10.0), "compute")
    assert peak_for("q8_0", {"bf16": 1.0, "int8": 2.0}) == 2.0
    assert peak_for("bf16", {"bf16": 1.0, "int8": 2.0}) == 1.0 and peak_for("bf16", {}) is None


def test_growth_needs_three_depths() -> None:
    def cell(depth: int) -> Cell:
        row = Row(samples=[Sample(value=1000 / depth) for _ in range(5)])
        return Cell("m", "bf16", 2, replace(DECODE, depth=depth), None, None, {"finial": row})

    assert growth([cell(d) for d in (16, 64)], "finial") is None
    found = growth([cell(d) for d in (16, 64, 256)], "finial")
    assert found is not None and found.exponent.median == pytest.approx(1.0)


# --- estimates ---------------------------------------------------------------------------------------------------


def test_estimates_grow_with_the_work() -> None:
    engines = [ENGINES["finial"]]
    few, many = (Group("m", "stored", 2, (DECODE,) * count) for count in (1, 4))
    assert 0 < estimate([few], engines) < estimate([many], engines)
    assert estimate([few], engines, model_bytes=8e6) < estimate([few], engines)
