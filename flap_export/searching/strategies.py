"""How candidates come about: the searches that share a space, an account of evaluations and a journal.

random        candidates from nowhere
evolutionary  one parent, offspring by level switches (EvoPress, arXiv 2410.14649): the conventional search
population    Self-Pruner's loop (arXiv 2502.14413, section 3): a population, mutated and crossed by chance or by a
              language model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np

from flap_export.progress import Progress, no_progress
from flap_export.searching.judging import Judge, narrowed
from flap_export.searching.operators import Conventional, Operators, Scored
from flap_export.searching.selection import best_first
from flap_export.searching.space import Candidate

StrategyName = Literal["evolutionary", "population", "random"]
OFFSPRING: Final = 16
"""Of one generation of the conventional search, and candidates of one round of the random one."""
NARROWING: Final = 4
"""One candidate in so many goes on from a stage to the next."""


@final
@dataclass(frozen=True)
class Task:
    """What a strategy works on."""

    judge: Judge
    operators: Operators
    chance: Conventional
    start: Sequence[Candidate]
    """Known candidates to begin with, such as uniform rates."""
    population: int = 30
    mutations: int = 10
    crossovers: int = 10
    """Of one generation of a population."""
    progress: Progress = no_progress

    def generation_done(self, number: int, scored: Sequence[Scored]) -> None:
        """Have a generation's results on the disk, and tell about it."""
        best = best_first(scored)[0]
        judge = self.judge
        summary = {"evaluations": round(judge.spent, 6), "looks": judge.looks, "best": best.fitness}
        judge.journal.finish_generation(number, summary)
        self.operators.observe(best.fitness)
        self.progress("evaluations", round(judge.spent), round(judge.limit))


def evolutionary(task: Task) -> None:
    """Keep the best candidate; its offspring differ from it by one to three level switches.

    Many are seen on little text, few on more, and what is left on all of it. The parent stays unless it is beaten.
    """
    judge = task.judge
    parent = _begun(task)[0]
    generation = 0
    while not judge.exhausted:
        offspring = task.chance.mutated([parent] * OFFSPRING, judge.seen)
        finished = narrowed(judge, offspring, _survivors(len(judge.stages)))
        if not finished:
            return
        parent = best_first([parent, *finished])[0]
        generation += 1
        task.generation_done(generation, [parent])


def randomly(task: Task) -> None:
    """Draw candidates anew every time, and narrow them down as the conventional search does."""
    judge, generation = task.judge, 0
    best = _begun(task)[:1]
    while not judge.exhausted:
        finished = narrowed(judge, task.chance.initial(OFFSPRING, judge.seen), _survivors(len(judge.stages)))
        if not finished:
            return
        best = best_first([*best, *finished])[:1]
        generation += 1
        task.generation_done(generation, best)


def population(task: Task) -> None:
    """Mutate and cross a population, and keep the best of parents and children.

    A child that is worse on part of the text than everybody in the population is seen no further.
    """
    judge, operators = task.judge, task.operators
    start = list(dict.fromkeys(task.start))[: task.population]
    known = {**judge.seen, **dict.fromkeys(start)}
    members = _seen_whole(judge, [*start, *operators.initial(task.population - len(start), known)])
    task.generation_done(0, members)
    generation = 0
    while not judge.exhausted:
        parents = [members[place % len(members)] for place in range(task.mutations)]
        children = operators.mutated(parents, judge.seen)
        known = {**judge.seen, **dict.fromkeys(children)}
        children += operators.crossed(operators.parents(members, task.crossovers), known)
        if not children:
            return
        finished = _not_hopeless(judge, children, members)
        members = best_first([*members, *finished])[: task.population]
        generation += 1
        task.generation_done(generation, members)


STRATEGIES: Final[Mapping[StrategyName, Callable[[Task], None]]] = {
    "evolutionary": evolutionary,
    "population": population,
    "random": randomly,
}


def _begun(task: Task) -> list[Scored]:
    return _seen_whole(task.judge, list(dict.fromkeys(task.start)) or task.chance.initial(1, ()))


def _seen_whole(judge: Judge, candidates: Sequence[Candidate]) -> list[Scored]:
    return judge.judged(candidates[: judge.affordable_whole(len(candidates))], judge.last_stage)


def _survivors(stages: int) -> list[int]:
    return [max(OFFSPRING // NARROWING ** (stage + 1), 1) for stage in range(stages - 1)]


def _not_hopeless(judge: Judge, children: Sequence[Candidate], members: Sequence[Scored]) -> list[Scored]:
    """Judge children stage by stage; those that are worse than all members at a stage go no further."""
    left, found = list(children), list[Scored]()
    for stage in range(len(judge.stages)):
        found = judge.judged(left[: judge.affordable(len(left), stage)], stage)
        if judge.latency is None and stage < judge.last_stage:
            worst = max(judge.scored(member.candidate, stage).fitness for member in members)
            found = [scored for scored in found if scored.fitness <= worst]
        left = [scored.candidate for scored in found]
    return found


def seeded(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for every purpose."""
    return np.random.default_rng([seed, *purpose.encode()])
