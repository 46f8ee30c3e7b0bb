"""A search as a page: best fitness against evaluations for every run, and the rates that were found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from flap_export.reporting import formats
from flap_export.reporting.layers import LayerChart, layer_chart
from flap_export.reporting.provenance import SettingsTable, settings_table, tool_version
from flap_export.searching.record import SearchReport, SearchRun
from flap_export.searching.selection import pareto_front
from flap_export.searching.table import SHARES, Line, lines_of, strategy_name

STYLES: Final = 4
"""Lines that can be told apart."""
_MARGIN: Final = 0.06
"""Of the plot's height, above the highest and below the lowest line."""
_FITNESS: Final = {"kl": "KL divergence from the dense model, nats per token", "perplexity": "Perplexity"}


@final
@dataclass(frozen=True)
class Series:
    """One strategy."""

    name: str
    style: int
    paths: tuple[str, ...]
    """Of every seed, in percent of the plot."""
    seeds: int
    values: tuple[str, ...]
    spread: str
    candidates: str
    seconds: str


@final
@dataclass(frozen=True)
class Reference:
    """Rates that were known beforehand."""

    name: str
    fitness: str
    height: float | None
    """In percent from the top of the plot; None where it is beyond it."""


@final
@dataclass(frozen=True)
class AxisTick:
    """A number of evaluations below the plot."""

    x_percent: float
    label: str
    anchor: str


@final
@dataclass(frozen=True)
class FrontPoint:
    """One candidate of the trade-off."""

    fitness: str
    latency: str
    rates: str


@final
@dataclass(frozen=True)
class SearchCurve:
    """Best fitness against evaluations, as a plot and as a table."""

    fitness: str
    highest: str
    lowest: str
    series: tuple[Series, ...]
    references: tuple[Reference, ...]
    ticks: tuple[AxisTick, ...]
    columns: tuple[str, ...]
    remark: str | None


@final
@dataclass(frozen=True)
class SearchPage:
    """Everything the template places."""

    model: str
    ratio: str
    facts: tuple[str, ...]
    headline: str
    altered: str | None
    """A warning that the record was changed after it was written."""
    curve: SearchCurve
    chosen: str
    front: tuple[FrontPoint, ...]
    charts: tuple[LayerChart, ...]
    settings: tuple[SettingsTable, ...]
    tool_version: str


@final
@dataclass(frozen=True)
class _Frame:
    """The plot's limits."""

    most: float
    """Evaluations at its right edge."""
    low: float
    high: float

    @classmethod
    def of(cls, report: SearchReport) -> _Frame:
        """Room for all lines; rates that are far worse than where the searches begin stay out."""
        points = [point for run in report.runs for point in run.curve if math.isfinite(point.fitness)]
        low, begun = min(point.fitness for point in points), max(run.curve[0].fitness for run in report.runs)
        near = [value for value in report.references.values() if value <= low + 3 * (begun - low)]
        high = max(begun, *near, low * 1.01)
        # Where no rates lose anything, there is no height to go by.
        margin = _MARGIN * (high - low or 1.0)
        return cls(max(run.evaluations for run in report.runs), low - margin, high + margin)

    def x(self, evaluations: float) -> float:
        return 100 * evaluations / self.most

    def y(self, fitness: float) -> float:
        return 100 * (self.high - fitness) / (self.high - self.low)


def search_page(report: SearchReport, altered: Sequence[str] = ()) -> SearchPage:
    """Turn the record of a search into what a person reads; `altered` names records that were changed since."""
    chosen = next(run for run in report.runs if run.name == report.chosen)
    return SearchPage(
        model=report.model,
        ratio=formats.percent(report.ratio.achieved),
        facts=(
            f"{len(chosen.best.rates)} layers",
            f"ranked and restored by {report.prune.method} / {report.prune.compensation}",
            f"{report.fitness_sequences} sequences",
        ),
        headline=_headline(report, chosen),
        altered=formats.altered(altered),
        curve=search_curve(report),
        chosen=report.chosen,
        front=_front(report, chosen),
        charts=_charts(chosen),
        settings=(
            settings_table("Search", {k: v for k, v in report.options.model_dump().items() if not isinstance(v, dict)}),
            settings_table("Prune", {k: v for k, v in report.prune.model_dump().items() if v is not None}),
            settings_table("Calibration", report.calibration.model_dump()),
        ),
        tool_version=tool_version(),
    )


def search_curve(report: SearchReport) -> SearchCurve:
    """How the runs of a search came to what they found."""
    frame, most = _Frame.of(report), max(run.evaluations for run in report.runs)
    return SearchCurve(
        fitness=_FITNESS[report.options.fitness],
        highest=formats.number(frame.high),
        lowest=formats.number(frame.low),
        series=tuple(_series(index, line, report, frame) for index, line in enumerate(lines_of(report))),
        references=tuple(
            Reference(name, formats.number(value), height if 0 <= (height := frame.y(value)) <= 100 else None)
            for name, value in report.references.items()
        ),
        ticks=tuple(
            AxisTick(100 * share, f"{share * most:g}", anchor)
            for share, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end"))
        ),
        columns=tuple(f"After {share * most:g}" for share in SHARES),
        remark="The text is too short: fitness was measured on sequences that units were ranked by."
        if report.fitness_shares_calibration
        else None,
    )


def _headline(report: SearchReport, chosen: SearchRun) -> str:
    found = f"fitness {formats.number(chosen.best.fitness)} by {chosen.name}"
    uniform = report.references.get("uniform")
    return found if uniform is None else f"{found}, uniform rates {formats.number(uniform)}"


def _series(index: int, line: Line, report: SearchReport, frame: _Frame) -> Series:
    runs = [run for run in report.runs if strategy_name(run) == line.name]
    return Series(
        name=line.name,
        style=index % STYLES,
        paths=tuple(_path(run, frame) for run in runs),
        seeds=line.seeds,
        values=tuple(formats.number(value) for value in line.fitness),
        spread=f"± {formats.number(line.spread, 1)}" if line.seeds > 1 else "",
        candidates=formats.count(round(line.looks)),
        seconds=formats.number(line.seconds),
    )


def _path(run: SearchRun, frame: _Frame) -> str:
    """A line that falls in steps, in percent of the plot."""
    first = run.curve[0]
    parts = [f"M{frame.x(first.evaluations):.3f} {frame.y(first.fitness):.3f}"]
    for point in run.curve[1:]:
        parts += [f"H{frame.x(point.evaluations):.3f}", f"V{frame.y(point.fitness):.3f}"]
    return "".join([*parts, f"H{frame.x(run.evaluations):.3f}"])


def _front(report: SearchReport, chosen: SearchRun) -> tuple[FrontPoint, ...]:
    same = [run for run in report.runs if strategy_name(run) == strategy_name(chosen)]
    points = pareto_front([point for run in same for point in run.front])
    return tuple(
        FrontPoint(
            formats.number(point.fitness),
            formats.milliseconds(point.latency_ms or math.nan),
            " ".join(f"{rate:.2f}" for rate in point.rates),
        )
        for point in points
    )


def _charts(chosen: SearchRun) -> tuple[LayerChart, ...]:
    def chart(title: str, removed: Sequence[float]) -> LayerChart:
        return layer_chart(
            title, "% of the weights", [round(100 * (1 - rate)) for rate in removed], [100] * len(removed)
        )

    best = chosen.best
    return (chart("Layers", best.rates), chart("Attention", best.attention), chart("FFN", best.ffn))
