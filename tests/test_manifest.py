from __future__ import annotations

from pathlib import Path

import pytest

from flap_export.errors import ArtifactError, InputError
from flap_export.manifest import Manifest, installed_versions, verify, write_manifest


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


def test_versions_tell_what_made_it() -> None:
    versions = installed_versions()
    assert {"python", "flap-export", "torch", "transformers", "onnx"} <= set(versions)
    assert all(version[0].isdigit() for version in versions.values())
