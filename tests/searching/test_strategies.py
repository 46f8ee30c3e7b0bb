"""How searches spend, choose and improve, on losses that are known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flap_export.allocation.ladders import Ladder, LayerLadders
from flap_export.searching.journal import Journal
from flap_export.searching.judging import Judge, narrowed
from flap_export.searching.operators import Conventional, Scored
from flap_export.searching.selection import best_first, pareto_front
from flap_export.searching.space import Candidate, Space
from flap_export.searching.strategies import STRATEGIES, Task, _not_hopeless, seeded

LAYERS = 12
TOKENS = 8


def ladder(steps: int, cost: int) -> Ladder:
    each = np.arange(steps)
    return Ladder(each, each + 1, np.full(steps, cost), np.ones(steps))


def space_of(layers: int = LAYERS, **options: Any) -> Space:
    both = LayerLadders(ladder(4, 300), ladder(80, 30))
    return Space.of([both] * layers, 0.3, **{"splitting": "uniform", **options})


@dataclass
class Rugged:
    """Every layer hurts by itself, steeply and by its own measure, and neighbours hurt each other.

    What part of the text says differs a little from what all of it does.
    """

    space: Space
    seed: int = 0
    calls: list[tuple[Candidate, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.weights = np.exp(random.normal(0, 1.5, len(self.space.layers)))
        self.pairs = random.uniform(0, 2, len(self.space.layers) - 1)

    def mean(self, candidate: Candidate) -> float:
        rates = np.array(self.space.rates(candidate)) + 0.002 * np.array(candidate.attention)
        return float((self.weights * rates**3).sum() + (self.pairs * rates[:-1] * rates[1:]).sum())

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        self.calls += [(candidate, first, last) for candidate in candidates]
        return [
            self.mean(candidate)
            * sum(1 + 0.05 * math.sin(sequence * sum(candidate.levels[::2])) for sequence in range(first, last))
            * TOKENS
            for candidate in candidates
        ]


_journals = count()


@contextmanager
def task_of(folder: Path, space: Space, losses: Any, *, seed: int = 0, **options: Any) -> Iterator[Task]:
    limits = {"stages": (4, 16), "limit": 60.0, "latency": None}
    own = {name: options.pop(name, default) for name, default in limits.items()}
    with Journal(folder / f"{next(_journals)}.jsonl", {}) as journal:
        judge = Judge(losses, journal, "kl", TOKENS, **own)
        chance = Conventional(space, seeded(seed, "test"))
        yield Task(judge, chance, chance, **{"start": (space.uniform(),), "population": 10, **options})


def found_by(strategy: str, folder: Path, losses: Any, space: Space, **options: Any) -> Judge:
    with task_of(folder, space, losses, **options) as task:
        STRATEGIES[strategy](task)  # type: ignore[index]
        return task.judge


strategies = pytest.mark.parametrize("strategy", STRATEGIES)
ALL_STAGES = pytest.mark.parametrize("stages", [(16,), (4, 16), (2, 7, 16), (3, 10)], ids=str)


@ALL_STAGES
@pytest.mark.parametrize("limit", [1, 1.5, 2.0, 9, 20.1, 57.35])
@strategies
def test_never_more_than_the_limit_and_every_look_counted(
    strategy: str, limit: float, stages: tuple[int, ...], tmp_path: Path
) -> None:
    """And no less than may still be seen whole; nothing is seen twice."""
    space = space_of()
    losses = Rugged(space)
    judge = found_by(strategy, tmp_path, losses, space, limit=limit, stages=stages)
    spent = sum((last - first) / stages[-1] for _, first, last in losses.calls)
    assert judge.spent == pytest.approx(spent)
    assert limit - 1 < judge.spent + 1e-9 <= limit + 2e-9
    assert judge.looks == len({candidate for candidate, _, _ in losses.calls})
    assert len(set(losses.calls)) == len(losses.calls)
    assert all(space.contains(candidate) for candidate in judge.seen)
    best = judge.finished()[0]
    assert best.fitness == min(judge.scored(c).fitness for c, sums in judge.seen.items() if len(sums) == len(stages))
    assert judge.curve[-1].fitness == best.fitness
    assert [point.fitness for point in judge.curve] == sorted({point.fitness for point in judge.curve}, reverse=True)
    assert judge.curve[-1].evaluations <= judge.spent + 1e-9


@strategies
def test_fitness_is_the_mean_over_all_tokens(strategy: str, tmp_path: Path) -> None:
    space = space_of()
    judge = found_by(strategy, tmp_path, losses := Rugged(space), space)
    for scored in judge.finished():
        (loss,) = losses.losses([scored.candidate], 0, 16)
        assert scored.fitness == pytest.approx(loss / (16 * TOKENS))


@strategies
def test_it_is_better_than_what_it_began_with(strategy: str, tmp_path: Path) -> None:
    space = space_of()
    for seed in range(4):
        judge = found_by(strategy, tmp_path, Rugged(space, seed), space, seed=seed, limit=150)
        assert judge.finished()[0].fitness < 0.95 * judge.scored(space.uniform()).fitness


@strategies
def test_a_seed_says_everything(strategy: str, tmp_path: Path) -> None:
    space = space_of(granularity="modules")
    runs = [found_by(strategy, tmp_path, Rugged(space), space, seed=seed, limit=40).seen for seed in (0, 0, 1)]
    assert list(runs[0].items()) == list(runs[1].items())
    assert runs[0].keys() != runs[2].keys()


def test_the_conventional_search_beats_random_search_at_equal_evaluations(tmp_path: Path) -> None:
    space = space_of()
    for seed in range(6):
        evolved, drawn = (
            found_by(strategy, tmp_path, Rugged(space, seed), space, seed=seed, limit=150).finished()[0].fitness
            for strategy in ("evolutionary", "random")
        )
        assert evolved < 0.9 * drawn


@strategies
def test_a_longer_search_begins_as_a_shorter_one(strategy: str, tmp_path: Path) -> None:
    """So that one that is finished can go on."""
    space = space_of()
    short, long = (found_by(strategy, tmp_path, Rugged(space), space, limit=limit).finished() for limit in (40, 90))
    assert {scored.candidate for scored in short[:3]} <= {scored.candidate for scored in long}
    assert long[0].fitness <= short[0].fitness


@strategies
def test_a_space_with_few_candidates_is_exhausted(strategy: str, tmp_path: Path) -> None:
    space = space_of(2, step=0.5, greatest=0.6)
    judge = found_by(strategy, tmp_path, Rugged(space), space, limit=500)
    assert judge.spent < 20


def test_a_population_begins_with_what_is_known_and_keeps_the_best(tmp_path: Path) -> None:
    space = space_of()
    losses = Rugged(space)
    known = Conventional(space, np.random.default_rng(9)).initial(3, ())
    with task_of(tmp_path, space, losses, start=(*known, known[0]), population=5, limit=5) as task:
        STRATEGIES["population"](task)
        assert list(task.judge.seen)[:3] == known
        assert len(task.judge.seen) == 5
        assert task.judge.spent == 5


def test_narrowing_goes_on_with_the_best_of_every_stage(tmp_path: Path) -> None:
    space = space_of()
    losses = Rugged(space)
    candidates = Conventional(space, np.random.default_rng(0)).initial(16, ())
    with task_of(tmp_path, space, losses, stages=(2, 8, 16)) as task:
        found = narrowed(task.judge, candidates, [4, 2])
        at = [[call[0] for call in losses.calls if call[2] == last] for last in (2, 8, 16)]
        assert [len(set(stage)) for stage in at] == [16, 4, 2]
        for stage, (seen, survivors) in enumerate(((at[0], at[1]), (at[1], at[2]))):
            fitness = {candidate: task.judge.scored(candidate, stage).fitness for candidate in seen}
            assert set(survivors) == set(sorted(fitness, key=fitness.__getitem__)[: len(survivors)])
        assert {scored.candidate for scored in found} == set(at[2])
        assert found == best_first(found)
        assert task.judge.spent == pytest.approx((16 * 2 + 4 * 6 + 2 * 8) / 16)


@pytest.mark.parametrize(("limit", "first"), [(0.99, 0), (1.0, 1), (1.3, 2), (1.99, 4), (2.0, 5)])
def test_what_is_begun_can_be_finished(limit: float, first: int, tmp_path: Path) -> None:
    """As many are seen on a quarter of the text as leave enough to see the best on all of it."""
    space = space_of()
    candidates = Conventional(space, np.random.default_rng(0)).initial(16, ())
    with task_of(tmp_path, space, Rugged(space), limit=limit) as task:
        found = narrowed(task.judge, candidates, [4])
        assert (task.judge.looks, len(found)) == (first, min(first, 1))
        assert task.judge.spent <= limit
        assert task.judge.exhausted


def test_the_hopeless_are_seen_no_further(tmp_path: Path) -> None:
    """Only those that are worse on the same part of the text than all members are."""
    space = space_of()
    losses = Rugged(space)
    drawn = Conventional(space, np.random.default_rng(0)).initial(20, ())
    ordered = sorted(drawn, key=losses.mean)
    with task_of(tmp_path, space, losses) as task:
        judge = task.judge
        members = judge.judged([ordered[3], ordered[8]], judge.last_stage)
        children = [candidate for candidate in ordered if candidate not in (ordered[3], ordered[8])]
        found = {scored.candidate for scored in _not_hopeless(judge, children, members)}
        worst = max(judge.scored(member.candidate, 0).fitness for member in members)
        assert found == {child for child in children if judge.scored(child, 0).fitness <= worst}
        assert 3 < len(found) < len(children)


def test_with_a_second_objective_nobody_is_hopeless(tmp_path: Path) -> None:
    space = space_of()
    losses = Rugged(space)
    ordered = sorted(Conventional(space, np.random.default_rng(0)).initial(6, ()), key=losses.mean)
    with task_of(tmp_path, space, losses, latency=lambda candidate: float(candidate.levels[0])) as task:
        members = task.judge.judged(ordered[:1], task.judge.last_stage)
        assert len(_not_hopeless(task.judge, ordered[1:], members)) == 5


def test_losses_come_from_the_journal_where_they_can(tmp_path: Path) -> None:
    space = space_of()
    candidates = Conventional(space, np.random.default_rng(0)).initial(5, ())
    found = []
    calls = []
    for _ in range(2):
        losses = Rugged(space)
        with Journal(tmp_path / "journal.jsonl", {}) as journal:
            judge = Judge(losses, journal, "kl", TOKENS, (4, 16), 50.0)
            judge.judged(candidates[:3], 0)
            found.append((judge.judged(candidates[1:], 1), judge.spent, judge.looks, judge.curve))
            calls.append(len(losses.calls))
    assert found[0] == found[1]
    assert calls == [3 + 2 + 4, 0]


numbers = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0])
scored_lists = st.lists(st.tuples(numbers, numbers), max_size=14).map(
    lambda pairs: [Scored(Candidate((number,), (0,)), *pair) for number, pair in enumerate(pairs)]
)


def dominates(one: Scored, other: Scored) -> bool:
    assert one.latency_ms is not None
    assert other.latency_ms is not None
    no_worse = one.fitness <= other.fitness and one.latency_ms <= other.latency_ms
    return no_worse and (one.fitness < other.fitness or one.latency_ms < other.latency_ms)


@given(scored_lists)
def test_the_front_is_whom_nobody_dominates(scored: list[Scored]) -> None:
    """One of those that are equal in both, the first by its levels."""
    expected = [
        found
        for found in scored
        if not any(dominates(other, found) for other in scored)
        and not any(
            (other.fitness, other.latency_ms) == (found.fitness, found.latency_ms) and other.candidate < found.candidate
            for other in scored
        )
    ]
    assert pareto_front(scored) == sorted(expected, key=lambda found: found.fitness)


@given(scored_lists, st.randoms())
def test_earlier_fronts_come_first_and_the_order_of_arrival_says_nothing(scored: list[Scored], random: Any) -> None:
    ordered = best_first(scored)
    assert sorted(ordered, key=lambda found: found.candidate) == scored
    for place, found in enumerate(ordered):
        assert not any(dominates(later, found) for later in ordered[place + 1 :])
    if len(front := pareto_front(scored)) > 2:
        assert {ordered[0], ordered[1]} == {front[0], front[-1]}
    shuffled = list(scored)
    random.shuffle(shuffled)
    assert best_first(shuffled) == ordered


@given(scored_lists)
def test_without_a_second_objective_fitness_alone_counts(scored: list[Scored]) -> None:
    alone = [replace(found, latency_ms=None) for found in scored]
    assert best_first(alone[::-1]) == sorted(alone, key=lambda found: (found.fitness, found.candidate))
    assert pareto_front(alone) == best_first(alone)[:1]


def test_within_a_front_the_lonely_come_first() -> None:
    points = [(0.0, 10.0), (0.1, 9.8), (0.2, 9.6), (5.0, 3.0), (10.0, 0.0)]
    scored = [Scored(Candidate((number,), (0,)), *point) for number, point in enumerate(points)]
    assert [found.candidate.levels[0] for found in best_first(scored)] == [0, 4, 3, 2, 1]


def test_generators_for_different_purposes() -> None:
    drawn = {(seed, name): seeded(seed, name).random() for seed in (0, 1) for name in ("random", "population")}
    assert len(set(drawn.values())) == 4
    assert drawn[1, "random"] == seeded(1, "random").random()
