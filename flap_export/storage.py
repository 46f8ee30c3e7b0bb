"""Files that appear whole or not at all, their digests, and the base of every record saved as JSON."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from flap_export.errors import LARGEST_SEED, InputError, OutputError

READ_CHUNK_BYTES = 1 << 22
MANIFEST_NAME = "manifest.json"
SCRATCH_PREFIX = "flap-export-"
"""Beginning of the names of what stages keep in the folder for temporary files while they work."""
_PARTIAL = ".partial"
_KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "run.json": ("run.json",),
    "request.json": ("request.json",),
    "search.json": ("search.json",),
    "comparison.json": ("comparison.json",),
    "engine.json": ("engine.json",),
    "artifact.json": ("artifact.json",),
    "plan.json": ("plan.json", "config.json"),
    "evidence.json": ("evidence.json",),
}
"""Every kind of output directory by its marker, and the files it is known by. A directory is of the first kind all of
whose files it holds: runs, searches, artifacts and engines have a plan too, and a pruned checkpoint has evidence."""


Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
V = TypeVar("V", bound="Value")


class Value(BaseModel):
    """A frozen, typed part of a record. NaN and infinity are saved as strings, so that files stay strict JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")


def validated(kind: type[V], values: Mapping[str, Any]) -> V:
    """Make a value from what a user gave.

    Raises:
        InputError: a field is unknown or holds something it cannot; the message names it.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        name, context = ".".join(map(str, problem["loc"])), problem.get("ctx", {})
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        if not name:
            raise InputError(message) from error
        if problem["type"] == "literal_error":
            known = context["expected"].replace("'", "").replace(" or ", ", ")
            raise InputError(f"{name} must be one of {known}, got {problem['input']!r}") from error
        if problem["type"] == "extra_forbidden":
            raise InputError(f"there is no option {name}; known are {', '.join(kind.model_fields)}") from error
        raise InputError(f"{name} is {problem['input']!r}: {message}") from error


class Record(Value):
    """A frozen, typed record with a schema version; the stages exchange nothing else."""

    kind: ClassVar[str] = "record"
    schema_version: Literal[1] = 1

    def save(self, path: Path) -> None:
        """Write as JSON, under a temporary name first."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def check_output(cls, path: Path) -> None:
        """Whether `save` may write to `path`, to be asked before the work is done.

        Raises:
            OutputError: it is a directory, or a file of another kind, which is never replaced.
        """
        if path.is_dir() or not path.name:
            raise OutputError(f"the output '{path}' is a directory; name the file of a {cls.kind}")
        try:
            # Parsed only, not loaded: a record whose verdicts contradict its values is of this kind all the same.
            if path.exists():
                cls._parsed(path)
        except InputError as error:
            raise OutputError(
                f"the output '{path}' is a file and no {cls.kind}, and was not touched; name another"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a saved record.

        Raises:
            InputError: no such file, or not a record of this kind.
        """
        return cls._parsed(path)

    @classmethod
    def _parsed(cls, path: Path) -> Self:
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(f"no {cls.kind} at '{path}'") from error
        except IsADirectoryError as error:
            raise InputError(f"'{path}' is a directory, expected the file of a {cls.kind}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise InputError(f"'{path}' is not a valid {cls.kind}: {where}: {first['msg']}") from error


def digest_of_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return digest_of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file whole: under a temporary name, then renamed.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file that appears whole: yields a temporary sibling that takes the name `path` at the end.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write below `path` into `OutputError`, with what else can be done."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        is_scratch = _is_scratch(path)
        remedy = "set TMPDIR to a folder on a larger disk" if is_scratch else "choose another --output"
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full while writing '{path}'; nothing was left behind. Free some space or {remedy}"
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EFBIG):
            raise OutputError(f"'{path}' cannot be written: {os.strerror(number)}; {remedy}") from error
        raise


def _is_scratch(path: Path) -> bool:
    """Whether `path` lies in what a stage keeps in the folder for temporary files; other folders may be called so."""
    folder = Path(tempfile.gettempdir()).resolve()
    return any(above.parent == folder and above.name.startswith(SCRATCH_PREFIX) for above in path.resolve().parents)


def save_tensors(path: Path, kind: str, schema_version: int, tensors: Mapping[str, Any], header: Any) -> None:
    """Write tensors and a JSON header of some kind as safetensors, under a temporary name first."""
    from safetensors.torch import save_file

    text = json.dumps({"schema_version": schema_version, **header})
    with new_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={kind: text})


def load_tensors(path: Path, kind: str, schema_version: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and header that `save_tensors` wrote.

    Raises:
        InputError: no such file, another kind of file, or another schema version.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[kind])
            if header["schema_version"] != schema_version:
                raise ValueError(f"schema version {header['schema_version']}, expected {schema_version}")
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"no {kind} at '{path}'") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' holds no {kind} of this version ({error}); calibrate again") from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The operating system's error number, which safetensors only spells out and NumPy's `tofile` drops."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return int(match[1])
    return errno.ENOSPC if re.fullmatch(r"\d+ requested and \d+ written", str(error)) else None


@contextmanager
def new_directory(path: Path, marker: str) -> Iterator[Path]:
    """A directory that appears whole: yields a temporary sibling that takes the name `path` at the end.

    Args:
        path: where the directory shall be.
        marker: the file that identifies a directory of this kind (`plan.json`, `artifact.json`); one of the same kind
            may be replaced, anything else is never touched, other kinds of outputs included.

    Raises:
        OutputError: `path` holds something else, the disk is full, or the folder cannot be written.
    """
    check_output(path, marker)
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with writing_errors(path):
        _clear_leftovers(path)
        partial.mkdir(parents=True)
        held = _hold(partial)
        try:
            yield partial
            _swap(partial, path)
        finally:
            os.close(held)
            shutil.rmtree(partial, ignore_errors=True)


def _clear_leftovers(path: Path) -> None:
    """Remove what killed processes left beside `path`; what one that is still at work holds stays."""
    name = glob.escape(path.name)
    for retired in path.parent.glob(f".{name}.retired-*"):
        # Killed between the two renames: what stood there goes back.
        shutil.rmtree(retired, ignore_errors=True) if path.exists() else retired.rename(path)
    for leftover in path.parent.glob(f".{name}.partial-*"):
        try:
            os.close(_hold(leftover))
        except OSError:
            continue
        shutil.rmtree(leftover, ignore_errors=True)


def _hold(directory: Path) -> int:
    """A descriptor that locks a directory; the operating system lets go of it when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make an output directory that grows in place, and hold it.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    with writing_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            held = _hold(directory)
        except BlockingIOError as error:
            raise OutputError(f"another run is at work in '{directory}'; wait for it or name another") from error
    try:
        yield
    finally:
        os.close(held)


def check_output(path: Path, marker: str, *, in_place: bool = False) -> None:
    """Whether `path` may become an output directory of the kind that `marker` identifies; asked before any work.

    Args:
        path: where the directory shall be.
        marker: see `new_directory`.
        in_place: whether the directory grows where it is, instead of taking its name when it is whole.

    Raises:
        OutputError: it is a file, the working directory, a directory that holds something else, or where nothing can
            be written.
    """
    if path.is_file():
        raise OutputError(f"the output '{path}' is a file; name a directory")
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"the output {str(path)!a} is no UTF-8, which records need; name another") from error
    if Path.cwd().is_relative_to(path.resolve()):
        raise OutputError(f"the output '{path}' is where you work, and would be replaced; name a directory below it")
    if not in_place and path.is_mount():
        raise OutputError(f"the output '{path}' is a mount point, which cannot be replaced; name a directory below it")
    _check_writable(path, path if in_place else path.resolve().parent)
    # What a killed process left half-written may go.
    if not path.exists() or all(entry.name.startswith(".") and _PARTIAL in entry.name for entry in path.iterdir()):
        return
    if (other := _what_else(path, marker)) is not None:
        raise OutputError(
            f"the output directory '{path}' holds something else ({other} in it), and nothing was touched; "
            "name an empty or a new directory"
        )


def _what_else(path: Path, marker: str) -> str | None:
    """Why a directory is not of the kind that `marker` identifies; None where it is."""
    own = _KINDS.get(marker, (marker,))
    if missing := [name for name in own if not (path / name).is_file()]:
        return f"no {missing[0]}"
    held = (kind for kind, names in _KINDS.items() if all((path / name).is_file() for name in names))
    found = next(held, marker)
    return None if found == marker else found


def _check_writable(path: Path, folder: Path) -> None:
    """Whether `folder`, or the nearest one above it that is there, can be written to."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "is read-only" if folder.is_dir() else "is no directory"
        raise OutputError(f"'{path}' cannot be written: '{folder}' {reason}; choose another --output")


def _swap(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; what stood there goes only after the new one is complete."""
    retired = path.with_name(f".{path.name}.retired-{os.getpid()}")
    if path.exists():
        path.rename(retired)
    try:
        partial.rename(path)
    except OSError:
        if retired.exists():
            retired.rename(path)
        raise
    shutil.rmtree(retired, ignore_errors=True)
