"""`manifest.json`: every file of a directory with size and SHA-256, what made it, and what it came from."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import Field

from flap_export.errors import ArtifactError, InputError
from flap_export.storage import MANIFEST_NAME, Record, Value, digest_of_file

_logger = logging.getLogger(__name__)

PACKAGES: Final = (
    "flap-export",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "polygraphy",
    "tensorrt",
    "tensorrt-rtx",
)
BESIDE: Final = ("report.html", "parity.json", "latency.json", "quality.json", "README.md", "LICENSE")
"""Files that later stages and people add to a directory, and that are no part of what was written there; in a run's own
directory they are."""
_RUN_NAME: Final = "run.json"
_SETTINGS: Final = frozenset({"generation_config.json"})
"""Files that users may edit, such as the tokens that end a text; whoever reads them checks them."""
_WEIGHTS: Final = (".data", ".engine", ".safetensors")
"""Ends of the names of files that are too large to be read through whenever something is opened."""


class FileEntry(Value):
    """Size and content of one file."""

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Measure a file."""
        return cls(size_bytes=path.stat().st_size, sha256=digest_of_file(path))

    def matches(self, path: Path) -> bool:
        """Whether the file is there and unchanged."""
        return path.is_file() and path.stat().st_size == self.size_bytes and digest_of_file(path) == self.sha256


class Manifest(Record):
    """What a directory holds."""

    kind: ClassVar[str] = "manifest"

    files: dict[str, FileEntry]
    """By path relative to the directory."""
    versions: dict[str, str]
    recipe: dict[str, Any] | None = None
    digests: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of what the files came from, up to the dense weights."""


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part, where installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def listed_files(directory: Path, within: str = "") -> Iterable[Path]:
    """The files below `directory`, or below `within` in it, sorted, without its own manifest and hidden ones."""
    for path in sorted((directory / within).rglob("*")):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and relative.as_posix() != MANIFEST_NAME:
            yield path


def added_files(directory: Path, written: Collection[str], within: str = "") -> list[str]:
    """Files below `directory`, or below `within` in it, that were not written with the rest.

    Another output that was put below it, with a manifest of its own, is no part of it; nor is what `BESIDE` names.
    """
    names = (path.relative_to(directory).as_posix() for path in listed_files(directory, within))
    return [name for name in names if name not in written and not _stands_beside(directory, name, written)]


def _stands_beside(directory: Path, name: str, written: Collection[str]) -> bool:
    path = directory / name
    if path.name in BESIDE and not (path.parent / _RUN_NAME).is_file():
        return True
    folders = (folder for folder in path.parents if folder != directory and folder.is_relative_to(directory))
    manifests = (folder / MANIFEST_NAME for folder in folders)
    return any(own.is_file() and own.relative_to(directory).as_posix() not in written for own in manifests)


def write_manifest(directory: Path, *, digests: Mapping[str, str], recipe: Mapping[str, Any] | None = None) -> Manifest:
    """Measure every file of `directory` and write its manifest."""
    manifest = Manifest(
        files={path.relative_to(directory).as_posix(): FileEntry.of(path) for path in listed_files(directory)},
        versions=installed_versions(),
        recipe=dict(recipe) if recipe is not None else None,
        digests=dict(digests),
    )
    manifest.save(directory / MANIFEST_NAME)
    return manifest


def note(path: Path) -> None:
    """Enter a file that a stage has added to a directory into the manifests that cover it, so that these still verify.

    These are the manifest of its own directory, and those of the directories around it, which list that manifest.
    """
    changed = [path.resolve()]
    for folder in changed[0].parents:
        try:
            manifest = Manifest.load(folder / MANIFEST_NAME)
        except (InputError, OSError):
            continue
        names = {file.relative_to(folder).as_posix(): file for file in changed}
        own = next(iter(names))
        if own not in manifest.files and _stands_beside(folder, own, manifest.files):
            continue
        files = {**manifest.files, **{name: FileEntry.of(file) for name, file in names.items()}}
        manifest.model_copy(update={"files": files}).save(folder / MANIFEST_NAME)
        changed.append(folder / MANIFEST_NAME)


def check_opened(directory: Path, needed: Collection[str], *, weights: bool, remedy: str) -> dict[str, str]:
    """Hold what is about to be run against what was written: sizes of all files, and the content of small ones.

    Args:
        directory: of an artifact or of engines.
        needed: what the manifest must list.
        weights: read the weights through too.
        remedy: what to do where something differs.

    Returns:
        SHA-256 of the files that were read through, by name.

    Raises:
        ArtifactError: a file is missing or is not what was written; the message names the first.
        InputError: the manifest cannot be read.
    """
    if not (directory / MANIFEST_NAME).is_file():
        _logger.warning("'%s' has no %s: whether it is as it was written is not known", directory, MANIFEST_NAME)
        return {}
    listed = Manifest.load(directory / MANIFEST_NAME).files
    entries = {name: entry for name, entry in listed.items() if name not in _SETTINGS}
    if unlisted := sorted(set(needed) - set(entries)):
        raise ArtifactError(f"the manifest of '{directory}' must list {unlisted[0]}, and does not; {remedy}")
    for name, entry in entries.items():
        if not (directory / name).is_file():
            raise ArtifactError(f"'{directory}' lacks {name}, which was written there; copy it too, or {remedy}")
        if (size := (directory / name).stat().st_size) != entry.size_bytes:
            raise _not_as_written(directory / name, f"{entry.size_bytes} bytes were, and it holds {size}", remedy)
    found = {name: digest_of_file(directory / name) for name in entries if weights or not name.endswith(_WEIGHTS)}
    for name, digest in found.items():
        if digest != entries[name].sha256:
            raise _not_as_written(directory / name, "its content differs", remedy)
    return found


def _not_as_written(path: Path, how: str, remedy: str) -> ArtifactError:
    return ArtifactError(f"'{path}' is not what was written there: {how}; {remedy}")


def verify(directory: str | Path) -> Manifest:
    """Check every file of a directory against its manifest, and that there are no others.

    Raises:
        ArtifactError: a file is missing or differs, or was not written with the rest; all of them are named.
        InputError: the directory has no manifest.
    """
    root = Path(directory)
    manifest = Manifest.load(root / MANIFEST_NAME)
    if not manifest.files:
        raise ArtifactError(
            f"the manifest of '{root}' must list what was written there, and lists no file; make it again"
        )
    problems = [
        f"{name} is {'changed' if (root / name).is_file() else 'missing'}"
        for name, entry in manifest.files.items()
        if not entry.matches(root / name)
    ]
    problems += [f"{name} is there and was not written with the rest" for name in added_files(root, manifest.files)]
    if problems:
        raise ArtifactError(f"'{root}' is not what was written there: {'; '.join(problems)}; make it again")
    return manifest
