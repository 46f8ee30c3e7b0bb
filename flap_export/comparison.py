"""`compare`: several pruning methods on one model, under the same budget, calibration text and evaluation.

Evidence is shared by what can share it, and every finished row is saved, so that an interrupted comparison goes on
where it stopped.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import Field

from flap_export.calibration.stage import open_dense
from flap_export.errors import BudgetError, InputError, MissingRequirementError
from flap_export.evaluation import QualityReport, evaluate
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import CalibrationText, Evidence
from flap_export.evidence.stage import ANY_RATIO, evidence_options, gather
from flap_export.models.opening import open_checkpoint
from flap_export.progress import Progress, no_progress
from flap_export.pruning.stage import prune_with
from flap_export.storage import (
    SCRATCH_PREFIX,
    Record,
    Value,
    check_output,
    digest_of_json,
    locked,
    new_file,
    validated,
    write_text,
)
from flap_export.text.sources import digest_of_source

COMPARISON_NAME: Final = "comparison.json"
TABLE_NAME: Final = "comparison.md"
PLOT_NAME: Final = "comparison.svg"


class Row(Value):
    """One method at one ratio."""

    variant: str
    """The method, and options that are not its own: `flap,compensation=least-squares`."""
    ratio: float
    achieved: float | None
    """None where the method cannot meet the budget."""
    perplexities: tuple[float, ...] = ()
    """On every source."""
    gather_s: float = 0.0
    """Seconds to calibrate; 0 where evidence was shared with an earlier row."""
    prune_s: float = 0.0
    reason: str | None = None
    """Why the budget could not be met."""


class ComparisonReport(Record):
    """`comparison.json`."""

    kind: ClassVar[str] = "comparison"

    model: str
    calibration: CalibrationText
    sources: tuple[str, ...]
    samples: int | None
    dense_perplexities: tuple[float, ...]
    rows: tuple[Row, ...] = ()
    digests: dict[str, str] = Field(default_factory=dict)

    def find(self, variant: str, ratio: float) -> Row | None:
        """The row of a variant and a ratio, if it is there."""
        return next((row for row in self.rows if (row.variant, row.ratio) == (variant, ratio)), None)

    def loss_share(self, row: Row, other: Row, source: int) -> float:
        """What a row loses in perplexity over the dense model, as a share of what another loses."""
        dense = self.dense_perplexities[source]
        return (row.perplexities[source] - dense) / (other.perplexities[source] - dense)


def parsed_variant(text: str) -> PruneOptions:
    """Options from `METHOD[,KEY=VALUE]...`; the ratio is still to be set.

    Raises:
        InputError: an unknown method, key or value, a key that is given twice, or a budget of its own.
    """
    method, *settings = text.split(",")
    values: dict[str, Any] = {"method": method.strip()}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise InputError(f"a variant reads METHOD,KEY=VALUE,..., such as flap,metric=ifv; got '{text}'")
        name = key.strip().replace("-", "_")
        if name in values:
            raise InputError(f"a variant states its {name} once; got '{text}'")
        values[name] = value.strip()
    if "ratio" in values:
        raise InputError(
            f"the variants of a comparison are all pruned at the same ratios, which --ratio names; got '{text}'"
        )
    if "rates" in values:
        raise InputError(
            f"the variants of a comparison are all pruned at the same ratios, rates have one of their own; got '{text}'"
        )
    options = validated(PruneOptions, {**values, "ratio": ANY_RATIO})
    resolved(options)
    return options


def compare(
    model: str | Path,
    output: str | Path,
    *,
    variants: Sequence[str],
    ratios: Sequence[float],
    calibration: CalibrationText,
    sources: Sequence[str],
    samples: int | None = None,
    sequence_length: int | None = None,
    plot: bool = True,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> ComparisonReport:
    """Prune by every variant at every ratio, evaluate, and write a table and a plot of perplexity against ratio.

    Args:
        model: a dense model directory or hub name.
        output: directory for `comparison.json`, `.md` and `.svg`; finished rows of the same comparison are kept.
        variants: methods, each as `METHOD[,KEY=VALUE]...` with the options of `flap_export.PruneOptions`.
        ratios: shares of the decoder's attention and FFN weights that go.
        calibration: what all are calibrated on.
        sources: texts to evaluate on, see `flap_export.text.sources`.
        samples: windows per source; None means all of them.
        sequence_length: tokens of a window.
        plot: whether to draw; needs matplotlib.
        device: where to compute.
        progress: told what is being done.

    Raises:
        InputError: one of its kinds, for an unusable model, text, variant, ratio or output directory.
        MissingRequirementError: matplotlib is not there.
    """
    wanted = [parsed_variant(variant).model_copy(update={"ratio": ratio}) for variant in variants for ratio in ratios]
    for options in wanted:
        resolved(options)
    if plot:
        _check_matplotlib()
    directory = Path(output)
    check_output(directory, COMPARISON_NAME, in_place=True)
    # Before there is a directory: an unusable model leaves none.
    open_dense(model)
    with locked(directory):
        report = _begun(model, directory, calibration, sources, samples, sequence_length, device)
        labels = [variant for variant in variants for _ in ratios]
        shared: dict[str, Evidence] = {}
        for done, (label, options) in enumerate(zip(labels, wanted, strict=True)):
            assert options.ratio is not None
            progress("comparison", done, len(wanted))
            if report.find(label, options.ratio) is None:
                row = _row(model, label, options, calibration, sources, samples, sequence_length, device, shared)
                report = report.model_copy(update={"rows": (*report.rows, row)})
                report.save(directory / COMPARISON_NAME)
        progress("comparison", len(wanted), len(wanted))
        write_text(directory / TABLE_NAME, markdown_table(report, variants, ratios))
        if plot:
            _draw(report, variants, directory / PLOT_NAME)
        return report


def _begun(
    model: str | Path,
    directory: Path,
    calibration: CalibrationText,
    sources: Sequence[str],
    samples: int | None,
    sequence_length: int | None,
    device: str,
) -> ComparisonReport:
    """The report without rows, or the one in the directory if it is of the same comparison."""
    texts = [digest_of_source(source) for source in (calibration.source, *sources)]
    settings = [calibration.model_dump(mode="json"), list(sources), samples, sequence_length]
    weights = open_checkpoint(model).weights.digest
    digests = {"weights": weights, "comparison": digest_of_json([weights, texts, settings])}
    path = directory / COMPARISON_NAME
    if path.is_file():
        earlier = ComparisonReport.load(path)
        if earlier.digests == digests:
            return earlier
    dense = _evaluated(model, sources, samples, sequence_length, device)
    return ComparisonReport(
        model=str(model),
        calibration=calibration,
        sources=tuple(sources),
        samples=samples,
        dense_perplexities=tuple(source.perplexity for source in dense.sources),
        digests=digests,
    )


def _row(
    model: str | Path,
    label: str,
    options: PruneOptions,
    calibration: CalibrationText,
    sources: Sequence[str],
    samples: int | None,
    sequence_length: int | None,
    device: str,
    shared: dict[str, Evidence],
) -> Row:
    options = resolved(options)
    assert options.ratio is not None
    key, started = evidence_options(options).model_dump_json(), time.monotonic()
    try:
        if key not in shared:
            shared[key] = gather(model, calibration, options, device=device)
        gathered = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX) as folder:
            pruned = Path(folder) / "pruned"
            plan = prune_with(model, pruned, shared[key], options, device=device, dtype=calibration.dtype)
            finished = time.monotonic()
            quality = _evaluated(pruned, sources, samples, sequence_length, device)
    except BudgetError as error:
        return Row(variant=label, ratio=options.ratio, achieved=None, reason=str(error))
    return Row(
        variant=label,
        ratio=options.ratio,
        achieved=plan.ratio.achieved,
        perplexities=tuple(source.perplexity for source in quality.sources),
        gather_s=round(gathered - started, 1),
        prune_s=round(finished - gathered, 1),
    )


def _evaluated(
    target: str | Path, sources: Sequence[str], samples: int | None, sequence_length: int | None, device: str
) -> QualityReport:
    return evaluate(target, sources, samples=samples, sequence_length=sequence_length, device=device)


def markdown_table(report: ComparisonReport, variants: Iterable[str], ratios: Sequence[float]) -> str:
    """Perplexities, a row for every variant and a column for every text and ratio."""
    columns = [(source, ratio) for source in range(len(report.sources)) for ratio in ratios]
    names = [Path(source).name for source in report.sources]
    lines = [
        "| method | " + " | ".join(f"{names[source]}, {ratio:.0%}" for source, ratio in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        "| dense | " + " | ".join(f"{report.dense_perplexities[source]:.2f}" for source, _ in columns) + " |",
    ]
    for variant in variants:
        rows = {ratio: report.find(variant, ratio) for ratio in ratios}
        cells = [_cell(rows[ratio], source) for source, ratio in columns]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None, source: int) -> str:
    return f"{row.perplexities[source]:.2f}" if row is not None and row.perplexities else "-"


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingRequirementError(
            "drawing the comparison needs matplotlib", "pip install 'flap-export[plots]'"
        ) from error


def _draw(report: ComparisonReport, variants: Sequence[str], path: Path) -> None:
    """Perplexity against ratio, one panel per text; logarithmic, because bad methods are far off."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(6 * len(report.sources), 4.5), layout="constrained")
    panels = figure.subplots(1, len(report.sources), squeeze=False)[0]
    for source, panel in enumerate(panels):
        for variant in variants:
            rows = sorted(
                (row for row in report.rows if row.variant == variant and row.perplexities), key=lambda row: row.ratio
            )
            panel.plot(
                [100 * (row.achieved or row.ratio) for row in rows],
                [row.perplexities[source] for row in rows],
                marker="o",
                markersize=4,
                label=variant,
            )
        dense = report.dense_perplexities[source]
        panel.axhline(dense, color="gray", linestyle=":", label=f"dense ({dense:.2f})")
        panel.set(
            title=Path(report.sources[source]).name, xlabel="attention and FFN weights removed, %", ylabel="perplexity"
        )
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(ScalarFormatter())
        panel.legend(fontsize="small")
    with new_file(path) as partial:
        figure.savefig(partial, format="svg")
