"""Where to compute, `cpu`, `cuda` or `cuda:N`, and what this machine has for it."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from flap_export.cgroups import cpu_quota, memory_left_bytes
from flap_export.errors import InputError, MissingRequirementError

THREADS_PER_CORE: Final = 2
"""More than these, and they only wait for each other; of very many, a runtime never comes to an end."""


def check_threads(threads: int | None) -> None:
    """Whether this machine can use so many threads.

    Raises:
        InputError: it cannot.
    """
    cores = available_cores()
    if threads is not None and not 1 <= threads <= THREADS_PER_CORE * cores:
        raise InputError(
            f"threads must lie in 1..{THREADS_PER_CORE * cores} on the {cores} cores that are to be had here, got "
            f"{threads}; leave them out for what the backend takes itself"
        )


def available_cores() -> int:
    """Cores this process may use; those of a container with a share of the CPU time are as many as it has time for."""
    return quota_threads() or _allowed_cores()


def quota_threads() -> int | None:
    """Threads that a container has CPU time and cores for; None where its time is not limited."""
    quota = cpu_quota()
    return None if quota is None else min(max(math.ceil(quota), 1), _allowed_cores())


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_to_quota() -> None:
    """Let OpenMP, by which PyTorch computes, begin with no more threads than a container has CPU time for.

    It would take a thread for every core of the machine, which then wait for time together. Of effect before the first
    import of PyTorch; what the environment says already is kept.
    """
    if (threads := quota_threads()) is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def available_memory_bytes() -> int | None:
    """What this process can still have of memory; None where the system does not tell.

    On a machine that is what nobody uses, swap included; in a container, no more than it has left of its own.
    """
    bounds = [left for left in (_machine_memory_bytes(), memory_left_bytes()) if left is not None]
    return min(bounds, default=None)


def _machine_memory_bytes() -> int | None:
    found = {}
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("MemAvailable", "SwapFree"):
                found[name] = int(value.split()[0]) * 1024
    return sum(found.values()) if "MemAvailable" in found else None


def parsed_device(device: str) -> tuple[str, int]:
    """Kind and index; the first device of its kind where none is named.

    Raises:
        InputError: there is no such kind of device.
    """
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise InputError(f"device must be cpu, cuda or cuda:N, got '{device}'")
    kind, _, index = device.partition(":")
    return kind, int(index or 0)


def check_device(device: str) -> None:
    """Whether PyTorch can compute on `device`.

    Raises:
        InputError: there is no such kind of device, or no such number of it.
        MissingRequirementError: there is none on this machine.
    """
    kind, index = parsed_device(device)
    if kind == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise MissingRequirementError(
            f"device '{device}' was asked for and PyTorch sees no CUDA device",
            "install a CUDA build of torch on a machine with a GPU, or use --device cpu",
        )
    if (count := torch.cuda.device_count()) <= index:
        raise InputError(f"device '{device}' was asked for and PyTorch sees {count}; name one, from cuda:0 on")
