"""What the benchmarks share: model shapes, random checkpoints, tables, and results with machine and versions."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import struct
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from flap_export.benchmarking.machine import this_machine
from flap_export.precision import PRECISIONS
from flap_export.storage import write_text

RESULTS: Final = Path(__file__).parent / "results"
VERSIONED: Final = (
    "flap-export", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch",
    "transformers",
)  # fmt: skip

UNRECORDED: Final = ("benchmark", "case", "genai_python", "optimum_python", "output", "work")
"""Options that name a place or a process rather than what is measured."""

LLAMAS: Final[dict[str, dict[str, Any]]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256,
    },
    "demo": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 2048,
    },
    "52m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 16000,
    },
    "160m": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 32000,
    },
    "207m": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
}  # fmt: skip
"""Llama configurations by their rough number of parameters."""


def parser(description: str | None, benchmark: str) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.set_defaults(benchmark=benchmark)
    made.add_argument("--output", type=Path, help=f"JSON file to write (default: {RESULTS}/{benchmark}-...json)")
    made.add_argument("--work", type=Path, help="where models and artifacts are made and kept (default: temporary)")
    made.add_argument("--quick", action="store_true", help="a tiny model and few rounds: does the script work?")
    return made


@contextmanager
def work_directory(arguments: argparse.Namespace) -> Iterator[Path]:
    """`--work`, or a directory that goes at the end."""
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
        yield arguments.work
        return
    with tempfile.TemporaryDirectory(prefix="flap-export-benchmark-") as directory:
        yield Path(directory)


def llama_config(name: str, max_length: int = 2048, **changes: Any) -> Any:
    """The transformers configuration of a row of `LLAMAS`."""
    from transformers import LlamaConfig

    return LlamaConfig(**{"max_position_embeddings": max_length, **LLAMAS[name], **changes})


def random_checkpoint(directory: Path, config: Any, seed: int = 0) -> Path:
    """A model with random float32 weights, made unless it is there."""
    import torch
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def random_pruned_checkpoint(directory: Path, dense: Path, ratio: float, *, multiple: int = 1, seed: int = 0) -> Path:
    """`dense` pruned by random scores with compensating biases, made unless it is there.

    Every layer ends with counts of its own. The weights are random: no arithmetic here depends on their values.

    Args:
        directory: where to make it.
        dense: the dense checkpoint.
        ratio: share of the attention and FFN weights that goes.
        multiple: FFN channels are rounded to a multiple of this.
        seed: of scores and weights.
    """
    from flap_export.models.opening import open_checkpoint
    from flap_export.rewriting.checkpoint import write_checkpoint

    if (directory / "config.json").is_file():
        return directory
    opened = open_checkpoint(dense)
    plan = random_plan(opened, ratio, multiple, seed)
    shape = plan.pruned_shape(opened.shape, compensated=True)
    directory.mkdir(parents=True, exist_ok=True)
    write_checkpoint(directory, opened, plan, shape, random_tensors(opened, shape, seed))
    return directory


def random_plan(opened: Any, ratio: float, multiple: int, seed: int) -> Any:
    """A plan from random scores whose mean differs from layer to layer."""
    import torch

    from flap_export.allocation.stage import allocate
    from flap_export.plan import PruningPlan
    from flap_export.scoring import LayerScores

    generator = torch.Generator().manual_seed(seed)

    def scores(*units: int) -> Any:
        spread = torch.randn(units, generator=generator, dtype=torch.float64)
        return spread + 0.5 * torch.randn(1, generator=generator, dtype=torch.float64)

    drawn = [LayerScores(scores(layer.query_heads), scores(*layer.ffn_scores)) for layer in opened.shape.layers]
    layers, achieved = allocate(drawn, opened.shape, ratio)
    if multiple > 1:
        layers = tuple(_rounded(layer, multiple) for layer in layers)
    return PruningPlan(model=opened.name, family=opened.family.model_type, ratio=achieved, layers=layers)


def _rounded(layer: Any, multiple: int) -> Any:
    count = max(len(layer.ffn_channels) // multiple * multiple, multiple)
    return layer.model_copy(update={"ffn_channels": layer.ffn_channels[:count]})


def random_tensors(opened: Any, shape: Any, seed: int) -> Iterator[tuple[str, Any]]:
    """Tensors of the pruned model, one at a time: norms are one, all else is normal with deviation 0.02."""
    import torch

    from flap_export.models.loading import meta_model, parameter_names

    resized = dataclasses.replace(opened, shape=shape, is_pruned=True)
    model, generator = meta_model(resized, torch.float32), torch.Generator().manual_seed(seed)
    for name in parameter_names(model, resized):
        size = model.get_parameter(name).shape
        is_norm = "norm" in name
        yield name, torch.ones(size) if is_norm else 0.02 * torch.randn(size, generator=generator)


def safetensors_header(sizes: Mapping[str, Sequence[int]], dtype: str) -> tuple[bytes, int]:
    """What a safetensors file with tensors of these shapes begins with, and the bytes of data that follow."""
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header, offset = {}, 0
    for name, size in sizes.items():
        end = offset + math.prod(size) * PRECISIONS[dtype].bytes_per_value
        header[name] = {"dtype": kind, "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    # Data that begins at a multiple of 8 is read where it lies.
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, offset


def exported(directory: Path, checkpoint: Path, max_length: int) -> Path:
    """The artifact of a checkpoint, made unless it is there."""
    from flap_export.artifact import is_artifact
    from flap_export.exporting import export

    if not is_artifact(directory):
        export(checkpoint, directory, max_length=max_length)
    return directory


def versions(packages: Iterable[str] = VERSIONED) -> dict[str, str]:
    """Installed versions of those that are there."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Conditions:
    """The machine's state around a benchmark: load by others shows in the load average when it begins."""

    def __init__(self) -> None:
        self.machine = this_machine()
        self.started = time.time()

    def described(self) -> dict[str, Any]:
        """Machine, versions, and the load average before and after."""
        cores = self.machine.cores
        before, after = self.machine.load_average, os.getloadavg()
        return {
            "machine": self.machine.model_dump(mode="json"),
            "load_average_after": after,
            "other_load_present": before is not None and before[0] > 0.25 * cores,
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "versions": versions(),
        }


def save_result(arguments: argparse.Namespace, conditions: Conditions, result: Mapping[str, Any]) -> Path:
    """Write the result with its settings and conditions; `--quick` ones go nowhere unless `--output` says where."""
    described = conditions.described()
    settings = {key: value for key, value in vars(arguments).items() if key not in UNRECORDED}
    document = {"benchmark": arguments.benchmark, **described, "settings": settings, **result}
    path: Path = arguments.output or _default_path(arguments, described)
    if arguments.quick and arguments.output is None:
        path = Path(tempfile.gettempdir()) / path.name
    write_text(path, json.dumps(document, indent=2, default=str) + "\n")
    return path


def _default_path(arguments: argparse.Namespace, described: Mapping[str, Any]) -> Path:
    machine, installed = described["machine"], described["versions"]
    parts = [arguments.benchmark, f"{machine['cpu']}-{machine['cores']}-cores"]
    parts += [f"{package}-{installed[package]}" for package in ("onnxruntime", "torch") if package in installed]
    return RESULTS / ("-".join(re.sub(r"[^a-z0-9._]+", "-", part.lower()).strip("-") for part in parts) + ".json")


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
