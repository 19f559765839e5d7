"""Medians, spreads, and paired ratios with bootstrap intervals.

Knows numbers; nothing of engines.

    ratio = paired_ratio(ours, theirs); ratio.median, ratio.low, ratio.high
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Ratio:
    """A speed-up: the median of paired ratios and its 95 % interval.

    Attributes:
        shown: whether the interval leaves 1 out; if not, no difference was shown.
    """

    median: float
    low: float
    high: float
    pairs: int

    @property
    def shown(self) -> bool:
        """Whether there is a difference."""
        return self.low > 1 or self.high < 1


def median(values: Sequence[float]) -> float:
    """The middle."""
    return float(np.median(values))


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / 2 / middle)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """Median of ours[i] / theirs[i] with the percentile bootstrap's interval (Efron & Tibshirani 1993, chapter 13).

    Args:
        ours, theirs: one value per round, both of the same rounds; at least one.
    """
    assert len(ours) == len(theirs) > 0
    ratios = np.asarray(ours, float) / np.asarray(theirs, float)
    draws = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.median(ratios[draws], axis=1), [tail, 100 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))
