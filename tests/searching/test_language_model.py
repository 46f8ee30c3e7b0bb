"""Operators by prompt: whatever a model answers, candidates are new and meet the budget; searches resume and replay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import Scripted, bred, fitness_of, opened, operators_of, scored, small_space, wanted, well

from flap_export.errors import InputError
from flap_export.searching.language.asking import DUPLICATE, HIGHEST_TEMPERATURE, Usage
from flap_export.searching.language.proposers import ProposerUnavailableError, Recorded
from flap_export.searching.operators import Conventional, Scored
from flap_export.searching.space import GRANULARITIES, Granularity, Space

LAYERS_CLAIMED = "<candidates>[[0.3, 0.3, 0.3, 0.3, 0.3, 0.3]]</candidates>"


def lines(folder: Path, event: str) -> list[dict[str, Any]]:
    """Of one kind, without the check values, which depend on the lines before."""
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [{name: one[name] for name in one if name != "check"} for one in events if one["event"] == event]


def population_of(space: Space, count: int = 5) -> list[Scored]:
    return scored(Conventional(space, np.random.default_rng(7)).initial(count, ()))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_good_answers_are_taken_and_brought_to_the_budget(tmp_path: Path, granularity: Granularity) -> None:
    space, proposer = small_space(granularity, protect_first=1), Scripted()
    with opened(tmp_path) as journal:
        operators = operators_of(space, proposer, journal)
        found = bred(operators)
    assert len(found) == len(set(found)) == 5 + 2 * (3 + 3)
    assert all(space.contains(one) for one in found)
    usage = operators.usage
    assert usage.filled == usage.invalid == usage.missing == 0
    assert usage.valid == len(found) + 2 * 3
    assert usage.questions == len(proposer.prompts) == 1 + 2 * 3 + (usage.duplicate > 0)
    assert usage.prompt_tokens == sum(map(len, proposer.prompts))
    assert usage.seconds == pytest.approx(0.25 * sum(range(1, usage.questions + 1)))
    questions = [one["question"] for one in lines(tmp_path, "answer")]
    assert [one["seed"] for one in questions] == proposer.seeds
    assert [one["temperature"] for one in questions] == proposer.temperatures
    assert [one["messages"][0]["content"] for one in questions] == proposer.prompts
    assert [one["number"] for one in questions] == list(range(1, usage.questions + 1))
    repairs = lines(tmp_path, "repair")
    assert len(repairs) == usage.valid + usage.duplicate
    taken = [(tuple(r["levels"]), tuple(r["attention"])) for r in repairs if "levels" in r and not r["problem"]]
    assert taken == [(one.levels, one.attention) for one in found]
    assert all(one["moved"] > 0 for one in repairs if "levels" in one)


def test_a_proposal_that_needs_no_repair_does_not_move(tmp_path: Path) -> None:
    space = small_space()
    with opened(tmp_path) as journal:
        operators = operators_of(space, Scripted(lambda prompt, seed: LAYERS_CLAIMED), journal)
        (found,) = operators.initial(1, ())
    assert found == space.uniform()
    (repair,) = lines(tmp_path, "repair")
    assert repair == {
        "event": "repair",
        "question": 1,
        "raw": "[0.3, 0.3, 0.3, 0.3, 0.3, 0.3]",
        "problem": None,
        "levels": [6] * 6,
        "attention": list(found.attention),
        "moved": 0,
    }


def test_each_child_belongs_to_its_parents_and_only_missing_ones_are_asked_for_again(tmp_path: Path) -> None:
    space = small_space()
    one, two, three, *_ = population_of(space)
    answers = iter(
        (
            "<candidates>[[0.1, 0.2], [0, 0.3, 0.3, 0.3, 0.3, 0.6], [0.3, 0.3, x, 0.3, 0.3, 0.3]]</candidates>",
            "<candidates>[[0.6, 0.3, 0.3, 0.3, 0.3, 0]]</candidates>",
            "<candidates>[[0.3, 0.6, 0.3, 0.3, 0, 0.3]]</candidates>",
        )
    )
    proposer = Scripted(lambda prompt, seed: next(answers))
    with opened(tmp_path) as journal:
        operators = operators_of(space, proposer, journal)
        found = operators.mutated([one, two, three], ())
    assert [space.rates(child)[0] for child in found] == pytest.approx([0, 0.6, 0.3])
    first, second, third = proposer.prompts
    assert [wanted(prompt) for prompt in proposer.prompts] == [3, 2, 1]
    assert "in copies: 1, 2, 3." in first
    assert "in copies: 1, 3." in second
    assert "- number 1: 2 rates for 6 layers\n- number 3: 'x' is not a number" in second
    assert "in copies: 3." in third
    assert "- 1 of 2 were missing" in third
    assert operators.usage.model_dump(include={"questions", "valid", "invalid", "missing", "duplicate", "filled"}) == {
        "questions": 3,
        "valid": 3,
        "invalid": 2,
        "missing": 1,
        "duplicate": 0,
        "filled": 0,
    }


def test_what_is_known_or_proposed_twice_is_no_news(tmp_path: Path) -> None:
    space = small_space()
    twice = "<candidates>[[0, 0.3, 0.3, 0.3, 0.3, 0.6], [0, 0.3, 0.3, 0.3, 0.3, 0.6], [0.3,0.3,0.3,0.3,0.3,0.3]]"
    with opened(tmp_path) as journal:
        operators = operators_of(space, Scripted(lambda prompt, seed: twice), journal, max_attempts=1)
        found = operators.initial(3, {space.uniform()})
    assert len(set(found)) == 3
    assert space.uniform() not in found
    assert [one["problem"] for one in lines(tmp_path, "repair")] == [None, DUPLICATE, DUPLICATE]
    assert (operators.usage.valid, operators.usage.duplicate, operators.usage.filled) == (1, 2, 2)


def test_more_than_was_asked_for_is_left_out_and_still_new(tmp_path: Path) -> None:
    space = small_space()
    early, late = "[0, 0.3, 0.3, 0.3, 0.3, 0.6]", "[0.6, 0.3, 0.3, 0.3, 0.3, 0]"
    answers = iter([f"<candidates>[{early}, [1], {late}]</candidates>", f"<candidates>[{late}]</candidates>"])
    with opened(tmp_path) as journal:
        operators = operators_of(space, Scripted(lambda prompt, seed: next(answers)), journal)
        found = operators.initial(2, ())
    assert [space.rates(one)[0] for one in found] == pytest.approx([0, 0.6])
    assert [one["raw"] for one in lines(tmp_path, "repair")] == [early, "[1]", late]
    assert (operators.usage.valid, operators.usage.invalid, operators.usage.duplicate) == (2, 1, 0)


NONSENSE: dict[str, Callable[[str, int], str]] = {
    "empty": lambda prompt, seed: "",
    "prose": lambda prompt, seed: "I am sorry, I cannot help with layers [1, 2, 3].",
    "echo": lambda prompt, seed: prompt,
    "html": lambda prompt, seed: "<html><body>502</body></html>",
    "numbers": lambda prompt, seed: "[[NaN, 1e999, -5, 1e300, 0, 0]] [[1, 1]] [[7, 7]]",
    "bytes": lambda prompt, seed: np.random.default_rng(seed).bytes(400).decode("latin-1"),
    "surrogates": lambda prompt, seed: "<candidates>[[\ud800]]",
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_survived_by_the_conventional_operators(
    tmp_path: Path, kind: str, granularity: Granularity
) -> None:
    space, proposer = small_space(granularity), Scripted(NONSENSE[kind])
    with opened(tmp_path) as journal:
        operators = operators_of(space, proposer, journal, max_attempts=2)
        found = bred(operators, generations=1)
    assert len(set(found)) == 5 + 3 + 3
    assert all(space.contains(one) for one in found)
    usage = operators.usage
    assert usage.questions == len(proposer.prompts) == 4 * 2
    assert usage.valid == 0
    assert usage.filled == 5 + 3 + 3 + 3
    # Every question's slots were answered wrongly or not at all.
    assert usage.invalid + usage.duplicate + usage.missing == 2 * usage.filled


def test_parents_are_taken_by_their_numbers_and_filled_where_they_make_no_pair(tmp_path: Path) -> None:
    population = population_of(small_space())
    answers = iter(["<parents>[[1, 5], [9, 1], [2, 2]]</parents>", "<parents>[[3, 4]]</parents>", "I am done."])
    proposer = Scripted(lambda prompt, seed: next(answers))
    with opened(tmp_path) as journal:
        operators = operators_of(small_space(), proposer, journal)
        pairs = operators.parents(population, 3)
    assert pairs[:2] == [(population[0], population[4]), (population[2], population[3])]
    assert len(pairs) == 3
    assert set(pairs[2]) <= set(population)
    assert [wanted(prompt) for prompt in proposer.prompts] == [3, 2, 1]
    assert "- number 2: there is no candidate 9; they are numbered 1 to 5" in proposer.prompts[1]
    assert operators.usage.filled == 1
    assert [one.get("parents") for one in lines(tmp_path, "repair")] == [[0, 4], None, None, [2, 3]]


def test_nothing_is_asked_where_nothing_is_wanted(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        operators = operators_of(small_space(), Scripted(dies_at=0), journal)
        assert operators.initial(0, ()) == operators.mutated([], ()) == operators.crossed([], ()) == []
        assert operators.parents(population_of(small_space()), 0) == []
    assert operators.usage == Usage()


def test_the_best_so_far_are_shown_beside_those_in_question(tmp_path: Path) -> None:
    population, proposer = population_of(small_space(), 14), Scripted()
    with opened(tmp_path) as journal:
        operators = operators_of(small_space(), proposer, journal)
        operators.parents(population, 1)
        operators.mutated(population[-1:], ())
    shown = proposer.prompts[-1]
    assert all(f"loss {one.fitness:.6g}:" in shown for one in (*population[:10], population[-1]))
    assert f"loss {population[11].fitness:.6g}:" not in shown


def test_answers_become_bolder_while_the_best_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        operators = operators_of(small_space(), Scripted(), journal)
        seen = []
        for best in (5.0, 4.0, 4.0, 4.5, 3.0, *[3.0] * 9):
            operators.observe(best)
            seen.append(operators.temperature)
    assert seen[:6] == [0.7, 0.7, 0.8, 0.9, 0.7, 0.8]
    assert seen[-1] == HIGHEST_TEMPERATURE
    with opened(tmp_path / "hot") as journal:
        proposer = Scripted()
        operators_of(small_space(), proposer, journal, temperature=1.5).initial(1, ())
    assert proposer.temperatures == [1.5]


def halfway(prompt: str, seed: int) -> str:
    """Good, bad and missing proposals in turns."""
    return {0: "no idea", 1: well(prompt, seed)[:-60]}.get(seed % 3, well(prompt, seed))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_cut_at_any_line_a_search_goes_on_to_the_same_end(tmp_path: Path, granularity: Granularity) -> None:
    space = small_space(granularity)
    with opened(tmp_path) as journal:
        proposer = Scripted(halfway)
        operators = operators_of(space, proposer, journal)
        expected = bred(operators)
    whole = (tmp_path / "journal.jsonl").read_bytes()
    assert operators.usage.filled
    assert operators.usage.valid > 10
    cuts = whole.splitlines(keepends=True)
    for count in range(len(cuts) + 1):
        kept = b"".join(cuts[:count])
        # A kill may cut a line short too.
        (tmp_path / "journal.jsonl").write_bytes(kept + b"".join(cuts[count : count + 1])[:20].rstrip(b"\n"))
        answered = sum(b'"event":"answer"' in line for line in cuts[:count])
        with opened(tmp_path) as journal:
            again = Scripted(halfway)
            # Its clock goes on where the first one's stood.
            again.prompts = proposer.prompts[:answered]
            resumed = operators_of(space, again, journal)
            assert bred(resumed) == expected
        assert again.prompts == proposer.prompts
        assert resumed.usage == operators.usage
        assert (tmp_path / "journal.jsonl").read_bytes() == whole


def test_a_dead_proposer_loses_nothing(tmp_path: Path) -> None:
    space = small_space()
    with opened(tmp_path / "whole") as journal:
        expected = bred(operators_of(space, Scripted(halfway), journal))
    for _ in range(40):
        try:
            with opened(tmp_path / "paused") as journal:
                found = bred(operators_of(space, Scripted(halfway, dies_at=1), journal))
            break
        except ProposerUnavailableError:
            continue
    assert found == expected
    questions = [[one["question"] for one in lines(tmp_path / name, "answer")] for name in ("whole", "paused")]
    assert questions[0] == questions[1]
    assert lines(tmp_path / "whole", "repair") == lines(tmp_path / "paused", "repair")


def test_a_journal_is_replayed_without_a_model(tmp_path: Path) -> None:
    space = small_space()
    with opened(tmp_path) as journal:
        operators = operators_of(space, Scripted(halfway), journal)
        expected = bred(operators)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with opened(tmp_path) as journal:
        replayed = operators_of(space, Recorded(), journal)
        assert bred(replayed) == expected
        assert replayed.usage == operators.usage
        with pytest.raises(InputError, match=r"the journal holds no further answers.*name the --proposer"):
            replayed.initial(1, expected)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_journal_of_other_questions_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        operators_of(small_space(), Scripted(), journal).initial(3, ())
    with opened(tmp_path) as journal, pytest.raises(InputError, match="answers another question"):
        operators_of(small_space(), Recorded(), journal).initial(4, ())


def test_costs_are_per_million_tokens() -> None:
    usage = Usage(prompt_tokens=2_000_000, completion_tokens=500_000)
    assert usage.cost(2.5, 10.0) == pytest.approx(10.0)
    assert Usage.model_validate_json(usage.model_dump_json()) == usage


def test_a_model_that_knows_better_than_chance_finds_better(tmp_path: Path) -> None:
    def knowing(prompt: str, seed: int) -> str:
        if "<parents>" in prompt:
            return well(prompt, seed)
        random = np.random.default_rng(seed)
        rates = np.array([0.2, 0.25, 0.45, 0.45, 0.25, 0.2]) + random.normal(0, 0.05, (wanted(prompt), 6))
        return f"<candidates>{rates.tolist()}</candidates>"

    best = {}
    for name, script in (("knowing", knowing), ("useless", lambda prompt, seed: "?")):
        with opened(tmp_path / name) as journal:
            best[name] = min(map(fitness_of, bred(operators_of(small_space(), Scripted(script), journal))))
    assert best["knowing"] < best["useless"]
