"""Which kernels a decode step of PyTorch with CUDA graphs launches, how long each takes, and what passes between them.

What `gpu.py` measures as a whole, taken apart by PyTorch's profiler: a table of kernels, and beside their sum the time
of a step that nobody watches. Weights are random, as there. Needs a GPU; on a CPU it names operators instead.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Final

import common
from gpu import MODELS, described_gpu, has_cuda, measured_machine
from gpu_models import Maker

from flap_export.benchmarking.workload import Call, Workload, prepared_call, timed_ms
from flap_export.ideal import call_bytes
from flap_export.precision import PRECISIONS
from flap_export.runners import open_runner

BACKEND: Final = "torch-static"
COLUMNS: Final = ("kernel", "launches", "us each", "ms a step", "share")
SHOWN: Final = 25
WARMUP_CALLS: Final = 5


def main() -> None:
    """Profile one model, print a table, write JSON."""
    arguments = parsed_arguments()
    conditions = common.Conditions()
    with common.work_directory(arguments) as work:
        found = measured(arguments, work)
    common.show(described(found), COLUMNS, [row(kernel, found) for kernel in found["kernels"][:SHOWN]])
    print(f"written to {common.save_result(arguments, conditions, found)}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "gpu_kernels")
    made.add_argument("--model", choices=list(MODELS), default="7b")
    made.add_argument("--ratio", type=float, default=0.0, help="share that is pruned by random scores")
    made.add_argument("--dtype", choices=sorted(PRECISIONS), default="float16")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--context-length", type=int, default=1024, help="cached tokens before the step")
    made.add_argument("--max-length", type=int, default=1040, help="rows of the cache, all of which are read")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--device", default="cuda")
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.model, arguments.dtype, arguments.steps = "tiny", "float32", 3
        arguments.context_length, arguments.max_length = 8, 16
        arguments.device = "cuda" if has_cuda() else "cpu"
    return arguments


def measured(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """A step as it is, its kernels, and the least time that the bytes it moves take on this device."""
    device, dtype = arguments.device, arguments.dtype
    name, roofline = measured_machine(device, dtype)
    maker = Maker(BACKEND, dtype, arguments.max_length, arguments.batch_size, device, arguments.seed, time.monotonic())
    made = maker.made(MODELS.get(arguments.model, arguments.model), arguments.ratio, work)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "max_length": arguments.max_length}
    with open_runner(made.path, backend=BACKEND, logits="last", **options) as runner:
        workload = Workload("decode", arguments.batch_size, arguments.context_length)
        call = prepared_call(runner, workload, arguments.seed)
        for _ in range(WARMUP_CALLS):
            call()
        step_ms = timed_ms(call, arguments.steps)
        kernels = profiled(call, arguments.steps, device)
    moved = call_bytes(
        made.shape, batch_size=arguments.batch_size, new_tokens=1, context_length=arguments.context_length,
        bytes_per_weight=PRECISIONS[dtype].bytes_per_value,
    )  # fmt: skip
    return {
        "device": name,
        "gpu": described_gpu(device),
        "roofline": vars(roofline),
        "step_ms": step_ms,
        "kernels_ms": sum(kernel["ms"] for kernel in kernels),
        "least_ms": moved / roofline.bandwidth_bytes_per_s * 1e3,
        "kernels": kernels,
    }


def profiled(call: Call, steps: int, device: str) -> list[dict[str, Any]]:
    """What a step launches, the longest together first; times are those of one step."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = device != "cpu"
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            call()
    events = [
        (event.key, event.count, event.self_device_time_total if is_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
    ]
    return [
        {"kernel": name, "launches": count / steps, "ms": total_us / steps / 1e3}
        for name, count, total_us in sorted(events, key=lambda event: -event[2])
        if total_us
    ]


def described(found: dict[str, Any]) -> str:
    launches = sum(kernel["launches"] for kernel in found["kernels"])
    return (
        f"a step takes {found['step_ms']:.3f} ms, its {launches:.0f} kernels {found['kernels_ms']:.3f} ms, "
        f"and moving its bytes {found['least_ms']:.3f} ms at least, on {found['device']}"
    )


def row(kernel: dict[str, Any], found: dict[str, Any]) -> tuple[str, ...]:
    each_us = kernel["ms"] * 1e3 / kernel["launches"]
    share = kernel["ms"] / found["kernels_ms"]
    return kernel["kernel"][:90], f"{kernel['launches']:.0f}", f"{each_us:.1f}", f"{kernel['ms']:.3f}", f"{share:.0%}"


if __name__ == "__main__":
    main()
