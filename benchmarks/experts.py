"""A mixture of experts on this CPU: the exported graph, which goes from expert to expert, against three others.

    joined         the same weights in the graph that a GPU gets: every call computes every expert
    transformers   the family's own class (of the pruned model, the class that its checkpoint carries)
    pruned         our graph of the model pruned by random scores

All take turns in one run. Weights are random, so that the router sends tokens everywhere, which is what the ideal
speedups assume: of the joined graph by bytes (decode) or operations (prefill), of the pruned model likewise.

On a machine that others use, `--cpu-time` compares the three artifacts by the CPU time of a single thread.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, final

import common
import numpy as np
from onnxruntime_cpu import ForeignProcess, opened, summarised

from flap_export.artifact import Artifact, load_artifact
from flap_export.benchmarking.rounds import take_rounds
from flap_export.benchmarking.worker import Sample, WorkerOptions
from flap_export.benchmarking.workload import Workload
from flap_export.building.graphs import cuda_graph
from flap_export.ideal import ideal_speedup
from flap_export.manifest import write_manifest
from flap_export.runners import open_runner

OURS: Final = "flap_export"
JOINED: Final = "joined"
TORCH: Final = "transformers"
PRUNED: Final = "pruned"
PRUNED_TORCH: Final = "pruned, transformers"
TRANSFORMERS_WORKER: Final = Path(__file__).with_name("transformers_worker.py")
SIZES: Final[dict[str, dict[str, int]]] = {
    "tiny": {
        "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8,
        "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
    },
    "420m": {
        "hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 4, "num_experts": 64,
        "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
        "vocab_size": 8000,
    },
}  # fmt: skip
"""Qwen3-MoE configurations by their rough number of parameters."""


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parsed_arguments()
    conditions = common.Conditions()
    with common.work_directory(arguments) as work:
        result = compared(arguments, work)
    common.show(f"{arguments.model} Qwen3-MoE, float32", COLUMNS, rows(result))
    print(f"written to {common.save_result(arguments, conditions, result)}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "experts")
    made.add_argument("--model", choices=sorted(SIZES), default="420m")
    made.add_argument("--ratio", type=float, default=0.5)
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="of decode steps")
    made.add_argument("--prompt-length", type=int, default=128)
    made.add_argument("--max-length", type=int, default=512)
    made.add_argument("--repeats", type=int, default=30)
    made.add_argument("--budget", type=float, default=60.0, help="seconds per phase and shape")
    made.add_argument("--threads", type=int, help="of every candidate (default: its own choice)")
    made.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, of artifacts only: see above")
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.model, arguments.repeats, arguments.budget = "tiny", 3, 2.0
    return arguments


def compared(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All candidates in every phase and shape."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(max_position_embeddings=arguments.max_length, **SIZES[arguments.model])
    dense = common.random_checkpoint(work / "dense", config, arguments.seed)
    pruned = common.random_pruned_checkpoint(work / "pruned", dense, arguments.ratio, seed=arguments.seed)
    ours = common.exported(work / "dense-onnx", dense, arguments.max_length)
    artifacts = {
        OURS: ours,
        JOINED: joined(work / "joined-onnx", ours),
        PRUNED: common.exported(work / "pruned-onnx", pruned, arguments.max_length),
    }
    shapes = [load_artifact(artifacts[name]) for name in (OURS, PRUNED)]
    workloads = [Workload("prefill", 1, arguments.prompt_length)]
    workloads += [Workload("decode", size, arguments.prompt_length) for size in arguments.batch_sizes]
    with contextlib.ExitStack() as stack:
        if arguments.cpu_time:
            candidates: dict[str, Any] = {
                name: stack.enter_context(OwnThread(path, arguments.seed)) for name, path in artifacts.items()
            }
        else:
            candidates = processes(arguments, stack, artifacts, {TORCH: dense, PRUNED_TORCH: pruned})
        return {"phases": [measured(arguments, candidates, workload, *shapes) for workload in workloads]}


def processes(
    arguments: argparse.Namespace,
    stack: contextlib.ExitStack,
    artifacts: dict[str, Path],
    checkpoints: dict[str, Path],
) -> dict[str, Any]:
    """Every candidate in a process of its own."""
    options = WorkerOptions(device="cpu", threads=arguments.threads, seed=arguments.seed)
    candidates: dict[str, Any] = {name: stack.enter_context(opened(path, options)) for name, path in artifacts.items()}
    for name, checkpoint in checkpoints.items():
        command = [sys.executable, str(TRANSFORMERS_WORKER), str(checkpoint), str(arguments.threads or 0)]
        candidates[name] = stack.enter_context(ForeignProcess(name, command, arguments.seed))
    return candidates


@final
class OwnThread:
    """An artifact in this process, computed by this thread alone, whose CPU time is taken; measured like a `Worker`."""

    def __init__(self, artifact: Path, seed: int) -> None:
        self.runner, self.seed = open_runner(artifact, threads=1, logits="last"), seed
        self.call: Callable[[], Any] = lambda: None

    def __enter__(self) -> OwnThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def prepare(self, workload: Workload) -> Sample:
        draw, vocabulary = np.random.default_rng(self.seed), self.runner.vocabulary_size
        prompts = draw.integers(0, vocabulary, (workload.batch_size, workload.length)).tolist()
        self.runner.prefill(prompts)
        if workload.phase == "prefill":
            self.call = lambda: self.runner.prefill(prompts)
        else:
            self.call = lambda: self.runner.decode(draw.integers(0, vocabulary, workload.batch_size))
        return self.measure(1)

    def measure(self, calls: int) -> Sample:
        begin = time.thread_time()
        for _ in range(calls):
            self.call()
        return Sample(call_ms=(time.thread_time() - begin) * 1000 / calls, peak_memory_bytes=None)


def joined(directory: Path, artifact: Path) -> Path:
    """The artifact with the graphs of a GPU, which run on a CPU as well; made unless it is there."""
    if directory.is_dir():
        return directory
    shutil.copytree(artifact, directory, copy_function=os.link)
    described = load_artifact(artifact)
    for graph in described.graphs.values():
        content = cuda_graph(artifact / graph)
        assert content is not None
        (directory / graph).unlink()
        (directory / graph).write_bytes(content)
    (directory / "manifest.json").unlink()
    write_manifest(directory, digests=described.digests)
    return directory


def measured(
    arguments: argparse.Namespace, candidates: dict[str, Any], workload: Workload, dense: Artifact, pruned: Artifact
) -> dict[str, Any]:
    """One phase and shape, and what reading and computing the chosen experts only may save."""
    unknown = dense.shape.model_copy(update={"experts_per_token": 0})
    call = {"batch_size": workload.batch_size, "length": workload.length, "bytes_per_weight": 4}
    ideal = ideal_speedup(unknown, dense.shape, workload.phase, **call)
    found = measured_against_ours(arguments, candidates, workload, dense, pruned)
    return {**found, "ideal_speedup_over_joined": ideal}


def measured_against_ours(
    arguments: argparse.Namespace, candidates: dict[str, Any], workload: Workload, dense: Artifact, pruned: Artifact
) -> dict[str, Any]:
    """One phase and shape: every candidate's samples, summarised, and our speedup over it."""
    draw = random.Random(arguments.seed)
    samples = take_rounds(
        list(candidates.values()), workload, repeats=arguments.repeats, budget_s=arguments.budget, draw=draw
    )
    times = {name: [sample.call_ms for sample in taken] for name, taken in zip(candidates, samples, strict=True)}
    memory = {name: taken[-1].peak_memory_bytes for name, taken in zip(candidates, samples, strict=True)}
    call = {"batch_size": workload.batch_size, "length": workload.length, "bytes_per_weight": 4}
    found = {name: summarised(times[name], times[OURS], memory[name], arguments.seed) for name in candidates}
    return {
        "phase": workload.phase,
        "batch_size": workload.batch_size,
        "length": workload.length,
        "candidates": found,
        "ideal_speedup_of_pruned": ideal_speedup(dense.shape, pruned.shape, workload.phase, **call),
    }


COLUMNS: Final = (
    "phase", "batch", "candidate", "median ms", "95 % interval", "minimum ms", "memory MB", "ours is", "95 % interval"
)  # fmt: skip


def rows(result: dict[str, Any]) -> list[list[str]]:
    drawn = []
    for phase in result["phases"]:
        for name, found in phase["candidates"].items():
            low, high = found["interval_ms"]
            ratio_low, ratio_high = found["our_speedup_interval"]
            times = [f"{found['median_ms']:.2f}", f"{low:.2f}-{high:.2f}", f"{found['minimum_ms']:.2f}"]
            ratios = [f"{found['our_speedup']:.2f}x", f"{ratio_low:.2f}-{ratio_high:.2f}"]
            peak = found["peak_memory_bytes"]
            memory = "?" if peak is None else f"{peak / 1e6:.0f}"
            drawn.append([phase["phase"], str(phase["batch_size"]), name, *times, memory, *ratios])
    return drawn


if __name__ == "__main__":
    main()
