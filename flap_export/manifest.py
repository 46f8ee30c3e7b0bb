"""`manifest.json`: every file of a directory with size and SHA-256, what made it, and what it came from."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import Field

from flap_export.errors import ArtifactError
from flap_export.storage import MANIFEST_NAME, Record, Value, digest_of_file

PACKAGES: Final = (
    "flap-export",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "polygraphy",
    "tensorrt",
    "tensorrt-rtx",
)


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


def listed_files(directory: Path) -> Iterable[Path]:
    """The files below `directory`, sorted, without manifests of its own level and hidden ones."""
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and relative.as_posix() != MANIFEST_NAME:
            yield path


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


def verify(directory: str | Path) -> Manifest:
    """Check every file of a directory against its manifest.

    Raises:
        ArtifactError: a file is missing or differs; all of them are named.
        InputError: the directory has no manifest.
    """
    root = Path(directory)
    manifest = Manifest.load(root / MANIFEST_NAME)
    problems = [
        f"{name} is {'changed' if (root / name).is_file() else 'missing'}"
        for name, entry in manifest.files.items()
        if not entry.matches(root / name)
    ]
    if problems:
        raise ArtifactError(f"'{root}' is not what was written there: {'; '.join(problems)}; make it again")
    return manifest
