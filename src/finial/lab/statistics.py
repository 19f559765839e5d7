"""Medians, spreads, and ratios with bootstrap intervals.

Knows numbers; nothing of engines.

    ratio = paired_ratio(ours, theirs); ratio.median, ratio.low, ratio.high

All intervals are 95 % percentile bootstraps (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
LEVEL = 0.95
TAIL = 100 * (1 - LEVEL) / 2


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval, from `count` samples."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Ratio:
    """A speed-up: the median of paired ratios and its 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int

    @property
    def shown(self) -> bool:
        """Whether there is a difference: the interval leaves 1 out, over at least 3 pairs."""
        return self.pairs >= 3 and (self.low > 1 or self.high < 1)


def median(values: Sequence[float]) -> float:
    """The middle."""
    return float(np.median(values))


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / 2 / middle)


def percentiles(values: Sequence[float], which: Sequence[float] = (50, 95, 99)) -> tuple[float, ...]:
    """By linear interpolation; of at least one value."""
    return tuple(float(p) for p in np.percentile(values, list(which)))


def _draws(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def median_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Median of at least one value."""
    array = np.asarray(values, float)
    low, high = np.percentile(np.median(array[_draws(len(array), seed)], axis=1), [TAIL, 100 - TAIL])
    return Interval(float(np.median(array)), float(low), float(high), len(array))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """Median of ours[i] / theirs[i].

    Args:
        ours, theirs: one value per round, both of the same rounds; at least one.
    """
    assert len(ours) == len(theirs) > 0
    ratios = np.asarray(ours, float) / np.asarray(theirs, float)
    found = median_interval([float(r) for r in ratios], seed)
    return Ratio(found.median, found.low, found.high, found.count)


def unpaired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """Ratio of medians of two runs that were not interleaved: each side is resampled by itself, so it is wider."""
    assert len(ours) > 0 < len(theirs)
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    above = np.median(a[_draws(len(a), seed)], axis=1)
    below = np.median(b[_draws(len(b), seed + 1)], axis=1)
    low, high = np.percentile(above / below, [TAIL, 100 - TAIL])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high), min(len(a), len(b)))


def exponent(xs: Sequence[float], ys: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """p of y ∝ x^p, fitted by least squares to the logarithms of medians.

    Args:
        xs: at least two different; ys: samples at each, resampled within each.
    """
    assert len(xs) == len(ys) >= 2
    rng = np.random.default_rng(seed)
    logs = np.log(np.asarray(xs, float))
    centred = logs - logs.mean()
    samples = [np.asarray(values, float) for values in ys]

    def slope(middles: NDArray[np.float64]) -> NDArray[np.float64]:
        slopes: NDArray[np.float64] = np.log(middles) @ centred / (centred @ centred)
        return slopes

    drawn = np.stack([np.median(v[rng.integers(0, len(v), (RESAMPLES, len(v)))], axis=1) for v in samples], axis=1)
    low, high = np.percentile(slope(drawn), [TAIL, 100 - TAIL])
    found = slope(np.asarray([[float(np.median(v)) for v in samples]]))[0]
    return Interval(float(found), float(low), float(high), len(xs))
