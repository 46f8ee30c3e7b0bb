"""What was changed after it was written is not run: every command that opens an artifact or engines says so."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tokens, tiny_checkpoint, tokens_of

from flap_export import manifest, storage
from flap_export.artifact import ARTIFACT_NAME
from flap_export.benchmarking import bench
from flap_export.building import build
from flap_export.building.record import ENGINE_NAME, Engine, EngineRecord, NetworkSummary, check_runnable
from flap_export.cli.inspecting import described
from flap_export.errors import ArtifactError
from flap_export.evaluation import evaluate
from flap_export.exporting import export
from flap_export.manifest import Manifest, write_manifest
from flap_export.runners import open_runner
from flap_export.validation import stage as validation_stage
from flap_export.validation import validate

DATA = "model.onnx.data"
Use = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opening")
    tiny_checkpoint("llama", folder / "model")
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "model" / "tokenizer.json").write_text("{}")
    export(folder / "model", folder / "onnx", max_length=48)
    save_tokens(folder / "text.npy", tokens_of(2, 12, seed=1))
    return folder


@pytest.fixture
def artifact(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "onnx", tmp_path / "onnx"))


@pytest.fixture(scope="module")
def reading(folder: Path) -> dict[str, Use]:
    """What reads the weights through."""
    options = {"decode_steps": 2, "prompt_length": 6, "threads": 1}
    quick = {"repeats": 3, "budget_s": 0.1, "sample_ms": 0.1, "prompt_lengths": (4,), "threads": 1}
    return {
        "validate": lambda path: validate(path, reference=folder / "model", **options),
        "bench": lambda path: bench(path, baseline=folder / "onnx", **quick),
        "bench's baseline": lambda path: bench(folder / "onnx", baseline=path, **quick),
        "evaluate": lambda path: evaluate(path, [str(folder / "text.npy")]),
    }


def opening(path: Path) -> None:
    with open_runner(path, threads=1) as runner:
        runner.prefill([[1, 2, 3]])


def inspecting(path: Path) -> None:
    described(str(path))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit_shape(path: Path) -> None:
    """A narrower FFN than the graph has: what was measured would be held against a wrong ideal."""
    text = path.read_text()
    width = json.loads(text)["shape"]["layers"][0]["ffn_channels"]
    path.write_text(text.replace(f'"ffn_channels": {width}', f'"ffn_channels": {width // 2}'))


@pytest.mark.parametrize("use", ["validate", "bench", "bench's baseline", "evaluate", "open", "inspect"])
@pytest.mark.parametrize(
    ("name", "damage", "how"),
    [
        (DATA, cut, r"\d+ bytes were, and it holds \d+"),
        ("model-last.onnx", cut, r"\d+ bytes were, and it holds \d+"),
        ("model.onnx", flip, "its content differs"),
        ("tokenizer.json", cut, "2 bytes were, and it holds 1"),
        (ARTIFACT_NAME, edit_shape, "its content differs"),
    ],
)
def test_a_changed_file_is_named(
    use: str, name: str, damage: Use, how: str, artifact: Path, reading: dict[str, Use]
) -> None:
    damage(artifact / name)
    with pytest.raises(ArtifactError, match=rf"{name}' is not what was written there: {how}; export again$"):
        {**reading, "open": opening, "inspect": inspecting}[use](artifact)


@pytest.mark.parametrize("use", ["validate", "bench", "bench's baseline", "evaluate"])
def test_changed_weights_are_found_by_what_judges_or_measures(
    use: str, artifact: Path, reading: dict[str, Use]
) -> None:
    flip(artifact / DATA)
    with pytest.raises(ArtifactError, match=rf"{DATA}' is not what was written there: its content differs; export"):
        reading[use](artifact)
    # Generating does not wait for gigabytes to be read twice.
    opening(artifact)


def test_engines_are_built_of_what_was_exported(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flap_export.building.stage.check_build", lambda *_: (None, None))
    flip(artifact / DATA)
    with pytest.raises(ArtifactError, match=rf"{DATA}' is not what was written there"):
        build(artifact, tmp_path / "engine", backend="tensorrt-rtx", targets=("sm80",))
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("name", [DATA, "model.onnx", "tokenizer.json"])
def test_a_file_that_was_left_behind_is_named(name: str, artifact: Path) -> None:
    (artifact / name).unlink()
    with pytest.raises(
        ArtifactError, match=rf"lacks {name}(, which was written there; copy it too, or ex|; export it)"
    ):
        opening(artifact)


def test_a_manifest_must_list_what_is_run(artifact: Path) -> None:
    listed = Manifest.load(artifact / "manifest.json")
    for gone in ("model.onnx", ARTIFACT_NAME):
        files = {name: entry for name, entry in listed.files.items() if name != gone}
        listed.model_copy(update={"files": files}).save(artifact / "manifest.json")
        with pytest.raises(ArtifactError, match=rf"must list {gone}, and does not; export again"):
            opening(artifact)


def test_without_a_manifest_it_runs_with_a_warning(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    (artifact / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        opening(artifact)
    assert "has no manifest.json: whether it is as it was written is not known" in caplog.text


def test_generation_settings_are_the_users(artifact: Path) -> None:
    (artifact / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    opening(artifact)
    (artifact / "generation_config.json").unlink()
    opening(artifact)


@pytest.mark.parametrize("use", ["validate", "bench", "evaluate"])
def test_nothing_large_is_read_through_twice(
    use: str, artifact: Path, reading: dict[str, Use], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[Path] = Counter()

    def counted(path: Path) -> str:
        seen[path] += 1
        return storage.digest_of_file(path)

    for module in (manifest, validation_stage):
        monkeypatch.setattr(module, "digest_of_file", counted)
    before = reading[use](artifact).digests
    assert seen[artifact / DATA] == seen[artifact / "model.onnx"] == seen[artifact / ARTIFACT_NAME] == 1
    # A report tells the same of an artifact that lost its manifest.
    (artifact / "manifest.json").unlink()
    assert reading[use](artifact).digests == before


def engine_at(path: Path, artifact: Path, weights: str | None) -> Path:
    path.mkdir()
    (path / "model-last.engine").write_bytes(b"engine")
    summary = NetworkSummary(layers=1, attentions=1, decomposable_attentions=0, cache_updates=0, caches={}, types={})
    exported = json.loads((artifact / ARTIFACT_NAME).read_text())
    EngineRecord(
        flavour="tensorrt-rtx",
        model="m",
        family="llama",
        dtype="float32",
        max_length=48,
        shape=exported["shape"],
        engines={"last": Engine(file="model-last.engine", size_bytes=6, weights_bytes=1, network=summary)},
        profiles=(),
        targets=("sm80",),
        weights=weights,
        settings={},
        digests={},
        versions={},
    ).save(path / ENGINE_NAME)
    write_manifest(path, digests={})
    return path


def test_engines_are_not_measured_against_an_artifact(artifact: Path, tmp_path: Path) -> None:
    engine = engine_at(tmp_path / "engine", artifact, weights=None)
    with pytest.raises(ArtifactError, match=r"onnx' runs on onnxruntime, '.*engine' on tensorrt-rtx; name two"):
        bench(engine, baseline=artifact)


def test_engines_are_checked_with_the_artifact_that_holds_their_weights(artifact: Path, tmp_path: Path) -> None:
    engine = engine_at(tmp_path / "engine", artifact, weights="../onnx")
    check_runnable(engine, weights=True)
    flip(artifact / DATA)
    check_runnable(engine)
    with pytest.raises(ArtifactError, match=rf"{DATA}' is not what was written there: its content differs; export"):
        check_runnable(engine, weights=True)
    flip(engine / "model-last.engine")
    check_runnable(engine)
    with pytest.raises(ArtifactError, match=r"model-last\.engine' is not what was written .*; build again"):
        check_runnable(engine, weights=True)
    cut(engine / "model-last.engine")
    with pytest.raises(ArtifactError, match=r"6 bytes were, and it holds 5; build again"):
        check_runnable(engine)
