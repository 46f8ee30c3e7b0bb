"""Journals: cut anywhere they open again, and nobody else's is taken for one's own."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flap_export.errors import InputError, OutputError
from flap_export.searching.journal import JOURNAL_NAME, SCHEMA_VERSION, Journal, check_of
from flap_export.searching.space import Candidate

SETTINGS: dict[str, Any] = {"ratio": 0.3, "seed": 0, "text": {"digest": "aé\r\u2028b"}}
ONE, OTHER = Candidate((3, 1), (0, 2)), Candidate((2, 2), (1, 1))
LOSSES = {(ONE, 0, 4): 1.25, (OTHER, 0, 4): math.inf, (ONE, 4, 8): 0.1 + 0.2}
QUESTION = {"prompt": "rates\r\nof each layer?", "generation": 1}


def written(path: Path) -> bytes:
    with Journal(path, SETTINGS) as journal:
        journal.record_losses(LOSSES)
        journal.record_answer(QUESTION, {"text": "[0.3]"})
        journal.append({"event": "note", "text": "of no effect"})
        journal.record_answer({**QUESTION, "generation": 2}, {"text": "none"})
        journal.finish_generation(1, {"best": 0.5})
    return path.read_bytes()


def test_a_line_that_finds_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the file tries to write the line once more."""

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.file.close()
            self.flush()

    path = tmp_path / JOURNAL_NAME
    written(path)
    journal = Journal(path, SETTINGS)
    monkeypatch.setattr(journal, "_file", Full(journal._file))
    with pytest.raises(OutputError, match=rf"the disk is full while writing '.*{JOURNAL_NAME}'"), journal:
        journal.append({"event": "note"})


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_what_was_written_comes_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / JOURNAL_NAME
    before = written(path)
    with Journal(path, SETTINGS) as journal:
        assert {key: journal.loss(key) for key in LOSSES} == LOSSES
        assert journal.loss((ONE, 0, 8)) is None
        first = journal.answer(QUESTION)
        assert first is not None
        assert first["text"] == "[0.3]"
        second = journal.answer({"generation": 2, "prompt": QUESTION["prompt"]})
        assert second is not None
        assert second["text"] == "none"
        assert journal.answer(QUESTION) is None
    assert path.read_bytes() == before
    assert [line["event"] for line in lines_of(path)] == [
        "search",
        *["loss"] * 3,
        "answer",
        "note",
        "answer",
        "generation",
    ]


def test_losses_are_known_as_soon_as_they_are_recorded(tmp_path: Path) -> None:
    with Journal(tmp_path / JOURNAL_NAME, SETTINGS) as journal:
        journal.record_losses(LOSSES)
        assert journal.loss((ONE, 4, 8)) == 0.1 + 0.2
        assert len(lines_of(journal.path)) == 4


def test_a_journal_that_was_cut_anywhere_goes_on(tmp_path: Path) -> None:
    """The line that was cut is dropped, the whole ones before it stay, and the next one starts a line."""
    path = tmp_path / JOURNAL_NAME
    whole = written(path)
    header = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = max(whole[:size].rfind(b"\n") + 1, header)
        with Journal(path, SETTINGS) as journal:
            journal.record_losses({(OTHER, 8, 9): 7.0})
            known = [key for key in LOSSES if journal.loss(key) is not None]
        assert known == list(LOSSES)[: max(whole[:kept].count(b"\n") - 1, 0)][: len(LOSSES)]
        after = path.read_bytes()
        assert after[:kept] == whole[:kept]
        added = json.loads(after[kept:])
        assert (added["levels"], added["sequences"], added["loss"]) == ([2, 2], [8, 9], 7.0)
        assert after.endswith(b"\n")


def test_an_answer_to_another_question_is_refused(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    written(path)
    with Journal(path, SETTINGS) as journal, pytest.raises(InputError, match="answers another question"):
        journal.answer({**QUESTION, "generation": 3})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({**SETTINGS, "seed": 1}, r"\(seed\)"),
        ({**SETTINGS, "ratio": 0.2, "text": {}}, r"\(ratio, text\)"),
        ({"ratio": 0.3, "text": SETTINGS["text"]}, r"\(seed\)"),
        ({**SETTINGS, "model": "m"}, r"\(model\)"),
    ],
)
def test_another_searchs_journal_is_refused_and_left_alone(
    settings: dict[str, Any], names: str, tmp_path: Path
) -> None:
    path = tmp_path / JOURNAL_NAME
    before = written(path)
    with pytest.raises(InputError, match=rf"a search with other settings {names}; name a new output directory"):
        Journal(path, settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b'{"event":', b"{}\r{}", b"[" * 9999])
def test_a_damaged_line_is_refused_and_left_alone(damage: bytes, number: int, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    lines = written(path).split(b"\n")
    lines[number - 1] = damage
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(InputError, match=rf"line {number} of the journal '.*' is damaged; begin a new search"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"event": "loss"},
        {"event": "loss", "levels": 3, "attention": [1], "sequences": [0, 1], "loss": 1.0},
        {"event": "loss", "levels": [[3]], "attention": [1], "sequences": [0, 1], "loss": 1.0},
        {"event": "loss", "levels": [3], "attention": [1], "sequences": [0], "loss": 1.0},
        {"event": "loss", "levels": [3], "attention": [1], "sequences": [0, 1], "loss": "much"},
        {"event": "answer", "text": "yes"},
    ],
)
def test_lines_that_lack_something_are_refused(line: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    whole = written(path)
    signed = {**line, "check": check_of(line, lines_of(path)[-1]["check"])}
    path.write_bytes(whole + json.dumps(signed).encode() + b"\n")
    number = len(lines_of(path))
    with pytest.raises(InputError, match=rf"line {number} of the journal '.*' is damaged"):
        Journal(path, SETTINGS)


@pytest.mark.parametrize(
    "line",
    [
        {"event": "loss", "schema_version": SCHEMA_VERSION, "settings": SETTINGS},
        {"event": "search", "schema_version": SCHEMA_VERSION + 1, "settings": SETTINGS},
        {"event": "search", "schema_version": 1, "settings": SETTINGS},
        {"event": "search", "schema_version": SCHEMA_VERSION},
        {"event": "search", "schema_version": SCHEMA_VERSION, "settings": [1]},
        {},
    ],
)
def test_files_of_another_kind_or_version_are_refused(line: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="is not a journal of this version; begin a new search"):
        Journal(path, SETTINGS)


def changed_digit(lines: list[bytes]) -> int:
    """In a loss, which is believed instead of measured."""
    lines[1] = lines[1].replace(b"1.25", b"1.24")
    return 2


def removed(lines: list[bytes]) -> int:
    del lines[2]
    return 3


def swapped(lines: list[bytes]) -> int:
    lines[2], lines[3] = lines[3], lines[2]
    return 3


def repeated(lines: list[bytes]) -> int:
    lines.insert(4, lines[3])
    return 5


def inserted(lines: list[bytes]) -> int:
    lines.insert(2, lines[2].replace(b"Infinity", b"0.001"))
    return 3


def header(lines: list[bytes]) -> int:
    lines[0] = lines[0].replace(b'"seed":0', b'"seed":1')
    return 1


def unsigned(lines: list[bytes]) -> int:
    event = json.loads(lines[4])
    del event["check"]
    lines[4] = json.dumps(event).encode()
    return 5


@pytest.mark.parametrize("tamper", [changed_digit, removed, swapped, repeated, inserted, header, unsigned])
def test_a_line_that_is_not_what_was_written_there_is_refused(
    tamper: Callable[[list[bytes]], int], tmp_path: Path
) -> None:
    path = tmp_path / JOURNAL_NAME
    whole = written(path)
    lines = whole.split(b"\n")
    number = tamper(lines)
    assert b"\n".join(lines) != whole
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=rf"line {number} of the journal '.*' is damaged; begin a new search"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == b"\n".join(lines)


def test_lines_that_are_added_later_go_on_from_the_last(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    written(path)
    for loss in (1.0, 2.0):
        with Journal(path, SETTINGS) as journal:
            journal.record_losses({(OTHER, 4, 8): loss})
    with Journal(path, SETTINGS) as journal:
        assert journal.loss((OTHER, 4, 8)) == 2.0


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path / "file" / "folder" / JOURNAL_NAME, SETTINGS)


def test_seconds_add_up_over_processes_and_those_of_repeated_generations_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("flap_export.searching.journal.time.monotonic", lambda: clock[0])
    path = tmp_path / JOURNAL_NAME
    with Journal(path, SETTINGS) as journal:
        for number in (0, 1):
            clock[0] += 5
            journal.finish_generation(number, {})
        clock[0] += 50
    with Journal(path, SETTINGS) as journal:
        assert journal.seconds == 10
        for number, taken in ((0, 1), (1, 1), (2, 7)):
            clock[0] += taken
            journal.finish_generation(number, {})
        assert journal.seconds == 17
