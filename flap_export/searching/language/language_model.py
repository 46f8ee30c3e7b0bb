"""The operators of a search as Self-Pruner has them: a language model writes, chooses, crosses and mutates rates.

Self-Pruner (arXiv 2502.14413, section 3). What it answers is parsed, brought to the budget and taken where it is new;
what is missing after some questions comes from the conventional operators, so that any model at all, and any answer,
leaves a search that goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, TypeVar, final

import numpy as np

from flap_export.searching.journal import Journal
from flap_export.searching.language.asking import DUPLICATE, Fate, Prompt, Questions, Usage
from flap_export.searching.language.notation import Shares, distance, meant, shares, width
from flap_export.searching.language.parsing import Proposal, candidates_from, parents_from
from flap_export.searching.language.prompts import OperatorName, ask_crossover, ask_initial, ask_mutation, ask_parents
from flap_export.searching.language.proposers import Proposer
from flap_export.searching.operators import Conventional, Pair, Scored
from flap_export.searching.space import Candidate, Space

SHOWN: Final = 10
"""The best candidates so far that a prompt lists beside those it is about."""

S = TypeVar("S")


@final
class LanguageModel:
    """Operators by prompt; see `flap_export.searching.operators.Operators`.

    All of them raise ProposerUnavailableError where nobody answers, with everything so far in the journal, and
    InputError where the proposer refuses or the journal is another search's.
    """

    def __init__(
        self,
        space: Space,
        proposer: Proposer,
        journal: Journal,
        conventional: Conventional,
        random: np.random.Generator,
        *,
        max_attempts: int = 3,
        temperature: float = 0.7,
    ) -> None:
        """Begin a search, or begin it again over its journal.

        Args:
            space: that is searched.
            proposer: answers prompts.
            journal: holds the answers so far.
            conventional: makes what answers lack.
            random: of seeds and repairs; of the same state whenever the search is begun.
            max_attempts: questions of one call, at most.
            temperature: of answers; it rises while `observe` sees no progress.
        """
        self._space, self._conventional, self._random = space, conventional, random
        self._questions = Questions(proposer, journal, random, max_attempts=max_attempts, temperature=temperature)
        self._best: list[Scored] = []

    @property
    def usage(self) -> Usage:
        """Questions, tokens and seconds, of answers from the journal too."""
        return self._questions.usage

    @property
    def temperature(self) -> float:
        """Of the next question."""
        return self._questions.temperature

    def observe(self, best: float) -> None:
        """Take note of the best fitness after a generation: without progress, answers become bolder."""
        self._questions.observe(best)

    def initial(self, count: int, known: Collection[Candidate]) -> list[Candidate]:
        """A first population."""
        return self._proposed(
            "initial",
            range(count),
            known,
            lambda left, corrections: ask_initial(self._space, len(left), corrections),
            lambda left, taken: self._conventional.initial(len(left), taken),
        )

    def parents(self, population: Sequence[Scored], pairs: int) -> list[Pair]:
        """Pairs by their numbers in the population."""
        self._remember(population)
        found, left = self._questions.fill_slots(
            "parents",
            range(pairs),
            lambda left, corrections: ask_parents(self._space, population, len(left), corrections),
            lambda text: (_chosen(one, population) for one in parents_from(text, len(population))),
        )
        self._questions.count_filled(len(left))
        return found + self._conventional.parents(population, len(left))

    def crossed(self, pairs: Sequence[Pair], known: Collection[Candidate]) -> list[Candidate]:
        """Children of pairs."""
        self._remember([parent for pair in pairs for parent in pair])
        return self._proposed(
            "crossover",
            pairs,
            known,
            lambda left, corrections: ask_crossover(self._space, left, self._best, corrections),
            self._conventional.crossed,
        )

    def mutated(self, parents: Sequence[Scored], known: Collection[Candidate]) -> list[Candidate]:
        """Changed copies."""
        self._remember(parents)
        return self._proposed(
            "mutation",
            parents,
            known,
            lambda left, corrections: ask_mutation(self._space, left, self._best, corrections),
            self._conventional.mutated,
        )

    def _proposed(
        self,
        operator: OperatorName,
        slots: Sequence[S],
        known: Collection[Candidate],
        prompt: Prompt[S],
        fill: Callable[[Sequence[S], Collection[Candidate]], list[Candidate]],
    ) -> list[Candidate]:
        """A new candidate for every slot: proposed, or by chance."""
        taken = dict.fromkeys(known)
        layers, rates = len(self._space.layers), width(self._space)

        def fates(text: str) -> Iterator[Fate[Candidate]]:
            return (self._repaired(one, taken) for one in candidates_from(text, layers, rates))

        found, left = self._questions.fill_slots(operator, slots, prompt, fates)
        filled = fill(left, taken) if left else []
        self._questions.count_filled(len(filled))
        return found + filled

    def _repaired(self, proposal: Proposal[Shares], taken: dict[Candidate, None]) -> Fate[Candidate]:
        """Bring a proposal to the budget; what is new becomes taken."""
        if proposal.value is None:
            return Fate(proposal.raw, problem=proposal.problem)
        candidate = meant(self._space, proposal.value, self._random)
        assert self._space.contains(candidate), "what is repaired keeps the budget"
        moved = round(distance(proposal.value, shares(self._space, candidate)), 6)
        repair = {"levels": candidate.levels, "attention": candidate.attention, "moved": moved}
        if candidate in taken:
            return Fate(proposal.raw, problem=DUPLICATE, repair=repair)
        taken[candidate] = None
        return Fate(proposal.raw, candidate, repair=repair)

    def _remember(self, scored: Sequence[Scored]) -> None:
        distinct = {one.candidate: one for one in (*self._best, *scored)}
        self._best = sorted(distinct.values(), key=lambda one: one.fitness)[:SHOWN]


def _chosen(proposal: Proposal[tuple[int, int]], population: Sequence[Scored]) -> Fate[Pair]:
    if proposal.value is None:
        return Fate(proposal.raw, problem=proposal.problem)
    one, other = proposal.value
    return Fate(proposal.raw, (population[one], population[other]), repair={"parents": [one, other]})
