"""The stage itself: both artifacts in turns, phase by phase and shape by shape."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from flap_export.artifact import Artifact
from flap_export.benchmarking.machine import this_machine
from flap_export.benchmarking.report import LatencyReport, PhaseLatency, phase_latency
from flap_export.benchmarking.rounds import MINIMUM_ROUNDS, SAMPLE_MS, take_rounds
from flap_export.benchmarking.worker import Worker, WorkerOptions
from flap_export.benchmarking.workload import Workload
from flap_export.building.record import check_runnable, is_engine, load_engine, load_runnable, record_digest
from flap_export.errors import ArtifactError, InputError, check_choice, check_seed
from flap_export.ideal import Experts, Phase, Roofline, experts_on, ideal_speedup
from flap_export.manifest import installed_versions
from flap_export.precision import PRECISIONS
from flap_export.prediction import GPUS, expected_ms
from flap_export.progress import Progress, no_progress

PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")


def bench(
    artifact: str | Path,
    *,
    baseline: str | Path,
    phases: Sequence[Phase] = PHASES,
    batch_sizes: Sequence[int] = (1,),
    prompt_lengths: Sequence[int] = (128,),
    context_length: int | None = None,
    repeats: int = 30,
    budget_s: float = 120.0,
    sample_ms: float = SAMPLE_MS,
    threads: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    roofline: Roofline | None = None,
    gpu: str | None = None,
    progress: Progress = no_progress,
) -> LatencyReport:
    """Measure a pruned artifact against its dense baseline on the same backend, precision and shapes.

    Each artifact runs in a process of its own, both in memory at the same time. They take turns, in an order drawn
    anew for every two rounds (dense, pruned, pruned, dense or the reverse), so that both meet the same disturbances.

    Args:
        artifact: the pruned artifact.
        baseline: the dense one.
        phases: `prefill`, `decode` or both.
        batch_sizes: sequences of a batch.
        prompt_lengths: tokens of a prefill.
        context_length: tokens in the cache before a decode step; by default as many as the longest prompt, or as the
            cache leaves room for.
        repeats: rounds per phase and shape; intervals of fewer than six are too narrow.
        budget_s: seconds for all rounds together. A phase and shape that has used up its share of them ends early,
            but not before six rounds, the fewest that give intervals of 95 %; opening and warming up come on top.
        sample_ms: short calls are repeated within one sample until it is about this long; long samples suit large
            models, whose first calls after a turn find cold caches.
        threads: cores one operator may use; the backend's own choice by default.
        device: `cpu`, `cuda` or `cuda:N`.
        seed: of the tokens, the order of the rounds and the bootstrap.
        roofline: what the machine sustains; see `flap_export.ideal.ideal_speedup`.
        gpu: the GPU's name in `flap_export.prediction`; what that expects then stands beside what was measured.
        progress: told before each phase and shape, and when all are done.

    Raises:
        InputError: an argument out of range.
        ArtifactError: an artifact is damaged or not what was written, the two differ in backend, dtype or
            `max_length`, or a shape does not fit them.
        MissingRequirementError: the backend or the device is not there.
        FlapExportError: a worker process died.
    """
    machine = this_machine()
    if gpu is not None:
        check_choice("gpu", gpu, GPUS)
    paths = (Path(baseline), Path(artifact))
    dense, pruned = load_runnable(paths[0]), load_runnable(paths[1])
    _check_comparable(dense, pruned, paths)
    _check_rounds(repeats, budget_s)
    check_seed(seed)
    workloads = planned_workloads(phases, batch_sizes, prompt_lengths, context_length, max_length=dense.max_length)
    # Here and not in the workers: read through once, and before anything is measured.
    checked = [check_runnable(path, weights=True) for path in paths]
    measured: list[PhaseLatency] = []
    draw, options = random.Random(seed), WorkerOptions(device=device, threads=threads, seed=seed)
    with Worker(paths[0], options) as dense_worker, Worker(paths[1], options) as pruned_worker:
        workers = (dense_worker, pruned_worker)
        backend, _ = (worker.backend() for worker in workers)
        for done, workload in enumerate(workloads):
            progress("measurements", done, len(workloads))
            share_s = budget_s / len(workloads)
            samples = take_rounds(workers, workload, repeats=repeats, budget_s=share_s, draw=draw, sample_ms=sample_ms)
            ideal = _ideal(dense, pruned, workload, roofline, experts_on(backend, device))
            found = phase_latency(workload, *samples, ideal=ideal, seed=seed)
            predicted = None if gpu is None else _predicted_ms((dense, pruned), workload, gpu)
            measured.append(found.model_copy(update={"predicted_ms": predicted}))
        progress("measurements", len(workloads), len(workloads))
    return LatencyReport(
        artifact=str(artifact),
        baseline=str(baseline),
        backend=backend,
        device=device,
        dtype=dense.dtype,
        max_length=dense.max_length,
        phases=tuple(measured),
        machine=machine,
        versions=installed_versions(),
        settings={"repeats": repeats, "budget_s": budget_s, "sample_ms": sample_ms, "threads": threads, "seed": seed},
        digests={
            **_digests("dense", record_digest(paths[0], checked[0]), dense),
            **_digests("pruned", record_digest(paths[1], checked[1]), pruned),
        },
    )


def _check_comparable(dense: Artifact, pruned: Artifact, paths: tuple[Path, Path]) -> None:
    backends = [load_engine(path).flavour if is_engine(path) else "onnxruntime" for path in paths]
    if backends[0] != backends[1]:
        raise ArtifactError(
            f"both must run on the same backend: '{paths[0]}' runs on {backends[0]}, '{paths[1]}' on {backends[1]}; "
            "name two exported artifacts, or the engines built from them"
        )
    for name, option in (("dtype", "--dtype"), ("max_length", "--max-length")):
        expected, found = getattr(dense, name), getattr(pruned, name)
        if expected != found:
            raise ArtifactError(
                f"both artifacts must have the same {name}: '{paths[0]}' has {expected}, '{paths[1]}' has {found}; "
                f"export the second again with `flap-export export {pruned.model} --output {paths[1]} "
                f"{option} {expected}`"
            )


def planned_workloads(
    phases: Sequence[Phase] = PHASES,
    batch_sizes: Sequence[int] = (1,),
    prompt_lengths: Sequence[int] = (128,),
    context_length: int | None = None,
    *,
    max_length: int,
) -> list[Workload]:
    """Every phase and shape that `bench` measures on artifacts with caches of `max_length` rows.

    Raises:
        InputError: an unknown phase, or a size out of range.
        ArtifactError: a shape does not fit the cache.
    """
    unknown = sorted(set(phases) - set(PHASES))
    if unknown:
        raise InputError(f"phases must be among {', '.join(PHASES)}, got {', '.join(unknown)}")
    context = min(max(prompt_lengths, default=1), max_length - 1) if context_length is None else context_length
    lengths: dict[Phase, tuple[int, ...]] = {"prefill": tuple(prompt_lengths), "decode": (context,)}
    planned = [Workload(phase, size, length) for phase in phases for size in batch_sizes for length in lengths[phase]]
    _check_workloads(planned, max_length)
    return planned


def _check_rounds(repeats: int, budget_s: float) -> None:
    if repeats < MINIMUM_ROUNDS:
        raise InputError(f"repeats must be at least {MINIMUM_ROUNDS}, got {repeats}")
    if not budget_s > 0:
        raise InputError(f"the budget must be positive, got {budget_s} s")


def _check_workloads(workloads: Sequence[Workload], max_length: int) -> None:
    if not workloads:
        raise InputError("nothing to measure; name at least one phase, one batch size and one prompt length")
    for workload in workloads:
        if workload.batch_size < 1 or workload.length < 1:
            raise InputError(f"batch sizes and lengths must be positive, got '{workload.described}'")
        if workload.context_length + workload.new_tokens > max_length:
            raise ArtifactError(
                f"'{workload.described}' must fit the cache of {max_length} rows and needs "
                f"{workload.context_length + workload.new_tokens}; shorten it, or export both artifacts with a larger "
                "--max-length"
            )


def _ideal(dense: Artifact, pruned: Artifact, workload: Workload, roofline: Roofline | None, experts: Experts) -> float:
    return ideal_speedup(
        dense.shape,
        pruned.shape,
        workload.phase,
        batch_size=workload.batch_size,
        length=workload.length,
        bytes_per_weight=PRECISIONS[dense.dtype].bytes_per_value,
        roofline=roofline,
        experts=experts,
    )


def _predicted_ms(models: tuple[Artifact, Artifact], workload: Workload, gpu: str) -> tuple[float, float]:
    call = workload.phase, workload.batch_size, workload.length
    dtype = models[0].dtype
    dense, pruned = (expected_ms(model.shape, *call, gpu=gpu, dtype=dtype) for model in models)
    return dense, pruned


def _digests(side: str, record: str, artifact: Artifact) -> dict[str, str]:
    own = {"artifact": record, **artifact.digests}
    return {f"{side}.{name}": digest for name, digest in own.items()}
