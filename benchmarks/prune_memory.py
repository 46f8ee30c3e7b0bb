"""Memory and time of pruning a model that is larger than the memory it is given.

A checkpoint of the LLaMA-7B shape with random float16 weights (13 GB) is made, pruned under a memory limit, with
the bias and with least squares, whose covariances count, and deleted. The limit is a control group's where the machine
lets one be made (page cache included), and one on anonymous memory (RLIMIT_DATA) otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import common

CASES: Final = ("bias", "least-squares")
CONTROL_GROUPS: Final = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)
SAMPLE_S: Final = 0.05


def main() -> None:
    """Run every case in its own process under the limit, print a table, write JSON."""
    arguments = parsed_arguments()
    if arguments.case is not None:
        print(json.dumps(measured(arguments.case[0], Path(arguments.case[1]), arguments)))
        return
    conditions = common.Conditions()
    with common.work_directory(arguments) as work:
        made_model(arguments.model, work)
        made_tokens(arguments, work)
        found = [kept_result(case, arguments, work) for case in arguments.cases]
        shutil.rmtree(work / arguments.model)
    common.show(f"pruning the {arguments.model} shape under {arguments.limit_gb:g} GB", COLUMNS, map(row, found))
    print(f"written to {common.save_result(arguments, conditions, {'cases': found})}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "prune_memory")
    made.add_argument("--model", choices=sorted(common.LLAMAS), default="7b")
    made.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--ratio", type=float, default=0.2)
    made.add_argument("--sequences", type=int, default=16)
    made.add_argument("--sequence-length", type=int, default=128)
    made.add_argument("--limit-gb", type=float, default=6.0, help="memory the pruning process may use")
    made.add_argument("--case", nargs=2, metavar=("CASE", "WORK"), help=argparse.SUPPRESS)
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.model = "tiny"
    return arguments


def made_model(name: str, work: Path) -> None:
    """Random float16 weights, one file per layer, never more than one layer in memory."""
    import torch
    from safetensors.torch import save_file

    from flap_export.models.loading import meta_model, parameter_names
    from flap_export.models.opening import open_checkpoint

    directory = work / name
    if (directory / "model.safetensors.index.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    common.llama_config(name, dtype="float16").save_pretrained(directory)
    opened = open_checkpoint(directory)
    model, generator = meta_model(opened, torch.float16), torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for parameter in parameter_names(model, opened):
        shards.setdefault(shard_of(parameter), []).append(parameter)
    for shard, names in shards.items():
        tensors = {name: random_tensor(name, model.get_parameter(name).shape, generator) for name in names}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_of(parameter: str) -> str:
    parts = parameter.split(".")
    return f"model-layer-{parts[2]}.safetensors" if "layers" in parts else "model-rest.safetensors"


def random_tensor(name: str, size: Any, generator: Any) -> Any:
    import torch

    if "norm" in name:
        return torch.ones(size, dtype=torch.float16)
    return (0.02 * torch.randn(size, generator=generator)).half()


def made_tokens(arguments: argparse.Namespace, work: Path) -> None:
    import numpy as np

    vocabulary = common.LLAMAS[arguments.model]["vocab_size"]
    shape = (arguments.sequences, arguments.sequence_length)
    np.save(work / "tokens.npy", np.random.default_rng(0).integers(0, vocabulary, shape))


def kept_result(case: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One case's numbers; those of a benchmark of the same settings, interrupted, are kept in the work directory."""
    settings = f"{arguments.ratio:g}-{arguments.sequences}x{arguments.sequence_length}-{arguments.limit_gb:g}gb"
    path = work / f"{arguments.model}-{case}-{settings}.json"
    if not path.is_file():
        path.write_text(json.dumps(in_own_process(case, arguments, work)))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def in_own_process(case: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One case's numbers, from a process under the limit."""
    limit = int(arguments.limit_gb * 1e9)
    command = [sys.executable, __file__, "--case", case, str(work), "--model", arguments.model]
    command += ["--ratio", str(arguments.ratio)]
    with control_group(limit) as group:

        def enter() -> None:
            if group is None:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            else:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "limit_bytes": limit, "limited_by": "RLIMIT_DATA" if group is None else "control group"}


@contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A group of processes with a memory limit, or None where none can be made."""
    for root, setting in CONTROL_GROUPS:
        group = root / f"flap-export-{os.getpid()}"
        try:
            group.mkdir()
            (group / setting).write_text(str(limit))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


class AnonymousPeak:
    """The largest anonymous memory of this process, looked up a few times a second."""

    def __init__(self) -> None:
        self.peak_bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            status = Path("/proc/self/status").read_text()
            self.peak_bytes = max(self.peak_bytes, 1024 * int(status.split("RssAnon:")[1].split()[0]))

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak_bytes


def measured(case: str, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in this process."""
    import flap_export

    output = work / f"{arguments.model}-{case}"
    watch, begin = AnonymousPeak(), time.perf_counter()
    plan = flap_export.prune(
        work / arguments.model,
        output,
        ratio=arguments.ratio,
        calibration=str(work / "tokens.npy"),
        compensation=case,  # type: ignore[arg-type]
    )
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    shutil.rmtree(output)
    return {
        "case": case,
        "achieved": plan.ratio.achieved,
        "seconds": round(seconds, 1),
        "peak_anonymous_bytes": watch.stop(),
        "dense_bytes": sum(file.stat().st_size for file in (work / arguments.model).glob("*.safetensors")),
        "pruned_bytes": size,
    }


COLUMNS: Final = (
    "compensation",
    "pruned",
    "seconds",
    "peak memory GB",
    "dense weights GB",
    "pruned weights GB",
    "limit",
)


def row(case: dict[str, Any]) -> list[str]:
    sizes = [f"{case[key] / 1e9:.2f}" for key in ("peak_anonymous_bytes", "dense_bytes", "pruned_bytes")]
    limit = f"{case['limit_bytes'] / 1e9:g} GB, {case['limited_by']}"
    return [case["case"], f"{case['achieved']:.2%}", f"{case['seconds']:.0f}", *sizes, limit]


if __name__ == "__main__":
    main()
