"""What the benchmarks of `search` share: the demo model, its texts, and a search of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import common

from flap_export.allocation.rates import LayerRate, rates_of_steps
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import CalibrationText
from flap_export.searching import SearchOptions, SearchReport, search
from flap_export.searching.preparing import Prepared
from flap_export.searching.space import Candidate
from flap_export.searching.strategies import StrategyName
from flap_export.searching.table import strategy_name

DEMO: Final = Path(__file__).parent.parent / "pipelines" / "demo"
METHOD: Final = "obs"


def parser(description: str | None, benchmark: str) -> argparse.ArgumentParser:
    """Options of every search."""
    made = common.parser(description, benchmark)
    made.add_argument("--samples", type=int, default=512, help="calibration sequences of 128 tokens")
    made.add_argument("--fitness-samples", type=int, default=32, help="sequences that fitness is measured on")
    return made


def searching_parser(description: str | None, benchmark: str, ratios: Sequence[float]) -> argparse.ArgumentParser:
    """Options of benchmarks that search from several seeds."""
    made = parser(description, benchmark)
    made.add_argument("--ratios", type=float, nargs="+", default=list(ratios))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--evaluations", type=float, default=100)
    return made


def shortened(arguments: argparse.Namespace) -> None:
    """A quick mode's sizes."""
    arguments.samples, arguments.fitness_samples = 16, 16
    if "seeds" in arguments:
        arguments.ratios, arguments.seeds, arguments.evaluations = [0.3], [0, 1], 6


def text_of(arguments: argparse.Namespace) -> CalibrationText:
    return CalibrationText(
        source=str(DEMO / "calibration.txt.xz"), samples=arguments.samples, sequence_length=128, seed=0
    )


def searched(
    arguments: argparse.Namespace, folder: Path, ratio: float, strategy: StrategyName, **options: bool
) -> SearchReport:
    return search(
        DEMO / "model",
        folder,
        calibration=text_of(arguments),
        prune=PruneOptions(ratio=ratio, method=METHOD),
        options=SearchOptions(
            strategy=strategy,
            evaluations=arguments.evaluations,
            fitness_samples=arguments.fitness_samples,
            informed=options.get("informed", True),
        ),
        seeds=arguments.seeds,
        baselines=options.get("baselines", False),
    )


def curves(report: SearchReport) -> list[dict[str, Any]]:
    """Best fitness against evaluations, a curve per run."""
    return [
        {"rates": strategy_name(run), "seed": run.seed, "curve": [[p.evaluations, p.fitness] for p in run.curve]}
        for run in report.runs
    ]


def rates_of(ready: Prepared, candidate: Candidate) -> tuple[LayerRate, ...]:
    return rates_of_steps(ready.ladders, ready.problem.space.settled(candidate))
