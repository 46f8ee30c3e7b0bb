"""A finished search as a table for people: best fitness against evaluations, for all strategies and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from flap_export.searching.record import SearchReport, SearchRun

SHARES: Final = (0.25, 0.5, 1.0)
"""Of the evaluations, where the best so far is told."""


@final
@dataclass(frozen=True)
class Line:
    """One strategy, over all its seeds."""

    name: str
    seeds: int
    fitness: tuple[float, ...]
    """Mean over seeds of the best so far, at each of `SHARES` of the evaluations."""
    spread: float
    """Standard deviation over seeds at the end; 0 of one."""
    looks: float
    seconds: float
    """Means over seeds."""


def lines_of(report: SearchReport) -> list[Line]:
    """A line for every strategy, in the order they ran."""
    names = dict.fromkeys(strategy_name(run) for run in report.runs)
    return [_line(name, [run for run in report.runs if strategy_name(run) == name]) for name in names]


def strategy_name(run: SearchRun) -> str:
    """What bred the candidates: a strategy, or who answered the prompts."""
    return run.strategy if run.proposer is None else run.proposer.partition(":")[0]


def best_after(run: SearchRun, evaluations: float) -> float:
    """The best fitness known after so many evaluations; the first one known where there was none yet."""
    known = [point.fitness for point in run.curve if point.evaluations <= evaluations + 1e-9]
    return known[-1] if known else run.curve[0].fitness


def _line(name: str, runs: Sequence[SearchRun]) -> Line:
    ends = [run.best.fitness for run in runs]
    return Line(
        name=name,
        seeds=len(runs),
        fitness=tuple(statistics.fmean(best_after(run, share * run.evaluations) for run in runs) for share in SHARES),
        spread=statistics.stdev(ends) if len(ends) > 1 else 0.0,
        looks=statistics.fmean(run.looks for run in runs),
        seconds=statistics.fmean(run.seconds for run in runs),
    )
