"""`latency.json`: dense against pruned, per phase and shape, beside what the arithmetic allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from pydantic import Field

from flap_export.benchmarking.machine import Machine
from flap_export.benchmarking.statistics import Interval, median, median_interval, ratio_interval, ratio_of_medians
from flap_export.benchmarking.worker import Sample
from flap_export.benchmarking.workload import Workload
from flap_export.errors import GateBreachedError
from flap_export.ideal import Phase
from flap_export.precision import DtypeName
from flap_export.storage import Record, Value

LATENCY_NAME: Final = "latency.json"


class Measurement(Value):
    """One artifact in one phase and shape."""

    median_ms: float
    """Of one call: a whole prefill, or one decode step of the whole batch."""
    interval_ms: Interval
    """95 % interval of the median."""
    tokens_per_s: float
    """New tokens of the whole batch per second."""
    peak_memory_bytes: int | None
    """Peak resident memory of the process that ran it, weights and libraries included; None where unknown."""


class PhaseLatency(Value):
    """Dense and pruned in one phase and shape."""

    phase: Phase
    batch_size: int
    new_tokens: int
    """Of each sequence per call: the prompt's length, or 1 when decoding."""
    context_length: int
    """Tokens in the cache of each sequence before the call."""
    rounds: int
    """Samples of each artifact, taken in turns."""
    dense: Measurement
    pruned: Measurement
    speedup: float
    """Ratio of the medians."""
    speedup_interval: Interval
    """95 % bootstrap interval over whole rounds."""
    ideal_speedup: float
    """From bytes moved (decode) or operations (prefill), or from a roofline; see `flap_export.ideal`."""
    efficiency: float
    """Speedup over ideal speedup."""
    predicted_ms: tuple[float, float] | None = None
    """Dense and pruned, as `flap_export.prediction` expects of the GPU that was named."""

    @property
    def described(self) -> str:
        """Phase and shape in words."""
        return Workload(self.phase, self.batch_size, max(self.context_length, self.new_tokens)).described

    @property
    def verdict(self) -> str:
        """Phase, shape and speedup in words."""
        low, high = self.speedup_interval
        return (
            f"{self.described}: {self.speedup:.2f}x (95 % interval {low:.2f} to {high:.2f}, "
            f"ideal {self.ideal_speedup:.2f}x)"
        )


class LatencyReport(Record):
    """`latency.json`."""

    kind: ClassVar[str] = "latency report"

    artifact: str
    """The pruned artifact, as named by the user."""
    baseline: str
    """The dense one."""
    backend: str
    device: str
    dtype: DtypeName
    max_length: int
    phases: tuple[PhaseLatency, ...]
    machine: Machine
    versions: dict[str, str]
    settings: dict[str, int | float | str | bool | None]
    digests: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each `artifact.json` and of the weights each was exported from."""

    def raise_if_slower(self, minimum_speedup: float, *, phase: Phase | None = None) -> None:
        """Hold every measured speedup, or those of one phase, against a gate.

        Raises:
            GateBreachedError: one is below `minimum_speedup`; the gate is named `speedup`.
        """
        checked = [latency for latency in self.phases if phase in (None, latency.phase)]
        slow = [latency.verdict for latency in checked if not latency.speedup >= minimum_speedup]
        if slow:
            raise GateBreachedError("speedup", f"must be at least {minimum_speedup:g}x, found {'; '.join(slow)}")


def phase_latency(
    workload: Workload, dense: Sequence[Sample], pruned: Sequence[Sample], *, ideal: float, seed: int
) -> PhaseLatency:
    """What the samples of one workload, taken in the same rounds, say; `seed` is the bootstrap's."""
    dense_ms, pruned_ms = ([sample.call_ms for sample in samples] for samples in (dense, pruned))
    speedup = ratio_of_medians(dense_ms, pruned_ms)
    return PhaseLatency(
        phase=workload.phase,
        batch_size=workload.batch_size,
        new_tokens=workload.new_tokens,
        context_length=workload.context_length,
        rounds=len(dense_ms),
        dense=_measurement(workload, dense),
        pruned=_measurement(workload, pruned),
        speedup=speedup,
        speedup_interval=ratio_interval(dense_ms, pruned_ms, seed=seed),
        ideal_speedup=ideal,
        efficiency=speedup / ideal,
    )


def _measurement(workload: Workload, samples: Sequence[Sample]) -> Measurement:
    call_ms = [sample.call_ms for sample in samples]
    peaks = [sample.peak_memory_bytes for sample in samples if sample.peak_memory_bytes is not None]
    return Measurement(
        median_ms=median(call_ms),
        interval_ms=median_interval(call_ms),
        tokens_per_s=workload.batch_size * workload.new_tokens * 1000 / median(call_ms),
        peak_memory_bytes=max(peaks, default=None),
    )
