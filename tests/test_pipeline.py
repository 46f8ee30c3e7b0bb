from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import save_tokens, tiny_checkpoint, tokens_of

from flap_export.benchmarking.alignment import ALIGNMENT_NAME, AlignmentReport
from flap_export.errors import (
    ArtifactError,
    BudgetError,
    MissingRequirementError,
    OutputError,
    RecipeError,
    TextError,
)
from flap_export.manifest import Manifest, verify, write_manifest
from flap_export.pipeline import checking, resuming, running, stages
from flap_export.plan import PruningPlan
from flap_export.recipe import Recipe, recipe_from
from flap_export.reporting import report
from flap_export.searching import preparing
from flap_export.searching.fitness import LocalLosses
from flap_export.searching.space import Candidate
from flap_export.storage import locked

STAGE_NAMES = [stage.name for stage in running.STAGES if stage.name not in ("search", "build-dense", "build", "align")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_checkpoint("llama", folder / "model")
    save_tokens(folder / "calibration.npy", tokens_of(6, 12, seed=1))
    save_tokens(folder / "heldout.npy", tokens_of(4, 12, seed=2))
    return folder


@pytest.fixture
def recipe_of(inputs: Path) -> Callable[..., Recipe]:
    def build(**sections: dict[str, Any]) -> Recipe:
        values: dict[str, Any] = {
            "model": str(inputs / "model"),
            "calibrate": {"source": str(inputs / "calibration.npy")},
            "prune": {"ratio": 0.3},
            "evaluate": {"sources": [str(inputs / "heldout.npy")]},
            "export": {"max_length": 48},
            "validate": {"decode_steps": 4, "prompt_length": 12},
            "bench": {"repeats": 3, "prompt_lengths": [8], "budget_s": 1},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return recipe_from(values)

    return build


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages whose action ran, in order."""
    names: list[str] = []

    def noting(stage: resuming.Stage) -> resuming.Stage:
        def action(current: resuming.Run) -> None:
            names.append(stage.name)
            stage.action(current)

        return dataclasses.replace(stage, action=action)

    monkeypatch.setattr(running, "STAGES", tuple(noting(stage) for stage in running.STAGES))
    return names


def digest_in(directory: Path, name: str) -> str:
    return Manifest.load(directory / "manifest.json").digests[name]


def performed_by(names: list[str], recipe: Recipe, directory: Path) -> list[str]:
    names.clear()
    running.run(recipe, directory)
    return list(names)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("export", {"max_length": 65}),
        ("validate", {"prompt_length": 45}),
        ("validate", {"decode_steps": 47}),
        ("bench", {"prompt_lengths": [8, 49]}),
        ("bench", {"prompt_lengths": [0]}),
        ("build", {"backend": "tensorrt-rtx", "max_prompt": 49}),
    ],
    ids=str,
)
def test_lengths_that_cannot_fit_are_refused_before_anything_is_done(
    section: str, values: dict[str, Any], recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"section '{section}' of the recipe: "):
        running.run(recipe_of(**{section: values}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_every_stage_and_a_second_one_only_what_changed(
    tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str]
) -> None:
    directory = tmp_path / "run"
    result = running.run(recipe_of(), directory)
    assert performed == STAGE_NAMES
    assert result.breaches == ()
    assert result.parity.passed
    assert result.quality is not None
    assert result.quality.sources[0].dense_perplexity is not None
    assert result.latency is not None
    assert {phase.phase for phase in result.latency.phases} == {"prefill", "decode"}
    assert result.report.is_file()
    assert "onnx/pruned/model.onnx.data" in verify(directory).files

    assert performed_by(performed, recipe_of(), directory) == []
    assert performed_by(performed, recipe_of(bench={"repeats": 4}), directory) == ["bench"]
    after_ratio = ["prune", "export", "evaluate", "validate", "bench"]
    assert performed_by(performed, recipe_of(prune={"ratio": 0.4}), directory) == after_ratio
    after_export = ["export-dense", "export", "validate", "bench"]
    assert (
        performed_by(performed, recipe_of(prune={"ratio": 0.4}, export={"max_length": 40}), directory) == after_export
    )


def test_changed_rates_redo_what_depends_on_them(
    tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str]
) -> None:
    directory = tmp_path / "run"
    result = running.run(recipe_of(prune={"rates": [0.4, 0.2]}), directory)
    assert result.plan.ratio.requested == pytest.approx(0.3)
    assert "rates" in result.plan.digests
    assert performed_by(performed, recipe_of(prune={"rates": [0.4, 0.2]}), directory) == []
    after_rates = ["prune", "export", "evaluate", "validate", "bench"]
    assert performed_by(performed, recipe_of(prune={"rates": [0.2, 0.4]}), directory) == after_rates


SEARCH = {"evaluations": 8, "fitness_samples": 2, "step": 0.1}


def test_a_run_searches_rates_and_prunes_at_them(
    tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "gather", None)  # what the run has gathered must do
    directory = tmp_path / "run"
    result = running.run(recipe_of(search=SEARCH), directory)
    assert performed == ["calibrate", "search", *STAGE_NAMES[1:]]
    assert result.search is not None
    assert result.plan.ratio == result.search.ratio
    assert result.plan.ratio.requested == 0.3
    assert result.plan.ratio.achieved == pytest.approx(0.3, abs=0.02)
    assert PruningPlan.load(directory / "search" / "plan.json").layers == result.plan.layers
    assert "How the rates were searched" in result.report.read_text(encoding="utf-8")
    assert result.as_json()["search"]["chosen"] == "evolutionary-0"

    assert performed_by(performed, recipe_of(search=SEARCH), directory) == []
    assert performed_by(performed, recipe_of(search={**SEARCH, "evaluations": 12}), directory)[0] == "search"
    # Levels of another size: nothing of the old search is of use.
    assert performed_by(performed, recipe_of(search={**SEARCH, "step": 0.2}), directory)[0] == "search"
    without = ["prune", "export", "evaluate", "validate", "bench"]
    assert performed_by(performed, recipe_of(), directory) == without
    assert not (directory / "search").exists()
    assert "How the rates were searched" not in result.report.read_text(encoding="utf-8")


def test_a_search_that_was_killed_goes_on_and_one_of_another_text_begins_anew(
    tmp_path: Path, recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, asked = LocalLosses.losses, list[int]()

    def dying(self: LocalLosses, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        asked.append(len(candidates))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return losses(self, candidates, first, last)

    monkeypatch.setattr(LocalLosses, "losses", dying)
    text = save_tokens(tmp_path / "calibration.npy", tokens_of(6, 12, seed=1))
    recipe = recipe_of(calibrate={"source": text}, search=SEARCH)
    with pytest.raises(KeyboardInterrupt):
        running.run(recipe, tmp_path / "run")
    resumed = running.run(recipe, tmp_path / "run").search
    in_two_parts, lost = sum(asked), asked[2]
    asked[3:] = []
    whole = running.run(recipe, tmp_path / "other").search
    assert resumed is not None
    assert whole is not None
    assert resumed.runs[0].best == whole.runs[0].best
    assert in_two_parts == sum(asked[3:]) + lost, "a loss was measured twice"

    save_tokens(tmp_path / "calibration.npy", tokens_of(6, 12, seed=3))
    again = running.run(recipe, tmp_path / "run").search
    assert again is not None
    assert again.digests["calibration"] != whole.digests["calibration"]


@pytest.mark.parametrize(
    ("damaged", "found"),
    [
        ("runs/evolutionary-0/journal.jsonl", r"line 3 of the journal '.*' is damaged$"),
        ("request.json", r"request\.json' is not a valid search request: .*"),
    ],
)
def test_a_damaged_search_is_set_aside_and_begun_anew(
    damaged: str, found: str, tmp_path: Path, recipe_of: Callable[..., Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    directory, recipe = tmp_path / "run", recipe_of(search=SEARCH)
    whole = running.run(recipe, directory).search
    for number in (1, 2):
        path = directory / "search" / damaged
        lines = path.read_bytes().split(b"\n")
        lines[2] = b"{damaged}"
        path.write_bytes(b"\n".join(lines))
        caplog.clear()
        again = running.run(recipe, directory).search
        assert (directory / f".search.damaged-{number}" / damaged).read_bytes() == b"\n".join(lines)
        assert any(re.search(rf"\.search\.damaged-{number}': .*{found}", message) for message in caplog.messages)
        assert again is not None
        assert whole is not None
        assert again.runs[0].best == whole.runs[0].best
        verify(directory)


def test_a_damaged_output_is_made_again(tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str]) -> None:
    directory = tmp_path / "run"
    running.run(recipe_of(), directory)
    data = directory / "onnx/pruned/model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 0xFF
    data.write_bytes(content)
    # What export writes again is what it wrote before, so nothing after it needs to run.
    assert performed_by(performed, recipe_of(), directory) == ["export"]

    for name, stage in (("checkpoint/plan.json", "prune"), ("onnx/dense/artifact.json", "export-dense")):
        (directory / name).unlink()
        assert performed_by(performed, recipe_of(), directory) == [stage]

    stale = (directory / "manifest.json").read_text(encoding="utf-8")
    (directory / "manifest.json").write_text(stale[: len(stale) // 2], encoding="utf-8")
    assert performed_by(performed, recipe_of(), directory) == []
    verify(directory)
    # A manifest of other texts has no say in the page, and a page made again none in whether the run is whole.
    (directory / "manifest.json").write_text(stale.replace(digest_in(directory, "model"), "f" * 64), encoding="utf-8")
    page = running.run(recipe_of(), directory).report
    assert "f" * 64 not in page.read_text(encoding="utf-8")
    page.write_text("older", encoding="utf-8")
    report(directory)
    verify(directory)


def test_what_was_added_to_an_output_or_taken_from_its_manifest_is_made_good(
    tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str]
) -> None:
    directory = tmp_path / "run"
    running.run(recipe_of(), directory)
    checkpoint, dense = directory / "checkpoint", directory / "onnx/dense"
    expected = (checkpoint / "manifest.json").read_bytes()
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ArtifactError, match=r"checkpoint/model\.safetensors\.index\.json is there and was not written"):
        verify(directory)
    # Records beside an artifact change nothing about it.
    (dense / "parity.json").write_text("{}")
    assert performed_by(performed, recipe_of(), directory) == ["prune"]
    assert not (checkpoint / "model.safetensors.index.json").exists()
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(expected.replace(b"size", b"sise", 1))):
        damage(checkpoint / "manifest.json")
        with pytest.raises(ArtifactError, match=r"checkpoint/manifest\.json is"):
            verify(directory)
        assert performed_by(performed, recipe_of(), directory) == ["prune"]
        assert (checkpoint / "manifest.json").read_bytes() == expected
    for folder in (directory, checkpoint, dense, directory / "onnx/pruned"):
        verify(folder)


def test_a_changed_calibration_text_redoes_what_depends_on_it(
    tmp_path: Path, inputs: Path, recipe_of: Callable[..., Recipe], performed: list[str]
) -> None:
    source = save_tokens(tmp_path / "text.npy", tokens_of(6, 12, seed=3))
    recipe = recipe_of(calibrate={"source": source})
    running.run(recipe, tmp_path / "run")
    save_tokens(tmp_path / "text.npy", tokens_of(6, 12, seed=4))
    again = performed_by(performed, recipe, tmp_path / "run")
    assert again[:2] == ["calibrate", "prune"]
    assert "export-dense" not in again


@pytest.mark.parametrize(
    ("name", "first"),
    [("tokenizer.json", "calibrate"), ("generation_config.json", "prune"), ("tekken.json", "calibrate")],
)
def test_a_changed_file_beside_the_weights_redoes_what_reads_it(
    name: str, first: str, tmp_path: Path, inputs: Path, recipe_of: Callable[..., Recipe], performed: list[str]
) -> None:
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    recipe = recipe_of().model_copy(update={"model": str(model)})
    running.run(recipe, tmp_path / "run")
    (model / name).write_text('{"eos_token_id": 7}')
    again = performed_by(performed, recipe, tmp_path / "run")
    assert again[0] == first
    assert {"prune", "export-dense", "export"} <= set(again)
    for where in ("checkpoint", "onnx/dense", "onnx/pruned"):
        assert (tmp_path / "run" / where / name).read_text() == '{"eos_token_id": 7}'
    assert performed_by(performed, recipe, tmp_path / "run") == []


def test_a_parity_breach_stops_before_the_bench_and_still_reports(
    tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    running.run(recipe_of(), directory)
    assert (directory / "latency.json").is_file()
    export = stages.export

    def broken_export(checkpoint: Any, output: Any, **options: Any) -> Any:
        artifact = export(checkpoint, output, **options)
        data = Path(output) / "model.onnx.data"
        content = bytearray(data.read_bytes())
        content[3] ^= 0x40
        data.write_bytes(content)
        write_manifest(Path(output), digests={})
        return artifact

    monkeypatch.setattr(stages, "export", broken_export)
    performed.clear()
    result = running.run(recipe_of(export={"max_length": 44}), directory)
    assert performed[-1] == "validate"
    assert [breach.gate for breach in result.breaches] == ["parity"]
    assert result.latency is None
    assert not (directory / "latency.json").exists()
    assert result.report.is_file()
    assert result.as_json()["passed"] is False


def test_gates_name_what_they_measured(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    gates = {"maximum_perplexity_ratio": 1.0000001, "minimum_decode_speedup": 1e6}
    result = running.run(recipe_of(gates=gates, prune={"ratio": 0.8}), tmp_path / "run")
    found = {breach.gate: str(breach) for breach in result.breaches}
    assert "speedup" in found
    assert "1e+06" in found["speedup"]
    quality = result.quality
    assert quality is not None
    dense = quality.sources[0].dense_perplexity
    assert dense is not None
    assert ("quality" in found) == (quality.sources[0].perplexity > dense * 1.0000001)


@pytest.mark.parametrize(
    ("gate", "section", "values"),
    [
        ("maximum_perplexity_ratio", "evaluate", {"sources": []}),
        ("minimum_prefill_speedup", "bench", {"prompt_lengths": []}),
        ("minimum_decode_speedup", "bench", {"batch_sizes": []}),
    ],
)
def test_a_gate_that_nothing_measures_is_refused(
    gate: str, section: str, values: dict[str, Any], recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of(**{"gates": {gate: 1.5}, section: values})
    with pytest.raises(RecipeError, match=rf"gates\.{gate} needs {section}\."):
        running.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_killed_run_is_resumed(tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str]) -> None:
    directory, recipe = tmp_path / "run", recipe_of()
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "flap_export", "run", str(tmp_path / "recipe.yaml"), "--output", str(directory)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    marker, deadline = directory / resuming.STAGES_FOLDER / "prune.json", time.monotonic() + 120
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert marker.exists()
    assert not (directory / "report.html").exists()
    again = performed_by(performed, recipe, directory)
    assert "calibrate" not in again
    assert "prune" not in again
    assert again[-1] == "bench"
    assert (directory / "report.html").is_file()
    assert [path.name for path in directory.rglob(".*partial*")] == []


def test_two_runs_do_not_share_a_directory(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    directory = tmp_path / "run"
    with locked(directory), pytest.raises(OutputError, match="another run is at work"):
        running.run(recipe_of(), directory)


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds something else"):
        running.run(recipe_of(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"prune": {"ratio": 1.5}}, BudgetError),
        ({"calibrate": {"source": "missing.txt"}}, TextError),
        ({"evaluate": {"sources": ["missing.npy"]}}, TextError),
    ],
)
def test_wrong_input_is_found_before_any_stage(
    tmp_path: Path,
    recipe_of: Callable[..., Recipe],
    performed: list[str],
    sections: dict[str, dict[str, Any]],
    error: type[Exception],
) -> None:
    with pytest.raises(error):
        running.run(recipe_of(**sections), tmp_path / "run")
    assert performed == []


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"evaluate": {"samples": 5}}, TextError, r"section 'evaluate' .* 5 samples were asked for"),
        ({"evaluate": {"sequence_length": 13}}, TextError, r"section 'evaluate' .* sequence_length asks for 13"),
        ({"build": {"backend": "tensorrt-rtx", "targets": ["sm99"]}}, RecipeError, "section 'build' .* target must be"),
        ({"build": {"backend": "tensorrt"}}, MissingRequirementError, "needs the package tensorrt .*not here"),
        ({"export": {"dtype": "bfloat16"}}, MissingRequirementError, "CPU provider does not implement bfloat16"),
        ({"bench": {"threads": 100_000}}, RecipeError, "section 'bench' .* threads must lie in"),
    ],
    ids=str,
)
def test_what_a_later_stage_would_refuse_is_refused_before_anything_is_done(
    sections: dict[str, dict[str, Any]],
    error: type[Exception],
    message: str,
    recipe_of: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def imported(flavour: str) -> Any:
        if flavour == "tensorrt":
            raise MissingRequirementError("the backend tensorrt needs the package tensorrt (not here)", "install it")
        return SimpleNamespace(ComputeCapability=SimpleNamespace(__members__={"SM80": 0}))

    monkeypatch.setattr("flap_export.building.stage.import_tensorrt", imported)
    with pytest.raises(error, match=message):
        running.run(recipe_of(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_engines_on_a_gpu_are_no_concern_of_onnxruntimes(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "check_device", lambda device: None)
    monkeypatch.setattr(checking, "check_build", lambda *options: None)
    recipe = recipe_of(build={"backend": "tensorrt"}, export={"dtype": "bfloat16"})
    checking.check_recipe(recipe.model_copy(update={"device": "cuda"}))
    with pytest.raises(MissingRequirementError, match="does not implement bfloat16"):
        checking.check_recipe(recipe)


def test_the_result_as_json_is_json(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    result = running.run(recipe_of(evaluate={"sources": []}), tmp_path / "run")
    value = json.loads(json.dumps(result.as_json()))
    assert value["quality"] is None
    assert value["passed"] is True
    assert value["ratio"]["requested"] == 0.3


@pytest.mark.tensorrt
def test_engines_are_built_and_reported(
    tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU their parity is not run, which is said and does not count as passed."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'flap-export[tensorrt-rtx]'")
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    section = {"backend": "tensorrt-rtx", "targets": ["sm80"], "max_prompt": 16}
    result = running.run(recipe_of(build=section), tmp_path / "run")
    verdicts = {(found.candidate, found.passed) for found in result.parity.comparisons}
    assert verdicts == {("onnxruntime", True), ("tensorrt-rtx", None)}
    for model in ("dense", "pruned"):
        assert {"engine.json", "model-last.engine"} <= {
            file.name for file in (tmp_path / "run/engine" / model).iterdir()
        }
    page = result.report.read_text(encoding="utf-8")
    assert "TensorRT engines" in page
    assert "Built with tensorrt-rtx in float32 for sm80: decode of up to 1 tokens" in page
    again = performed_by(performed, recipe_of(build={"backend": None}), tmp_path / "run")
    assert again == ["validate", "bench"]
    assert not (tmp_path / "run/engine/dense").exists()
    assert "TensorRT engines" not in result.report.read_text(encoding="utf-8")


def test_alignment_is_held_against_the_same_budget_without(
    tmp_path: Path, recipe_of: Callable[..., Recipe], performed: list[str]
) -> None:
    aligned = recipe_of(prune={"ratio": 0.3, "align_channels": 8, "method": "obs"})
    result = running.run(aligned, tmp_path / "run")
    assert all(len(layer.ffn_channels) % 8 == 0 for layer in result.plan.layers)
    found = AlignmentReport.load(tmp_path / "run" / ALIGNMENT_NAME)
    assert found.align_channels == 8
    assert found.unaligned is not None
    assert result.quality is not None
    assert found.unaligned.sources[0].perplexity != result.quality.sources[0].perplexity
    assert {phase.phase for phase in found.latency.phases} == {"prefill", "decode"}
    page = result.report.read_text(encoding="utf-8")
    assert "FFN widths are multiples of 8" in page
    assert f"{found.unaligned.sources[0].perplexity:.2f}" in page
    assert not performed_by(performed, aligned, tmp_path / "run")
    plain = recipe_of(prune={"ratio": 0.3, "method": "obs"})
    assert "align" not in performed_by(performed, plain, tmp_path / "run")
    assert not (tmp_path / "run" / ALIGNMENT_NAME).exists()
