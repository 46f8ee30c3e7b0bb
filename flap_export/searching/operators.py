"""The operators of an evolutionary search, and their conventional form: chance, under the exact budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, final

import numpy as np

from flap_export.searching.space import Candidate, Space

MAX_SWITCHES: Final = 3
"""Level switches of one mutation, at most; the fewer of two draws is taken (EvoPress, arXiv 2410.14649)."""
TOURNAMENT: Final = 2
_ATTEMPTS: Final = 50
"""Draws for a candidate that is not known yet; a small space may hold no more."""


@final
@dataclass(frozen=True)
class Scored:
    """A candidate and what it is worth."""

    candidate: Candidate
    fitness: float
    """Loss; smaller is better."""
    latency_ms: float | None = None
    """The second objective, where there is one."""


Pair = tuple[Scored, Scored]


class Operators(Protocol):
    """What Self-Pruner lets a language model do. All answers meet the budget, and none is in `known`."""

    def observe(self, best: float) -> None:
        """Take note of the best fitness after a generation."""
        ...

    def initial(self, count: int, known: Collection[Candidate]) -> list[Candidate]:
        """A first population of `count` candidates, or fewer where the space is exhausted."""
        ...

    def parents(self, population: Sequence[Scored], pairs: int) -> list[Pair]:
        """Choose who crosses; `population` comes best first."""
        ...

    def crossed(self, pairs: Sequence[Pair], known: Collection[Candidate]) -> list[Candidate]:
        """One child of every pair."""
        ...

    def mutated(self, parents: Sequence[Scored], known: Collection[Candidate]) -> list[Candidate]:
        """One changed copy of every parent."""
        ...


@final
class Conventional:
    """Operators by chance."""

    def __init__(self, space: Space, random: np.random.Generator) -> None:
        self._space, self._random = space, random

    def observe(self, best: float) -> None:
        """Chance does not mind."""

    def initial(self, count: int, known: Collection[Candidate]) -> list[Candidate]:
        """Rates drawn around the mean rate, every time with another spread."""
        return self.distinct([self.drawn] * count, known)

    def parents(self, population: Sequence[Scored], pairs: int) -> list[Pair]:
        """Tournaments of two; the places in `population` decide."""
        return [(self._winner(population), self._winner(population)) for _ in range(pairs)]

    def crossed(self, pairs: Sequence[Pair], known: Collection[Candidate]) -> list[Candidate]:
        """Every layer from one parent or the other, then balanced."""
        return self.distinct([lambda pair=pair: self._child(*pair) for pair in pairs], known)  # type: ignore[misc]

    def mutated(self, parents: Sequence[Scored], known: Collection[Candidate]) -> list[Candidate]:
        """Level switches: one layer loses a step of what another gains, once to three times, mostly once."""
        return self.distinct(
            [lambda parent=parent: self.switched(parent.candidate) for parent in parents],  # type: ignore[misc]
            {*known, *(parent.candidate for parent in parents)},
        )

    def distinct(self, draws: Sequence[Callable[[], Candidate]], known: Collection[Candidate]) -> list[Candidate]:
        """A new candidate of every draw: one that is known is drawn again, in the end mutated, and at last left out."""
        found: dict[Candidate, None] = {}
        for draw in draws:
            candidate = draw()
            for attempt in range(_ATTEMPTS):
                assert self._space.contains(candidate), "operators keep the budget"
                if candidate not in found and candidate not in known:
                    found[candidate] = None
                    break
                candidate = draw() if attempt < _ATTEMPTS // 2 else self.switched(candidate)
        return list(found)

    def drawn(self) -> Candidate:
        """A candidate from nowhere."""
        space, random = self._space, self._random
        mean = space.uniform()
        spread = random.uniform(0.1, 0.8)
        rates = [rate * float(np.exp(random.normal(0.0, spread))) for rate in space.rates(mean)]
        levels = space.repaired(rates, None, random).levels
        if space.granularity == "layers":
            return space.completed(levels)
        chosen = [int(random.choice(space.reachable[index][level])) for index, level in enumerate(levels)]
        # Half of attention stays with the ranking: its parts are better than chance.
        own = [space.splits[index][level] for index, level in enumerate(levels)]
        keeps = random.random(len(own)) < 0.5
        return space.completed(levels, [a if kept else b for a, b, kept in zip(own, chosen, keeps, strict=True)])

    def switched(self, candidate: Candidate) -> Candidate:
        """A neighbour by level switches; with attention apart, a switch may move attention's part of one layer."""
        space, random = self._space, self._random
        levels, attention = list(candidate.levels), list(candidate.attention)
        for _ in range(1 + int(random.integers(MAX_SWITCHES, size=2).min())):
            if space.granularity == "modules" and random.random() < 0.5:
                index = int(random.integers(len(levels)))
                attention[index] += int(random.choice([-1, 1]))
                attention = list(space.completed(levels, attention).attention)
                continue
            rising = [i for i, (_, high) in enumerate(space.bounds) if levels[i] < high]
            up = int(random.choice(rising)) if rising else None
            falling = [i for i, (low, _) in enumerate(space.bounds) if levels[i] > low and i != up]
            if up is not None and falling:
                levels[up] += 1
                levels[int(random.choice(falling))] -= 1
        moved = [a != b for a, b in zip(levels, candidate.levels, strict=True)]
        own = space.completed(levels)
        # A layer whose level moved takes the ranking's part again; elsewhere attention stays as it was.
        parts = [new if changed else old for new, old, changed in zip(own.attention, attention, moved, strict=True)]
        return space.completed(levels, parts)

    def _child(self, one: Scored, other: Scored) -> Candidate:
        space, random = self._space, self._random
        first = random.random(len(one.candidate.levels)) < 0.5
        chosen = [one.candidate if takes else other.candidate for takes in first]
        levels = [parent.levels[index] for index, parent in enumerate(chosen)]
        attention = [parent.attention[index] for index, parent in enumerate(chosen)]
        return space.completed(space.balanced(levels, random), attention)

    def _winner(self, population: Sequence[Scored]) -> Scored:
        return population[int(self._random.integers(len(population), size=TOURNAMENT).min())]
