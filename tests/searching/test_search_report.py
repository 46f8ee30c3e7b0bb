"""The page of a search, and the lines of its table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flap_export.cli.summaries import of_search
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import CalibrationText
from flap_export.manifest import verify, write_manifest
from flap_export.plan import Ratio
from flap_export.reporting import report
from flap_export.reporting.searches import search_page
from flap_export.searching.judging import CurvePoint
from flap_export.searching.record import SEARCH_NAME, Found, SearchOptions, SearchReport, SearchRun
from flap_export.searching.table import best_after, lines_of

RATES = (0.1, 0.3, 0.5)


def run_of(name: str, curve: list[tuple[float, float]], **given: Any) -> SearchRun:
    strategy, seed = name.rsplit("-", 1)
    values = {
        "name": name,
        "strategy": strategy,
        "proposer": None,
        "seed": int(seed),
        "best": Found(rates=RATES, attention=RATES, ffn=RATES, fitness=curve[-1][1]),
        "evaluations": 20.0,
        "looks": 40,
        "seconds": 3.0,
        "curve": tuple(CurvePoint(evaluations=at, fitness=value) for at, value in curve),
    }
    return SearchRun.model_validate({**values, **given})


def report_of(**given: Any) -> SearchReport:
    values = {
        "model": "a <b> model",
        "ratio": Ratio(requested=0.3, achieved=0.3001),
        "options": SearchOptions(evaluations=20),
        "prune": resolved(PruneOptions(ratio=0.3, method="obs")),
        "calibration": CalibrationText(source="text.txt"),
        "fitness_sequences": 16,
        "fitness_shares_calibration": False,
        "references": {"uniform": 0.9, "flap": 40.0},
        "runs": (
            run_of("evolutionary-0", [(1, 0.9), (4, 0.5), (16, 0.2)]),
            run_of("evolutionary-1", [(1, 0.9), (10, 0.4)]),
            run_of("random-0", [(1, 0.9), (12, 0.8)]),
        ),
        "chosen": "evolutionary-0",
        "prepare_s": 1.0,
    }
    return SearchReport.model_validate({**values, **given})


def test_the_best_so_far_is_told_at_every_time() -> None:
    run = report_of().runs[0]
    assert [best_after(run, at) for at in (0.5, 1, 3.9, 4, 15, 20)] == [0.9, 0.9, 0.9, 0.5, 0.5, 0.2]


def test_a_line_is_the_mean_over_seeds() -> None:
    conventional, random = lines_of(report_of())
    assert (conventional.name, conventional.seeds, random.name, random.seeds) == ("evolutionary", 2, "random", 1)
    assert conventional.fitness == pytest.approx(((0.5 + 0.9) / 2, (0.5 + 0.4) / 2, (0.2 + 0.4) / 2))
    assert conventional.spread == pytest.approx(0.2 / 2**0.5)
    assert random.spread == 0


def test_lines_fall_in_steps_within_the_plot_and_rates_far_off_stay_out() -> None:
    page = search_page(report_of())
    assert [series.name for series in page.curve.series] == ["evolutionary", "random"]
    assert len({series.style for series in page.curve.series}) == 2
    for series in page.curve.series:
        for path in series.paths:
            heights = [float(found) for found in re.findall(r"(?:V|M[\d.]+ )([\d.]+)", path)]
            assert all(0 <= height <= 100 for height in heights)
            # Down the page is better.
            assert heights == sorted(heights)
            assert path.endswith("H100.000")
    heights = {reference.name: reference.height for reference in page.curve.references}
    assert heights["flap"] is None
    assert heights["uniform"] == pytest.approx(
        float(re.findall(r"M[\d.]+ ([\d.]+)", page.curve.series[0].paths[0])[0]), abs=1e-3
    )
    assert page.curve.columns == ("After 5", "After 10", "After 20")
    assert page.front == ()


def test_one_run_that_found_nothing_better_is_drawn_all_the_same() -> None:
    page = search_page(report_of(runs=(run_of("random-0", [(1, 0.9)]),), chosen="random-0", references={}))
    assert page.curve.series[0].paths[0].startswith("M5.000 ")


def test_columns_are_of_the_evaluations_that_were_spent() -> None:
    """A small space is exhausted before the search's limit."""
    table: Any = next(iter(of_search(report_of(options=SearchOptions(evaluations=430)))))
    assert [column.header for column in table.columns][1:4] == ["after 5", "after 10", "after 20"]


def test_rates_that_lose_nothing_are_drawn_too() -> None:
    """Divergences below what rounding leaves are zero, of all rates where a model hardly depends on its layers."""
    run = run_of("random-0", [(1, 0.0)])
    page = search_page(report_of(runs=(run,), chosen="random-0", references={"uniform": 0.0}))
    assert page.curve.series[0].paths[0] == "M5.000 50.000H100.000"
    assert page.curve.references[0].height == 50


def test_the_page_of_a_search_is_written_and_escapes_names(tmp_path: Path) -> None:
    found = report_of(fitness_shares_calibration=True)
    found.save(tmp_path / SEARCH_NAME)
    text = report(tmp_path).read_text(encoding="utf-8")
    assert "a &lt;b&gt; model" in text
    assert "<b>" not in text
    assert "30.0\u00a0%" in text
    assert "fitness was measured on sequences that units were ranked by" in text
    assert "Trade-off" not in text


def test_a_record_that_was_edited_is_warned_of(tmp_path: Path) -> None:
    report_of().save(tmp_path / SEARCH_NAME)
    write_manifest(tmp_path, digests={})
    assert "not what was written" not in report(tmp_path).read_text(encoding="utf-8")
    verify(tmp_path)
    path = tmp_path / SEARCH_NAME
    path.write_text(path.read_text().replace("0.5", "0.4", 1))
    assert "search.json is not what was written with the rest" in report(tmp_path).read_text(encoding="utf-8")


def test_a_trade_off_lists_what_none_beats(tmp_path: Path) -> None:
    points = [
        Found(rates=RATES, attention=RATES, ffn=RATES, fitness=fitness, latency_ms=latency)
        for fitness, latency in ((0.2, 3.0), (0.3, 2.0), (0.35, 2.5))
    ]
    run = run_of("population-0", [(1, 0.2)], best=points[0], front=tuple(points))
    page = search_page(report_of(runs=(run,), chosen="population-0"))
    assert [point.latency for point in page.front] == ["3.00\u00a0ms", "2.00\u00a0ms"]
    assert page.front[0].rates == "0.10 0.30 0.50"
