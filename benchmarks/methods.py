"""Pruning methods side by side on the demo model: perplexity at several ratios, on texts of two domains.

Calibrated on one part of the books the model was trained on; evaluated on other books and on WikiText-2.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, Final

import common

from flap_export.comparison import PLOT_NAME, ComparisonReport, compare, markdown_table
from flap_export.evidence.record import CalibrationText

DEMO: Final = Path(__file__).parent.parent / "pipelines" / "demo"
VARIANTS: Final = (
    "flap",
    "flap,compensation=none",
    "flap,compensation=least-squares",
    "flap,structure=ul-um",
    "obs",
    "obs,head_units=queries",
    "obs,align_channels=64",
    "obs,sequential=true",
    "wanda-sp",
    "llm-pruner",
    "magnitude",
    "random",
)


def main() -> None:
    """Compare, print the table, write JSON and the plot."""
    arguments = parsed_arguments()
    conditions = common.Conditions()
    with common.work_directory(arguments) as work:
        report = compare(
            DEMO / "model",
            work / "comparison",
            variants=arguments.variants,
            ratios=arguments.ratios,
            calibration=CalibrationText(
                source=str(DEMO / "calibration.txt.xz"), samples=arguments.samples, sequence_length=128
            ),
            sources=[str(DEMO / name) for name in ("heldout.txt.xz", "wikitext-2.txt.xz")],
            samples=arguments.windows,
        )
        print(markdown_table(report, arguments.variants, arguments.ratios))
        path = common.save_result(arguments, conditions, {"comparison": described(report, arguments)})
        shutil.copyfile(work / "comparison" / PLOT_NAME, path.with_suffix(".svg"))
    print(f"written to {path}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "methods")
    made.add_argument("--variants", nargs="+", default=list(VARIANTS))
    made.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    made.add_argument("--samples", type=int, default=512, help="calibration sequences of 128 tokens")
    made.add_argument("--windows", type=int, default=256, help="evaluation windows of 128 tokens per text")
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.variants, arguments.ratios, arguments.samples, arguments.windows = ["flap", "random"], [0.2], 8, 8
    return arguments


def described(report: ComparisonReport, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report, with names instead of paths, and every row's loss as a share of FLAP's at the same ratio."""
    names = [Path(source).name for source in report.sources]
    values: dict[str, Any] = report.model_dump(mode="json")
    values.update(model="pipelines/demo/model", sources=names)
    values["calibration"]["source"] = Path(report.calibration.source).name
    for row, found in zip(report.rows, values["rows"], strict=True):
        flap = report.find("flap", row.ratio)
        if flap is not None and flap.perplexities and row.perplexities:
            found["loss_over_flap"] = [report.loss_share(row, flap, source) for source in range(len(names))]
    return values


if __name__ == "__main__":
    main()
