"""Medians and their intervals: pure functions over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 2000

Interval = tuple[float, float]


def median(samples: Sequence[float]) -> float:
    """The median of at least one sample."""
    return float(np.median(samples))


def median_interval(samples: Sequence[float]) -> Interval:
    """A 95 % interval of the median, from order statistics.

    The number of n samples below the true median is binomial (n, 1/2), whatever they are distributed like. The
    interval runs from the k-th smallest to the k-th largest sample with the largest k that keeps both tails at
    2.5 %. Five samples or fewer cannot give 95 %: their range is returned.
    """
    ordered = sorted(samples)
    rank = max(_interval_rank(len(ordered)), 1)
    return float(ordered[rank - 1]), float(ordered[-rank])


def _interval_rank(count: int) -> int:
    """The largest k with P(Binomial(count, 1/2) < k) <= 2.5 %; 0 when there is none."""
    tail, rank = 0.0, 0
    while rank < count:
        tail += math.comb(count, rank) / 2**count
        if tail > (1 - CONFIDENCE) / 2:
            break
        rank += 1
    return rank


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of `numerators` over median of `denominators`."""
    return median(numerators) / median(denominators)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], *, seed: int) -> Interval:
    """A 95 % percentile bootstrap interval of `ratio_of_medians`.

    Sample i of both was taken in round i. Whole rounds are drawn, so that noise which hit both sides of a round
    stays on both sides of the ratio.
    """
    rounds = len(numerators)
    assert rounds == len(denominators), (rounds, len(denominators))
    drawn = np.random.default_rng(seed).integers(0, rounds, size=(_RESAMPLES, rounds))
    above = np.median(np.asarray(numerators)[drawn], axis=1)
    below = np.median(np.asarray(denominators)[drawn], axis=1)
    low, high = np.quantile(above / below, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
