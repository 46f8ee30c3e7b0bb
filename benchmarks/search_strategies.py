"""Search strategies on the demo model: fitness against evaluations.

Random search, the conventional search and a population bred by chance, all from uniform rates and under the same number
of evaluations.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
from demo_search import curves, searched, searching_parser, shortened

from flap_export.searching.table import SHARES, lines_of


def main() -> None:
    """Search by every strategy; print tables, write a JSON file."""
    arguments, conditions = parsed_arguments(), common.Conditions()
    with common.work_directory(arguments) as work:
        found = strategies(arguments, work)
    print(f"written to {common.save_result(arguments, conditions, {'strategies': found})}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    arguments = searching_parser(__doc__, "search_strategies", (0.3,)).parse_args(command_line)
    if arguments.quick:
        shortened(arguments)
    return arguments


def strategies(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """What every strategy makes of uniform rates: at the known ones of `obs` there is little left to find."""
    results = []
    for ratio in arguments.ratios:
        folder = work / f"strategies-{ratio:g}"
        report = searched(arguments, folder, ratio, "population", baselines=True, informed=False)
        lines = [
            {
                "rates": line.name,
                "fitness_after": dict(zip(map(str, SHARES), line.fitness, strict=True)),
                "spread": line.spread,
                "candidates": line.looks,
                "seconds": line.seconds,
            }
            for line in lines_of(report)
        ]
        shown = [
            (line.name, *(f"{value:.4f}" for value in line.fitness), f"{line.spread:.1g}", f"{line.looks:.0f}")
            for line in lines_of(report)
        ]
        shown += [(name, "", "", f"{value:.4f}", "", "") for name, value in report.references.items()]
        after = [f"after {share * arguments.evaluations:g}" for share in SHARES]
        common.show(f"{ratio:.0%}, from uniform rates", ("strategy", *after, "± seeds", "candidates"), shown)
        own = {"ratio": ratio, "references": report.references, "strategies": lines, "curves": curves(report)}
        results.append(own)
    return results


if __name__ == "__main__":
    main()
