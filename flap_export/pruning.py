"""Stage `prune`: score, allocate, rewrite and save, from calibration statistics or from scratch."""

from __future__ import annotations

from pathlib import Path

from flap_export.allocation import STRUCTURES, Selection, StructureName, allocate, check_ratio
from flap_export.calibration import calibrate
from flap_export.checkpoint import write_checkpoint
from flap_export.compensation import COMPENSATIONS, CompensationName
from flap_export.errors import InputError, check_choice
from flap_export.layerwise import Progress, no_progress
from flap_export.loading import Checkpoint, check_weights, meta_model, open_checkpoint
from flap_export.manifest import write_manifest
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.rewriting import rewrite
from flap_export.scoring import METRICS, MetricName, score
from flap_export.statistics import STATISTICS_NAME, CalibrationStatistics, StatisticsName
from flap_export.storage import check_output, new_directory


def prune(
    model: str | Path,
    output: str | Path,
    *,
    ratio: float,
    calibration: str,
    metric: MetricName = "wifv",
    structure: StructureName = "al-am",
    compensation: CompensationName = "bias",
    remove_heads: int = 0,
    statistics: StatisticsName = "welford",
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> PruningPlan:
    """Prune a dense causal LM with FLAP and save the smaller checkpoint, its plan and its statistics.

    Args:
        model: a dense model directory or hub name.
        output: the directory to make; an older checkpoint of this tool there is replaced once the new one is whole.
        ratio: share of the decoder's attention and FFN weights that goes, in (0, 1).
        calibration: a text source, see `flap_export.text`.
        metric: importance of a channel, see `flap_export.scoring`.
        structure: how the budget is spread, see `flap_export.allocation`.
        compensation: see `flap_export.compensation`.
        remove_heads: query heads that go, for the structures `al-mm` and `ul-mm`.
        statistics: `welford` is exact; `reference` reproduces the official code, its choice of units included.
        samples: calibration sequences.
        sequence_length: tokens of one sequence.
        seed: chooses the sequences of a longer text.
        device: where to calibrate.
        dtype: precision to calibrate in.
        progress: told after every layer.

    Raises:
        InputError: one of its kinds, for an unusable model, text, budget or output directory.
    """
    check_ratio(ratio)
    for what, value, known in (
        ("metric", metric, METRICS),
        ("structure", structure, STRUCTURES),
        ("compensation", compensation, COMPENSATIONS),
    ):
        check_choice(what, value, known)
    check_output(Path(output), PLAN_NAME)
    gathered = calibrate(
        model,
        calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        statistics=statistics,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    return prune_with(
        model,
        output,
        gathered,
        ratio=ratio,
        metric=metric,
        structure=structure,
        compensation=compensation,
        remove_heads=remove_heads,
    )


def prune_with(
    model: str | Path,
    output: str | Path,
    statistics: CalibrationStatistics,
    *,
    ratio: float,
    metric: MetricName = "wifv",
    structure: StructureName = "al-am",
    compensation: CompensationName = "bias",
    remove_heads: int = 0,
) -> PruningPlan:
    """Prune with statistics that were gathered before; the other arguments are those of `prune`."""
    check_ratio(ratio)
    dense = open_checkpoint(model)
    check_weights(meta_model(dense, dense.dtype), dense)
    _check_statistics(statistics, dense)
    plan = make_plan(
        dense,
        statistics,
        ratio=ratio,
        metric=metric,
        structure=structure,
        compensation=compensation,
        remove_heads=remove_heads,
    )
    check_choice("compensation", compensation, COMPENSATIONS)
    restore = COMPENSATIONS[compensation]
    shape = plan.pruned_shape(dense.shape, compensated=restore is not None)
    with new_directory(Path(output), PLAN_NAME) as directory:
        write_checkpoint(directory, dense, plan, shape, rewrite(dense, plan, statistics, restore))
        statistics.save(directory / STATISTICS_NAME)
        write_manifest(directory, digests=plan.digests)
    return plan


def make_plan(
    dense: Checkpoint,
    statistics: CalibrationStatistics,
    *,
    ratio: float,
    metric: MetricName,
    structure: StructureName,
    compensation: CompensationName,
    remove_heads: int = 0,
) -> PruningPlan:
    """Score and allocate, without touching a weight."""
    follows_code = statistics.kind == "reference"
    scores = score(statistics, dense.shape, metric, square_attention=follows_code)
    selection: Selection = "reference" if follows_code else "exact"
    layers, achieved = allocate(scores, dense.shape, ratio, structure, remove_heads=remove_heads, selection=selection)
    return PruningPlan(
        model=dense.name,
        family=dense.family.model_type,
        ratio=achieved,
        method={
            "method": "flap",
            "metric": metric,
            "structure": structure,
            "compensation": compensation,
            "remove_heads": remove_heads if structure.endswith("-mm") else None,
            "statistics": statistics.kind,
            "calibration": statistics.source,
            "samples": statistics.sequences,
            "sequence_length": statistics.sequence_length,
        },
        layers=layers,
        digests=dict(statistics.digests),
    )


def _check_statistics(statistics: CalibrationStatistics, dense: Checkpoint) -> None:
    found, required = statistics.digests.get("weights"), dense.weights.digest
    if found != required:
        raise InputError(
            f"the calibration statistics are of other weights than '{dense.name}' (digest {str(found)[:12]} against "
            f"{required[:12]}); calibrate again"
        )
