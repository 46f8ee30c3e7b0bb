"""The scripts in `benchmarks/`: their options and the functions that need no measurement."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flap_export.benchmarking.worker import Sample
from flap_export.benchmarking.workload import Workload
from flap_export.errors import FlapExportError
from flap_export.ideal import stored_parameters
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint

SCRIPTS = (
    "cpu_products",
    "experts",
    "export_cost",
    "gpu",
    "gpu_kernels",
    "latents",
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


def test_memory_is_measured_again_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = script("prune_memory")
    monkeypatch.setattr(memory, "in_own_process", lambda case, arguments, work: {"asked": arguments.ratio})
    asked = [memory.parsed_arguments(["--ratio", ratio]) for ratio in ("0.2", "0.5", "0.2")]
    found = [memory.kept_result("bias", arguments, tmp_path) for arguments in asked]
    assert [kept["asked"] for kept in found] == [0.2, 0.5, 0.2]
    assert len(list(tmp_path.iterdir())) == 2


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


def gpu_json(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    """Run the script as it is run, where there is no GPU."""
    command = [sys.executable, str(FOLDER / "gpu.py"), "--output", str(folder / "gpu.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    written = folder / "gpu.json"
    return done, json.loads(written.read_text(encoding="utf-8")) if written.exists() else None


def test_the_gpu_comparison_runs_from_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    done, written = gpu_json(tmp_path, "--quick", "--work", str(tmp_path / "work"))
    assert done.returncode == 0, done.stderr
    assert written["finished"]
    assert [found["backend"] for found in written["comparisons"]] == ["torch-static", "onnxruntime"]
    for found in written["comparisons"]:
        assert [(phase["phase"], phase["batch_size"]) for phase in found["phases"]] == [
            ("decode", 1),
            ("prefill", 1),
            ("decode", 2),
            ("prefill", 2),
        ]
        assert all(phase["rounds"] >= 3 and phase["dense"]["median_ms"] > 0 for phase in found["phases"])
        assert all(dense > pruned > 0 for dense, pruned in found["predicted_ms"])
    # Same machine, same models: what differs are the kernels that PyTorch does not fuse.
    unfused, fused = (found["predicted_ms"] for found in written["comparisons"])
    assert all(slow > fast for both in zip(unfused, fused, strict=True) for slow, fast in zip(*both, strict=True))
    assert {skipped["what"] for skipped in written["skipped"]} == {"tensorrt", "tensorrt-rtx"}
    assert "skipped tensorrt-rtx: " in done.stdout
    assert list((tmp_path / "work").rglob("*.safetensors")) == []


def test_a_step_is_taken_apart_into_what_it_launches(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "gpu_kernels.py"), "--quick", "--output", str(tmp_path / "kernels.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    launches = {kernel["kernel"]: kernel["launches"] for kernel in written["kernels"]}
    # Two layers, with a cache for keys and one for values each.
    assert launches["aten::scatter_"] == 4
    assert written["least_ms"] > 0
    assert written["kernels_ms"] == pytest.approx(sum(kernel["ms"] for kernel in written["kernels"]))
    assert "a step takes" in done.stdout


def test_the_gpu_comparison_exits_3_without_a_gpu(tmp_path: Path) -> None:
    done, written = gpu_json(tmp_path)
    assert done.returncode == 3
    assert "skipped everything: PyTorch sees no CUDA device" in done.stdout
    assert written is None


def test_the_gpu_comparison_ends_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured by then is in a whole file, and nothing is left running."""
    gpu = script("gpu")
    comparison = fast(gpu, tmp_path)

    def stuck() -> None:
        comparison.deadline = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(60.0)

    workers = StandIn.put_in(gpu, monkeypatch, stuck_at=4, stuck=stuck)
    begin = time.monotonic()
    comparison.run(tmp_path / "work")
    assert time.monotonic() - begin < 60.0
    comparison.saved()
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [len(found["phases"]) for found in written["comparisons"]] == [3]
    skipped = [f"tiny at {ratio} on torch-static" for ratio in ("30%", "50%")]
    assert [skipped["what"] for skipped in written["skipped"]] == skipped
    assert all("no time left" in skipped["why"] for skipped in written["skipped"])
    assert all(worker.is_closed for worker in workers)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_the_alarm_rings_in_time_through_those_who_catch_exceptions() -> None:
    gpu = script("gpu")

    def works_on() -> None:
        while True:
            with suppress(Exception):
                time.sleep(60.0)

    begin = time.monotonic()
    with pytest.raises(gpu.TimeIsUpError), gpu.alarm(0.2):
        works_on()
    assert 0.1 < time.monotonic() - begin < 30.0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(gpu.TimeIsUpError), gpu.alarm(-1.0):
        raise AssertionError


def test_a_share_that_would_not_be_measured_in_time_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = script("gpu")
    comparison = fast(gpu, tmp_path)
    workers = StandIn.put_in(gpu, monkeypatch)
    comparison.lead_s = 0.0
    run_share = comparison.run_share

    def late(*arguments: Any) -> None:
        run_share(*arguments)
        comparison.deadline = time.monotonic() + comparison.lead_s / 2

    comparison.run_share = late
    comparison.run(tmp_path / "work")
    assert [found.ratio for found in comparison.found] == [0.3]
    assert [skipped["what"] for skipped in comparison.skipped] == ["tiny at 50% on torch-static"]
    assert len(workers) == 2


def test_the_dense_model_stays_open_until_something_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second worker starts when the memory of the first is known; what was measured before a failure is kept."""
    gpu = script("gpu")
    comparison = fast(gpu, tmp_path)
    log: list[str] = []
    StandIn.put_in(gpu, monkeypatch, log=log, fails_at=4)
    comparison.run(tmp_path / "work")
    starts = [line for line in log if "starts" in line or "prepared" in line or "ends" in line]
    assert starts[:4] == ["dense starts", "dense is prepared", "pruned starts", "pruned is prepared"]
    assert [len(found.phases) for found in comparison.found] == [3, 3]
    assert [found.device_memory_bytes for found in comparison.found] == [(7, 7), (7, 7)]
    assert [line for line in starts if line == "dense starts"] == ["dense starts"] * 2
    assert [skipped["why"] for skipped in comparison.skipped] == ["FlapExportError: out of memory"] * 2


def test_a_backend_that_does_not_run_a_tiny_model_is_not_tried_on_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = script("gpu")
    comparison = fast(gpu, tmp_path, "7b")
    StandIn.put_in(gpu, monkeypatch, opening=RuntimeError("no kernel image"))
    comparison.run(tmp_path / "work")
    why = "it does not run a tiny model: RuntimeError: no kernel image"
    assert comparison.skipped == [{"what": "torch-static", "why": why}]
    assert "Traceback" in capsys.readouterr().err


def test_models_without_room_are_named_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, gpu = script("gpu_models"), script("gpu")
    comparison = fast(gpu, tmp_path)
    StandIn.put_in(gpu, monkeypatch)
    monkeypatch.setattr(models, "free_bytes", lambda device: 1000)
    comparison.run(tmp_path / "work")
    assert comparison.skipped[0]["what"] == "tiny at 30%, 50% on torch-static"
    assert "the device 'cpu' must have 0.0 GB free, found 0.0 GB" in comparison.skipped[0]["why"]
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_shapes_that_the_gpu_has_no_room_for_are_named_and_the_others_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = script("gpu")
    comparison = fast(gpu, tmp_path)
    comparison.arguments.ratios, comparison.arguments.batch_sizes = [0.5], [1, 64]
    # The models take 0.8 MB, the caches of 64 sequences as much again.
    monkeypatch.setattr(gpu, "described_gpu", lambda device: {"memory_bytes": 1_500_000})
    workers = StandIn.put_in(gpu, monkeypatch)
    comparison.run(tmp_path / "work")
    assert [(phase.phase, phase.batch_size) for phase in comparison.found[0].phases] == [("decode", 1), ("prefill", 1)]
    assert [skipped["what"] for skipped in comparison.skipped] == [
        "tiny at 50% on torch-static, decode, batch 64, context 8",
        "tiny at 50% on torch-static, prefill, batch 64, prompt 8",
    ]
    assert all("and there are 0.0 GB" in skipped["why"] for skipped in comparison.skipped)
    assert len(workers) == 2


def test_a_signal_ends_the_gpu_comparison_and_leaves_no_files(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--quick", "--output", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "decode" in line:
                process.terminate()
                break
        table = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "dense against pruned" in table
    assert not json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["finished"]
    assert list(tmp_path.glob("flap-export-benchmark-*")) == []


def fast(gpu: ModuleType, folder: Path, model: str = "tiny") -> Any:
    """A comparison of tiny models on one backend."""
    arguments = gpu.parsed_arguments(["--quick", "--backends", "torch-static", "--output", str(folder / "gpu.json")])
    arguments.ratios, arguments.repeats, arguments.models = [0.3, 0.5], 1, [model]
    return gpu.Comparison(arguments)


class StandIn:
    """A worker that measures nothing."""

    log: list[str]
    all: list[StandIn]
    opening: Exception | None
    fails_at: int | None
    stuck_at: int | None
    stuck: Callable[[], None]

    def __init__(self, path: Path, options: Any) -> None:
        # The first time counts for nothing: it is before the shapes, when the model is opened.
        self.name, self.shapes, self.is_closed = path.parent.name, -1, False
        self.log.append(f"{self.name} starts")
        self.all.append(self)

    @classmethod
    def put_in(
        cls,
        gpu: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        *,
        log: list[str] | None = None,
        opening: Exception | None = None,
        fails_at: int | None = None,
        stuck_at: int | None = None,
        stuck: Callable[[], None] = lambda: None,
    ) -> list[StandIn]:
        """In the place of workers; the pruned one's shape `fails_at` does not fit, its shape `stuck_at` has no end."""
        cls.log, cls.all, cls.opening = [] if log is None else log, [], opening
        cls.fails_at, cls.stuck_at, cls.stuck = fails_at, stuck_at, staticmethod(stuck)
        monkeypatch.setattr(gpu, "Worker", cls)
        return cls.all

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True
        self.log.append(f"{self.name} ends")

    def backend(self) -> str:
        if self.opening is not None:
            raise self.opening
        return "standing in"

    def prepare(self, workload: Any) -> Sample:
        self.shapes += 1
        self.log.append(f"{self.name} is prepared")
        if self.name == "pruned" and self.shapes == self.fails_at:
            raise FlapExportError("out of memory")
        return Sample(1.0, None, 7)

    def measure(self, calls: int) -> Sample:
        if self.name == "pruned" and self.shapes == self.stuck_at:
            self.stuck()
        return Sample(1.0, None)


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [
        ('{"error": {"message": "no such target"}}', "error: no such target\n", "no such target"),
        ("", "Traceback (most recent call last):\n  ...\nOSError: libcuda\n", "OSError: libcuda"),
        ("[TRT] half a line", "", "the build ended with code -11"),
    ],
)
def test_a_failed_build_is_explained(stdout: str, stderr: str, reason: str) -> None:
    models = script("gpu_models")
    assert models.reason_of(subprocess.CompletedProcess([], -11, stdout, stderr)) == reason


def test_a_build_does_not_outlast_the_time_limit(tmp_path: Path) -> None:
    models = script("gpu_models")
    with pytest.raises(FlapExportError, match="within the time limit"):
        models.run_build(tmp_path, tmp_path / "engine", "tensorrt", 1, -5.0)


@pytest.mark.parametrize("backend", ["torch-static", "onnxruntime"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_what_a_backend_opens_is_all_that_is_left_on_disk(backend: str, ratio: float, tmp_path: Path) -> None:
    maker = script("gpu_models").Maker(backend, "float16", 32, 1, "cpu", 0, 0.0)
    made = maker.made("tiny", ratio, tmp_path)
    assert list(tmp_path.iterdir()) == [made.path]
    weights = stored_parameters(made.shape) * 2
    assert weights < sum(file.stat().st_size for file in made.path.rglob("*")) < weights + 200_000
    assert len(set(made.shape.layers)) == (2 if ratio else 1)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_pooled_checkpoints_load_dense_and_pruned(
    ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the packages that exporting needs."""
    monkeypatch.setitem(sys.modules, "flap_export.exporting", None)
    maker = script("gpu_models").Maker("torch-static", "float16", 32, 1, "cpu", 0, 0.0)
    path = maker.made("tiny", ratio, tmp_path).path
    model = load_model(path, dtype=torch.float32)
    assert open_checkpoint(path).is_pruned == bool(ratio)
    weights = torch.cat([p.flatten() for name, p in model.named_parameters() if "norm" not in name])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.1)
    assert all(bool((p == 1).all()) for name, p in model.named_parameters() if "norm" in name)


def test_a_pool_is_gone_through_again_and_again() -> None:
    pieces = script("gpu_models").stretches(bytes(range(5)), 3, 11)
    assert b"".join(pieces) == bytes([3, 4, *range(5), *range(4)])
