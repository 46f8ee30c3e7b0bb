"""Asking a language model, with the journal first: every question has a number, a seed and one recorded answer.

Answers are recorded as they come, and what became of them is derived from them. A search that is run again over its
journal therefore finds its answers there, in the order it asks, counts them as it did, and goes on with new ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Generic, TypeVar, final

import numpy as np
from pydantic import Field

from flap_export.searching.journal import Journal
from flap_export.searching.language.prompts import OperatorName
from flap_export.searching.language.proposers import Answer, Message, Proposer
from flap_export.storage import Value

HIGHEST_TEMPERATURE: Final = 1.2
WARMING: Final = 0.1
"""What a generation without progress adds to the temperature."""
DUPLICATE: Final = "is known already"
_SEEDS: Final = 2**31

R = TypeVar("R")
S = TypeVar("S")
Prompt = Callable[[Sequence[S], Sequence[str]], list[Message]]
"""Makes the messages that ask for what is missing, given what was wrong with the answer before."""


class Usage(Value):
    """What a language model was asked, and what it took."""

    questions: int = 0
    requests: int = 0
    """Sent for them, repeated ones too."""
    valid: int = 0
    invalid: int = 0
    """Proposals that could not be understood."""
    duplicate: int = 0
    """Proposals that were known already."""
    missing: int = 0
    """Proposals that were asked for and not in the answer."""
    filled: int = 0
    """What the conventional operators made instead."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = Field(default=0.0, ge=0)

    def plus(self, **counts: float) -> Usage:
        """With some counts added."""
        return Usage.model_validate({**self.model_dump(), **{k: getattr(self, k) + n for k, n in counts.items()}})

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """What the tokens come to, at prices per million of them."""
        return (self.prompt_tokens * prompt_price + self.completion_tokens * completion_price) / 1e6


@final
@dataclass(frozen=True)
class Fate(Generic[R]):
    """What became of one proposal."""

    raw: str
    value: R | None = None
    """What is made of it, where it can be used."""
    problem: str = ""
    repair: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How it was changed, as JSON."""

    def event(self) -> dict[str, Any]:
        """As the journal keeps it."""
        return {"raw": self.raw, "problem": self.problem or None, **self.repair}


@final
class Questions:
    """All questions of one search, in their order."""

    def __init__(
        self,
        proposer: Proposer,
        journal: Journal,
        random: np.random.Generator,
        *,
        max_attempts: int,
        temperature: float,
    ) -> None:
        """Begin with the first one.

        Args:
            proposer: answers what the journal does not.
            journal: holds the answers so far.
            random: draws the questions' seeds.
            max_attempts: questions for one thing, at most.
            temperature: of the answers, while there is progress.
        """
        self._proposer, self._journal, self._random = proposer, journal, random
        self._max_attempts, self._base = max_attempts, temperature
        self._best, self._idle = np.inf, 0
        self.usage = Usage()

    @property
    def temperature(self) -> float:
        """Rises while the best candidate stays the same."""
        return round(min(self._base + WARMING * self._idle, max(self._base, HIGHEST_TEMPERATURE)), 6)

    def observe(self, best: float) -> None:
        """Take note of the best fitness after a generation."""
        self._idle = 0 if best < self._best else self._idle + 1
        self._best = min(best, self._best)

    def fill_slots(
        self,
        operator: OperatorName,
        slots: Sequence[S],
        prompt: Prompt[S],
        fates_of: Callable[[str], Iterable[Fate[R]]],
    ) -> tuple[list[R], list[S]]:
        """Ask for one proposal per slot, and again for what is missing.

        Args:
            operator: that is asked for.
            slots: what proposals are wanted for.
            prompt: asks for some of them.
            fates_of: what becomes of the proposals in an answer, the first of which is for the first slot asked for.

        Returns:
            What came of it, and the slots that nothing came for.

        Raises:
            ProposerUnavailableError: nobody answers; the journal holds all answers so far.
            InputError: the proposer refuses, or the journal answers another question.
        """
        found: list[R] = []
        left, corrections = list(slots), list[str]()
        for _ in range(self._max_attempts):
            if not left:
                break
            answer = self._answered(operator, prompt(left, corrections))
            # Drawn one by one: what was not asked for is neither repaired nor taken.
            fates = list(islice(fates_of(answer.text), len(left)))
            self._journal.record_repairs(self.usage.questions, [fate.event() for fate in fates])
            found += [fate.value for fate in fates if fate.value is not None]
            self._count(answer, fates, len(left))
            corrections = _corrections(fates, len(left))
            left = [slot for place, slot in enumerate(left) if place >= len(fates) or fates[place].value is None]
        return found, left

    def count_filled(self, count: int) -> None:
        """Take note of what chance made instead."""
        self.usage = self.usage.plus(filled=count)

    def _answered(self, operator: OperatorName, messages: list[Message]) -> Answer:
        self.usage = self.usage.plus(questions=1)
        seed = int(self._random.integers(_SEEDS))
        question = {
            "number": self.usage.questions,
            "operator": operator,
            "messages": messages,
            "temperature": self.temperature,
            "seed": seed,
        }
        recorded = self._journal.answer(question)
        if recorded is not None:
            return Answer(**{field.name: recorded[field.name] for field in dataclasses.fields(Answer)})
        answer = self._proposer.answer(messages, temperature=self.temperature, seed=seed)
        self._journal.record_answer(question, dataclasses.asdict(answer))
        return answer

    def _count(self, answer: Answer, fates: Sequence[Fate[R]], wanted: int) -> None:
        duplicate = sum(fate.problem == DUPLICATE for fate in fates)
        valid = sum(fate.value is not None for fate in fates)
        self.usage = self.usage.plus(
            requests=answer.attempts,
            valid=valid,
            duplicate=duplicate,
            invalid=len(fates) - valid - duplicate,
            missing=wanted - len(fates),
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            seconds=answer.seconds,
        )


def _corrections(fates: Sequence[Fate[R]], wanted: int) -> list[str]:
    missing = [f"{wanted - len(fates)} of {wanted} were missing"] if len(fates) < wanted else []
    return missing + [f"number {place}: {fate.problem}" for place, fate in enumerate(fates, start=1) if fate.problem]
