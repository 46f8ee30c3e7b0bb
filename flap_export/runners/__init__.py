"""Open a checkpoint or an artifact on a backend. A further backend is one file beside this and one row of the table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Literal

from flap_export.artifact import LogitsKind, is_artifact
from flap_export.building.record import check_runnable, is_engine, is_runnable
from flap_export.devices import check_threads
from flap_export.errors import InputError
from flap_export.runners.base import Logits, Runner, RunnerOptions, TokenIds, padded
from flap_export.runners.onnxruntime_runner import OnnxRuntimeRunner
from flap_export.runners.tensorrt_runner import TensorRTRunner
from flap_export.runners.torch_runner import TorchRunner

__all__ = [
    "BACKENDS",
    "Backend",
    "Logits",
    "Runner",
    "RunnerOptions",
    "TokenIds",
    "natural_backend",
    "open_runner",
    "padded",
]

Backend = Literal[
    "auto", "torch", "torch-static", "onnxruntime", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "tensorrt"
]


def _static_torch(path: Path, options: RunnerOptions) -> Runner:
    """Imported when asked for: it stands on transformers' classes."""
    from flap_export.runners.static_torch_runner import StaticTorchRunner

    return StaticTorchRunner(path, options)


BACKENDS: Final[dict[str, Callable[[Path, RunnerOptions], Runner]]] = {
    "torch": TorchRunner,
    "torch-static": _static_torch,
    "onnxruntime": OnnxRuntimeRunner,
    # TensorRT inside ONNX Runtime, as an execution provider.
    "onnxruntime-tensorrt": partial(OnnxRuntimeRunner, provider="tensorrt"),
    "onnxruntime-tensorrt-rtx": partial(OnnxRuntimeRunner, provider="tensorrt-rtx"),
    "tensorrt": TensorRTRunner,
}


def open_runner(
    path: str | Path,
    *,
    backend: Backend = "auto",
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    logits: LogitsKind = "all",
    max_length: int | None = None,
    check: bool = True,
) -> Runner:
    """Open `path` for running; use it in a `with` statement.

    Args:
        path: an artifact (ONNX Runtime), built engines (TensorRT) or a checkpoint (PyTorch).
        backend: which one to insist on; `auto` goes by what `path` is.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: precision of a checkpoint on PyTorch, float32 by default; an artifact has its own.
        threads: cores one operator may use; the backend's own choice by default.
        logits: of every new token, or of the last one only, which is cheaper.
        max_length: rows of a checkpoint's cache, its context length by default; an artifact has its own.
        check: hold an artifact or engines against their manifest, all but the weights' content; False where
            `check_runnable` has done so.

    Raises:
        InputError: an unknown backend, device or dtype, or one that `path` does not have; or more threads than this
            machine has use for.
        ArtifactError: the artifact is damaged, or is not what was written.
        ModelError: the checkpoint is not usable.
        MissingRequirementError: a package or a device is not there.
    """
    path = Path(path)
    chosen = natural_backend(path) if backend == "auto" else backend
    if chosen not in BACKENDS:
        raise InputError(f"backend must be auto or one of {', '.join(BACKENDS)}, got '{backend}'")
    check_threads(threads)
    if check and is_runnable(path):
        check_runnable(path)
    options = RunnerOptions(device=device, dtype=dtype, threads=threads, logits=logits, max_length=max_length)
    return BACKENDS[chosen](path, options)


def natural_backend(path: Path) -> Backend:
    """The backend that goes with what `path` is."""
    if is_engine(path):
        return "tensorrt"
    return "onnxruntime" if is_artifact(path) else "torch"
