"""What is searched: one pruning rate per layer, all together an exact number of weights. Pure.

Rates are integer multiples of a step that divides the budget, so that wherever layers cost the same, as those of a
dense model do, the budget is a fixed sum of integers and no candidate is nearer to it than another. What attention
bears of a layer's rate is decided by the ranking within the layer (granularity `layers`), or searched too (`modules`);
FFN channels make up the rest, so that moving attention's part never moves the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, final

import numpy as np

from flap_export.allocation.ladders import LayerLadders
from flap_export.allocation.rates import LayerCosts, Splitting, split
from flap_export.allocation.ratios import check_ratio
from flap_export.allocation.stage import Steps
from flap_export.errors import BudgetError, check_choice

Granularity = Literal["layers", "modules"]
GRANULARITIES: Final[tuple[Granularity, ...]] = ("layers", "modules")
_ROUNDING: Final = 1e-6


@final
@dataclass(frozen=True, order=True)
class Candidate:
    """A point of the space."""

    levels: tuple[int, ...]
    """Of every layer, its rate in steps of the space."""
    attention: tuple[int, ...]
    """Of every layer, how far attention goes down its ladder."""


@final
@dataclass(frozen=True)
class Space:
    """All rates within the bounds that remove what the budget says."""

    layers: tuple[LayerCosts, ...]
    budget: float
    """Weights that shall go."""
    step: float
    """Weights of one step of a layer's rate."""
    bounds: tuple[tuple[int, int], ...]
    """Least and greatest level of every layer."""
    granularity: Granularity
    splitting: Splitting

    @classmethod
    def of(
        cls,
        ladders: Sequence[LayerLadders],
        ratio: float,
        *,
        granularity: Granularity = "layers",
        splitting: Splitting = "losses",
        step: float = 0.05,
        least: float = 0.0,
        greatest: float = 0.9,
        bounds: Mapping[int, tuple[float, float]] | None = None,
        protect_first: int = 0,
        protect_last: int = 0,
    ) -> Space:
        """Lay a grid over the rates.

        Args:
            ladders: of every layer.
            ratio: share of all their weights that goes, in (0, 1).
            granularity: whether attention's part is searched too.
            splitting: decides about it otherwise.
            step: of a rate, at most; the next smaller one that divides the budget is taken.
            least: rate of every layer.
            greatest: rate of every layer.
            bounds: of single layers, least and greatest rate.
            protect_first: layers that lose nothing.
            protect_last: layers that lose nothing.

        Raises:
            BudgetError: the bounds leave no room for the budget, or make no sense.
        """
        check_ratio(ratio)
        check_choice("granularity", granularity, GRANULARITIES)
        if not 0 < step <= 0.5:
            raise BudgetError(f"the step of a rate must lie in (0, 0.5], got {step}")
        layers = tuple(LayerCosts.of(layer) for layer in ladders)
        total = sum(layer.total for layer in layers)
        budget = ratio * total
        level_sum = max(math.ceil(ratio * len(layers) / step - _ROUNDING), 1)
        step_weights = budget / level_sum
        ranges = []
        for index, layer in enumerate(layers):
            own = (bounds or {}).get(index, (least, greatest))
            if index < protect_first or index >= len(layers) - protect_last:
                own = (0.0, 0.0)
            low, high = own
            if not 0 <= low <= high <= 1:
                raise BudgetError(f"layer {index}: the bounds of a rate must be ascending shares in 0..1, got {own}")
            unit = step_weights / layer.total
            lowest, highest = math.ceil(low / unit - _ROUNDING), math.floor(high / unit + _ROUNDING)
            # No layer can bear more than all of the budget.
            ranges.append((lowest, min(highest, max(lowest, level_sum))))
        unknown = sorted(index for index in bounds or {} if not 0 <= index < len(layers))
        if unknown:
            raise BudgetError(f"there is no layer {unknown[0]} to set bounds for; the model has {len(layers)} layers")
        space = cls(layers, budget, step_weights, tuple(ranges), granularity, splitting)
        space._check_room(ratio)
        return space

    def _check_room(self, ratio: float) -> None:
        for index, (least, greatest) in enumerate(self.bounds):
            if least > greatest:
                raise BudgetError(f"layer {index}: no multiple of the step lies within its bounds; widen them")
        least, greatest = (sum(levels[end] for levels in self.bounds) for end in (0, 1))
        if not least <= self.level_sum <= greatest:
            low, high = (ratio * levels / self.level_sum for levels in (least, greatest))
            raise BudgetError(
                f"within their bounds the layers lose between {low:.1%} and {high:.1%} of the weights, not "
                f"{ratio:.1%}; widen the bounds or protect fewer layers"
            )

    @property
    def level_sum(self) -> int:
        """What the levels of every candidate add up to."""
        return round(self.budget / self.step)

    @cached_property
    def splits(self) -> tuple[Mapping[int, int], ...]:
        """Of every layer, attention's steps at every level, as the splitting has it."""
        return tuple(
            {level: split(layer, min(level * self.step, layer.total), self.splitting) for level in range(low, high + 1)}
            for layer, (low, high) in zip(self.layers, self.bounds, strict=True)
        )

    @cached_property
    def reachable(self) -> tuple[Mapping[int, Sequence[int]], ...]:
        """Of every layer, attention's possible steps at every level; those of `splits` where it is not searched."""
        if self.granularity == "layers":
            return tuple({level: [steps] for level, steps in own.items()} for own in self.splits)
        return tuple(
            {level: layer.attention_steps(min(level * self.step, layer.total)) for level in range(low, high + 1)}
            for layer, (low, high) in zip(self.layers, self.bounds, strict=True)
        )

    def rate(self, layer: int, level: int) -> float:
        """Share of a layer's weights that a level stands for."""
        return level * self.step / self.layers[layer].total

    def level(self, layer: int, rate: float) -> int:
        """The nearest level within the layer's bounds."""
        low, high = self.bounds[layer]
        return min(max(round(rate * self.layers[layer].total / self.step), low), high)

    def rates(self, candidate: Candidate) -> list[float]:
        """Of every layer."""
        return [self.rate(index, level) for index, level in enumerate(candidate.levels)]

    def steps(self, candidate: Candidate) -> Steps:
        """How many steps of every ladder are taken."""
        return [
            (attention, costs.ffn_steps(min(level * self.step, costs.total), attention))
            for costs, level, attention in zip(self.layers, candidate.levels, candidate.attention, strict=True)
        ]

    def removed(self, candidate: Candidate) -> int:
        """Weights that go, exactly."""
        return sum(costs.removed(*taken) for costs, taken in zip(self.layers, self.steps(candidate), strict=True))

    def contains(self, candidate: Candidate) -> bool:
        """Whether levels and attention are within their bounds, and the levels add up to the budget."""
        within = len(candidate.levels) == len(candidate.attention) == len(self.layers) and all(
            low <= level <= high and attention in self.reachable[index][level]
            for index, (level, attention, (low, high)) in enumerate(
                zip(candidate.levels, candidate.attention, self.bounds, strict=True)
            )
        )
        return within and sum(candidate.levels) == self.level_sum

    def completed(self, levels: Sequence[int], attention: Sequence[int] | None = None) -> Candidate:
        """A candidate of these levels; attention's steps are the nearest possible, or what the ranking says."""
        if attention is None:
            return Candidate(tuple(levels), tuple(self.splits[i][level] for i, level in enumerate(levels)))
        nearest = (
            min(self.reachable[index][level], key=lambda steps: abs(steps - wanted))
            for index, (level, wanted) in enumerate(zip(levels, attention, strict=True))
        )
        return Candidate(tuple(levels), tuple(nearest))

    def repaired(
        self,
        wanted: Sequence[float],
        attention: Sequence[int] | None,
        random: np.random.Generator,
    ) -> Candidate:
        """The candidate that is meant by rates which may miss bounds, levels and budget.

        Rates are clipped and rounded; then single levels move, first where they follow what was wanted, until the
        budget is met. Ties are drawn.

        Args:
            wanted: a rate per layer, finite.
            attention: steps of attention per layer, or None for what the ranking says.
            random: for ties.
        """
        levels = [self.level(index, rate) for index, rate in enumerate(wanted)]
        asked = [rate * costs.total / self.step for rate, costs in zip(wanted, self.layers, strict=True)]
        return self.completed(self.balanced(levels, random, asked), attention)

    def balanced(
        self, levels: Sequence[int], random: np.random.Generator, asked: Sequence[float] | None = None
    ) -> list[int]:
        """Move single levels until their sum meets the budget.

        Args:
            levels: within the bounds.
            random: chooses among layers that have equal claims.
            asked: levels that were wanted, not rounded; the layer that moves is the one it brings nearest to them.
        """
        found, wanted = list(levels), list(asked if asked is not None else levels)
        missing = self.level_sum - sum(found)
        direction = 1 if missing > 0 else -1
        for _ in range(abs(missing)):
            movable = [i for i, (low, high) in enumerate(self.bounds) if low <= found[i] + direction <= high]
            claims = {i: direction * (wanted[i] - found[i]) for i in movable}
            most = max(claims.values())
            found[int(random.choice([i for i in movable if claims[i] >= most - _ROUNDING]))] += direction
        return found

    def uniform(self) -> Candidate:
        """The same rate in every layer that may have it; what the grid cannot divide is drawn by a fixed seed."""
        total = sum(costs.total for costs in self.layers)
        return self.repaired([self.budget / total] * len(self.layers), None, np.random.default_rng(0))

    def nearest(self, steps: Steps) -> Candidate:
        """The candidate nearest to a plan's cut points."""
        rates = [costs.removed(*taken) / costs.total for costs, taken in zip(self.layers, steps, strict=True)]
        return self.repaired(rates, [attention for attention, _ in steps], np.random.default_rng(0))

    def settled(self, candidate: Candidate) -> Steps:
        """The candidate's cut points with single FFN steps moved until the budget is met to half of one.

        Every layer meets its level to half a step of its FFN, and these misses may add up; here steps of some layers
        make up for them. An FFN that is whole or gone stays so.
        """
        steps = [list(taken) for taken in self.steps(candidate)]
        missing = self.budget - self.removed(candidate)
        while True:
            moved = False
            for costs, taken in zip(self.layers, steps, strict=True):
                other = taken[1] + (1 if missing > 0 else -1)
                if not 0 < taken[1] < len(costs.ffn) - 1:
                    continue
                change = int(costs.ffn[other] - costs.ffn[taken[1]])
                if abs(missing - change) < abs(missing):
                    taken[1], missing, moved = other, missing - change, True
            if not moved:
                return [(attention, ffn) for attention, ffn in steps]
