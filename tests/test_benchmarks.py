"""The scripts in `benchmarks/`: their options and the functions that need no measurement."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flap_export.benchmarking.worker import Sample
from flap_export.benchmarking.workload import Workload
from flap_export.errors import FlapExportError
from flap_export.ideal import Roofline
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint

SCRIPTS = (
    "cpu_products",
    "experts",
    "export_cost",
    "gpu",
    "methods",
    "onnxruntime_cpu",
    "prune_memory",
    "pruned_vs_dense",
    "reference_differences",
    "search_quality",
    "search_speed",
    "search_strategies",
)
FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_have_defaults_and_a_quick_mode(name: str) -> None:
    assert script(name).parsed_arguments([]).benchmark == name
    assert script(name).parsed_arguments(["--quick"]).quick


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_the_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script(name).parsed_arguments(["--help"])
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_a_result_says_where_when_and_with_what_it_was_measured(tmp_path: Path) -> None:
    arguments = argparse.Namespace(benchmark="b", output=tmp_path / "b.json", work=None, quick=False, seed=3)
    script("common").save_result(arguments, script("common").Conditions(), {"speedup": 2.0})
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["settings"] == {"quick": False, "seed": 3}
    assert written["speedup"] == 2.0
    assert {"machine", "versions", "load_average_after", "other_load_present", "date"} < set(written)
    assert {"python", "torch", "onnxruntime"} < set(written["versions"])


def test_quick_results_stay_out_of_the_results() -> None:
    common = script("common")
    described: dict[str, Any] = {"machine": {"cpu": "Some CPU (R)", "cores": 2}, "versions": {"torch": "2.13.0+cpu"}}
    path = common._default_path(argparse.Namespace(benchmark="b"), described)
    assert path == common.RESULTS / "b-some-cpu-r-2-cores-torch-2.13.0-cpu.json"
    arguments = argparse.Namespace(benchmark="b", output=None, work=None, quick=True)
    written = common.save_result(arguments, common.Conditions(), {})
    assert written.parent != common.RESULTS
    written.unlink()


def test_a_random_pruned_checkpoint_is_uneven_and_loads(tmp_path: Path) -> None:
    common = script("common")
    dense = common.random_checkpoint(tmp_path / "dense", common.llama_config("tiny", 64))
    pruned = open_checkpoint(common.random_pruned_checkpoint(tmp_path / "pruned", dense, 0.4, multiple=4))
    shape = open_checkpoint(dense).shape
    assert len(set(pruned.shape.layers)) > 1
    assert all(layer.ffn_channels % 4 == 0 for layer in pruned.shape.layers)
    assert pruned.shape.decoder_parameters / shape.decoder_parameters == pytest.approx(0.6, abs=0.05)
    assert all(bool(p.isfinite().all()) for p in load_model(pruned.directory, dtype=torch.float32).parameters())


def test_sparse_weights_are_a_whole_checkpoint_without_blocks(tmp_path: Path) -> None:
    export_cost = script("export_cost")
    export_cost.made_checkpoint("graph", "tiny", "float16", tmp_path)
    directory = export_cost.checkpoint_directory("graph", "tiny", tmp_path)
    model = load_model(directory, dtype=torch.float16)
    assert sum(int(parameter.count_nonzero()) for parameter in model.parameters()) == 0
    stored = (directory / "model.safetensors").stat()
    assert stored.st_size > 2 * sum(parameter.numel() for parameter in model.parameters())
    assert stored.st_blocks * 512 < 16384


def test_nodes_per_layer_leave_out_what_comes_once() -> None:
    nodes = ["Gather", *["MatMul", "MatMul", "Add"] * 4, "MatMul"]
    assert script("export_cost").nodes_per_layer(nodes, 4) == 3


def test_packages_that_are_not_there_are_left_out_and_named(tmp_path: Path) -> None:
    compared = script("onnxruntime_cpu")
    absent = ["--genai-python", "/no/such/python", "--optimum-python", "/no/such/python"]
    commands, skipped = compared.foreign_candidates(compared.parsed_arguments(absent), tmp_path, tmp_path)
    assert commands == {}
    assert "--genai-python" in skipped["onnxruntime-genai"]
    assert "--optimum-python" in skipped["optimum"]
    assert compared.versions("/no/such/python", "optimum-onnx") is None
    assert set(compared.versions(sys.executable, "numpy")) == {"numpy"}


def test_a_worker_of_another_package_is_measured_like_ours(tmp_path: Path) -> None:
    """Its protocol with a model that counts; both phases, the calls that warm up, and tokens."""
    (tmp_path / "worker.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from foreign_worker import serve

class Model:
    vocabulary_size = 50

    def __init__(self, directory, threads):
        self.calls = 0

    def prefill(self, tokens):
        assert tokens.shape == (2, 7) and tokens.min() >= 3 and tokens.max() < 50
        return self.timed

    def decode(self, context):
        assert context.shape == (2, 9)
        return self.timed

    def timed(self, calls):
        self.calls += calls
        return float(self.calls)

    def generate(self, prompt, new_tokens):
        return prompt[-1:] * new_tokens

serve(Model)
"""
    )
    compared = script("onnxruntime_cpu")
    command = [sys.executable, str(tmp_path / "worker.py"), "nowhere", "0"]
    with compared.ForeignProcess("counting", command, seed=0) as process:
        assert process.generate([4, 5], 3) == [5, 5, 5]
        assert process.prepare(Workload("prefill", 2, 7)).call_ms == 3.0
        assert process.measure(4).call_ms == 7.0
        assert process.prepare(Workload("decode", 2, 9)).call_ms == 10.0
        assert process.measure(1).peak_memory_bytes > 0
    dying = compared.ForeignProcess("dying", [sys.executable, "-c", ""], seed=0)
    with dying, pytest.raises(SystemExit, match="the process of dying died"):
        dying.generate([4], 1)


# --- the comparison on a GPU


def test_the_gpu_comparison_runs_from_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--quick", "--output", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert {found["backend"] for found in written["comparisons"]} == {"onnxruntime", "torch-static"}
    for found in written["comparisons"]:
        assert [phase["phase"] for phase in found["phases"]] == ["prefill", "prefill", "decode", "decode"]
        assert all(phase["rounds"] >= 3 and phase["dense"]["median_ms"] > 0 for phase in found["phases"])
        assert all(dense > pruned > 0 for dense, pruned in found["predicted_ms"])
    assert {skipped["what"] for skipped in written["skipped"]} == {"tensorrt", "tensorrt-rtx"}
    assert "skipped tensorrt-rtx: " in done.stdout


def test_the_gpu_comparison_exits_3_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--output", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 3
    assert done.stdout.startswith("skipped everything: PyTorch sees no CUDA device")
    assert not (tmp_path / "gpu.json").exists()


def test_what_no_longer_fits_the_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    arguments = gpu.parsed_arguments(["--quick", "--time-limit", "-1"])
    measured = gpu.Comparison(arguments)
    measured.run_model("tiny", ["onnxruntime", "torch-static"], Path("nowhere"))
    assert [skipped["what"] for skipped in measured.skipped] == [
        "tiny at 50% on onnxruntime",
        "tiny at 50% on torch-static",
    ]
    assert all("time limit" in skipped["why"] for skipped in measured.skipped)


def test_what_was_found_is_kept_when_a_backend_fails_or_the_run_is_ended(tmp_path: Path) -> None:
    gpu = script("gpu")
    measured = gpu.Comparison(gpu.parsed_arguments(["--quick", "--output", str(tmp_path / "gpu.json")]))

    def compared(model: str, ratio: float, backend: str, *_: Any) -> Any:
        if backend == "tensorrt":
            raise AssertionError
        if backend == "torch-static":
            raise KeyboardInterrupt
        return gpu.Found(backend, model, ratio, (), (), (None, None))

    measured.compared = compared
    with pytest.raises(KeyboardInterrupt):
        measured.run_model("tiny", ["tensorrt", "onnxruntime", "torch-static"], tmp_path / "work")
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [found["backend"] for found in written["comparisons"]] == ["onnxruntime"]
    assert written["skipped"] == [{"what": "tiny at 50% on tensorrt", "why": "AssertionError"}]


def test_the_second_worker_starts_when_the_memory_of_the_first_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, log = script("gpu"), []

    class Counting:
        def __init__(self, path: Path, options: Any) -> None:
            self.name = path.name
            log.append(f"{self.name} starts")

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def backend(self) -> str:
            return "counting"

        def prepare(self, workload: Any) -> Sample:
            log.append(f"{self.name} is prepared")
            return Sample(1.0, None, 7)

        def measure(self, calls: int) -> Sample:
            return Sample(1.0, None)

    monkeypatch.setattr(gpu, "Worker", Counting)
    measured = gpu.Comparison(gpu.parsed_arguments(["--quick"]))
    measured.roofline = Roofline(1e9, 1e9)
    dense, pruned = (measured.made("tiny", ratio, tmp_path / str(ratio)) for ratio in (0.0, 0.5))
    found = measured.compared("tiny", 0.5, "torch-static", dense, pruned)
    assert log[:4] == ["checkpoint starts", "checkpoint is prepared"] * 2
    assert found.device_memory_bytes == (7, 7)


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [
        ('{"error": {"message": "no such target"}}', "error: no such target\n", "no such target"),
        ("", "Traceback (most recent call last):\n  ...\nOSError: libcuda\n", "OSError: libcuda"),
        ("[TRT] half a line", "", "the build ended with code -11"),
    ],
)
def test_a_failed_build_is_explained(stdout: str, stderr: str, reason: str) -> None:
    gpu = script("gpu")
    assert gpu.reason_of(subprocess.CompletedProcess([], -11, stdout, stderr)) == reason


def test_a_build_does_not_outlast_the_time_limit(tmp_path: Path) -> None:
    gpu = script("gpu")
    with pytest.raises(FlapExportError, match="within the time limit"):
        gpu.run_build(tmp_path, tmp_path / "engine", "tensorrt", 1, -5.0)


def test_pooled_checkpoints_load_dense_and_pruned(tmp_path: Path) -> None:
    gpu = script("gpu")
    arguments = gpu.parsed_arguments(["--quick"])
    for ratio in (0.0, 0.5):
        path = gpu.fast_checkpoint(tmp_path / str(ratio), "tiny", ratio, arguments)
        model = load_model(path, dtype=torch.float32)
        assert open_checkpoint(path).is_pruned == bool(ratio)
        weights = torch.cat([p.flatten() for name, p in model.named_parameters() if "norm" not in name])
        assert float(weights.std()) == pytest.approx(0.02, rel=0.1)
