"""What alignment cost and gained: the aligned model beside one of the same budget without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from flap_export.benchmarking.alignment import AlignmentReport
from flap_export.evaluation import QualityReport
from flap_export.reporting import formats


@final
@dataclass(frozen=True)
class AlignmentRow:
    """One text, or one phase of the benchmark."""

    what: str
    unaligned: str
    aligned: str
    change: str


@final
@dataclass(frozen=True)
class AlignmentSection:
    """The section of the report."""

    summary: str
    rows: tuple[AlignmentRow, ...]


def alignment_section(found: AlignmentReport | None, quality: QualityReport | None) -> AlignmentSection | None:
    """Rows for every text and every phase; None where widths were not aligned."""
    if found is None:
        return None
    summary = (
        f"FFN widths are multiples of {found.align_channels}. Beside it the same method at the same budget with widths "
        "as they come, exported and measured in the same way, in turns."
    )
    return AlignmentSection(summary, (*_quality_rows(found, quality), *_time_rows(found)))


def _quality_rows(found: AlignmentReport, quality: QualityReport | None) -> tuple[AlignmentRow, ...]:
    if quality is None or found.unaligned is None:
        return ()
    unaligned = {source.source: source.perplexity for source in found.unaligned.sources}
    return tuple(
        AlignmentRow(
            f"perplexity on {source.source}",
            f"{unaligned[source.source]:.2f}",
            f"{source.perplexity:.2f}",
            formats.change(unaligned[source.source], source.perplexity),
        )
        for source in quality.sources
        if source.source in unaligned
    )


def _time_rows(found: AlignmentReport) -> tuple[AlignmentRow, ...]:
    return tuple(
        AlignmentRow(
            phase.described,
            f"{phase.dense.median_ms:.2f} ms",
            f"{phase.pruned.median_ms:.2f} ms",
            f"{phase.speedup:.2f}x ({phase.speedup_interval[0]:.2f}-{phase.speedup_interval[1]:.2f})",
        )
        for phase in found.latency.phases
    )
