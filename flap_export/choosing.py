"""Stage `choose`: a method's evidence and a budget become a pruning plan, without touching a weight."""

from __future__ import annotations

from flap_export.allocation import Selection, allocate, allocate_by_loss, allocate_ladders
from flap_export.errors import BudgetError, InputError
from flap_export.evidence import Evidence
from flap_export.ladders import ffn_plan
from flap_export.loading import Checkpoint
from flap_export.methods import PruneOptions, resolved
from flap_export.plan import LayerPlan, PruningPlan, Ratio
from flap_export.scoring import LayerScores, score
from flap_export.sensitivity import Sensitivity
from flap_export.shapes import DecoderShape
from flap_export.stock import allowed_heads


def make_plan(dense: Checkpoint, evidence: Evidence, options: PruneOptions) -> PruningPlan:
    """Choose what goes, without touching a weight.

    Raises:
        BudgetError: the budget cannot be met.
        InputError: the evidence is another method's.
        PlanError: the evidence is of another model.
    """
    options = resolved(options)
    if evidence.method != options.method:
        raise InputError(
            f"what was gathered serves the method {evidence.method}, not {options.method}; calibrate again"
        )
    if options.row.basis == "sensitivity":
        assert evidence.sensitivity is not None
        if evidence.sensitivity.head_units != options.head_units:
            raise InputError(
                f"the losses were measured for the head units {evidence.sensitivity.head_units}, asked are "
                f"{options.head_units}; measure again"
            )
        layers, achieved = _by_losses(dense, evidence.sensitivity, options)
    else:
        layers, achieved = _by_scores(dense, evidence, options)
    return PruningPlan(
        model=dense.name,
        family=dense.family.model_type,
        ratio=achieved,
        method=_described(options, evidence),
        layers=layers,
        digests=dict(evidence.digests),
    )


def _by_losses(
    dense: Checkpoint, sensitivity: Sensitivity, options: PruneOptions
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    ladders, align = sensitivity.ladders(dense.shape, options.align_channels), options.align_channels
    if options.structure is None:
        return allocate_by_loss(ladders, dense.shape, options.ratio, align_channels=align)
    return allocate_ladders(
        ladders,
        dense.shape,
        options.ratio,
        options.structure,
        align_channels=align,
        allowed_heads=_allowed_heads(dense, options),
    )


def _allowed_heads(dense: Checkpoint, options: PruneOptions) -> tuple[int, ...] | None:
    return allowed_heads(dense) if options.layout == "stock" else None


def _by_scores(dense: Checkpoint, evidence: Evidence, options: PruneOptions) -> tuple[tuple[LayerPlan, ...], Ratio]:
    shape = dense.shape
    follows_code = evidence.statistics is not None and evidence.statistics.kind == "reference"
    selection: Selection = "reference" if follows_code else "exact"
    scores = evidence.scores
    if options.row.basis == "statistics":
        assert options.metric is not None
        assert evidence.statistics is not None
        squares = options.squares_attention(evidence.statistics.kind)
        scores = score(evidence.statistics, shape, options.metric, square_attention=squares)
    assert scores is not None
    if options.row.spares_ends:
        return _between_ends(shape, scores, options)
    assert options.structure is not None
    return allocate(
        scores,
        shape,
        options.ratio,
        options.structure,
        remove_heads=options.remove_heads,
        selection=selection,
        head_units=options.head_units,
        align_channels=options.align_channels,
        allowed_heads=_allowed_heads(dense, options),
    )


def _between_ends(
    shape: DecoderShape, scores: tuple[LayerScores, ...], options: PruneOptions
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """Allocate within the middle layers; LLM-Pruner spares the first four and the last two of LLaMA-7B's 32."""
    count = len(shape.layers)
    first, last = (max(round(count * share), 1) if count > 2 else 0 for share in (4 / 32, 2 / 32))
    middle = slice(first, count - last)
    inner = shape.model_copy(update={"layers": shape.layers[middle]})
    share = options.ratio * shape.decoder_parameters / inner.decoder_parameters
    if share >= 1:
        raise BudgetError(
            f"{options.method} spares the first {first} and the last {last} of {count} layers, the others hold less "
            f"than a ratio of {options.ratio}; ask for less"
        )
    assert options.structure is not None
    plans, found = allocate(
        scores[middle],
        inner,
        share,
        options.structure,
        remove_heads=options.remove_heads,
        head_units=options.head_units,
        align_channels=options.align_channels,
    )
    achieved = found.achieved * inner.decoder_parameters / shape.decoder_parameters
    whole = [
        LayerPlan(
            layer=index,
            query_heads=tuple(range(layer.query_heads)),
            kv_heads=tuple(range(layer.kv_heads)),
            **ffn_plan(range(layer.ffns * layer.ffn_channels), layer),
        )
        for index, layer in enumerate(shape.layers)
    ]
    whole[middle] = [plan.model_copy(update={"layer": first + plan.layer}) for plan in plans]
    return tuple(whole), Ratio(requested=options.ratio, achieved=achieved, reason=found.reason)


def _described(options: PruneOptions, evidence: Evidence) -> dict[str, str | int | float | bool | None]:
    text = evidence.text
    return {
        "method": options.method,
        "metric": options.metric,
        "structure": options.structure,
        "square_attention": options.square_attention,
        "compensation": options.compensation,
        "sequential": options.sequential,
        "remove_heads": options.remove_heads if (options.structure or "").endswith("-mm") else None,
        "head_units": options.head_units,
        "align_channels": options.align_channels,
        "layout": options.layout,
        "seed": options.seed if options.method == "random" else None,
        "statistics": evidence.statistics.kind if evidence.statistics is not None else None,
        "calibration": text.source if text is not None else None,
        "samples": text.samples if text is not None else None,
        "sequence_length": text.sequence_length if text is not None else None,
    }
