"""The machinery of `run`: stages that are done once, and outputs that tell whether they still are.

A stage is done when its record in `.stages/` carries the key of what it would do now and its outputs are unchanged.
The key covers the stage's options and the digests of its inputs, not how they came about: a changed recipe redoes
exactly the stages whose inputs change. Outputs appear whole or not at all, so a run may be killed anywhere.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

from flap_export import __version__
from flap_export.errors import FlapExportError
from flap_export.manifest import FileEntry, added_files, listed_files
from flap_export.progress import Progress
from flap_export.recipe import Recipe
from flap_export.storage import MANIFEST_NAME, Record, digest_of_json, write_text, writing_errors

logger = logging.getLogger(__name__)

RUN_NAME: Final = "run.json"
STAGES_FOLDER: Final = ".stages"


class StageRecord(Record):
    """That a stage is done, and what it left."""

    kind: ClassVar[str] = "stage record"

    key: str
    outputs: dict[str, FileEntry]


@final
@dataclass(frozen=True)
class Run:
    """One recipe in one directory."""

    recipe: Recipe
    directory: Path
    progress: Progress


@final
@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    needs: tuple[str, ...]
    """Stages whose outputs it reads."""
    outputs: tuple[str, ...]
    """Files or folders it writes, relative to the run's directory."""
    options: Callable[[Recipe], Any]
    """What of the recipe it depends on, as JSON."""
    action: Callable[[Run], None]
    applies: Callable[[Recipe], bool] = lambda recipe: True
    """Whether the recipe asks for it; outputs of an earlier recipe that did go away."""


def perform(stage: Stage, current: Run, known: dict[str, str]) -> None:
    """Do a stage unless it is done; afterwards `known` has the digest of its outputs."""
    directory = current.directory
    if not stage.applies(current.recipe):
        _clear(stage, directory)
        known[stage.name] = digest_of_json({})
        return
    inputs = {need: known[need] for need in stage.needs}
    key = digest_of_json([stage.name, __version__, stage.options(current.recipe), inputs])
    record_path = directory / STAGES_FOLDER / f"{stage.name}.json"
    record = _valid_record(stage, record_path, key, directory)
    if record is None:
        logger.info("stage %s", stage.name)
        current.progress(stage.name, 0, 1)
        _clear_incomplete(stage, directory, record_path)
        record_path.unlink(missing_ok=True)
        with writing_errors(directory):
            stage.action(current)
        record = StageRecord(key=key, outputs=_measured(stage, directory))
        record.save(record_path)
        current.progress(stage.name, 1, 1)
    else:
        logger.info("stage %s is done already", stage.name)
    # A manifest tells versions too, on which nothing depends that reads the files.
    read = {name: entry.sha256 for name, entry in record.outputs.items() if not _is_manifest(name)}
    known[stage.name] = digest_of_json(read)


def _is_manifest(name: str) -> bool:
    return Path(name).name == MANIFEST_NAME


def _clear(stage: Stage, directory: Path) -> None:
    for name in (*stage.outputs, f"{STAGES_FOLDER}/{stage.name}.json"):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _clear_incomplete(stage: Stage, directory: Path, record_path: Path) -> None:
    """Remove outputs that have lost files: without the one that tells their kind, nothing would take their place."""
    try:
        record = StageRecord.load(record_path)
    except FlapExportError:
        return
    if not all((directory / name).is_file() for name in record.outputs if not _is_manifest(name)):
        _clear(stage, directory)


def _valid_record(stage: Stage, path: Path, key: str, directory: Path) -> StageRecord | None:
    """The record at `path` if it is of `key` and the outputs are what it lists, no more and no less."""
    if not path.is_file():
        return None
    try:
        record = StageRecord.load(path)
    except FlapExportError:
        return None
    if record.key != key:
        return None
    problems = [f"{name} is changed" for name, entry in record.outputs.items() if not entry.matches(directory / name)]
    folders = [name for name in stage.outputs if (directory / name).is_dir()]
    added = [name for folder in folders for name in added_files(directory, record.outputs, folder)]
    problems += [f"{name} was not written by it" for name in added]
    if problems:
        logger.warning("stage %s is done again: %s", stage.name, "; ".join(problems))
    return None if problems else record


def set_aside(folder: Path) -> Path:
    """Rename an output that cannot be used to a hidden name beside it, which no manifest lists and no stage clears."""
    names = (folder.with_name(f".{folder.name}.damaged-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    return aside


def _measured(stage: Stage, directory: Path) -> dict[str, FileEntry]:
    entries = {}
    for name in stage.outputs:
        path = directory / name
        for file in listed_files(directory, name) if path.is_dir() else filter(Path.is_file, [path]):
            entries[file.relative_to(directory).as_posix()] = FileEntry.of(file)
    return entries


def begin(current: Run) -> None:
    """Write the resolved recipe and clear what a killed run left half-written."""
    for pattern in (".*.partial*", ".*.retired-*"):
        for leftover in current.directory.rglob(pattern):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    write_text(current.directory / RUN_NAME, current.recipe.model_dump_json(indent=2, by_alias=True) + "\n")
