"""Searched pruning rates on the demo model: quality on held-out text.

At every ratio the conventional search from several seeds, beside rates that need no search. All share ranking and
restoration (`--method obs`); only the rates differ. What is found is pruned and evaluated on other books and on
WikiText-2.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import common
from demo_search import DEMO, METHOD, curves, rates_of, searched, searching_parser, shortened

from flap_export.allocation.rates import LayerRate
from flap_export.evaluation import evaluate
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import Evidence
from flap_export.progress import no_progress
from flap_export.pruning.stage import prune_with
from flap_export.searching import SearchReport
from flap_export.searching.preparing import EVIDENCE_FOLDER, Prepared, prepared
from flap_export.searching.table import SHARES, lines_of, strategy_name
from flap_export.storage import digest_of_json, write_text

TEXTS: Final = ("heldout.txt.xz", "wikitext-2.txt.xz")


def main() -> None:
    """Search, prune and evaluate; print tables, write a JSON file."""
    arguments, conditions = parsed_arguments(), common.Conditions()
    with common.work_directory(arguments) as work:
        found = quality(arguments, work)
    print(f"written to {common.save_result(arguments, conditions, {'quality': found})}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = searching_parser(__doc__, "search_quality", (0.3, 0.5, 0.2))
    made.add_argument("--windows", type=int, default=256, help="evaluation windows of 128 tokens per text")
    arguments = made.parse_args(command_line)
    if arguments.quick:
        shortened(arguments)
        arguments.windows = 8
    return arguments


def quality(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """One result per ratio: the search, and perplexity on held-out text of what it found."""
    results = []
    for ratio in arguments.ratios:
        folder = work / f"search-{ratio:g}"
        report = searched(arguments, folder, ratio, "evolutionary")
        rows = [*known_rows(arguments, report, folder, work), *found_rows(arguments, report, folder, work)]
        common.show(f"{ratio:.0%}, {arguments.evaluations:g} evaluations", COLUMNS, map(row, rows))
        results.append({"ratio": ratio, "rows": rows, "curves": curves(report), "prepare_s": report.prepare_s})
    return results


def known_rows(
    arguments: argparse.Namespace, report: SearchReport, folder: Path, work: Path
) -> Iterator[dict[str, Any]]:
    """Rates that need no search, and FLAP as it is published."""
    ready = ready_of(arguments, report, folder)
    for name, candidate in ready.references.items():
        perplexities = pruned_perplexities(arguments, ready.evidence, rates_of(ready, candidate), work)
        yield {"rates": name, "fitness": report.references.get(name), "perplexities": [perplexities]}
    flap = Evidence.load(folder / "evidence-flap")
    published = perplexities_of(arguments, flap, PruneOptions(ratio=report.prune.ratio, method="flap"), work)
    yield {"rates": "flap, units and bias too", "fitness": None, "perplexities": [published]}


def found_rows(
    arguments: argparse.Namespace, report: SearchReport, folder: Path, work: Path
) -> Iterator[dict[str, Any]]:
    """What every strategy found, from every seed."""
    evidence = Evidence.load(folder / EVIDENCE_FOLDER)
    for line in lines_of(report):
        runs = [run for run in report.runs if strategy_name(run) == line.name]
        found = [
            [
                LayerRate(rate=rate, attention=attention, ffn=ffn)
                for rate, attention, ffn in zip(run.best.rates, run.best.attention, run.best.ffn, strict=True)
            ]
            for run in runs
        ]
        yield {
            "rates": line.name,
            "fitness": line.fitness[-1],
            "fitness_after": dict(zip(map(str, SHARES), line.fitness, strict=True)),
            "fitness_spread": line.spread,
            "candidates": line.looks,
            "seconds": line.seconds,
            "perplexities": [pruned_perplexities(arguments, evidence, rates, work) for rates in found],
        }


def pruned_perplexities(
    arguments: argparse.Namespace, evidence: Evidence, rates: Sequence[LayerRate], work: Path
) -> list[float]:
    """Perplexities of the model pruned at these rates, as `prune --rates` does."""
    return perplexities_of(arguments, evidence, PruneOptions(method=METHOD, rates=tuple(rates)), work)


def perplexities_of(
    arguments: argparse.Namespace, evidence: Evidence, options: PruneOptions, work: Path
) -> list[float]:
    """Perplexities after pruning; kept in the work directory, so that an interrupted benchmark goes on."""
    kept = work / "perplexities" / f"{digest_of_json([options.model_dump(mode='json'), arguments.windows])}.json"
    if not kept.is_file():
        prune_with(DEMO / "model", work / "pruned", evidence, options)
        found = evaluate(work / "pruned", [str(DEMO / text) for text in TEXTS], samples=arguments.windows)
        write_text(kept, json.dumps([source.perplexity for source in found.sources]))
    perplexities: list[float] = json.loads(kept.read_text())
    return perplexities


def ready_of(arguments: argparse.Namespace, report: SearchReport, folder: Path) -> Prepared:
    """The problem of a search, from what it left."""
    return prepared(
        DEMO / "model",
        folder,
        report.calibration,
        report.prune,
        report.options,
        compares=True,
        fits=False,
        device="cpu",
        progress=no_progress,
    )


COLUMNS: Final = ("rates", "fitness", "± seeds", "candidates", "seconds", "books", "± seeds", "WikiText-2", "± seeds")


def row(found: dict[str, Any]) -> tuple[str, ...]:
    columns = []
    for values in zip(*found["perplexities"], strict=True):
        columns += [f"{statistics.fmean(values):.2f}", f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""]
    searched = (found.get("fitness_spread"), found.get("candidates"), found.get("seconds"))
    shown = ["" if value is None else form.format(value) for value, form in zip(searched, ("{:.1g}", "{:.0f}", "{:.0f}"), strict=True)]  # fmt: skip  # noqa: E501
    fitness = "" if found["fitness"] is None else f"{found['fitness']:.4f}"
    return (found["rates"], fitness, *shown, *columns)


if __name__ == "__main__":
    main()
