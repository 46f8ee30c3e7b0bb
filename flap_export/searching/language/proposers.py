"""Who answers the prompts of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict, final

from flap_export.errors import InputError, MissingRequirementError


class Message(TypedDict):
    """A turn of a conversation, as the OpenAI protocol has it."""

    role: Literal["system", "user", "assistant"]
    content: str


@final
@dataclass(frozen=True)
class Answer:
    """What came back, and what it took."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    attempts: int = 1


class ProposerUnavailableError(MissingRequirementError):
    """Nobody answers. What was found so far is in the journal; the same command goes on from there."""


class Proposer(Protocol):
    """Something that answers prompts."""

    def answer(self, messages: Sequence[Message], *, temperature: float, seed: int) -> Answer:
        """Answer a conversation.

        Raises:
            ProposerUnavailableError: it cannot, even after being asked again.
            InputError: it refuses for a reason that waiting does not mend.
        """
        ...


@final
class Recorded:
    """Nobody: a search whose journal holds all the answers it needs is replayed without a model."""

    def answer(self, messages: Sequence[Message], *, temperature: float, seed: int) -> Answer:
        """Refuse.

        Raises:
            InputError: always; only a question that the journal does not answer comes this far.
        """
        raise InputError(
            "the journal holds no further answers, and there is no language model to ask; replay with as many "
            "evaluations as the search had, or name the --proposer it was begun with"
        )
