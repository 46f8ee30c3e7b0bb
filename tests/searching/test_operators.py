"""Operators by chance: everything they make lies in the space and is new."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spaces import ladders_of, layer_of, shape_of, spaces

from flap_export.searching.operators import MAX_SWITCHES, Conventional, Scored
from flap_export.searching.space import GRANULARITIES, Candidate, Granularity, Space


def scored(candidates: list[Candidate]) -> list[Scored]:
    return [Scored(candidate, float(place)) for place, candidate in enumerate(candidates)]


def generation(space: Space, seed: int) -> list[list[Candidate]]:
    """An initial population, its children and their mutants."""
    operators = Conventional(space, np.random.default_rng(seed))
    first = operators.initial(4, ())
    population = scored(first)
    children = operators.crossed(operators.parents(population, 3), first)
    mutants = operators.mutated(population, [*first, *children])
    return [first, children, mutants]


@given(space=spaces(), seed=st.integers(0, 99))
def test_every_candidate_lies_in_the_space_and_none_comes_twice(space: Space, seed: int) -> None:
    first, children, mutants = generation(space, seed)
    everything = [*first, *children, *mutants]
    assert all(space.contains(candidate) for candidate in everything)
    assert len(set(everything)) == len(everything)
    assert 1 <= len(first) <= 4
    assert len(children) <= 3
    assert len(mutants) <= len(first)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_seed_decides(granularity: Granularity) -> None:
    space = Space.of(ladders_of(shape_of([layer_of(8, 4)] * 6)), 0.3, granularity=granularity, splitting="scores")
    assert generation(space, 1) == generation(space, 1)
    assert generation(space, 1) != generation(space, 2)
    assert [len(part) for part in generation(space, 1)] == [4, 3, 4]


@given(space=spaces(granularity="layers", step=0.17), seed=st.integers(0, 9))
def test_small_spaces_are_found_whole_and_then_give_nothing_new(space: Space, seed: int) -> None:
    ranges = [range(low, high + 1) for low, high in space.bounds]
    if math.prod(map(len, ranges)) > 500:
        return
    there = {space.completed(levels) for levels in itertools.product(*ranges) if sum(levels) == space.level_sum}
    operators = Conventional(space, np.random.default_rng(seed))
    if len(there) <= 3:
        assert set(operators.initial(10 * len(there), ())) == there
    assert operators.initial(3, there) == []
    assert operators.crossed([(Scored(space.uniform(), 0.0),) * 2], there) == []
    assert operators.mutated([Scored(space.uniform(), 0.0)], there) == []


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_mutant_is_a_neighbour_of_its_parent_and_not_the_parent(granularity: Granularity) -> None:
    space = Space.of(ladders_of(shape_of([layer_of(8, 4)] * 8)), 0.3, granularity=granularity, splitting="scores")
    operators = Conventional(space, np.random.default_rng(0))
    parent, attention_alone = Scored(space.uniform(), 0.0), 0
    for _ in range(200):
        (mutant,) = operators.mutated([parent], ())
        assert mutant != parent.candidate
        moved = [abs(a - b) for a, b in zip(mutant.levels, parent.candidate.levels, strict=True)]
        assert sum(moved) <= 2 * MAX_SWITCHES
        attention_alone += not any(moved)
        if granularity == "modules":
            kept = [
                a == b for a, b, far in zip(mutant.attention, parent.candidate.attention, moved, strict=True) if not far
            ]
            assert kept.count(False) <= MAX_SWITCHES
    assert (attention_alone > 0) == (granularity == "modules")


def test_switches_spare_what_their_bounds_hold() -> None:
    """Two layers are free, of which one is at its end: the switch that is left is the only one drawn."""
    ladders = ladders_of(shape_of([layer_of()] * 4))
    space = Space.of(ladders, 0.3, step=0.1, bounds={1: (0.3, 0.3)}, greatest=0.6, protect_last=1)
    assert space.bounds == ((0, 6), (3, 3), (0, 6), (0, 0))
    operators = Conventional(space, np.random.default_rng(0))
    parent = space.completed([6, 3, 3, 0])
    for _ in range(20):
        (mutant,) = operators.mutated([Scored(parent, 0.0)], ())
        assert mutant.levels in {(6 - moved, 3, 3 + moved, 0) for moved in range(1, 4)}


def test_children_take_after_both_parents() -> None:
    """Where parents agree on every level but two, a child has one of the two candidates' levels."""
    space = Space.of(ladders_of(shape_of([layer_of()] * 6)), 0.3, step=0.05)
    operators = Conventional(space, np.random.default_rng(0))
    one, other = (space.completed([6, 6, 6, 6, *ends]) for ends in ((3, 9), (9, 3)))
    children = {operators.crossed([(Scored(one, 0.0), Scored(other, 1.0))], ())[0] for _ in range(60)}
    assert {one, other} <= children
    for child in children:
        assert space.contains(child)
        assert max(abs(level - 6) for level in child.levels) <= 3


def test_attention_is_inherited_with_its_level() -> None:
    ladders = ladders_of(shape_of([layer_of(8, 4)] * 4))
    space = Space.of(ladders, 0.4, step=0.05, granularity="modules", splitting="uniform")
    levels = space.uniform().levels
    one, other = (space.completed(levels, [attention] * 4) for attention in (1, 3))
    operators = Conventional(space, np.random.default_rng(0))
    children = [operators.crossed([(Scored(one, 0.0), Scored(other, 1.0))], ())[0] for _ in range(30)]
    assert all(set(child.attention) <= {1, 3} for child in children)
    assert len({child.attention for child in children}) > 2


def test_tournaments_favour_the_front() -> None:
    space = Space.of(ladders_of(shape_of([layer_of()] * 6)), 0.3)
    operators = Conventional(space, np.random.default_rng(0))
    population = scored(operators.initial(10, ()))
    pairs = operators.parents(population, 300)
    places = [parent.fitness for pair in pairs for parent in pair]
    # The lesser of two places out of ten is 2.85 on average, one alone 4.5.
    assert 2.5 < float(np.mean(places)) < 3.2
    assert set(places) == set(range(10))
