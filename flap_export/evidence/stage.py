"""Stage `calibrate` for any method: gather what decides which units go."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from flap_export.allocation.ladders import check_widths, ladders_from_scores
from flap_export.allocation.rates import check_rates, steps_of_rates
from flap_export.allocation.reference import check_known
from flap_export.allocation.stage import allocate, plan_layers, takes_shares
from flap_export.calibration.stage import (
    RemovedChannels,
    Sites,
    calibrate,
    calibration_windows,
    compute_dtype,
    open_dense,
)
from flap_export.calibration.statistics import CalibrationStatistics, CutSpace, StatisticsName, cut_spaces
from flap_export.devices import check_device
from flap_export.errors import InputError, TextError
from flap_export.evidence.coupled import magnitude_scores, random_scores, taylor_scores
from flap_export.evidence.measuring import measure
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import CalibrationText, Evidence
from flap_export.evidence.sensitivity import Sensitivity
from flap_export.models.opening import Checkpoint
from flap_export.plan import LayerPlan
from flap_export.progress import Progress, no_progress
from flap_export.rewriting.compensation import complement
from flap_export.rewriting.cutting import kept_channels
from flap_export.rewriting.stock import allowed_heads, check_stock
from flap_export.scoring import METRICS, LayerScores, layer_scores
from flap_export.shapes import DecoderShape

ANY_RATIO: Final = 0.5
"""For options that do not depend on it, and must state one."""


def gather(
    model: str | Path,
    text: CalibrationText | None,
    options: PruneOptions,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Evidence:
    """Calibrate a dense model for a method.

    Args:
        model: a dense model directory or hub name.
        text: what to calibrate on; methods that look at weights only, without compensation, do without.
        options: resolved, see `flap_export.evidence.methods`.
        device: where to compute.
        progress: told after every layer.

    Raises:
        InputError: one of its kinds, for an unusable model, text, device or rates, or a text that is missing.
        MissingRequirementError: the device is not on this machine.
    """
    check_device(device)
    if text is None:
        if options.row.needs_text or options.compensation != "none":
            raise InputError(
                f"the method {options.method} with compensation {options.compensation} calibrates on text; "
                "name one with --calibration"
            )
        dense = open_dense(model)
        _check_options(options, dense, None)
        scores = _scores(dense, None, options, device)
        return Evidence(options.method, None, {"weights": dense.weights.digest}, scores=scores)
    dense, windows = calibration_windows(model, text.source, text.samples, text.sequence_length, text.seed, text.dtype)
    sequences, length = windows.tokens.shape
    if length < 2:
        raise TextError(f"text source '{text.source}' gives sequences of one token; calibration needs at least two")
    by_statistics = options.row.basis == "statistics" or options.compensation == "bias"
    _check_options(options, dense, text.statistics if by_statistics else None)
    used = text.model_copy(update={"samples": sequences, "sequence_length": length})
    digests = {"weights": dense.weights.digest, "calibration": windows.digest}
    basis, tokens = options.row.basis, torch.from_numpy(windows.tokens)
    by_scores = basis not in ("statistics", "sensitivity")
    return Evidence(
        options.method,
        used,
        digests,
        _statistics(model, text, options, device, progress) if by_statistics else None,
        _measured(model, text, options, device, progress) if basis == "sensitivity" else None,
        _scores(dense, tokens, options, device, text.dtype) if by_scores else None,
    )


def follows_code(options: PruneOptions, statistics: StatisticsName | None) -> bool:
    """Whether the official code's thresholds over the whole model decide what goes.

    Args:
        options: resolved.
        statistics: that were gathered, if any were.
    """
    return statistics == "reference" and options.row.basis != "sensitivity" and not options.row.spares_ends


def check_ranks_modules(options: PruneOptions, statistics: StatisticsName | None) -> None:
    """Whether a method ranks the units of every module.

    Args:
        options: resolved.
        statistics: that were gathered, if any were.

    Raises:
        InputError: it follows the official code.
    """
    if follows_code(options, statistics):
        raise InputError(
            "the official code decides by thresholds over the whole model, so there is no ranking within a layer that "
            "a rate could cut; use --statistics welford"
        )


def _check_options(options: PruneOptions, dense: Checkpoint, statistics: StatisticsName | None) -> None:
    """Whether the model can be pruned this way, before anything is computed."""
    check_widths(dense.shape, options.align_channels)
    if options.layout == "stock":
        check_stock(dense, compensated=options.compensation != "none", align_channels=options.align_channels)
    if follows_code(options, statistics):
        check_known(dense.shape)
    if options.rates is not None:
        check_rates(options.rates, dense.shape, options.ratio)
        check_ranks_modules(options, statistics)


def evidence_options(options: PruneOptions) -> PruneOptions:
    """Of the options those that `gather` depends on; equal ones can share evidence, whatever the budget."""
    filled = resolved(options)
    if filled.row.propagates_pruned:
        return filled
    basis = filled.row.basis
    return PruneOptions(
        ratio=ANY_RATIO,
        method=filled.method,
        # A bias needs statistics, which are there where they decide.
        compensation="bias" if filled.compensation == "bias" or basis == "statistics" else "none",
        head_units=filled.head_units if basis == "sensitivity" else "groups",
        seed=filled.seed if filled.method == "random" else 0,
    )


def _scores(
    dense: Checkpoint, tokens: Tensor | None, options: PruneOptions, device: str, dtype: str | None = None
) -> tuple[LayerScores, ...]:
    if options.row.basis == "weights":
        return magnitude_scores(dense)
    if options.row.basis == "chance":
        return random_scores(dense.shape, options.seed)
    assert tokens is not None
    return taylor_scores(dense, tokens, dtype=compute_dtype(dense, dtype, device), device=device)


def _measured(
    model: str | Path, text: CalibrationText, options: PruneOptions, device: str, progress: Progress
) -> Sensitivity:
    return measure(
        model,
        text.source,
        samples=text.samples,
        sequence_length=text.sequence_length,
        seed=text.seed,
        head_units=options.head_units,
        device=device,
        dtype=text.dtype,
        progress=progress,
    )


def _statistics(
    model: str | Path, text: CalibrationText, options: PruneOptions, device: str, progress: Progress
) -> CalibrationStatistics:
    return calibrate(
        model,
        text.source,
        samples=text.samples,
        sequence_length=text.sequence_length,
        seed=text.seed,
        statistics=text.statistics,
        device=device,
        dtype=text.dtype,
        removed=_prefix_removal(open_dense(model), options, text.statistics) if options.row.propagates_pruned else None,
        progress=progress,
    )


def _prefix_removal(dense: Checkpoint, options: PruneOptions, statistics: StatisticsName) -> RemovedChannels:
    """What goes of each layer, decided by that layer alone."""
    assert options.metric is not None
    metric = options.metric
    attention_power = 2 if options.squares_attention(statistics) else 1

    def removed(index: int, sites: Sites) -> dict[CutSpace, Tensor]:
        alone = dense.shape.model_copy(update={"layers": (dense.shape.layers[index],)})
        scores = layer_scores(sites, dense.shape, METRICS[metric], index, attention_power)
        kept = kept_channels(_plan_alone(alone, scores, index, dense, options, statistics), alone)
        widths = {space: sites[index, space].mean.shape[-1] for space in cut_spaces(dense.shape.layers[index])}
        return {
            space: complement(channels, widths[space])
            if channels.ndim == 1
            else torch.stack([complement(own, widths[space]) for own in channels])
            for space in widths
            if (channels := kept[space]) is not None
        }

    return removed


def _plan_alone(
    alone: DecoderShape,
    scores: LayerScores,
    index: int,
    dense: Checkpoint,
    options: PruneOptions,
    statistics: StatisticsName,
) -> LayerPlan:
    """What layer `index` keeps at its own rate, or at the same share as every other."""
    if options.rates is not None:
        ladders = ladders_from_scores(
            (scores,),
            alone,
            head_units=options.head_units,
            align_channels=options.align_channels,
            proportional=takes_shares(options.structure),
        )
        # Methods that decide about a layer alone spread the budget uniformly.
        return plan_layers(ladders, alone, steps_of_rates(ladders, options.rates[index : index + 1], "uniform"))[0]
    assert options.ratio is not None
    assert options.structure is not None
    plans, _ = allocate(
        (scores,),
        alone,
        options.ratio,
        options.structure,
        selection="reference" if statistics == "reference" else "exact",
        head_units=options.head_units,
        align_channels=options.align_channels,
        allowed_heads=allowed_heads(dense) if options.layout == "stock" else None,
    )
    return plans[0]
