"""Pruned against dense on ONNX Runtime, beside what the arithmetic allows.

A Llama with random weights is pruned by random scores, so that every layer has head counts and an FFN width of its
own, exported, and measured against the dense one by `flap_export.bench`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import common

from flap_export.benchmarking import LatencyReport, bench

AIMS: Final = {"decode": 0.95, "prefill": 0.90}
"""Efficiency: speedup over ideal speedup."""


def main() -> None:
    """Measure every ratio, print a table, write JSON."""
    arguments = parsed_arguments()
    conditions = common.Conditions()
    with common.work_directory(arguments) as work:
        reports = measured(arguments, work)
    common.show("pruned against dense", COLUMNS, [row for label in reports for row in rows(label, reports[label])])
    result = {"aims": AIMS, "reports": {label: found.model_dump(mode="json") for label, found in reports.items()}}
    print(f"written to {common.save_result(arguments, conditions, result)}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "pruned_vs_dense")
    made.add_argument("--model", choices=sorted(common.LLAMAS), default="207m")
    made.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    made.add_argument("--multiples", type=int, nargs="+", default=[1], help="FFN channels in multiples of these")
    made.add_argument("--prompt-length", type=int, default=128)
    made.add_argument("--max-length", type=int, default=512)
    made.add_argument("--repeats", type=int, default=60)
    made.add_argument("--budget", type=float, default=60.0, help="seconds per artifact pair")
    made.add_argument("--sample-ms", type=float, default=100.0, help="length of one sample")
    made.add_argument("--threads", type=int)
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.model, arguments.ratios, arguments.repeats, arguments.budget = "tiny", [0.5], 3, 2.0
    return arguments


def measured(arguments: argparse.Namespace, work: Path) -> dict[str, LatencyReport]:
    """One report per ratio and multiple."""
    name, max_length = arguments.model, arguments.max_length
    dense = common.random_checkpoint(work / name, common.llama_config(name, max_length))
    baseline = common.exported(work / f"{name}-onnx", dense, max_length)
    reports = {}
    for ratio in arguments.ratios:
        for multiple in arguments.multiples:
            folder = f"{name}-{ratio}-{multiple}"
            pruned = common.random_pruned_checkpoint(
                work / folder, dense, ratio, multiple=multiple, seed=arguments.seed
            )
            artifact = common.exported(work / f"{folder}-onnx", pruned, max_length)
            report = bench(
                artifact,
                baseline=baseline,
                prompt_lengths=(arguments.prompt_length,),
                repeats=arguments.repeats,
                budget_s=arguments.budget,
                sample_ms=arguments.sample_ms,
                threads=arguments.threads,
                seed=arguments.seed,
            )
            names = {"artifact": artifact.name, "baseline": baseline.name}
            reports[label(ratio, multiple)] = report.model_copy(update=names)
    return reports


def label(ratio: float, multiple: int) -> str:
    return f"{ratio:.0%}" if multiple == 1 else f"{ratio:.0%}, FFN in {multiple}s"


COLUMNS: Final = (
    "pruned", "phase", "dense ms", "pruned ms", "speedup", "95 % interval", "ideal", "efficiency", "aim", "memory MB"
)  # fmt: skip


def rows(label: str, report: LatencyReport) -> list[list[Any]]:
    drawn = []
    for found in report.phases:
        low, high = found.speedup_interval
        peaks = [side.peak_memory_bytes for side in (found.dense, found.pruned)]
        memory = " -> ".join("?" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks)
        times = [f"{found.dense.median_ms:.2f}", f"{found.pruned.median_ms:.2f}"]
        speedups = [f"{found.speedup:.2f}x", f"{low:.2f}-{high:.2f}", f"{found.ideal_speedup:.2f}x"]
        drawn.append([label, found.described, *times, *speedups, f"{found.efficiency:.2f}", AIMS[found.phase], memory])
    return drawn


if __name__ == "__main__":
    main()
