"""What an export costs: nodes, seconds and peak memory, each case in a process of its own.

Cases come in two kinds. `graph` traces and optimizes with fake weights only, so that even the shape of LLaMA-7B
(32 layers, hidden 4096, FFN 11008, float16, 13 GB of weights) needs no weights at all. `full` exports a checkpoint of
random weights and streams them to disk. `--full-7b` does so for the 7B shape too: its checkpoint is a sparse file of
zeros, the artifact takes 13 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import common

GRAPH_CASES: Final = (("demo", "float32"), ("160m", "float32"), ("7b", "float16"))
FULL_CASES: Final = (("demo", "float32"), ("160m", "float32"))
BYTES: Final = {"float32": 4, "float16": 2}
MAX_LENGTH: Final = 2048


def main() -> None:
    """Run every case in its own process, print a table, write JSON."""
    arguments = parsed_arguments()
    if arguments.case is not None:
        print(json.dumps(measured(arguments.case[0], *arguments.case[1:3], Path(arguments.case[3]))))
        return
    conditions = common.Conditions()
    with common.work_directory(arguments) as work:
        found = [in_own_process(*case, work) for case in cases(arguments)]
    common.show("cost of an export", COLUMNS, [row(case) for case in found])
    print(f"written to {common.save_result(arguments, conditions, {'cases': found})}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "export_cost")
    made.add_argument("--full-7b", action="store_true", help="write a whole artifact of the 7B shape: 13 GB of disk")
    made.add_argument("--case", nargs=4, metavar=("KIND", "MODEL", "DTYPE", "WORK"), help=argparse.SUPPRESS)
    return made.parse_args(command_line)


def cases(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    if arguments.quick:
        return [("graph", "tiny", "float32"), ("full", "tiny", "float32")]
    full = [*FULL_CASES, ("7b", "float16")] if arguments.full_7b else list(FULL_CASES)
    return [("graph", *case) for case in GRAPH_CASES] + [("full", *case) for case in full]


def in_own_process(kind: str, model: str, dtype: str, work: Path) -> dict[str, Any]:
    """The case's numbers; peak memory is that process's own."""
    made_checkpoint(kind, model, dtype, work)
    command = [sys.executable, __file__, "--case", kind, model, dtype, str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def checkpoint_directory(kind: str, model: str, work: Path) -> Path:
    return work / (model if kind == "full" and model != "7b" else f"{model}-zeros")


def made_checkpoint(kind: str, model: str, dtype: str, work: Path) -> None:
    """Random weights for full exports; a file of zeros without blocks on disk where values are never looked at."""
    directory, config = checkpoint_directory(kind, model, work), common.llama_config(model, MAX_LENGTH)
    if directory.name == model:
        common.random_checkpoint(directory, config)
    elif not (directory / "config.json").is_file():
        directory.mkdir(parents=True)
        config.save_pretrained(directory)
        write_sparse_weights(directory, dtype)


def write_sparse_weights(directory: Path, dtype: str) -> None:
    """All tensors of the configuration in one safetensors file whose data is a hole."""
    import torch

    from flap_export.models.loading import meta_model, parameter_names
    from flap_export.models.opening import open_checkpoint

    opened = open_checkpoint(directory)
    model = meta_model(opened, torch.float32)
    sizes = {name: model.get_parameter(name).shape for name in parameter_names(model, opened)}
    header, data_bytes = common.safetensors_header(sizes, dtype)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + data_bytes)


def measured(kind: str, model: str, dtype: str, work: Path) -> dict[str, Any]:
    """Run one case in this process."""
    from flap_export.benchmarking.machine import peak_memory_bytes, reset_peak_memory
    from flap_export.exporting.stage import export
    from flap_export.ideal import stored_parameters
    from flap_export.models.opening import open_checkpoint

    directory = checkpoint_directory(kind, model, work)
    opened = open_checkpoint(directory)
    shape = opened.shape
    reset_peak_memory()
    idle = peak_memory_bytes()
    begin = time.perf_counter()
    if kind == "graph":
        nodes = optimized_nodes(opened, dtype)
    else:
        export(directory, work / f"{model}-cost-onnx", dtype=dtype, max_length=MAX_LENGTH)  # type: ignore[arg-type]
    seconds, peak = time.perf_counter() - begin, peak_memory_bytes()
    if kind == "full":
        nodes = stored_nodes(work / f"{model}-cost-onnx")
        shutil.rmtree(work / f"{model}-cost-onnx")
    weights = BYTES[dtype] * stored_parameters(shape)
    return {
        "kind": kind,
        "model": model,
        "dtype": dtype,
        "layers": len(shape.layers),
        "nodes": len(nodes),
        "nodes_per_layer": nodes_per_layer(nodes, len(shape.layers)),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
        "imports_memory_bytes": idle,
        "weights_bytes": weights,
        "peak_over_twice_the_weights": None if peak is None else peak / (2 * weights),
    }


def optimized_nodes(opened: Any, dtype: str) -> list[str]:
    """Operators of the graph after tracing and all passes; no weight is read."""
    from flap_export.exporting.passes import optimize
    from flap_export.exporting.streaming import bind_weights
    from flap_export.exporting.trace import trace
    from flap_export.precision import torch_dtype

    ir_model = trace(opened, torch_dtype(dtype), MAX_LENGTH, "last")
    bind_weights(ir_model, opened, torch_dtype(dtype))
    optimize(ir_model)
    return [node.op_type for node in ir_model.graph]


def stored_nodes(artifact: Path) -> list[str]:
    import onnx

    stored = onnx.load(artifact / "model-last.onnx", load_external_data=False)
    return [node.op_type for node in stored.graph.node]


def nodes_per_layer(nodes: list[str], layers: int) -> int:
    """Nodes that come once per layer: of each operator as many as every layer can have."""
    return sum(nodes.count(operator) // layers for operator in set(nodes))


COLUMNS: Final = (
    "case", "layers", "nodes", "per layer", "seconds", "peak MB", "of which imports", "weights MB", "peak / 2 weights"
)  # fmt: skip


def row(case: dict[str, Any]) -> list[str]:
    peak, idle = case["peak_memory_bytes"] or 0, case["imports_memory_bytes"] or 0
    counts = [str(case["layers"]), str(case["nodes"]), str(case["nodes_per_layer"]), f"{case['seconds']:.1f}"]
    memory = [f"{peak / 1e6:.0f}", f"{idle / 1e6:.0f}", f"{case['weights_bytes'] / 1e6:.0f}"]
    share = case["peak_over_twice_the_weights"]
    label = f"{case['kind']}, {case['model']}, {case['dtype']}"
    return [label, *counts, *memory, "?" if share is None else f"{share:.2f}"]


if __name__ == "__main__":
    main()
