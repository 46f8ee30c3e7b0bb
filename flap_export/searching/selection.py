"""Who is better: by loss alone, or by loss and latency together. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from flap_export.searching.operators import Scored


def best_first(scored: Sequence[Scored]) -> list[Scored]:
    """Put candidates in order.

    By fitness; with a second objective by non-dominated fronts, and within a front by crowding distance, so that a
    population spreads along the trade-off (NSGA-II, Deb et al. 2002). Equal ones keep the order of their levels.
    """
    stable = sorted(scored, key=lambda found: (found.fitness, found.candidate))
    if all(found.latency_ms is None for found in stable):
        return stable
    ordered: list[Scored] = []
    rest = stable
    while rest:
        front = pareto_front(rest)
        ordered += _spread(front)
        rest = [found for found in rest if found not in front]
    return ordered


class Valued(Protocol):
    """What two objectives are known of."""

    @property
    def fitness(self) -> float: ...  # noqa: D102

    @property
    def latency_ms(self) -> float | None: ...  # noqa: D102


V = TypeVar("V", bound=Valued)


def pareto_front(scored: Sequence[V]) -> list[V]:
    """Those that no other one beats in one objective without losing in the other, by ascending fitness.

    Of several that are equal in both, the first.
    """
    front: list[V] = []
    for found in sorted(scored, key=lambda found: (found.fitness, _latency(found))):
        if not front or _latency(found) < _latency(front[-1]):
            front.append(found)
    return front


def _latency(found: Valued) -> float:
    return math.inf if found.latency_ms is None else found.latency_ms


def _spread(front: Sequence[Scored]) -> list[Scored]:
    """A front, ends first, then those whose neighbours are far away."""
    if len(front) <= 2:
        return list(front)
    widths = (front[-1].fitness - front[0].fitness or 1.0, _latency(front[0]) - _latency(front[-1]) or 1.0)

    def crowding(place: int) -> float:
        if place in (0, len(front) - 1):
            return math.inf
        before, after = front[place - 1], front[place + 1]
        return (after.fitness - before.fitness) / widths[0] + (_latency(before) - _latency(after)) / widths[1]

    return [front[place] for place in sorted(range(len(front)), key=crowding, reverse=True)]
