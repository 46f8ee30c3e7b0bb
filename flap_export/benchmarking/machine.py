"""The machine a measurement was taken on, and the memory of the process that takes it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

from flap_export.devices import available_cores
from flap_export.storage import Value

_CPU_INFO: Final = Path("/proc/cpuinfo")
_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"


class Machine(Value):
    """What ran the measurement."""

    cpu: str
    cores: int
    """Cores this process may use, and has time for; see `flap_export.devices.available_cores`."""
    system: str
    load_average: tuple[float, float, float] | None
    """Of the last 1, 5 and 15 minutes when the measurement began; None where the system does not say."""


def this_machine() -> Machine:
    """Describe the machine this process runs on."""
    return Machine(
        cpu=_cpu_model(),
        cores=available_cores(),
        system=platform.platform(),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
    )


def reset_peak_memory() -> bool:
    """Let the peak resident memory of this process begin anew; False where the system does not allow it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process (Linux: VmHWM) since it began or was reset; None on other systems."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith(f"{field}:")), None)
    return int(line.split()[1]) * 1024 if line is not None else None


def _cpu_model() -> str:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
