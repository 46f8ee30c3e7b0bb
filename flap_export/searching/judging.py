"""What a search spends: candidates are judged on part of the text first, losses come from the journal where they can.

An evaluation is one look at one candidate on all of the text; a look at a quarter of it counts a quarter. All
strategies spend from the same account, so that their results can be set side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from flap_export.searching.fitness import FitnessName, Losses, fitness_value, tokens_counted
from flap_export.searching.journal import Journal, Key
from flap_export.searching.operators import Scored
from flap_export.searching.selection import best_first
from flap_export.searching.space import Candidate
from flap_export.storage import Value

_ROUNDING: Final = 1e-9


class CurvePoint(Value):
    """The best that was known at some time of a search."""

    evaluations: float
    fitness: float


@final
@dataclass
class Judge:
    """Judges candidates; see the module."""

    source: Losses
    journal: Journal
    fitness: FitnessName
    length: int
    """Tokens of a sequence."""
    stages: tuple[int, ...]
    """Sequences that a candidate has been seen on after each look; the last is all of them."""
    limit: float
    """Evaluations that may be spent."""
    latency: Callable[[Candidate], float] | None = None
    """The second objective, in ms."""
    spent: float = 0.0
    looks: int = 0
    """Candidates judged, on however little text."""
    curve: list[CurvePoint] = field(default_factory=list)
    seen: dict[Candidate, list[float]] = field(default_factory=dict)
    """Summed losses over the sequences of each stage so far."""

    @property
    def exhausted(self) -> bool:
        """Whether no new candidate can be seen on all of the text any more."""
        return not self.affordable(1)

    @property
    def last_stage(self) -> int:
        """The stage at which candidates have been seen on all of the text."""
        return len(self.stages) - 1

    def affordable(self, count: int, stage: int = 0) -> int:
        """How many of `count` candidates can be seen at a stage, with enough left to see one on all of the text.

        Args:
            count: candidates that were seen at all stages before.
            stage: the next one.
        """
        look, rest = self._share(stage), 1 - self.stages[stage] / self.stages[-1]
        return min(count, max(int((self.limit - self.spent - rest) / look + _ROUNDING), 0))

    def affordable_whole(self, count: int) -> int:
        """How many of `count` new candidates can be seen on all of the text."""
        return min(count, max(int(self.limit - self.spent + _ROUNDING), 0))

    def judged(self, candidates: Sequence[Candidate], stage: int) -> list[Scored]:
        """See candidates on the text up to a stage; what was seen already costs nothing.

        Returns:
            All of them, best first.
        """
        for looked in range(stage + 1):
            first, last = (0, *self.stages)[looked], self.stages[looked]
            wanted = [candidate for candidate in dict.fromkeys(candidates) if self._looks_at(candidate) == looked]
            keys = {candidate: (candidate, first, last) for candidate in wanted}
            losses = self._losses(list(keys.values()))
            for candidate in wanted:
                self.looks += not looked
                self.seen.setdefault(candidate, []).append(losses[keys[candidate]])
                self.spent += self._share(looked)
                if looked == self.last_stage:
                    self._note(self.scored(candidate))
        return best_first([self.scored(candidate, stage) for candidate in dict.fromkeys(candidates)])

    def scored(self, candidate: Candidate, stage: int | None = None) -> Scored:
        """A candidate with its fitness on the text up to a stage; all of it by default."""
        sums = self.seen[candidate][: (self.last_stage if stage is None else stage) + 1]
        tokens = tokens_counted(self.fitness, self.stages[len(sums) - 1], self.length)
        latency = None if self.latency is None else self.latency(candidate)
        return Scored(candidate, fitness_value(self.fitness, sum(sums), tokens), latency)

    def finished(self) -> list[Scored]:
        """Everything that was seen on all of the text, best first."""
        return best_first([self.scored(candidate) for candidate, sums in self.seen.items() if self._complete(sums)])

    def _share(self, stage: int) -> float:
        """What a look at a stage costs."""
        return (self.stages[stage] - (0, *self.stages)[stage]) / self.stages[-1]

    def _complete(self, sums: Sequence[float]) -> bool:
        return len(sums) == len(self.stages)

    def _looks_at(self, candidate: Candidate) -> int:
        return len(self.seen.get(candidate, ()))

    def _losses(self, keys: Sequence[Key]) -> dict[Key, float]:
        known = {key: loss for key in keys if (loss := self.journal.loss(key)) is not None}
        missing = [key for key in keys if key not in known]
        if missing:
            _, first, last = missing[0]
            measured = self.source.losses([candidate for candidate, _, _ in missing], first, last)
            found = dict(zip(missing, measured, strict=True))
            self.journal.record_losses(found)
            known |= found
        return known

    def _note(self, found: Scored) -> None:
        if not self.curve or found.fitness < self.curve[-1].fitness:
            self.curve.append(CurvePoint(evaluations=self.spent, fitness=found.fitness))


def narrowed(judge: Judge, candidates: Sequence[Candidate], survivors: Sequence[int]) -> list[Scored]:
    """Judge candidates stage by stage, fewer each time (EvoPress's selection by few, then more tokens).

    Args:
        judge: what they are judged by.
        candidates: new ones.
        survivors: how many are left after each stage but the last.

    Returns:
        Those that were seen on all of the text, best first; none where nothing may be spent any more.
    """
    left, found = list(candidates), list[Scored]()
    for stage, most in enumerate((len(left), *survivors)):
        left = left[: judge.affordable(min(most, len(left)), stage)]
        found = judge.judged(left, stage)
        left = [scored.candidate for scored in found]
    return found
