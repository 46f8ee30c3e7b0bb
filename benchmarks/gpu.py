"""Dense against pruned on a GPU, on everything that is installed: TensorRT, TensorRT-RTX, ONNX Runtime, PyTorch.

One command for a machine that has a GPU; needs no network. Llamas with random weights are pruned by random scores, so
that every layer has head counts and an FFN width of its own. For every model, share and backend: time to first token
(a prefill) and time per output token (a decode step) over a grid of batches and lengths, dense and pruned in turns,
beside what the arithmetic allows on this GPU (bandwidth and matrix rate are measured first), and beside what
`flap_export.prediction` expects of a GPU with these rates. What is not there, or no longer fits the time, is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import common

from flap_export.benchmarking.report import PhaseLatency, phase_latency
from flap_export.benchmarking.rounds import take_rounds
from flap_export.benchmarking.worker import Worker, WorkerOptions
from flap_export.benchmarking.workload import Workload
from flap_export.errors import FlapExportError
from flap_export.ideal import Roofline, ideal_speedup
from flap_export.precision import PRECISIONS
from flap_export.prediction import Assumptions, estimate

AIMS: Final = {"7b decode at batch 1": 0.95}
"""Efficiency, speedup over ideal speedup, at 30 % and 50 %."""
BACKENDS: Final = ("tensorrt", "tensorrt-rtx", "onnxruntime", "torch-static")
MODELS: Final = {"0.1b": "160m", "1b": "1b", "7b": "7b"}
common.LLAMAS.setdefault(
    "1b",
    {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
)  # fmt: skip


def main() -> None:
    """Measure everything that is there, print a table, write JSON."""
    arguments = parsed_arguments()
    measured = Comparison(arguments)
    with common.work_directory(arguments) as work:
        measured.run(work)
    if measured.found:
        common.show("dense against pruned", COLUMNS, [row for found in measured.found for row in rows(found)])
    for skipped in measured.skipped:
        print(f"skipped {skipped['what']}: {skipped['why']}")
    if not measured.found:
        sys.exit(3)
    print(f"written to {measured.saved()}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "gpu")
    made.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    made.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.2])
    made.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    made.add_argument("--dtype", choices=sorted(PRECISIONS), default="float16")
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    made.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 1024])
    made.add_argument("--context-length", type=int, default=1024, help="cached tokens before a decode step")
    made.add_argument("--max-length", type=int, default=1152, help="rows of the cache")
    made.add_argument("--repeats", type=int, default=15, help="rounds per phase and shape")
    made.add_argument("--budget", type=float, default=0.8, help="seconds for the rounds of one phase and shape")
    made.add_argument(
        "--time-limit", type=float, default=570.0, help="seconds; what would not be done by then is left out"
    )
    made.add_argument("--device", default="cuda")
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.models, arguments.ratios, arguments.dtype = ["tiny"], [0.5], "float32"
        arguments.batch_sizes, arguments.prompt_lengths, arguments.context_length = [1, 2], [8], 8
        arguments.max_length, arguments.repeats, arguments.budget = 32, 3, 0.2
        arguments.device = "cuda" if has_cuda() else "cpu"
    return arguments


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class Found:
    """One backend on one model and share, all shapes."""

    backend: str
    model: str
    ratio: float
    phases: tuple[PhaseLatency, ...]
    predicted_ms: tuple[tuple[float, float], ...]
    """Dense and pruned, per phase."""
    device_memory_bytes: tuple[int | None, int | None]
    """Dense and pruned, after the first workload."""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "phases": [phase.model_dump(mode="json") for phase in self.phases]}


class Comparison:
    """What was asked for, what was found and what was skipped."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.conditions = arguments, common.Conditions()
        self.deadline = time.monotonic() + arguments.time_limit
        self.slowest_s = 0.0
        """The longest that one backend took on the current model."""
        self.found: list[Found] = []
        self.skipped: list[dict[str, str]] = []
        self.roofline: Roofline | None = None
        self.device_name = arguments.device

    def run(self, work: Path) -> None:
        reason = None if self.arguments.device == "cpu" else missing_gpu()
        if reason:
            return self.skip("everything", reason)
        self.device_name, self.roofline = measured_machine(self.arguments.device, self.arguments.dtype)
        backends = [name for name in self.arguments.backends if self.is_there(name)]
        for model in self.arguments.models:
            self.run_model(model, backends, work / model)
        return None

    def saved(self) -> Path:
        """Write what there is so far."""
        self.arguments.benchmark = f"gpu-{self.device_name}"
        result = {
            "aims": AIMS,
            "device": self.device_name,
            "roofline": None if self.roofline is None else vars(self.roofline),
            "comparisons": [found.as_json() for found in self.found],
            "skipped": self.skipped,
        }
        return common.save_result(self.arguments, self.conditions, result)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append({"what": what, "why": why})

    def is_there(self, backend: str) -> bool:
        reason = missing_backend(backend, self.arguments.device)
        if reason:
            self.skip(backend, reason)
        return reason is None

    def run_model(self, model: str, backends: Sequence[str], folder: Path) -> None:
        """All shares of one model; what it wrote is removed, for 7 B parameters are 13 GB a piece."""
        dense: Made | None = None
        self.slowest_s = 0.0
        for ratio in self.arguments.ratios:
            for backend in backends:
                what = f"{model} at {ratio:.0%} on {backend}"
                begin = time.monotonic()
                if begin + self.slowest_s > self.deadline:
                    self.skip(what, f"it would not be done within the time limit of {self.arguments.time_limit:g} s")
                    continue
                try:
                    dense = dense or self.made(MODELS.get(model, model), 0.0, folder / "dense")
                    pruned = self.made(MODELS.get(model, model), ratio, folder / f"pruned-{ratio}")
                    self.found.append(self.compared(model, ratio, backend, dense, pruned))
                    # A run that is ended from outside has measured something.
                    self.saved()
                # Whatever one backend does not do must not keep the others from being measured.
                except Exception as error:
                    self.skip(what, ": ".join([type(error).__name__, *str(error).splitlines()[:1]]))
                self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
            shutil.rmtree(folder / f"pruned-{ratio}", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)

    def made(self, config: str, ratio: float, folder: Path) -> Made:
        """Checkpoint and artifact, made unless they are there."""
        arguments = self.arguments
        checkpoint = fast_checkpoint(folder / "checkpoint", config, ratio, arguments)
        return Made(checkpoint, folder, arguments, self.deadline)

    def compared(self, model: str, ratio: float, backend: str, dense: Made, pruned: Made) -> Found:
        arguments = self.arguments
        options = WorkerOptions(device=arguments.device, threads=None, seed=arguments.seed)
        if backend == "torch-static":
            options = replace(options, backend=backend, dtype=arguments.dtype, max_length=arguments.max_length)
        grid, draw = workloads(arguments), random.Random(arguments.seed)
        paths, shapes = [side.path_for(backend) for side in (dense, pruned)], [dense.shape, pruned.shape]
        phases = []
        with ExitStack() as opened:
            workers: list[Worker] = []
            memory = []
            # A worker counts all memory that came into use since it started, so the second starts behind the first.
            for path in paths:
                workers.append(opened.enter_context(Worker(path, options)))
                workers[-1].backend()
                memory.append(workers[-1].prepare(grid[0]).device_memory_bytes)
            for workload in grid:
                samples = take_rounds(
                    workers, workload, repeats=arguments.repeats, budget_s=arguments.budget, draw=draw
                )
                ideal = ideal_speedup(
                    *shapes, workload.phase, batch_size=workload.batch_size, length=workload.length,
                    bytes_per_weight=PRECISIONS[arguments.dtype].bytes_per_value, roofline=self.roofline,
                )  # fmt: skip
                phases.append(phase_latency(workload, *samples, ideal=ideal, seed=arguments.seed))
        predicted = tuple(tuple(self.predicted_ms(shape, w) for shape in shapes) for w in grid)
        return Found(backend, model, ratio, tuple(phases), predicted, (memory[0], memory[1]))  # type: ignore[arg-type]

    def predicted_ms(self, shape: Any, workload: Workload) -> float:
        """From the rates measured here, which need no assumed efficiency, and the assumptions about kernels."""
        assert self.roofline is not None
        return estimate(
            shape, workload.phase, workload.batch_size, workload.length, machine=self.roofline,
            dtype=self.arguments.dtype, assumptions=Assumptions(),
        ).ms  # fmt: skip


@dataclass(frozen=True)
class Made:
    """One model on disk; artifacts and engines are made when a backend asks for them."""

    checkpoint: Path
    folder: Path
    arguments: argparse.Namespace
    deadline: float

    @property
    def shape(self) -> Any:
        from flap_export.models.opening import open_checkpoint

        return open_checkpoint(self.checkpoint).shape

    def path_for(self, backend: str) -> Path:
        """What `backend` opens."""
        if backend == "torch-static":
            return self.checkpoint
        artifact = self.artifact()
        return artifact if backend == "onnxruntime" else self.engine(artifact, backend)

    def artifact(self) -> Path:
        from flap_export.artifact import is_artifact
        from flap_export.exporting import export

        target = self.folder / "onnx"
        if not is_artifact(target):
            export(self.checkpoint, target, dtype=self.arguments.dtype, max_length=self.arguments.max_length)
        return target

    def engine(self, artifact: Path, flavour: Any) -> Path:
        from flap_export.building import is_engine

        target = self.folder / flavour
        if not is_engine(target):
            run_build(artifact, target, flavour, max(self.arguments.batch_sizes), self.deadline - time.monotonic())
        return target


def run_build(artifact: Path, target: Path, flavour: str, max_batch: int, timeout_s: float) -> None:
    """In a process of its own: Polygraphy serves one flavour per process."""
    command = [sys.executable, "-m", "flap_export", "build", str(artifact), "--output", str(target), "--json"]
    command += ["--backend", flavour, "--max-batch", str(max_batch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(timeout_s, 1.0))
    except subprocess.TimeoutExpired:
        raise FlapExportError("its engine would not be built within the time limit") from None
    if done.returncode:
        raise FlapExportError(reason_of(done))


def reason_of(failed: subprocess.CompletedProcess[str]) -> str:
    """What a build said last: its own error, or where it did not come to that, whatever ended it."""
    try:
        message: str = json.loads(failed.stdout)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return (failed.stderr.strip().splitlines() or [f"the build ended with code {failed.returncode}"])[-1]
    return message


def fast_checkpoint(directory: Path, config: str, ratio: float, arguments: argparse.Namespace) -> Path:
    """A Llama with random weights in the precision that is measured, pruned by random scores where `ratio` is not 0.

    Every tensor is a stretch of one pool of random numbers: drawing 7 B of them would take longer than the rest.
    """
    import torch
    from transformers import LlamaConfig

    from flap_export.models.opening import open_checkpoint
    from flap_export.rewriting.checkpoint import write_checkpoint, write_shards

    if (directory / "config.json").is_file():
        return directory
    directory.mkdir(parents=True)
    dtype = getattr(torch, arguments.dtype)
    made: LlamaConfig = common.llama_config(config, arguments.max_length, dtype=arguments.dtype)
    made.architectures = ["LlamaForCausalLM"]
    made.save_pretrained(directory)
    dense = open_checkpoint(directory)
    if not ratio:
        write_shards(directory, pooled_tensors(dense, dense.shape, dtype, arguments.seed), 4 * 1024**3)
        return directory
    plan = common.random_plan(dense, ratio, 8, arguments.seed)
    shape = plan.pruned_shape(dense.shape, compensated=True)
    write_checkpoint(directory, dense, plan, shape, pooled_tensors(dense, shape, dtype, arguments.seed))
    return directory


def pooled_tensors(opened: Any, shape: Any, dtype: Any, seed: int) -> Iterator[tuple[str, Any]]:
    """Tensors of a model of `shape`: norms are one, all else has deviation 0.02."""
    import torch

    from flap_export.models.loading import meta_model, parameter_names

    resized = replace(opened, shape=shape, is_pruned=shape != opened.shape)
    model, generator = meta_model(resized, torch.float32), torch.Generator().manual_seed(seed)
    pool = (0.02 * torch.randn(1 << 22, generator=generator)).to(dtype)
    for name in parameter_names(model, resized):
        size = model.get_parameter(name).shape
        if "norm" in name:
            yield name, torch.ones(size, dtype=dtype)
            continue
        start = int(torch.randint(len(pool), (1,), generator=generator))
        stretch = torch.roll(pool, -start).repeat(-(-size.numel() // len(pool)))[: size.numel()]
        yield name, stretch.reshape(size).clone()


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The grid: every batch with every prompt length, and with one decode step; the most memory first."""
    sizes = sorted(arguments.batch_sizes, reverse=True)
    prefills = [Workload("prefill", b, n) for b in sizes for n in sorted(arguments.prompt_lengths, reverse=True)]
    return prefills + [Workload("decode", batch, arguments.context_length) for batch in sizes]


def missing_gpu() -> str | None:
    return None if has_cuda() else "PyTorch sees no CUDA device; install a CUDA build of torch on a machine with a GPU"


def missing_backend(backend: str, device: str) -> str | None:
    """Why a backend cannot be measured here; None where it can."""
    if backend == "torch-static":
        return None
    if backend == "onnxruntime":
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed: pip install 'flap-export[gpu]'"
        import onnxruntime

        wanted = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
        lacks = wanted not in onnxruntime.get_available_providers()
        return f"the installed onnxruntime has no {wanted}: pip install 'flap-export[gpu]'" if lacks else None
    if importlib.util.find_spec(backend.replace("-", "_")) is None:
        return f"{backend} is not installed: pip install 'flap-export[{backend}]'"
    return "engines run on a GPU only" if device == "cpu" else None


def measured_machine(device: str, dtype: str) -> tuple[str, Roofline]:
    """Name of the device, and the bandwidth and matrix rate it sustains: medians of what PyTorch reaches."""
    import torch

    is_gpu = device != "cpu"
    name = torch.cuda.get_device_name(torch.device(device)) if is_gpu else "cpu"
    source = torch.ones(1 << (30 if is_gpu else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_seconds(lambda: target.copy_(source), is_gpu)
    side = 8192 if is_gpu else 256
    # Matrices of ones would let a GPU clock higher than any weights do.
    left = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    product_s = median_seconds(lambda: left @ left, is_gpu)
    # A copy reads and writes every byte.
    return name, Roofline(2 * source.nbytes / copy_s, 2 * side**3 / product_s)


def median_seconds(call: Callable[[], object], is_gpu: bool, repeats: int = 11) -> float:
    import torch

    samples = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        call()
        if is_gpu:
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - begin)
    return sorted(samples[2:])[repeats // 2]


COLUMNS: Final = (
    "backend", "model", "pruned", "phase", "dense ms", "pruned ms", "speedup", "95 % interval", "ideal", "efficiency",
    "predicted ms", "GPU GB",
)  # fmt: skip


def rows(found: Found) -> list[list[Any]]:
    drawn = []
    memory = " -> ".join("?" if taken is None else f"{taken / 1e9:.1f}" for taken in found.device_memory_bytes)
    for phase, predicted in zip(found.phases, found.predicted_ms, strict=True):
        low, high = phase.speedup_interval
        times = [f"{side.median_ms:.3f}" for side in (phase.dense, phase.pruned)]
        speedups = [f"{phase.speedup:.2f}x", f"{low:.2f}-{high:.2f}", f"{phase.ideal_speedup:.2f}x"]
        expected = " -> ".join(f"{ms:.3f}" for ms in predicted)
        head = [found.backend, found.model, f"{found.ratio:.0%}", phase.described]
        drawn.append([*head, *times, *speedups, f"{phase.efficiency:.2f}", expected, memory])
    return drawn


if __name__ == "__main__":
    main()
