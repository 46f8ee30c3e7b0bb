"""From what a language model answered to what it proposes. Pure, and no text makes it raise.

Of an answer counts what is in the last tags that hold a list, or without any all of it. Lists are read by their
brackets alone: prose around them, code fences, keys, quotes and trailing commas do no harm, and of an answer that was
cut off the whole lists remain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar, final

from flap_export.searching.language.notation import Shares
from flap_export.searching.language.prompts import CANDIDATES_TAG, PARENTS_TAG

MAX_RAW: Final = 2000
"""Characters of a proposal that are kept; the answer has all of them."""
_TOKENS: Final = re.compile(r"[\[\]{},]|[^\[\]{},]+")

V = TypeVar("V")


@final
@dataclass(frozen=True)
class Proposal(Generic[V]):
    """One proposal of an answer: a value, or why there is none."""

    raw: str
    value: V | None = None
    problem: str = ""


@final
@dataclass
class _List:
    """A list of an answer, with its place in the text; values are as they were written."""

    start: int
    end: int
    values: list[str]
    lists: list[_List]


def candidates_from(text: str, layers: int, width: int) -> list[Proposal[Shares]]:
    """The candidates of an answer.

    Args:
        text: any.
        layers: of the model.
        width: rates of a layer: one, or attention's and the FFN's.
    """
    section, found = _lists(text, CANDIDATES_TAG, width, layers)
    return [_proposal(section, one, lambda one=one: _shares(one, layers, width)) for one in found]  # type: ignore[misc]


def parents_from(text: str, population: int) -> list[Proposal[tuple[int, int]]]:
    """The pairs of an answer, as places in a population that counts from 0; an answer counts from 1."""
    section, found = _lists(text, PARENTS_TAG, 1, 2)
    return [_proposal(section, one, lambda one=one: _pair(one, population)) for one in found]  # type: ignore[misc]


def _proposal(section: str, found: _List, read: Callable[[], V]) -> Proposal[V]:
    raw = section[found.start : found.end][:MAX_RAW]
    try:
        return Proposal(raw, read())
    except _Problem as problem:
        return Proposal(raw, problem=str(problem))


class _Problem(Exception):
    """Why a list is no proposal."""


def _lists(text: str, tag: str, depth: int, length: int) -> tuple[str, list[_List]]:
    """The text that counts, and its lists of values (depth 1) or of such lists (depth 2)."""
    # What a model thinks to itself is not its answer.
    text = text.rpartition("</think>")[2]
    for section in reversed(text.split(f"<{tag}>")[1:]):
        inner = section.partition(f"</{tag}>")[0]
        if found := _outermost(_tree(inner), depth):
            return inner, found
    found = _outermost(_tree(text), depth)
    # Prose has brackets of its own.
    fitting = [one for one in found if len(one.values) + len(one.lists) == length]
    return text, fitting or found


def _tree(text: str) -> _List:
    """All lists of a text, below one that stands for the text itself."""
    root = _List(0, len(text), [], [])
    opened = [root]
    for token in _TOKENS.finditer(text):
        if token[0] in "[{":
            opened.append(_List(token.start(), len(text), [], []))
            opened[-2].lists.append(opened[-1])
        elif token[0] in "]}":
            if len(opened) > 1:
                opened.pop().end = token.end()
        elif token[0] != "," and len(opened) > 1 and (value := token[0].rpartition(":")[2].strip(" \t\r\n\"'#`")):
            opened[-1].values.append(value)
    # The last value of a list that does not end may be cut off itself.
    if opened[-1].values:
        opened[-2].lists.pop()
    return root


def _outermost(root: _List, depth: int) -> list[_List]:
    """The lists of values; at depth 2 those whose lists are such, for which single lists of values stand too."""
    found, pending = [], [root]
    while pending:
        one = pending.pop()
        nested = any(inner.values for inner in one.lists) and not any(inner.lists for inner in one.lists)
        if one.values or (depth == 2 and nested):
            found.append(one)
        else:
            pending.extend(reversed(one.lists))
    return found


def _shares(found: _List, layers: int, width: int) -> Shares:
    if width == 1:
        if found.lists:
            raise _Problem("a rate is one number, not a list")
        rows: list[Sequence[str]] = [[value] for value in found.values]
    else:
        if found.values or any(len(pair.values) != width or pair.lists for pair in found.lists):
            raise _Problem("every layer takes a pair [rate of attention, rate of FFN]")
        rows = [pair.values for pair in found.lists]
    if len(rows) != layers:
        raise _Problem(f"{len(rows)} {'rate' if width == 1 else 'pair'}{'s' * (len(rows) != 1)} for {layers} layers")
    return _as_shares([[_number(value) for value in row] for row in rows])


def _as_shares(rows: list[list[float]]) -> Shares:
    """Clip to 0..1; where most values are above 1, they are percent."""
    values = [abs(value) for row in rows for value in row if value]
    if max(values, default=0.0) > 100:
        raise _Problem(f"{max(values):g} is no share of a layer")
    scale = 100.0 if sum(value > 1 for value in values) * 2 > len(values) else 1.0
    return tuple(tuple(min(max(value / scale, 0.0), 1.0) for value in row) for row in rows)


def _pair(found: _List, population: int) -> tuple[int, int]:
    numbers = [_number(value) for value in found.values]
    if len(numbers) != 2 or found.lists:
        raise _Problem(f"two parents make a pair, not {len(numbers) + len(found.lists)}")
    for number in numbers:
        if not number.is_integer() or not 1 <= number <= population:
            raise _Problem(f"there is no candidate {number:g}; they are numbered 1 to {population}")
    one, other = (int(number) - 1 for number in numbers)
    if one == other and population > 1:
        raise _Problem(f"candidate {one + 1} cannot cross with itself")
    return one, other


def _number(value: str) -> float:
    try:
        number = float(value.removesuffix("%")) / (100.0 if value.endswith("%") else 1.0)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _Problem(f"'{value[:20]}' is not a number")
    return number
