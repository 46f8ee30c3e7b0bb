"""Limits of containers, on files as the kernel shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flap_export import devices
from flap_export.cgroups import cpu_quota, memory_left_bytes
from flap_export.devices import available_cores, available_memory_bytes, keep_to_quota
from flap_export.errors import InputError

GIB = 1 << 30
UNLIMITED_IN_1 = "9223372036854771712"
VERSION_2 = "0::/user.slice/job\n"
VERSION_1 = "9:name=systemd:/\n4:memory:/docker/3f\n2:cpu,cpuacct:/docker/3f\n0::/\n"


def files(root: Path, folders: dict[str, dict[str, str]]) -> None:
    """Write files below `/sys/fs/cgroup`, by folder."""
    for name, contents in folders.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            (folder / file).write_text(content + "\n")


def of_process(root: Path, groups: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)


def memory_2(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon {used - cache}\ninactive_file {cache}\nactive_file 0"
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}


def memory_1(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"cache {cache}\ninactive_file 0\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": str(used), "memory.stat": stat}


def test_the_tightest_group_of_version_2_counts(tmp_path: Path) -> None:
    of_process(tmp_path, VERSION_2)
    files(
        tmp_path,
        {"user.slice/job": memory_2(str(8 * GIB), GIB), "user.slice": memory_2(str(4 * GIB), 3 * GIB)},
    )
    assert memory_left_bytes(tmp_path) == GIB


def test_cache_that_goes_when_memory_is_needed_is_left(tmp_path: Path) -> None:
    of_process(tmp_path, VERSION_2)
    files(tmp_path, {"user.slice/job": memory_2(str(8 * GIB), 7 * GIB, cache=5 * GIB)})
    assert memory_left_bytes(tmp_path) == 6 * GIB


def test_a_container_of_version_2_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    of_process(tmp_path, "0::/\n")
    files(tmp_path, {"": {**memory_2(str(2 * GIB), GIB), "cpu.max": "150000 100000"}})
    assert memory_left_bytes(tmp_path) == GIB
    assert cpu_quota(tmp_path) == 1.5


def test_a_container_of_version_1_does_not_find_the_path_it_is_told(tmp_path: Path) -> None:
    of_process(tmp_path, VERSION_1)
    quota = {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}
    files(tmp_path, {"memory": memory_1(str(2 * GIB), GIB, cache=GIB // 2), "cpu,cpuacct": quota})
    assert memory_left_bytes(tmp_path) == 3 * GIB // 2
    assert cpu_quota(tmp_path) == 2.5


def test_groups_above_the_own_one_bind_in_version_1_too(tmp_path: Path) -> None:
    of_process(tmp_path, VERSION_1)
    none, some = ({"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"} for quota in ("-1", "300000"))
    files(tmp_path, {"cpu,cpuacct/docker/3f": none, "cpu,cpuacct/docker": some, "cpu,cpuacct": none})
    assert cpu_quota(tmp_path) == 3.0


def test_what_is_not_limited_is_none(tmp_path: Path) -> None:
    of_process(tmp_path, VERSION_2)
    files(tmp_path, {"user.slice": {**memory_2("max", GIB), "cpu.max": "max 100000"}})
    assert memory_left_bytes(tmp_path) is None
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize("groups", ["", "0::/\n", "0::/../outside\n", "4:memory:/\n1:cpu:/\n"])
def test_nothing_to_read_is_no_limit(groups: str, tmp_path: Path) -> None:
    assert (memory_left_bytes(tmp_path), cpu_quota(tmp_path)) == (None, None)
    of_process(tmp_path, groups)
    files(tmp_path, {"": {"memory.max": "garbage", "memory.current": "", "cpu.max": "max"}})
    assert (memory_left_bytes(tmp_path), cpu_quota(tmp_path)) == (None, None)


def test_a_group_that_is_beyond_its_limit_has_nothing_left(tmp_path: Path) -> None:
    of_process(tmp_path, "0::/\n")
    files(tmp_path, {"": memory_2(str(GIB), 2 * GIB)})
    assert memory_left_bytes(tmp_path) == 0


# --- and what follows from them


@pytest.mark.parametrize(("left", "expected"), [(None, 10 * GIB), (3 * GIB, 3 * GIB), (int(UNLIMITED_IN_1), 10 * GIB)])
def test_memory_is_what_machine_and_container_leave(
    left: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_machine_memory_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(devices, "memory_left_bytes", lambda: left)
    assert available_memory_bytes() == expected


@pytest.mark.parametrize(
    ("quota", "cores", "threads"), [(None, 4, None), (1.5, 2, "2"), (0.2, 1, "1"), (3.0, 3, "3"), (16.0, 4, "4")]
)
def test_cores_are_those_that_there_is_time_for(
    quota: float | None, cores: int, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(devices, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert available_cores() == cores
    assert devices.quota_threads() == (None if threads is None else cores)
    keep_to_quota()
    assert os.environ.pop("OMP_NUM_THREADS", None) == threads
    with pytest.raises(InputError, match=f"must lie in 1..{2 * cores} on the {cores} cores"):
        devices.check_threads(2 * cores + 1)


def test_a_number_of_threads_that_somebody_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_quota", lambda: 1.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    keep_to_quota()
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_pytorch_keeps_to_it() -> None:
    code = (
        "from flap_export import devices; devices.cpu_quota = lambda: 1.0; devices.keep_to_quota(); import torch; "
        "print(torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["1"], done.stderr
