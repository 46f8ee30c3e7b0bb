"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file

from flap_export.errors import InputError, OutputError
from flap_export.storage import (
    Record,
    Value,
    check_output,
    digest_of_file,
    digest_of_json,
    load_tensors,
    locked,
    new_directory,
    new_file,
    save_tensors,
    validated,
    write_text,
    writing_errors,
)

MARKER = "mark.json"


class Sample(Record):
    kind: ClassVar[str] = "sample"

    value: float


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old_directory(path: Path) -> Path:
    path.mkdir()
    (path / MARKER).write_text("old")
    return path


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "note.txt", "one")
    write_text(tmp_path / "deep" / "note.txt", "zwölf")
    assert (tmp_path / "deep" / "note.txt").read_text(encoding="utf-8") == "zwölf"
    assert names(tmp_path / "deep") == ["note.txt"]


def test_a_file_that_fails_midway_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")

    def fill_the_disk() -> None:
        with new_file(path) as partial:
            partial.write_text("half of the n")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"the disk is full while writing.*note\.txt.*nothing was left behind"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        # What NumPy's tofile and safetensors really raise on a full disk.
        (OSError("1000000 requested and 131072 written"), "the disk is full"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written: Permission denied; choose another"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written: Read-only file system"),
    ],
)
def test_refusals_of_the_system_become_output_errors(error: Exception, message: str) -> None:
    with pytest.raises(OutputError, match=message) as caught, writing_errors(Path("out")):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError("odd"), FileNotFoundError(2, "gone"), SafetensorError("odd"), KeyError("k")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing_errors(Path("out")):
        raise error
    assert caught.value is error


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "out", MARKER) as directory:
        (directory / MARKER).write_text("new")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / MARKER).read_text() == "new"
    assert names(tmp_path / "a") == ["out"]


def test_a_directory_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    old = old_directory(tmp_path / "out")
    (old / "stale").write_text("")
    with new_directory(old, MARKER) as directory:
        (directory / MARKER).write_text("new")
        assert (old / MARKER).read_text() == "old"
    assert names(old) == [MARKER]
    assert (old / MARKER).read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("bug")])
def test_a_failure_midway_leaves_the_old_directory(tmp_path: Path, error: BaseException) -> None:
    old = old_directory(tmp_path / "out")

    def fail() -> None:
        with new_directory(old, MARKER) as directory:
            (directory / MARKER).write_text("new")
            raise error

    with pytest.raises((OutputError, KeyboardInterrupt, RuntimeError)):
        fail()
    assert (old / MARKER).read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_old_directory_comes_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_directory(tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Any) -> Path:
        if ".partial-" in self.name:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="cannot be written"), new_directory(old, MARKER):
        pass
    assert (old / MARKER).read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    output = tmp_path / "o[u]t"
    for name in (".o[u]t.partial-1", ".o[u]t.retired-1", ".out.partial-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text(name)
    with new_directory(tmp_path / "o[u]t", MARKER) as directory:
        # The last one before the kill stands again, and another process's work is left alone.
        assert (output / MARKER).read_text() == ".o[u]t.retired-1"
        at_work = tmp_path / ".o[u]t.partial-2"
        directory.rename(at_work)
        with new_directory(tmp_path / "o[u]t", MARKER) as other:
            assert names(at_work) == []
            (other / MARKER).write_text("other")
        at_work.rename(directory)
    assert names(tmp_path) == [".out.partial-1", "o[u]t"]
    assert names(output) == []


def test_what_cannot_be_written_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file' is no directory; choose another --output"):
        check_output(tmp_path / "file" / "deep" / "below", MARKER)
    with pytest.raises(OutputError, match="is no UTF-8, which records need; name another"):
        check_output(tmp_path / os.fsdecode(b"x\xff"), MARKER)
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(OutputError, match="is a mount point, which cannot be replaced; name a directory below it"):
        check_output(tmp_path / "volume", MARKER)
    check_output(tmp_path / "volume", MARKER, in_place=True)
    # Not by the folder's mode, which does not bind the super-user.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    check_output(tmp_path / "volume" / "new", MARKER)
    check_output(tmp_path / "volume", MARKER, in_place=True)
    for path, in_place in ((tmp_path / "new", False), (tmp_path / "new" / "new", True)):
        with pytest.raises(OutputError, match=r"cannot be written: .* is read-only; choose another --output"):
            check_output(path, MARKER, in_place=in_place)


def test_a_full_disk_of_temporary_files_names_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for folder, remedy in (
        ("tmp/flap-export-x", "set TMPDIR"),
        ("tmp/out", "choose another --output"),
        ("home/flap-export-runs", "choose another --output"),
    ):
        with pytest.raises(OutputError, match=remedy), writing_errors(tmp_path / folder / "states"):
            raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OutputError, match="File too large"), writing_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")


def test_a_directory_that_grows_is_one_process_s(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(OutputError, match="at work"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass


def test_what_is_no_output_directory_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="is a file; name a directory"):
        check_output(tmp_path / "file", MARKER)
    with pytest.raises(OutputError, match=r"holds something else \(no mark\.json in it\), and nothing was touched"):
        check_output(tmp_path / "photos", MARKER)
    with pytest.raises(OutputError, match="cannot be written"), new_directory(tmp_path / "file" / "below", MARKER):
        pass
    check_output(tmp_path / "empty", MARKER)
    check_output(tmp_path / "new", MARKER)
    check_output(tmp_path / "deep" / "new", MARKER, in_place=True)
    monkeypatch.chdir(tmp_path / "empty")
    for here in (Path(), Path("../empty"), tmp_path):
        with pytest.raises(OutputError):
            check_output(here, MARKER)
    with pytest.raises(OutputError, match="is where you work"):
        check_output(Path(), MARKER)


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    old_directory(tmp_path / "elsewhere")
    (tmp_path / "out").symlink_to("elsewhere")
    with new_directory(tmp_path / "out", MARKER) as directory:
        (directory / MARKER).write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / MARKER).read_text() == "new"
    assert names(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("value", [1.5, float("inf"), float("nan")])
def test_records_keep_every_number(tmp_path: Path, value: float) -> None:
    Sample(value=value).save(tmp_path / "sample.json")
    assert repr(Sample.load(tmp_path / "sample.json").value) == repr(value)


def test_digests(tmp_path: Path) -> None:
    data = os.urandom((1 << 22) + 5)
    (tmp_path / "data").write_bytes(data)
    assert digest_of_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    assert digest_of_json({"a": 1, "b": [2]}) == digest_of_json({"b": [2], "a": 1}) != digest_of_json({"a": 1})


class Options(Value):
    name: Literal["one", "two"] = "one"
    count: int = Field(default=1, ge=1)
    inner: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "three"}, "name must be one of one, two, got 'three'"),
        ({"colour": 1}, "there is no option colour; known are name, count, inner"),
        ({"count": "many"}, "count is 'many': input should be a valid integer"),
        ({"count": 0}, "count is 0: input should be greater than or equal to 1"),
        ({"inner": [1, "x"]}, r"inner\.1 is 'x': input should be a valid integer"),
    ],
)
def test_what_a_user_gave_is_checked_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validated(Options, values)


def test_valid_values_become_a_value() -> None:
    assert validated(Options, {"count": "3"}) == Options(count=3)


def test_tensors_keep_dtype_shape_and_header(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.safetensors"
    tensors = {
        "a": torch.arange(6, dtype=torch.float64).view(2, 3).T,
        "b": torch.tensor([1, 2]),
        "empty": torch.zeros(4, 0),
    }
    save_tensors(path, "sample", 3, tensors, {"layers": 2, "digests": {"w": "x"}})
    found, header = load_tensors(path, "sample", 3)
    assert header == {"schema_version": 3, "layers": 2, "digests": {"w": "x"}}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert names(path.parent) == ["t.safetensors"]


def test_tensors_of_another_kind_or_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match=r"no sample at .*t\.safetensors"):
        load_tensors(path, "sample", 1)
    save_tensors(path, "sample", 1, {"a": torch.zeros(1)}, {})
    for kind, version in (("other", 1), ("sample", 2)):
        with pytest.raises(InputError, match=rf"holds no {kind} of this version"):
            load_tensors(path, kind, version)
    with pytest.raises(InputError, match=r"schema version 1, expected 2"):
        load_tensors(path, "sample", 2)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="holds no sample of this version"):
        load_tensors(path, "sample", 1)
    for damage in (b"", b"no tensors at all", b"\xff" * 16):
        path.write_bytes(damage)
        with pytest.raises(InputError, match="holds no sample of this version"):
            load_tensors(path, "sample", 1)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError):
        load_tensors(path, "sample", 1)
