"""What `gpu.py` measures: Llamas of random weights, dense and pruned, as each backend opens them.

Random weights cost little more than writing them once: every tensor is a stretch of one pool of random numbers, written
straight into the file. What a backend does not open goes as soon as what it opens is there, so that a comparison of two
models of 7 B parameters needs no more disk than three of them.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import common

from flap_export.devices import available_memory_bytes
from flap_export.errors import FlapExportError
from flap_export.ideal import stored_parameters
from flap_export.precision import PRECISIONS

POOL_VALUES: Final = 1 << 22
DEVIATION: Final = 0.02
FFN_MULTIPLE: Final = 8
"""Channels that a pruned FFN keeps are a multiple of this."""
COPIES: Final = {"torch-static": 1}
"""How often a model is on the disk while it is made for a backend, where that is not twice."""
SPARE_DISK_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Model:
    """One model on disk, as one backend opens it."""

    path: Path
    shape: Any


@dataclass(frozen=True)
class Maker:
    """Makes models for a backend."""

    backend: str
    dtype: Any
    max_length: int
    max_batch: int
    device: str
    seed: int
    deadline: float
    """By `time.monotonic`, when an engine must be built."""

    def made(self, config: str, ratio: float, folder: Path) -> Model:
        """A model of a row of `common.LLAMAS`, pruned by random scores where `ratio` is not 0.

        Raises:
            FlapExportError: there is no room for it, or it cannot be made for the backend.
        """
        checkpoint = folder / "checkpoint"
        opened, plan = self._planned(config, ratio, checkpoint)
        shape = opened.shape if plan is None else plan.pruned_shape(opened.shape, compensated=True)
        weights = stored_parameters(shape) * PRECISIONS[self.dtype].bytes_per_value
        check_room(f"the disk of '{folder}'", shutil.disk_usage(folder).free, self._disk_bytes(weights))
        check_room(f"the device '{self.device}'", free_bytes(self.device), weights)
        self._write(checkpoint, opened, plan, shape)
        return Model(self._opened_by_the_backend(checkpoint, folder), shape)

    def _planned(self, config: str, ratio: float, checkpoint: Path) -> tuple[Any, Any]:
        """The dense model, of which only the configuration is on disk, and what is kept of it."""
        from flap_export.models.opening import open_checkpoint

        made = common.llama_config(config, self.max_length, dtype=self.dtype)
        made.architectures = ["LlamaForCausalLM"]
        made.save_pretrained(checkpoint)
        dense = open_checkpoint(checkpoint)
        return dense, common.random_plan(dense, ratio, FFN_MULTIPLE, self.seed) if ratio else None

    def _disk_bytes(self, weights: int) -> int:
        return COPIES.get(self.backend, 2) * weights + SPARE_DISK_BYTES

    def _write(self, checkpoint: Path, dense: Any, plan: Any, shape: Any) -> None:
        from flap_export.rewriting.checkpoint import write_beside_uneven

        if plan is not None:
            write_beside_uneven(checkpoint, dense, plan, shape)
        write_pooled_weights(checkpoint, replace(dense, shape=shape, is_pruned=plan is not None), self.dtype, self.seed)

    def _opened_by_the_backend(self, checkpoint: Path, folder: Path) -> Path:
        """The checkpoint, or what is made of it, which then goes."""
        if self.backend == "torch-static":
            return checkpoint
        from flap_export.exporting import export

        artifact = folder / "onnx"
        export(checkpoint, artifact, dtype=self.dtype, max_length=self.max_length)
        shutil.rmtree(checkpoint)
        if self.backend == "onnxruntime":
            return artifact
        engine = folder / "engine"
        run_build(artifact, engine, self.backend, self.max_batch, self.deadline - time.monotonic())
        shutil.rmtree(artifact)
        return engine


def check_room(where: str, free: int | None, needed: int) -> None:
    """Raises FlapExportError where less is free than needed."""
    if free is not None and free < needed:
        raise FlapExportError(f"{where} must have {needed / 1e9:.1f} GB free, found {free / 1e9:.1f} GB")


def free_bytes(device: str) -> int | None:
    """Memory of a device that nobody uses; None where it does not tell."""
    if device == "cpu":
        return available_memory_bytes()
    import torch

    return torch.cuda.mem_get_info(torch.device(device))[0]


def write_pooled_weights(directory: Path, opened: Any, dtype: str, seed: int) -> None:
    """All tensors of a model: norms are one, all else is normal with deviation `DEVIATION`."""
    import torch

    from flap_export.models.loading import meta_model, parameter_names

    model, generator = meta_model(opened, torch.float32), torch.Generator().manual_seed(seed)
    sizes = {name: tuple(model.get_parameter(name).shape) for name in parameter_names(model, opened)}
    pool = (DEVIATION * torch.randn(POOL_VALUES, generator=generator)).to(getattr(torch, dtype))
    value_bytes = PRECISIONS[dtype].bytes_per_value  # type: ignore[index]
    with (directory / "model.safetensors").open("wb") as file:
        file.write(common.safetensors_header(sizes, dtype)[0])
        for name, size in sizes.items():
            start = int(torch.randint(POOL_VALUES, (1,), generator=generator))
            source = torch.ones_like(pool) if "norm" in name else pool
            for piece in stretches(
                source.view(torch.uint8).numpy(), start * value_bytes, math.prod(size) * value_bytes
            ):
                file.write(piece)


def stretches(pool: Any, start: int, length: int) -> Iterator[memoryview]:
    """The `length` bytes from `start` on, of the pool again and again; nothing is copied."""
    content = memoryview(pool)
    while length:
        piece = content[start : start + length]
        yield piece
        start, length = 0, length - len(piece)


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
