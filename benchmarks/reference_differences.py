"""What each difference between the default and the official FLAP code does to the pruned model.

The official code's own test case (multi-head attention, 8 layers; `tests/calibration/flap_reference`) is pruned as that
code does, then with one difference at a time, then with all of them, which is the default.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import common
import numpy as np

from flap_export.allocation.stage import Selection, allocate
from flap_export.calibration.stage import calibrate
from flap_export.calibration.statistics import CalibrationStatistics, StatisticsName
from flap_export.evaluation import evaluate
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.plan import PruningPlan
from flap_export.rewriting.checkpoint import write_checkpoint
from flap_export.rewriting.cutting import rewrite
from flap_export.rewriting.restoring import mean_restorer
from flap_export.scoring import score

DATA: Final = Path(__file__).parent.parent / "tests" / "calibration" / "flap_reference"


@dataclass(frozen=True)
class Variant:
    """Where one way of pruning follows the official code."""

    name: str
    statistics: StatisticsName = "reference"
    squares_attention: bool = True
    selection: Selection = "reference"


VARIANTS: Final = (
    Variant("the official code"),
    Variant("exact mean and variance over tokens", statistics="welford"),
    Variant("attention scores not squared", squares_attention=False),
    Variant("units by rank, at exact costs", selection="exact"),
    Variant("all three: the default", "welford", False, "exact"),
)


def main() -> None:
    """Prune and evaluate every variant, print a table, write JSON."""
    arguments = parsed_arguments()
    conditions = common.Conditions()
    dense = open_checkpoint(DATA / "model")
    with common.work_directory(arguments) as work:
        text = work / "windows.npy"
        np.save(text, np.load(DATA / "evaluation_tokens.npy").reshape(-1, 128)[: arguments.windows])
        statistics = {kind: calibrate(DATA / "model", str(DATA / "calibration_tokens.npy"), statistics=kind)
                      for kind in ("reference", "welford")}  # fmt: skip
        found = [
            measured(dense, variant, ratio, statistics[variant.statistics], work, text)
            for ratio in arguments.ratios
            for variant in VARIANTS
        ]
        baseline = evaluate(DATA / "model", [str(text)]).sources[0].perplexity
    with_changes = list(changed_units(found))
    common.show(f"dense perplexity {baseline:.2f}", COLUMNS, map(row, with_changes))
    result = {"dense_perplexity": baseline, "rows": with_changes}
    print(f"written to {common.save_result(arguments, conditions, result)}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "reference_differences")
    made.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    made.add_argument("--windows", type=int, default=None, help="evaluation windows of 128 tokens (all)")
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.ratios, arguments.windows = [0.2], 4
    return arguments


def measured(
    dense: Checkpoint, variant: Variant, ratio: float, statistics: CalibrationStatistics, work: Path, text: Path
) -> dict[str, Any]:
    """WIFV, AL-AM, with the bias."""
    scores = score(statistics, dense.shape, "wifv", square_attention=variant.squares_attention)
    layers, achieved = allocate(scores, dense.shape, ratio, "al-am", selection=variant.selection)
    plan = PruningPlan(model=dense.name, family=dense.family.model_type, ratio=achieved, layers=layers)
    directory = work / f"{ratio}-{VARIANTS.index(variant)}"
    directory.mkdir()
    shape = plan.pruned_shape(dense.shape, compensated=True)
    write_checkpoint(directory, dense, plan, shape, rewrite(dense, plan, mean_restorer(statistics)))
    return {
        "variant": variant.name,
        "requested": ratio,
        "achieved": achieved.achieved,
        "perplexity": evaluate(directory, [str(text)]).sources[0].perplexity,
        "kept_heads": [list(layer.query_heads) for layer in layers],
        "kept_channels": [list(layer.ffn_channels) for layer in layers],
    }


def changed_units(found: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Every variant with the number of units it keeps that the official code drops, or the other way round."""
    official: dict[str, Any] = {}
    for entry in found:
        if entry["variant"] == VARIANTS[0].name:
            official = entry
        changes = {
            f"{what}_changed": sum(
                len(set(one) ^ set(other)) for one, other in zip(entry[key], official[key], strict=True)
            )
            for what, key in (("heads", "kept_heads"), ("channels", "kept_channels"))
        }
        yield {**{key: value for key, value in entry.items() if not key.startswith("kept")}, **changes}


COLUMNS: Final = ("variant", "asked", "achieved", "heads changed", "channels changed", "perplexity")


def row(entry: dict[str, Any]) -> list[str]:
    changes = [str(entry["heads_changed"]), str(entry["channels_changed"])]
    ratios = [f"{entry['requested']:.0%}", f"{entry['achieved']:.2%}"]
    return [entry["variant"], *ratios, *changes, f"{entry['perplexity']:.2f}"]


if __name__ == "__main__":
    main()
