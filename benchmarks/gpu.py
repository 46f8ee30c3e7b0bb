"""Dense against pruned on a GPU, on everything that is installed: PyTorch, TensorRT, TensorRT-RTX, ONNX Runtime.

One command for a machine that has a GPU; needs no network. Llamas with random weights are pruned by random scores, so
that every layer has head counts and an FFN width of its own. For every model, backend and share: time per output token
(a decode step) and time to first token (a prefill) over a grid of batches and lengths, dense and pruned in turns,
beside what the arithmetic allows on this GPU (bandwidth and matrix rate are measured first), and beside what
`flap_export.prediction` expects of a GPU with these rates.

What matters most comes first: 7 B parameters, one token at batch 1. Every number is printed and saved as soon as it is
there, and the run ends when its time is up, whatever it is at. What is not there, does not work, has no room or no time
is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import common
from gpu_models import Maker

from flap_export.benchmarking.report import PhaseLatency, phase_latency
from flap_export.benchmarking.rounds import take_rounds
from flap_export.benchmarking.worker import Worker, WorkerOptions
from flap_export.benchmarking.workload import Workload
from flap_export.errors import FlapExportError
from flap_export.ideal import Roofline, cache_bytes, ideal_speedup, stored_parameters
from flap_export.precision import PRECISIONS
from flap_export.prediction import Assumptions, estimate

AIMS: Final = {"7b decode at batch 1": 0.95}
"""Efficiency, speedup over ideal speedup, at 30 % and 50 %."""
BACKENDS: Final = ("torch-static", "tensorrt", "tensorrt-rtx", "onnxruntime")
"""The first needs nothing but PyTorch and transformers, and takes the least time to prepare."""
ASSUMED: Final = {"torch-static": Assumptions(attention_kernels=11, ffn_kernels=6)}
"""What is expected of a backend that does not fuse kernels as engines do; see `flap_export.models.fewer_kernels`."""
MODELS: Final = {"7b": "7b", "1b": "1b", "0.1b": "160m"}
HELD: Final = 0.9
"""Of a GPU's memory, for weights and caches; the rest is for contexts, workspaces and what is computed."""
CLOSING_S: Final = 10.0
"""Of the time limit, for what is still to be done when measuring has to stop."""
TRIAL: Final = "tiny"
TRIAL_WORKLOADS: Final = (Workload("decode", 1, 8), Workload("prefill", 1, 8))


class TimeIsUpError(BaseException):
    """Raised in the middle of whatever is at work; what keeps others' errors to itself must not keep this one."""


def main() -> None:
    """Measure everything that is there, print a table, write JSON."""
    arguments = parsed_arguments()
    measured = Comparison(arguments)
    signal.signal(signal.SIGTERM, ended)
    try:
        with common.work_directory(arguments) as work:
            measured.run(work)
    finally:
        measured.show()
    if not measured.found:
        sys.exit(3)


def ended(number: int, frame: FrameType | None) -> NoReturn:
    """End as an exception does, so that no worker and no file stays."""
    sys.exit(128 + number)


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "gpu")
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    made.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.2])
    made.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    made.add_argument("--dtype", choices=sorted(PRECISIONS), default="float16")
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    made.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 1024])
    made.add_argument("--context-length", type=int, default=1024, help="cached tokens before a decode step")
    made.add_argument("--max-length", type=int, default=1040, help="rows of the cache, all of which are read")
    made.add_argument("--repeats", type=int, default=15, help="rounds per phase and shape")
    made.add_argument("--budget", type=float, default=0.8, help="seconds for the rounds of one phase and shape")
    made.add_argument("--time-limit", type=float, default=570.0, help="seconds after which this command has ended")
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
class Side:
    """One model open in a worker."""

    worker: Worker
    shape: Any
    device_memory_bytes: int | None
    """After the first workload."""


@dataclass(frozen=True)
class Found:
    """One backend on one model and share: the shapes that were measured so far."""

    backend: str
    model: str
    ratio: float
    device_memory_bytes: tuple[int | None, int | None]
    """Dense and pruned."""
    phases: list[PhaseLatency] = field(default_factory=list)
    predicted_ms: list[tuple[float, float]] = field(default_factory=list)
    """Dense and pruned, per phase."""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "phases": [phase.model_dump(mode="json") for phase in self.phases]}


class Comparison:
    """What was asked for, what was found and what was skipped."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.conditions = arguments, common.Conditions()
        self.started = time.monotonic()
        self.deadline = self.started + arguments.time_limit - CLOSING_S
        self.lead_s = 0.0
        """The longest that it took until the first shape of a share was measured, on the current model and backend."""
        self.found: list[Found] = []
        self.skipped: list[dict[str, str]] = []
        self.roofline: Roofline | None = None
        self.device_name = arguments.device
        self.gpu: dict[str, Any] | None = None
        self.finished = False
        """Whether everything was measured or named; a run that is ended from outside does neither."""

    def run(self, work: Path) -> None:
        """Everything, until the time is up."""
        if self.arguments.device != "cpu" and (reason := missing_gpu()):
            return self.skip("everything", reason)
        try:
            with alarm(self.deadline - time.monotonic()):
                self._run(work)
        # Between two comparisons; within one it is caught there.
        except TimeIsUpError as error:
            self.skip("the rest", reason_of(error))
        self.finished = True
        return None

    def _run(self, work: Path) -> None:
        self.say(f"measuring {self.arguments.device} itself")
        self.device_name, self.roofline = measured_machine(self.arguments.device, self.arguments.dtype)
        self.gpu = described_gpu(self.arguments.device)
        rates = self.roofline.bandwidth_bytes_per_s / 1e9, self.roofline.flops_per_s / 1e12
        self.say(f"{self.device_name} sustains {rates[0]:.0f} GB/s and {rates[1]:.1f} TFLOP/s: {self.gpu}")
        backends = [name for name in self.arguments.backends if self.is_there(name) and self.works(name, work)]
        for model in self.arguments.models:
            for backend in backends:
                self.run_backend(model, backend, work / model)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.1f} s] {text}", flush=True)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append({"what": what, "why": why})
        self.say(f"skipped {what}: {why}")

    def show(self) -> None:
        """All that was found, as a table."""
        for skipped in self.skipped:
            print(f"skipped {skipped['what']}: {skipped['why']}")
        if self.found:
            common.show("dense against pruned", COLUMNS, [row for found in self.found for row in rows(found)])
            print(f"written to {self.saved()}")

    def saved(self) -> Path:
        """Write what there is so far."""
        self.arguments.benchmark = f"gpu-{self.device_name}"
        result = {
            "aims": AIMS,
            "device": self.device_name,
            "gpu": self.gpu,
            "roofline": None if self.roofline is None else vars(self.roofline),
            "finished": self.finished,
            "comparisons": [found.as_json() for found in self.found],
            "skipped": self.skipped,
        }
        return common.save_result(self.arguments, self.conditions, result)

    def is_there(self, backend: str) -> bool:
        reason = missing_backend(backend, self.arguments.device)
        if reason:
            self.skip(backend, reason)
        return reason is None

    def works(self, backend: str, work: Path) -> bool:
        """Whether a model that costs nothing runs: what fails on every model shall not fail after minutes."""
        if self.arguments.models == [TRIAL]:
            return True
        self.say(f"trying {backend} on a tiny model")
        try:
            with self.opened(TRIAL, 0.0, backend, work / "trial", TRIAL_WORKLOADS):
                return True
        except (Exception, TimeIsUpError) as error:
            self.skip(backend, f"it does not run a tiny model: {reason_of(error)}")
            return False
        finally:
            shutil.rmtree(work / "trial", ignore_errors=True)

    def run_backend(self, model: str, backend: str, folder: Path) -> None:
        """All shares of one model on one backend; the dense one stays open until something fails."""
        left, self.lead_s = list(self.arguments.ratios), 0.0
        while left:
            is_open = False
            try:
                self.check_time()
                with self.opened(model, 0.0, backend, folder / "dense") as dense:
                    is_open = True
                    while left:
                        self.run_share(model, backend, left[0], dense, folder / "pruned")
                        left.pop(0)
            # Whatever one backend does not do must not keep the others from being measured.
            except (Exception, TimeIsUpError) as error:
                failed = left[:1] if is_open else left
                left = left[len(failed) :]
                if failed:
                    shares = ", ".join(f"{ratio:.0%}" for ratio in failed)
                    self.skip(f"{model} at {shares} on {backend}", reason_of(error))
        shutil.rmtree(folder, ignore_errors=True)

    def run_share(self, model: str, backend: str, ratio: float, dense: Side, folder: Path) -> None:
        """All shapes of one share; what fails leaves those that were measured before it."""
        begin = time.monotonic()
        self.check_time()
        try:
            with self.opened(model, ratio, backend, folder) as pruned:
                found = Found(backend, model, ratio, (dense.device_memory_bytes, pruned.device_memory_bytes))
                for workload in workloads(self.arguments):
                    if reason := self.lacks_room(workload, dense, pruned):
                        self.skip(f"{model} at {ratio:.0%} on {backend}, {workload.described}", reason)
                        continue
                    self.measure(found, workload, dense, pruned)
                    if len(found.phases) == 1:
                        self.lead_s = max(self.lead_s, time.monotonic() - begin)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def check_time(self) -> None:
        """Raises TimeIsUpError where nothing new would be measured."""
        if time.monotonic() + self.lead_s > self.deadline:
            raise TimeIsUpError

    @contextmanager
    def opened(
        self, model: str, ratio: float, backend: str, folder: Path, tried: Sequence[Workload] = ()
    ) -> Iterator[Side]:
        """A model on disk and in a worker, with its first workload done."""
        arguments = self.arguments
        maker = Maker(
            backend, arguments.dtype, arguments.max_length, max(arguments.batch_sizes), arguments.device,
            arguments.seed, self.deadline,
        )  # fmt: skip
        made = maker.made(MODELS.get(model, model), ratio, folder)
        self.say(f"made {model} at {ratio:.0%} for {backend}")
        options = WorkerOptions(device=arguments.device, threads=None, seed=arguments.seed)
        if backend == "torch-static":
            options = replace(options, backend=backend, dtype=arguments.dtype, max_length=arguments.max_length)
        with Worker(made.path, options) as worker:
            worker.backend()
            # A worker counts all memory that came into use since it started: the others are idle until this is known.
            samples = [worker.prepare(workload) for workload in tried or workloads(arguments)[:1]]
            self.say(f"opened {model} at {ratio:.0%} on {backend}, first call {samples[0].call_ms:.3f} ms")
            yield Side(worker, made.shape, samples[0].device_memory_bytes)

    def lacks_room(self, workload: Workload, *sides: Side) -> str | None:
        """Why weights and caches of both are too much for the GPU; to find out by trying costs opening them again."""
        if self.gpu is None:
            return None
        value_bytes, rows = PRECISIONS[self.arguments.dtype].bytes_per_value, self.arguments.max_length
        needed = sum(
            value_bytes * stored_parameters(side.shape)
            + cache_bytes(side.shape, batch_size=workload.batch_size, context_length=rows, bytes_per_value=value_bytes)
            for side in sides
        )
        total = self.gpu["memory_bytes"]
        return None if needed < HELD * total else f"it holds {needed / 1e9:.1f} GB, and there are {total / 1e9:.1f} GB"

    def measure(self, found: Found, workload: Workload, dense: Side, pruned: Side) -> None:
        """One shape; it is saved at once, for a run that is ended from outside has measured something."""
        arguments, sides = self.arguments, (dense, pruned)
        samples = take_rounds(
            [side.worker for side in sides], workload, repeats=arguments.repeats, budget_s=arguments.budget,
            draw=random.Random(arguments.seed),
        )  # fmt: skip
        ideal = ideal_speedup(
            dense.shape, pruned.shape, workload.phase, batch_size=workload.batch_size, length=workload.length,
            bytes_per_weight=PRECISIONS[arguments.dtype].bytes_per_value, roofline=self.roofline,
        )  # fmt: skip
        found.phases.append(phase_latency(workload, *samples, ideal=ideal, seed=arguments.seed))
        assumed = ASSUMED.get(found.backend, Assumptions())
        dense_ms, pruned_ms = (self.predicted_ms(side.shape, workload, assumed) for side in sides)
        found.predicted_ms.append((dense_ms, pruned_ms))
        if len(found.phases) == 1:
            self.found.append(found)
        times = " -> ".join(f"{side.median_ms:.3f}" for side in (found.phases[-1].dense, found.phases[-1].pruned))
        self.saved()
        self.say(f"{found.model} at {found.ratio:.0%} on {found.backend}: {times} ms, {found.phases[-1].verdict}")

    def predicted_ms(self, shape: Any, workload: Workload, assumed: Assumptions) -> float:
        """From the rates measured here, which need no assumed efficiency, and the assumptions about kernels."""
        assert self.roofline is not None
        return estimate(
            shape, workload.phase, workload.batch_size, workload.length, machine=self.roofline,
            dtype=self.arguments.dtype, assumptions=assumed,
        ).ms  # fmt: skip


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeIsUpError in the block when so much time has passed."""
    if seconds <= 0:
        raise TimeIsUpError

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason_of(error: BaseException) -> str:
    """An error in one line; where one that nobody foresaw comes from goes to standard error."""
    if isinstance(error, TimeIsUpError):
        return "there is no time left for it; see --time-limit"
    if not isinstance(error, FlapExportError):
        traceback.print_exception(error)
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The grid: every batch with one decode step and with every prompt length; the least memory first."""
    grid = []
    for batch_size in sorted(arguments.batch_sizes):
        grid.append(Workload("decode", batch_size, arguments.context_length))
        grid += [Workload("prefill", batch_size, length) for length in sorted(arguments.prompt_lengths)]
    return grid


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
    needed = [name for name in (backend.replace("-", "_"), "polygraphy") if importlib.util.find_spec(name) is None]
    if needed:
        return f"{' and '.join(needed)} not installed: pip install 'flap-export[{backend}]'"
    return "engines run on a GPU only" if device == "cpu" else None


def described_gpu(device: str) -> dict[str, Any] | None:
    """What a result must say of the GPU; None for a CPU."""
    import torch

    if device == "cpu":
        return None
    found = torch.cuda.get_device_properties(torch.device(device))
    return {
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "compute_capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def measured_machine(device: str, dtype: str) -> tuple[str, Roofline]:
    """Name of the device, and the bandwidth and matrix rate it sustains: medians of what PyTorch reaches."""
    import torch

    if device == "cpu":
        return device, measured_rates(device, dtype, copied_bytes=1 << 24, side=256)
    found = measured_rates(device, dtype, copied_bytes=1 << 30, side=8192)
    # The memory is for those that are measured.
    torch.cuda.empty_cache()
    return torch.cuda.get_device_name(torch.device(device)), found


def measured_rates(device: str, dtype: str, *, copied_bytes: int, side: int) -> Roofline:
    """By a copy within the device, and a product of two square matrices."""
    import torch

    source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_seconds(lambda: target.copy_(source), device)
    # Matrices of ones would let a GPU clock higher than any weights do.
    left = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    product_s = median_seconds(lambda: left @ left, device)
    # A copy reads and writes every byte.
    return Roofline(2 * copied_bytes / copy_s, 2 * side**3 / product_s)


def median_seconds(call: Callable[[], object], device: str, repeats: int = 21, warmups: int = 5) -> float:
    import torch

    samples = []
    for _ in range(warmups + repeats):
        begin = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(torch.device(device))
        samples.append(time.perf_counter() - begin)
    return sorted(samples[warmups:])[repeats // 2]


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
