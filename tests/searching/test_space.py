"""Spaces of rates: whatever is made in one lies in it, and removes what the budget says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spaces import ladders_of, layer_of, shape_of, spaces

from flap_export.allocation.rates import SPLITTINGS, LayerCosts, Splitting
from flap_export.allocation.stage import Steps
from flap_export.errors import BudgetError, InputError
from flap_export.searching.space import GRANULARITIES, Candidate, Granularity, Space


def made(space: Space, data: st.DataObject) -> list[Candidate]:
    """One candidate by every way there is."""
    count = len(space.layers)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    wanted = data.draw(st.lists(st.floats(-1, 2), min_size=count, max_size=count))
    attention = data.draw(st.none() | st.lists(st.integers(-2, 9), min_size=count, max_size=count))
    found = space.repaired(wanted, attention, random)
    cuts = [
        (int(random.integers(len(costs.attention))), int(random.integers(len(costs.ffn)))) for costs in space.layers
    ]
    return [space.uniform(), found, space.nearest(cuts), space.completed(space.balanced(found.levels, random))]


def least_miss(costs: LayerCosts, target: float) -> float:
    """Of all cut points of a layer."""
    return float(np.abs(costs.attention[:, None] + costs.ffn[None, :] - target).min())


@given(data=st.data(), space=spaces())
def test_every_candidate_lies_in_the_space_and_meets_the_budget(data: st.DataObject, space: Space) -> None:
    for candidate in made(space, data):
        assert space.contains(candidate)
        assert sum(level * space.step for level in candidate.levels) == pytest.approx(space.budget)
        missed = 0.0
        for costs, level, taken in zip(space.layers, candidate.levels, space.steps(candidate), strict=True):
            target = min(level * space.step, costs.total)
            allowed = max(float(np.diff(costs.ffn).max()) / 2, least_miss(costs, target))
            assert abs(costs.removed(*taken) - target) <= allowed + 1e-6
            missed += allowed
        assert abs(space.removed(candidate) - space.budget) <= missed + 1e-6


@given(data=st.data(), space=spaces(splitting="losses"))
def test_rates_stay_within_their_bounds_and_ends_are_exact(data: st.DataObject, space: Space) -> None:
    for candidate in made(space, data):
        for index, (level, taken) in enumerate(zip(candidate.levels, space.steps(candidate), strict=True)):
            low, high = space.bounds[index]
            assert low <= level <= high
            assert space.rate(index, level) <= 1 + 1e-5
            assert level > 0 or taken == (0, 0)


@given(data=st.data(), space=spaces())
def test_what_is_settled_meets_the_budget_to_half_a_step(data: st.DataObject, space: Space) -> None:
    """Unless every FFN is whole or gone; attention stays as it was."""
    for candidate in made(space, data):
        before, after = space.steps(candidate), space.settled(candidate)
        assert [attention for attention, _ in after] == [attention for attention, _ in before]
        missing = space.budget - removed(space, after)
        assert abs(missing) <= abs(space.budget - space.removed(candidate))
        for costs, (_, ffn) in zip(space.layers, after, strict=True):
            if 0 < ffn < len(costs.ffn) - 1:
                step = costs.ffn[ffn + 1] - costs.ffn[ffn] if missing > 0 else costs.ffn[ffn] - costs.ffn[ffn - 1]
                assert abs(missing) <= step / 2 + 1e-6


def removed(space: Space, steps: Steps) -> int:
    return sum(costs.removed(*taken) for costs, taken in zip(space.layers, steps, strict=True))


@given(data=st.data(), space=spaces())
def test_a_candidate_is_its_own_repair(data: st.DataObject, space: Space) -> None:
    for candidate in made(space, data):
        again = space.repaired(space.rates(candidate), candidate.attention, np.random.default_rng(0))
        assert again == candidate


@given(data=st.data(), space=spaces())
def test_other_levels_and_attention_are_not_in_the_space(data: st.DataObject, space: Space) -> None:
    candidate = space.uniform()
    index = data.draw(st.integers(0, len(space.layers) - 1))
    for moved in (-1, 1):
        levels = list(candidate.levels)
        levels[index] += moved
        assert not space.contains(Candidate(tuple(levels), candidate.attention))
    attention = list(candidate.attention)
    attention[index] = len(space.layers[index].attention)
    assert not space.contains(Candidate(candidate.levels, tuple(attention)))
    assert not space.contains(Candidate(candidate.levels[1:], candidate.attention[1:]))


@given(data=st.data(), space=spaces(granularity="layers"))
def test_attention_is_the_rankings_where_it_is_not_searched(data: st.DataObject, space: Space) -> None:
    for candidate in made(space, data):
        assert candidate.attention == tuple(
            own[level] for own, level in zip(space.splits, candidate.levels, strict=True)
        )


def test_attention_is_free_where_it_is_searched() -> None:
    space = Space.of(ladders_of(shape_of([layer_of(8, 4)] * 2)), 0.4, granularity="modules", splitting="uniform")
    levels = space.uniform().levels
    found = {space.completed(levels, [wanted, 2]).attention[0] for wanted in range(5)}
    assert found == set(space.layers[0].attention_steps(levels[0] * space.step))
    assert len(found) > 2


@given(data=st.data(), space=spaces())
def test_repairs_are_as_near_as_any_candidate(data: st.DataObject, space: Space) -> None:
    """By brute force, in the squares of the differences."""
    ranges = [range(low, high + 1) for low, high in space.bounds]
    if math.prod(map(len, ranges)) > 3000:
        return
    wanted = data.draw(st.lists(st.floats(0, 1), min_size=len(ranges), max_size=len(ranges)))
    asked = [rate * costs.total / space.step for rate, costs in zip(wanted, space.layers, strict=True)]

    def distance(levels: Sequence[int]) -> float:
        return sum((level - own) ** 2 for level, own in zip(levels, asked, strict=True))

    least = min(distance(levels) for levels in itertools.product(*ranges) if sum(levels) == space.level_sum)
    found = space.repaired(wanted, None, np.random.default_rng(0)).levels
    assert distance(found) == pytest.approx(least, rel=1e-5, abs=1e-4)


twentieths = st.integers(0, 20).map(lambda count: Fraction(count, 20))


@given(
    count=st.integers(1, 4),
    ratio=st.integers(1, 19).map(lambda count: Fraction(count, 20)),
    step=st.sampled_from([Fraction(1, 20), Fraction(1, 10), Fraction(1, 4)]),
    least=twentieths,
    greatest=twentieths,
    protect_first=st.integers(0, 2),
)
def test_a_space_is_refused_exactly_where_it_is_empty(
    count: int, ratio: Fraction, step: Fraction, least: Fraction, greatest: Fraction, protect_first: int
) -> None:
    level_sum = math.ceil(ratio * count / step)
    unit = ratio * count / level_sum
    assert unit <= step
    own = [(Fraction(0), Fraction(0)) if index < protect_first else (least, greatest) for index in range(count)]
    levels = [[level for level in range(101) if low <= level * unit <= high] for low, high in own]
    exists = all(low <= high for low, high in own) and any(
        sum(candidate) == level_sum for candidate in itertools.product(*levels)
    )
    ladders = ladders_of(shape_of([layer_of(channels=12)] * count))

    def begun() -> Space:
        bounds = {"least": float(least), "greatest": float(greatest), "protect_first": protect_first}
        return Space.of(ladders, float(ratio), step=float(step), **bounds)  # type: ignore[arg-type]

    if not exists:
        with pytest.raises(BudgetError, match=r"widen|must be ascending"):
            begun()
        return
    space = begun()
    assert space.level_sum == level_sum
    assert space.contains(space.uniform())
    possible = [[level for level in own if level <= max(own[0], level_sum)] for own in levels]
    assert [list(range(low, high + 1)) for low, high in space.bounds] == possible
    rates = [rate for index, rate in enumerate(space.rates(space.uniform())) if index >= protect_first]
    assert max(rates) - min(rates) <= float(unit) + 1e-9


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("splitting", SPLITTINGS)
def test_a_level_may_be_less_than_a_channel(granularity: Granularity, splitting: Splitting) -> None:
    """Twelve channels: candidates with other levels may cut alike, and still all meet the budget when settled."""
    shape = shape_of([layer_of(channels=12)] * 4)
    space = Space.of(ladders_of(shape), 0.3, step=0.01, granularity=granularity, splitting=splitting)
    assert space.step < shape.ffn_channel_parameters
    random = np.random.default_rng(0)
    for _ in range(50):
        found = space.repaired(random.uniform(0, 0.6, 4).tolist(), None, random)
        assert space.contains(found)
        assert abs(removed(space, space.settled(found)) - space.budget) <= shape.ffn_channel_parameters / 2


def test_repairs_follow_the_seed_where_claims_are_equal() -> None:
    space = Space.of(ladders_of(shape_of([layer_of()] * 6)), 0.3, step=0.05)

    def repaired(seed: int) -> Candidate:
        return space.repaired([0.9] * 6, None, np.random.default_rng(seed))

    assert space.level_sum % 5
    crowded = Space.of(ladders_of(shape_of([layer_of()] * 7)), 0.22, step=0.05)
    seeds = {crowded.repaired([0.9] * 7, None, np.random.default_rng(seed)) for seed in range(20)}
    assert len(seeds) > 1
    assert repaired(3) == repaired(3)
    assert crowded.uniform() == crowded.uniform()


def test_levels_are_shares_of_the_budget_and_rates_of_the_layer() -> None:
    small, large = layer_of(2, 1, 6), layer_of(8, 4, 24)
    space = Space.of(ladders_of(shape_of([small, large])), 0.25, step=0.05)
    assert space.level_sum * space.step == pytest.approx(0.25 * sum(costs.total for costs in space.layers))
    assert space.rate(0, 3) == pytest.approx(3 * space.step / space.layers[0].total)
    assert space.level(1, space.rate(1, 4)) == 4
    assert space.level(0, 7.0) == space.bounds[0][1]
    assert space.level(0, -7.0) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 0.0}, r"step of a rate must lie in \(0, 0\.5\], got 0\.0"),
        ({"step": math.nan}, r"step of a rate must lie in"),
        ({"ratio": 1.0}, "strictly between 0 and 1"),
        ({"granularity": "heads"}, "granularity must be one of layers, modules, got 'heads'"),
        ({"least": 0.6, "greatest": 0.4}, r"layer 0: the bounds .* ascending shares in 0\.\.1, got \(0\.6, 0\.4\)"),
        ({"greatest": 1.2}, r"layer 0: the bounds of a rate must be ascending shares"),
        ({"bounds": {2: (math.nan, 0.5)}}, r"layer 2: the bounds of a rate must be ascending shares"),
        ({"bounds": {4: (0.1, 0.5)}}, r"no layer 4 to set bounds for; the model has 4 layers"),
        ({"bounds": {-1: (0.1, 0.5)}}, r"no layer -1 to set bounds for"),
        ({"bounds": {1: (0.31, 0.34)}}, r"layer 1: no multiple of the step lies within its bounds; widen them"),
        ({"greatest": 0.25}, r"lose between 0\.0% and 25\.0% of the weights, not 30\.0%; widen the bounds"),
        ({"least": 0.35}, r"lose between 35\.0% and 90\.0% of the weights, not 30\.0%"),
        ({"protect_first": 2, "protect_last": 1, "greatest": 0.9}, r"between 0\.0% and 22\.5% .* protect fewer layers"),
    ],
)
def test_bounds_that_leave_no_room_are_refused(given: dict[str, Any], message: str) -> None:
    ladders = ladders_of(shape_of([layer_of()] * 4))
    arguments = {"ratio": 0.3, "step": 0.05, **given}
    with pytest.raises(InputError, match=message):
        Space.of(ladders, **arguments)


def test_bounds_of_single_layers_hold_and_protection_wins() -> None:
    ladders = ladders_of(shape_of([layer_of()] * 4))
    space = Space.of(ladders, 0.3, step=0.05, bounds={0: (0.2, 0.9), 2: (0.5, 0.6)}, protect_first=1)
    candidate = space.uniform()
    assert candidate.levels[0] == 0
    assert 0.5 - 1e-9 <= space.rate(2, candidate.levels[2]) <= 0.6 + 1e-9
    assert space.bounds[1] == (0, 18)


def test_the_least_ratios_have_a_space() -> None:
    space = Space.of(ladders_of(shape_of([layer_of()] * 2)), 1e-9)
    assert space.level_sum == 1
    assert space.contains(space.uniform())
