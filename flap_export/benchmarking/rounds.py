"""Samples of several candidates taken in turns, so that all meet the same disturbances."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from flap_export.benchmarking.worker import Sample
from flap_export.benchmarking.workload import Workload

SAMPLE_MS: Final = 25.0
"""Default length of one sample."""
MINIMUM_ROUNDS: Final = 3
INTERVAL_ROUNDS: Final = 6
"""The fewest from which an interval of 95 % can be read: that of three covers the truth three times in four."""


class Measured(Protocol):
    """What `take_rounds` needs of a worker."""

    def prepare(self, workload: Workload) -> Sample:
        """Get ready, warm up, and time one call."""

    def measure(self, calls: int) -> Sample:
        """Time `calls` calls."""


def take_rounds(
    candidates: Sequence[Measured],
    workload: Workload,
    *,
    repeats: int,
    budget_s: float,
    draw: random.Random,
    sample_ms: float = SAMPLE_MS,
) -> tuple[tuple[Sample, ...], ...]:
    """Warm all candidates up, then sample each once a round.

    Args:
        candidates: who is measured.
        workload: what.
        repeats: rounds.
        budget_s: seconds after which no further round begins, once there are `INTERVAL_ROUNDS`.
        draw: chooses the order within each round.
        sample_ms: short calls are repeated within a sample until it is about this long.

    Returns:
        The samples of each candidate; sample i of all was taken in round i.
    """
    calls = [_calls_per_sample(candidate.prepare(workload), sample_ms) for candidate in candidates]
    samples: list[list[Sample]] = [[] for _ in candidates]
    deadline = time.monotonic() + budget_s
    for done, order in enumerate(round_orders(len(candidates), repeats, draw)):
        if done >= INTERVAL_ROUNDS and time.monotonic() > deadline:
            break
        for index in order:
            samples[index].append(candidates[index].measure(calls[index]))
    return tuple(tuple(taken) for taken in samples)


def round_orders(candidates: int, rounds: int, draw: random.Random) -> Iterator[list[int]]:
    """Whose turn it is, round by round: an order is drawn, then reversed (ABBA), then drawn anew."""
    order = list(range(candidates))
    for index in range(rounds):
        if index % 2:
            order.reverse()
        else:
            draw.shuffle(order)
        yield list(order)


def _calls_per_sample(warm: Sample, sample_ms: float) -> int:
    return max(1, math.ceil(sample_ms / max(warm.call_ms, 1e-3)))
