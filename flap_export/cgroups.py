"""What a container may take of its machine: memory and CPU time, by Linux control groups of version 1 or 2.

The limits of a group hold for all groups below it, so that a process is bound by the tightest of its own and those
above. A container may see its own group as the root of what is mounted, whatever `/proc/self/cgroup` calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path("/")
_MOUNT: Final = "sys/fs/cgroup"
_MEMORY: Final = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, what is used of it, and the field of `memory.stat` that tells what of this is cache that goes when memory is
needed: in version 2, and in version 1."""


def memory_left_bytes(root: Path = ROOT) -> int | None:
    """What this process's groups leave it of memory, swap apart; None where none of them has a limit."""
    lefts = [left for folder in _groups("memory", root) if (left := _memory_left(folder)) is not None]
    return min(lefts, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs whose time this process's groups leave it, such as 1.5; None where none of them has a limit."""
    quotas = [quota for folder in _groups("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    return min(quotas, default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the groups of a controller that this process is in, from its own to the root of what is mounted."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        # The one hierarchy of version 2 names none.
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / _MOUNT / controllers
        inner = PurePosixPath(path.lstrip("/"))
        yield from (mount / above for above in (inner, *inner.parents) if ".." not in above.parts)


def _memory_left(folder: Path) -> int | None:
    for limit_name, used_name, cache_name in _MEMORY:
        limit, used = (_number(_text(folder / name)) for name in (limit_name, used_name))
        if limit is not None and used is not None:
            fields = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
            return max(limit - used + (_number(fields.get(cache_name, "0")) or 0), 0)
    return None


def _cpu_quota(folder: Path) -> float | None:
    """Version 2 has quota and period, in microseconds, in one file; version 1 in two, and -1 for no limit."""
    both = _text(folder / "cpu.max").split() or [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = (_number(text) for text in both[:2]) if len(both) == 2 else (None, None)
    return quota / period if quota is not None and period else None


def _number(text: str) -> int | None:
    """A limit; None where there is none, which version 2 calls `max`."""
    return int(text) if text.strip().isdecimal() else None


def _text(path: Path) -> str:
    """The content of a file; nothing where there is none to read."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
