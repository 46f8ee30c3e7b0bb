"""A search's journal: every prompt, answer, repair and measured loss as one JSON line, in the order they came about.

Strategies draw from seeded generators and ask for everything else here, so that the journal is all the state there
is: run again over its journal, a search finds its old answers and losses in place of new ones and stands where it
stopped. A line that a kill cut short is dropped. Every line carries a check value of itself and the line before it, so
that one that was changed, taken out, moved or put in is found.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, final

from flap_export.errors import DamagedSearchError, OtherSearchError, OutputError
from flap_export.searching.space import Candidate
from flap_export.storage import digest_of_json, writing_errors

JOURNAL_NAME: Final = "journal.jsonl"
SCHEMA_VERSION: Final = 2
_CHECK: Final = "check"
_CHECK_CHARACTERS: Final = 16
Key = tuple[Candidate, int, int]
"""A candidate, and the range of sequences it was seen on: the first, and the one after the last."""


@final
class Journal:
    """Append-only; see the module. Use as a context manager."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open a journal, or begin it.

        Args:
            path: the file.
            settings: all that a search depends on, as JSON; two searches may not share a journal.

        Raises:
            OtherSearchError: the journal is another search's.
            DamagedSearchError: a whole line of it is damaged, or it is of another version.
            OutputError: it cannot be written.
        """
        self.path = path
        self._losses: dict[Key, float] = {}
        self._answers: deque[tuple[str, dict[str, Any]]] = deque()
        self._repairs: Counter[int] = Counter()
        self._generations = -1
        self._seconds, self._since = 0.0, time.monotonic()
        self._check = ""
        own = {"event": "search", "schema_version": SCHEMA_VERSION, "settings": json.loads(json.dumps(dict(settings)))}
        with writing_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        try:
            self._lock()
            events, size, self._check = _read(path)
            if events:
                _check_same(path, events[0], own)
            for number, event in enumerate(events[1:], start=2):
                try:
                    self._take_in(event)
                except (KeyError, TypeError, ValueError) as error:
                    raise _damaged(path, number) from error
            with writing_errors(path):
                # Whatever a kill cut short goes, so that the next line starts a line.
                self._file.truncate(size)
            if not events:
                self.append(own)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing_errors(self.path):
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another process searches with the journal '{self.path}'; wait for it to end") from error

    @property
    def seconds(self) -> float:
        """Of the search up to its last generation: what earlier processes took for theirs, and this one since."""
        return self._seconds

    def loss(self, key: Key) -> float | None:
        """What was measured before, or None."""
        return self._losses.get(key)

    def record_losses(self, losses: Mapping[Key, float]) -> None:
        """Keep what was measured: losses summed over the tokens of the sequences."""
        for (candidate, first, last), loss in losses.items():
            place = {"levels": candidate.levels, "attention": candidate.attention, "sequences": [first, last]}
            self.append({"event": "loss", **place, "loss": loss})
        self._losses.update(losses)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """The next recorded answer, or None where there are no more.

        Raises:
            DamagedSearchError: it answers another question; another version or another search wrote the journal.
        """
        if not self._answers:
            return None
        digest, recorded = self._answers.popleft()
        if digest != digest_of_json(question):
            raise DamagedSearchError(
                f"the journal '{self.path}' answers another question than the one asked now; begin a new search"
            )
        return recorded

    def record_answer(self, question: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Keep a question and its answer."""
        self.append(
            {"event": "answer", "question_digest": digest_of_json(question), "question": dict(question), **answer}
        )

    def record_repairs(self, question: int, repairs: Sequence[Mapping[str, Any]]) -> None:
        """Keep what became of the proposals in an answer, except for what a search before this one kept."""
        for repair in repairs[self._repairs[question] :]:
            self.append({"event": "repair", "question": question, **repair})

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            OutputError: the disk is full.
        """
        # As it will be read: the check is of that.
        read = json.loads(json.dumps(dict(event)))
        check = check_of(read, self._check)
        with writing_errors(self.path):
            self._file.write(json.dumps({**read, _CHECK: check}, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
        self._check = check

    def finish_generation(self, number: int, summary: Mapping[str, Any]) -> None:
        """Write what a generation came to, unless that was done before, and have everything on the disk."""
        elapsed, self._since = time.monotonic() - self._since, time.monotonic()
        if number <= self._generations:
            return
        self._generations, self._seconds = number, self._seconds + elapsed
        seconds = round(self._seconds, 3)
        self.append({"event": "generation", "generation": number, "seconds": seconds, **summary})
        with writing_errors(self.path):
            os.fsync(self._file.fileno())

    def _take_in(self, event: dict[str, Any]) -> None:
        if event["event"] == "loss":
            candidate = Candidate(tuple(event["levels"]), tuple(event["attention"]))
            first, last = event["sequences"]
            self._losses[candidate, first, last] = float(event["loss"])
        elif event["event"] == "answer":
            self._answers.append((event["question_digest"], event))
        elif event["event"] == "repair":
            self._repairs[int(event["question"])] += 1
        elif event["event"] == "generation":
            self._generations, self._seconds = int(event["generation"]), float(event["seconds"])


def check_of(event: Mapping[str, Any], before: str) -> str:
    """The check value of a line, given that of the line before it; empty before the first."""
    return digest_of_json([before, event])[:_CHECK_CHARACTERS]


def _read(path: Path) -> tuple[list[dict[str, Any]], int, str]:
    """The whole lines of a journal, how many bytes they are, and the check value of the last.

    Raises:
        DamagedSearchError: the journal is of another version, or a line of it is damaged.
    """
    if not path.is_file():
        return [], 0, ""
    events, size = [], 0
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, number) from error
        if not isinstance(event, dict):
            raise _damaged(path, number)
        events.append(event)
        size += len(line) + 1
    if events:
        _check_version(path, events[0])
    return events, size, _checked(path, events)


def _checked(path: Path, events: list[dict[str, Any]]) -> str:
    """Take the check values off and hold them against the lines; the last one."""
    check = ""
    for number, event in enumerate(events, start=1):
        stated, check = event.pop(_CHECK, None), check_of(event, check)
        if stated != check:
            raise _damaged(path, number)
    return check


def _check_version(path: Path, first: Mapping[str, Any]) -> None:
    own_kind = ("search", SCHEMA_VERSION, dict)
    if (first.get("event"), first.get("schema_version"), type(first.get("settings"))) != own_kind:
        raise DamagedSearchError(f"'{path}' is not a journal of this version; begin a new search")


def _damaged(path: Path, number: int) -> DamagedSearchError:
    return DamagedSearchError(
        f"line {number} of the journal '{path}' is damaged; begin a new search in another directory"
    )


def _check_same(path: Path, found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if found == own:
        return
    there, here = found["settings"], own["settings"]
    changed = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    raise OtherSearchError(
        f"the journal '{path}' is of a search with other settings ({', '.join(changed)}); name a new output directory, "
        "or the settings it was begun with"
    )
