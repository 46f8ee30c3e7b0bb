"""Comparisons that stop and go on, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import save_tokens, tiny_checkpoint, tokens_of

from flap_export import comparison
from flap_export.comparison import (
    COMPARISON_NAME,
    PLOT_NAME,
    TABLE_NAME,
    ComparisonReport,
    compare,
    parsed_variant,
)
from flap_export.errors import BudgetError, InputError, MissingRequirementError, ModelError, OutputError
from flap_export.evaluation import evaluate
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import CalibrationText
from flap_export.pruning.stage import prune

VARIANTS = ("flap", "flap,compensation=least-squares", "random,seed=3")
RATIOS = (0.2, 0.4)


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    if not (folder / "dense").exists():
        tiny_checkpoint("llama", folder / "dense")
        save_tokens(folder / "calibration.npy", tokens_of(9, 8))
        save_tokens(folder / "one.npy", tokens_of(3, 8, seed=5))
        save_tokens(folder / "two.npy", tokens_of(3, 8, seed=6))
    return {
        "model": folder / "dense",
        "output": folder / "out",
        "variants": VARIANTS,
        "ratios": RATIOS,
        "calibration": CalibrationText(source=str(folder / "calibration.npy")),
        "sources": [str(folder / "one.npy"), str(folder / "two.npy")],
        "plot": False,
        **changes,
    }


def test_rows_are_what_pruning_and_evaluating_by_hand_give(tmp_path: Path) -> None:
    given = arguments(tmp_path)
    report = compare(**given)
    assert [(row.variant, row.ratio) for row in report.rows] == [(v, r) for v in VARIANTS for r in RATIOS]
    dense = evaluate(given["model"], given["sources"])
    assert report.dense_perplexities == tuple(source.perplexity for source in dense.sources)
    plan = prune(
        given["model"],
        tmp_path / "by hand",
        ratio=0.4,
        calibration=given["calibration"].source,
        compensation="least-squares",
    )
    row = report.find("flap,compensation=least-squares", 0.4)
    assert row is not None
    assert row.achieved == plan.ratio.achieved
    expected = [source.perplexity for source in evaluate(tmp_path / "by hand", given["sources"]).sources]
    assert list(row.perplexities) == pytest.approx(expected, rel=1e-6)
    other = report.find("flap", 0.4)
    assert other is not None
    dense_one = report.dense_perplexities[1]
    share = (row.perplexities[1] - dense_one) / (other.perplexities[1] - dense_one)
    assert report.loss_share(row, other, 1) == pytest.approx(share)
    assert ComparisonReport.load(tmp_path / "out" / COMPARISON_NAME) == report


def test_an_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished rows stay as they are, byte for byte of their timings too; only the others are computed."""
    real, labels = comparison._row, []

    def interrupted(model: Any, label: str, options: PruneOptions, *rest: Any) -> Any:
        if len(labels) == 3:
            raise KeyboardInterrupt
        labels.append((label, options.ratio))
        return real(model, label, options, *rest)

    monkeypatch.setattr(comparison, "_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(**arguments(tmp_path))
    saved = ComparisonReport.load(tmp_path / "out" / COMPARISON_NAME)
    assert [(row.variant, row.ratio) for row in saved.rows] == labels
    assert len(labels) == 3
    assert not (tmp_path / "out" / TABLE_NAME).exists()

    def counted(model: Any, label: str, options: PruneOptions, *rest: Any) -> Any:
        labels.append((label, options.ratio))
        return real(model, label, options, *rest)

    monkeypatch.setattr(comparison, "_row", counted)
    finished = compare(**arguments(tmp_path))
    assert labels == [(variant, ratio) for variant in VARIANTS for ratio in RATIOS]
    assert finished.rows[:3] == saved.rows
    assert len(finished.rows) == 6
    before = len(labels)
    assert compare(**arguments(tmp_path)) == finished
    assert len(labels) == before


@pytest.mark.parametrize("changed", ["calibration.npy", "one.npy", "settings", "model"])
def test_another_text_setting_or_model_starts_afresh(changed: str, tmp_path: Path) -> None:
    given = arguments(tmp_path, variants=["random"], ratios=[0.3])
    before = compare(**given)
    if changed == "model":
        tiny_checkpoint("llama", tmp_path / "dense", seed=1)
    elif changed == "settings":
        given["samples"] = 2
    else:
        save_tokens(tmp_path / changed, tokens_of(9, 8, seed=9))
    after = compare(**{**given, "variants": ["random,seed=1"]})
    assert [row.variant for row in after.rows] == ["random,seed=1"]
    assert after.digests["comparison"] != before.digests["comparison"]


def test_further_variants_join_the_rows_there_are(tmp_path: Path) -> None:
    compare(**arguments(tmp_path, variants=["random"], ratios=[0.3]))
    report = compare(**arguments(tmp_path, variants=["random,seed=1"], ratios=[0.3]))
    assert [row.variant for row in report.rows] == ["random", "random,seed=1"]


def test_a_budget_that_cannot_be_met_is_a_row_with_a_reason(tmp_path: Path) -> None:
    given = arguments(tmp_path, variants=["magnitude", "flap"], ratios=[0.001, 0.3])
    report = compare(**given)
    row = report.find("magnitude", 0.001)
    assert row is not None
    assert (row.achieved, row.perplexities) == (None, ())
    assert row.reason is not None
    assert "removes nothing" in row.reason
    assert len(report.rows) == 4
    line = next(line for line in (tmp_path / "out" / TABLE_NAME).read_text().splitlines() if "magnitude" in line)
    assert [cell.strip() for cell in line.split("|")[2:-1]][::2] == ["-", "-"]


def test_evidence_is_gathered_once_for_what_shares_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, gathered = comparison.gather, []

    def counted(model: Any, text: Any, options: PruneOptions, **rest: Any) -> Any:
        gathered.append((options.method, options.ratio))
        return real(model, text, options, **rest)

    monkeypatch.setattr(comparison, "gather", counted)
    compare(**arguments(tmp_path, variants=["flap", "flap,metric=ifv", "wanda-sp", "magnitude"]))
    # The already pruned layers that wanda-sp sees depend on the ratio.
    assert gathered == [("flap", 0.2), ("wanda-sp", 0.2), ("wanda-sp", 0.4), ("magnitude", 0.2)]


def test_table_and_plot_hold_every_variant(tmp_path: Path) -> None:
    given = arguments(tmp_path, plot=True)
    report = compare(**given)
    table = (tmp_path / "out" / TABLE_NAME).read_text(encoding="utf-8").splitlines()
    assert table[0] == "| method | one.npy, 20% | one.npy, 40% | two.npy, 20% | two.npy, 40% |"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:]}
    assert list(cells) == ["dense", *VARIANTS]
    for variant in VARIANTS:
        rows = [report.find(variant, ratio) for ratio in RATIOS]
        expected = [f"{row.perplexities[source]:.2f}" for source in range(2) for row in rows if row is not None]
        assert cells[variant] == expected
    assert cells["dense"] == [f"{report.dense_perplexities[source]:.2f}" for source in (0, 0, 1, 1)]
    svg = (tmp_path / "out" / PLOT_NAME).read_text(encoding="utf-8")
    # Matplotlib draws text as paths, and leaves what they spell in comments.
    for text in (*VARIANTS, "one.npy", "two.npy", "perplexity"):
        assert text in svg, text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [COMPARISON_NAME, TABLE_NAME, PLOT_NAME]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flab", r"method must be one of flap, obs, .*, got 'flab'"),
        ("flap,metric", r"a variant reads METHOD,KEY=VALUE,\.\.\., such as flap,metric=ifv; got 'flap,metric'"),
        ("flap,colour=red", "there is no option colour; known are ratio, method, metric"),
        ("flap,metric=loud", "metric must be one of wifv, ifv, wifn, got 'loud'"),
        ("flap,remove-heads=many", "remove_heads is 'many': input should be a valid integer"),
        ("flap,remove-heads=-1", "remove_heads is '-1': input should be greater than or equal to 0"),
        ("obs,metric=ifv", "the method obs has no metric of its own"),
        ("flap,rates=r.json", "all pruned at the same ratios, rates have one of their own; got 'flap,rates=r.json'"),
        ("flap,ratio=0.3", "all pruned at the same ratios, which --ratio names; got 'flap,ratio=0.3'"),
        ("flap,method=obs", "a variant states its method once; got 'flap,method=obs'"),
        ("flap,metric=ifv,metric=wifn", "a variant states its metric once"),
        ("flap,sequential=true", "--sequential is about --compensation least-squares"),
        ("", "method must be one of"),
    ],
)
def test_variants_that_mean_nothing(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        parsed_variant(text)
    with pytest.raises(InputError, match=message):
        compare(**arguments(tmp_path, variants=["flap", text]))
    assert not (tmp_path / "out").exists()


def test_a_variant_is_the_options_it_spells() -> None:
    found = parsed_variant("flap, compensation = least-squares,head-units=queries,sequential=true,align_channels=8")
    expected = {"compensation": "least-squares", "head_units": "queries", "sequential": True, "align_channels": 8}
    assert found == PruneOptions(ratio=0.5, **expected)  # type: ignore[arg-type]


def test_ratios_and_output_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="strictly between 0 and 1"):
        compare(**arguments(tmp_path, ratios=[0.2, 1.0]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat.jpg").write_text("")
    with pytest.raises(OutputError, match="holds something else"):
        compare(**arguments(tmp_path))


def test_an_unusable_model_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="not in the family table"):
        compare(**arguments(tmp_path, model=tmp_path / "foreign"))
    assert not (tmp_path / "out").exists()


def test_a_plot_needs_matplotlib_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingRequirementError, match=r"drawing the comparison needs matplotlib.*flap-export\[plots\]"):
        compare(**arguments(tmp_path, plot=True))
    assert not (tmp_path / "out").exists()
