from __future__ import annotations

from pathlib import Path

import pytest

from flap_export.errors import ArtifactError, InputError
from flap_export.manifest import BESIDE, Manifest, installed_versions, note, verify, write_manifest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "deep" / "b.txt").write_text("b")
    (tmp_path / "deep" / "manifest.json").write_text("{}")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c").write_text("")
    write_manifest(tmp_path, digests={"weights": "12"}, recipe={"model": "m"})
    return tmp_path


def test_every_file_is_listed_with_size_and_content(directory: Path) -> None:
    manifest = verify(directory)
    assert sorted(manifest.files) == ["a.bin", "deep/b.txt", "deep/manifest.json"]
    assert manifest.files["a.bin"].size_bytes == 3
    # SHA-256 of "abc", FIPS 180-2.
    assert manifest.files["a.bin"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.digests == {"weights": "12"}
    assert manifest.recipe == {"model": "m"}
    assert manifest == Manifest.load(directory / "manifest.json")


def test_changed_and_missing_files_are_all_named(directory: Path) -> None:
    (directory / "a.bin").write_bytes(b"abd")
    (directory / "deep" / "b.txt").unlink()
    with pytest.raises(ArtifactError, match=r"a\.bin is changed; deep/b\.txt is missing; make it again"):
        verify(directory)


def test_a_file_of_another_size_and_a_directory_in_its_place(directory: Path) -> None:
    (directory / "a.bin").unlink()
    (directory / "a.bin").mkdir()
    (directory / "deep" / "b.txt").write_text("bb")
    with pytest.raises(ArtifactError, match=r"a\.bin is missing; deep/b\.txt is changed"):
        verify(directory)


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no manifest at"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "deep/c", "notes.json"])
def test_added_files_are_named(directory: Path, name: str) -> None:
    (directory / name).write_text("added")
    with pytest.raises(ArtifactError, match=rf"{name} is there and was not written with the rest; make it again"):
        verify(directory)
    # Unless a stage wrote it, and said so.
    note(directory / name)
    assert name in verify(directory).files


@pytest.mark.parametrize("name", BESIDE)
def test_records_and_pages_may_stand_beside_but_in_a_run_they_are_a_part(directory: Path, name: str) -> None:
    (directory / "deep" / name).write_text("beside")
    (directory / name).write_text("beside")
    note(directory / name)
    assert name not in verify(directory).files
    (directory / "run.json").write_text("")
    write_manifest(directory, digests={})
    assert name in verify(directory).files
    (directory / name).write_text("edited")
    with pytest.raises(ArtifactError, match=f"{name} is changed"):
        verify(directory)
    note(directory / name)
    (directory / "deep" / name).write_text("of its own")
    note(directory / "deep" / name)
    verify(directory)


def test_another_output_below_is_no_part_of_it(directory: Path) -> None:
    (directory / "onnx" / "deep").mkdir(parents=True)
    (directory / "onnx" / "deep" / "model").write_text("")
    write_manifest(directory / "onnx", digests={})
    verify(directory)
    (directory / "onnx" / "late.json").write_text("")
    note(directory / "onnx" / "late.json")
    verify(directory / "onnx")
    assert not any(name.startswith("onnx") for name in verify(directory).files)


def test_a_file_is_noted_by_all_manifests_around_it(tmp_path: Path) -> None:
    inner = tmp_path / "onnx" / "pruned"
    inner.mkdir(parents=True)
    (inner / "model").write_text("")
    for folder in (inner, tmp_path):
        write_manifest(folder, digests={"of": folder.name})
    (inner / "mine.json").write_text("")
    note(inner / "mine.json")
    for folder, name in ((inner, "mine.json"), (tmp_path, "onnx/pruned/mine.json")):
        assert name in verify(folder).files
        assert Manifest.load(folder / "manifest.json").digests == {"of": folder.name}


def test_a_manifest_that_lists_nothing_verifies_nothing(directory: Path) -> None:
    Manifest.load(directory / "manifest.json").model_copy(update={"files": {}}).save(directory / "manifest.json")
    with pytest.raises(ArtifactError, match="must list what was written there, and lists no file; make it again"):
        verify(directory)


def test_versions_tell_what_made_it() -> None:
    versions = installed_versions()
    assert {"python", "flap-export", "torch", "transformers", "onnx"} <= set(versions)
    assert all(version[0].isdigit() for version in versions.values())
