"""What a language model is told: the constraint as it is, candidates worst first, and the form of the answer."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scripted import LAYERS, prompt_of, scored, small_space

from flap_export.searching.language.notation import distance, meant, shares, width, written
from flap_export.searching.language.parsing import candidates_from
from flap_export.searching.language.prompts import ask_crossover, ask_initial, ask_mutation, ask_parents
from flap_export.searching.operators import Conventional, Scored
from flap_export.searching.space import GRANULARITIES, Granularity, Space


def population_of(space: Space, count: int = 4) -> list[Scored]:
    return scored(Conventional(space, np.random.default_rng(0)).initial(count, ()))


def listed(prompt: str) -> list[tuple[int, float]]:
    """Number and loss of the candidates, in the order they are listed."""
    return [(int(a), float(b)) for a, b in re.findall(r"(?m)^(\d+)\. loss ([\d.]+)", prompt)]


def test_the_task_states_layers_budget_grid_and_bounds() -> None:
    prompt = prompt_of(ask_initial(small_space(protect_first=1, greatest=0.7, bounds={3: (0.1, 0.2)}), 7))
    assert "a list of 6 rates between 0 and 1" in prompt
    assert "multiples of 0.05" in prompt
    assert "mean is exactly 0.3: they add up to 1.8" in prompt
    assert "in layer 1 must be 0." in prompt
    assert "in layer 2, 3, 5, 6 must lie between 0 and 0.7." in prompt
    assert "in layer 4 must lie between 0.1 and 0.2." in prompt
    assert "Write 7 candidates" in prompt


def test_bounds_that_all_layers_share_are_said_once() -> None:
    assert "The rate of every layer must lie between 0 and 0.9." in prompt_of(ask_initial(small_space(), 2))


def test_layers_of_different_sizes_are_weighed() -> None:
    prompt = prompt_of(ask_initial(small_space(uneven=True), 2))
    sizes = re.search(r"weighted by their sizes \[([^\]]+)\], is exactly 0.3\.", prompt)
    assert sizes
    # 2736 and 4896 weights.
    assert [float(size) for size in sizes[1].split(", ")] == pytest.approx([2736 / 3816, 4896 / 3816] * 3, abs=1e-3)


def test_pairs_of_rates_come_with_their_weights() -> None:
    assert "Attention holds 0.211 of a layer's weights" in prompt_of(ask_initial(small_space("modules"), 2))
    uneven = prompt_of(ask_initial(small_space("modules", uneven=True), 2))
    assert "[0.211, 0.118, 0.211, 0.118, 0.211, 0.118]" in uneven


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_candidates_come_worst_first_with_what_they_are_worth(granularity: Granularity) -> None:
    space = small_space(granularity)
    population = population_of(space)
    for messages in (
        ask_parents(space, population, 2),
        ask_crossover(space, [(population[0], population[2])], population),
        ask_mutation(space, population[1:3], population),
    ):
        prompt = prompt_of(messages)
        assert [number for number, _ in listed(prompt)] == [4, 3, 2, 1]
        assert [loss for _, loss in listed(prompt)] == pytest.approx(
            [p.fitness for p in reversed(population)], rel=1e-5
        )
        assert all(written(shares(space, one.candidate)) in prompt for one in population)


def test_children_are_asked_for_by_the_parents_numbers() -> None:
    space = small_space()
    best, second, third, worst = population_of(space)
    crossing = prompt_of(ask_crossover(space, [(worst, best), (second, worst)]))
    # The third is not shown, so that the worst has its number.
    assert "pairs of candidates: 3 and 1, 2 and 3." in crossing
    assert "the 2 candidates, one for every pair in that order" in crossing
    mutation = prompt_of(ask_mutation(space, [third, best, third], [second]))
    assert "in copies: 3, 1, 3." in mutation
    assert [number for number, _ in listed(mutation)] == [3, 2, 1]


def test_a_second_objective_is_shown() -> None:
    space = small_space()
    one, other = population_of(space, 2)
    timed = Scored(one.candidate, one.fitness, latency_ms=12.345)
    assert "latency 12.35 ms" in prompt_of(ask_parents(space, [timed, other], 1))


def test_every_prompt_ends_with_the_form_of_its_answer() -> None:
    space = small_space()
    population = population_of(space)
    tail = "<candidates>[[rate, ...], ...]</candidates>, with 6 entries in every candidate."
    assert prompt_of(ask_initial(space, 2)).endswith(tail)
    assert prompt_of(ask_mutation(space, population[:1])).endswith(tail)
    assert prompt_of(ask_crossover(space, [(population[0], population[1])])).endswith(tail)
    assert prompt_of(ask_parents(space, population, 1)).endswith("<parents>[[number, number], ...]</parents>.")
    assert prompt_of(ask_initial(small_space("modules"), 2)).endswith(
        tail.replace("[rate,", "[[rate of attention, rate of FFN],")
    )


def test_what_was_wrong_is_said_in_a_few_lines() -> None:
    space = small_space()
    assert "could not be used" not in prompt_of(ask_initial(space, 2))
    prompt = prompt_of(ask_initial(space, 2, [f"number {n}: 9 rates for 6 layers" for n in range(1, 9)]))
    assert "- number 5: 9 rates for 6 layers\n- and 3 more like these\n\nStep 1." in prompt
    assert "number 6" not in prompt


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("uneven", [False, True])
def test_what_is_written_means_the_same_candidate_when_read_back(granularity: Granularity, uneven: bool) -> None:
    space = small_space(granularity, uneven=uneven)
    for one in population_of(space, 30):
        (read,) = candidates_from(written(shares(space, one.candidate)), LAYERS, width(space))
        assert read.value is not None, read.problem
        assert meant(space, read.value, np.random.default_rng(0)) == one.candidate
        assert distance(read.value, shares(space, one.candidate)) <= 0.0005 * LAYERS * width(space)
