"""What was measured: speedup per phase and shape, perplexity per source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from flap_export.benchmarking.report import Measurement, PhaseLatency
from flap_export.evaluation import SourceQuality
from flap_export.ideal import Phase
from flap_export.reporting import formats
from flap_export.reporting.records import RunRecords
from flap_export.reporting.verdicts import increase_of, speedup_limits

UNKNOWN: Final = "unknown"
"""Stands where a record holds no value."""
NOT_MEASURED: Final = "not measured"


@final
@dataclass(frozen=True)
class Bar:
    """A measured factor of the dense model, in percent of the plot's width; None is not drawn."""

    value: float | None
    dense: float
    """Where the factor is 1."""
    excess: float | None = None
    """Length of what goes beyond dense, where that is a loss."""
    low: float | None = None
    high: float | None = None
    """Ends of the interval."""
    ideal: float | None = None
    limit: float | None = None
    """The gate."""


@final
@dataclass(frozen=True)
class MeasurementCells:
    """One artifact in one phase and shape."""

    median: str
    interval: str
    tokens_per_s: str
    peak_memory: str


@final
@dataclass(frozen=True)
class SpeedRow:
    """One phase and shape."""

    phase: str
    shape: str
    speedup: str
    interval: str
    ideal: str
    efficiency: str
    efficiency_interval: str
    limit: str | None
    is_below_limit: bool
    remark: str | None
    bar: Bar
    dense: MeasurementCells
    pruned: MeasurementCells
    rounds: int


@final
@dataclass(frozen=True)
class QualityRow:
    """One text source."""

    source: str
    dense: str
    pruned: str
    increase: str
    tokens: str
    contaminated: bool
    is_beyond_limit: bool
    bar: Bar | None


def speed_rows(records: RunRecords) -> tuple[SpeedRow, ...]:
    """One row per phase and shape; none where latency was not measured."""
    if records.latency is None:
        return ()
    limits, phases = speedup_limits(records), records.latency.phases
    bars = _speed_bars(phases, limits)
    return tuple(_speed_row(found, bar, limits.get(found.phase)) for found, bar in zip(phases, bars, strict=True))


def _speed_row(found: PhaseLatency, bar: Bar, limit: float | None) -> SpeedRow:
    low, high = found.speedup_interval
    ideal = found.ideal_speedup or math.nan
    efficiencies = [formats.percent(bound / ideal, 0) for bound in (low, high)]
    return SpeedRow(
        phase=found.phase,
        shape=found.described.removeprefix(f"{found.phase}, "),
        speedup=formats.times(found.speedup),
        interval=f"{formats.times(low)} to {formats.times(high)}",
        ideal=formats.times(found.ideal_speedup),
        efficiency=formats.percent(found.efficiency, 0),
        efficiency_interval=f"{efficiencies[0].removesuffix(_PERCENT)} to {efficiencies[1]}",
        limit=None if limit is None else formats.times(limit),
        is_below_limit=limit is not None and not found.speedup >= limit,
        remark=_remark(low, high),
        bar=bar,
        dense=_measurement_cells(found.dense),
        pruned=_measurement_cells(found.pruned),
        rounds=found.rounds,
    )


def _remark(low: float, high: float) -> str | None:
    if high < 1:
        return "slower than dense"
    return "not told apart from dense" if low <= 1 <= high else None


def _measurement_cells(measured: Measurement) -> MeasurementCells:
    memory = measured.peak_memory_bytes
    low, high = measured.interval_ms
    return MeasurementCells(
        median=formats.milliseconds(measured.median_ms),
        interval=f"{formats.milliseconds(low)} to {formats.milliseconds(high)}",
        tokens_per_s=formats.number(measured.tokens_per_s),
        peak_memory=UNKNOWN if memory is None else formats.byte_size(memory),
    )


def quality_rows(records: RunRecords) -> tuple[QualityRow, ...]:
    """One row per source; none where quality was not measured."""
    if records.quality is None:
        return ()
    limit, sources = records.gates.maximum_perplexity_ratio, records.quality.sources
    scale = _Scale.over(limit, *(increase_of(source) for source in sources))
    return tuple(_quality_row(source, limit, scale) for source in sources)


def _quality_row(source: SourceQuality, limit: float | None, scale: _Scale) -> QualityRow:
    increase, dense = increase_of(source), source.dense_perplexity
    return QualityRow(
        source=source.source,
        dense=NOT_MEASURED if dense is None else formats.number(dense, 4),
        pruned=formats.number(source.perplexity, 4),
        increase=NOT_MEASURED if increase is None else formats.change(1.0, increase),
        tokens=formats.count(source.tokens),
        contaminated=source.contaminated,
        is_beyond_limit=limit is not None and increase is not None and not increase <= limit,
        bar=_quality_bar(increase, limit, scale),
    )


def _speed_bars(phases: Sequence[PhaseLatency], limits: Mapping[Phase, float]) -> tuple[Bar, ...]:
    scale = _Scale.over(
        *(value for found in phases for value in (found.speedup, found.speedup_interval[1], found.ideal_speedup)),
        *limits.values(),
    )
    return tuple(
        Bar(
            value=scale.position(found.speedup),
            dense=100 / scale.limit,
            low=scale.position(found.speedup_interval[0]),
            high=scale.position(found.speedup_interval[1]),
            ideal=scale.position(found.ideal_speedup),
            limit=scale.position(limits.get(found.phase)),
        )
        for found in phases
    )


def _quality_bar(ratio: float | None, limit: float | None, scale: _Scale) -> Bar | None:
    """Up to dense, and what pruning added to it; nothing where the two were not both measured."""
    value = scale.position(ratio)
    if value is None:
        return None
    dense = 100 / scale.limit
    return Bar(min(value, dense), dense, excess=max(value - dense, 0.0), limit=scale.position(limit))


@final
@dataclass(frozen=True)
class _Scale:
    """From 0 to `limit`, shared by the bars of one plot."""

    limit: float

    @classmethod
    def over(cls, *values: float | None) -> _Scale:
        return cls(_HEADROOM * max([1.0, *(value for value in values if value is not None and math.isfinite(value))]))

    def position(self, value: float | None) -> float | None:
        """In percent; None for what is not a number to draw."""
        if value is None or not math.isfinite(value):
            return None
        return 100 * min(max(value / self.limit, 0.0), 1.0)


_HEADROOM: Final = 1.05
_PERCENT: Final = f"{formats.SPACE}%"
