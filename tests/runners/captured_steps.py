"""Runs a decode step of every family as it is captured, on a device that stands for a GPU and computes nothing.

What a CUDA graph cannot hold ends in an error here or is printed: an answer that the host waits for, and a copy from
or to the host. In a process of its own, because a process can have but one such device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import ALL_FAMILIES, tiny_pruned
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from flap_export.runners.base import RunnerOptions
from flap_export.runners.static_torch_runner import StaticTorchRunner

DEVICE, BATCH_SIZE, MAX_LENGTH = "gpu", 2, 16


class Host(TorchDispatchMode):
    """Operators that read or write tensors of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in _pytree.tree_leaves((given, result)) if isinstance(leaf, torch.Tensor)]
        self.seen += [str(func)] if any(tensor.device.type != DEVICE for tensor in tensors) else []
        return result


def moved(model: nn.Module) -> None:
    """Put every parameter and buffer on the device; as it is not computed with, nothing is copied."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                    held[name] = nn.Parameter(empty, requires_grad=False) if held is module._parameters else empty


def step(checkpoint: Path) -> dict[str, Any]:
    """What happened in a decode step."""
    runner = StaticTorchRunner(checkpoint, RunnerOptions(dtype="float16", logits="last", max_length=MAX_LENGTH))
    runner._device = torch.device(DEVICE)
    with FakeTensorMode(), torch.inference_mode():
        moved(runner._model)
        runner._allocate(BATCH_SIZE)
        ids = torch.zeros(BATCH_SIZE, 1, dtype=torch.int64, device=DEVICE)
        starts = torch.zeros(BATCH_SIZE, dtype=torch.int64, device=DEVICE)
        waited, host = None, Host()
        try:
            with host:
                runner._called(ids, starts, MAX_LENGTH)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            waited = str(error)
    return {"captured": runner._captures, "waited": waited, "host": host.seen}


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    found = {family: step(tiny_pruned(family, Path(sys.argv[1]) / family)) for family in ALL_FAMILIES}
    Path(sys.argv[2]).write_text(json.dumps(found))
