"""Stage `choose`: a method's evidence and a budget become a pruning plan, without touching a weight."""

from __future__ import annotations

from flap_export.allocation.ladders import LayerLadders, ffn_plan, ladders_from_scores
from flap_export.allocation.rates import Splitting, allocate_by_rates, check_rates
from flap_export.allocation.stage import allocate, allocate_by_loss, allocate_ladders, takes_shares
from flap_export.calibration.statistics import StatisticsName
from flap_export.errors import BudgetError, InputError
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import CalibrationText, Evidence
from flap_export.evidence.stage import check_ranks_modules, follows_code
from flap_export.models.opening import Checkpoint
from flap_export.plan import LayerPlan, PruningPlan, Ratio
from flap_export.rewriting.stock import allowed_heads
from flap_export.scoring import LayerScores, score
from flap_export.shapes import DecoderShape
from flap_export.storage import digest_of_json


def make_plan(dense: Checkpoint, evidence: Evidence, options: PruneOptions) -> PruningPlan:
    """Choose what goes, without touching a weight.

    Raises:
        BudgetError: the budget cannot be met, or the rates do not fit.
        InputError: the evidence is another method's, or has no ranking that rates could cut.
        PlanError: the evidence is of another model.
    """
    options = resolved(options)
    _check_evidence(evidence, options)
    layers, achieved = _allocated(dense, evidence, options)
    return PruningPlan(
        model=dense.name,
        family=dense.family.model_type,
        ratio=achieved,
        method=_described(options, evidence),
        layers=layers,
        digests={**evidence.digests, **_digests_of_rates(options)},
    )


def ladders_of(dense: Checkpoint, evidence: Evidence, options: PruneOptions) -> tuple[LayerLadders, ...]:
    """The method's ranking of the units of every module, and what each step costs.

    Args:
        dense: the model.
        evidence: what was gathered for the method.
        options: of them, whatever the budget is.

    Raises:
        InputError: the evidence is another method's, or follows the official code, which ranks nothing.
    """
    options = resolved(options)
    _check_evidence(evidence, options)
    check_ranks_modules(options, _statistics_name(evidence))
    if evidence.sensitivity is not None:
        return evidence.sensitivity.ladders(
            dense.shape, options.align_channels, proportional=takes_shares(options.structure)
        )
    return ladders_from_scores(
        _scores(dense, evidence, options),
        dense.shape,
        head_units=options.head_units,
        align_channels=options.align_channels,
        proportional=takes_shares(options.structure),
    )


def splitting_of(options: PruneOptions) -> Splitting:
    """How the method shares a layer's rate between attention and FFN."""
    structure = resolved(options).structure
    if structure is None:
        return "losses"
    return "scores" if structure.startswith("al") else "uniform"


def _check_evidence(evidence: Evidence, options: PruneOptions) -> None:
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


def _allocated(dense: Checkpoint, evidence: Evidence, options: PruneOptions) -> tuple[tuple[LayerPlan, ...], Ratio]:
    shape, align = dense.shape, options.align_channels
    if options.rates is not None:
        check_rates(options.rates, shape, options.ratio)
        ladders = ladders_of(dense, evidence, options)
        return allocate_by_rates(ladders, shape, options.rates, splitting_of(options))
    assert options.ratio is not None
    heads = allowed_heads(dense) if options.layout == "stock" else None
    if follows_code(options, _statistics_name(evidence)):
        assert options.structure is not None
        return allocate(
            _scores(dense, evidence, options),
            shape,
            options.ratio,
            options.structure,
            remove_heads=options.remove_heads,
            selection="reference",
            head_units=options.head_units,
            align_channels=align,
            allowed_heads=heads,
        )
    ladders = ladders_of(dense, evidence, options)
    if options.row.spares_ends:
        return _between_ends(shape, ladders, options)
    if options.structure is None:
        return allocate_by_loss(ladders, shape, options.ratio, align_channels=align)
    return allocate_ladders(
        ladders,
        shape,
        options.ratio,
        options.structure,
        remove_heads=options.remove_heads,
        align_channels=align,
        allowed_heads=heads,
    )


def _statistics_name(evidence: Evidence) -> StatisticsName | None:
    return evidence.statistics.kind if evidence.statistics is not None else None


def _scores(dense: Checkpoint, evidence: Evidence, options: PruneOptions) -> tuple[LayerScores, ...]:
    if options.row.basis == "statistics":
        assert options.metric is not None
        assert evidence.statistics is not None
        squares = options.squares_attention(evidence.statistics.kind)
        return score(evidence.statistics, dense.shape, options.metric, square_attention=squares)
    assert evidence.scores is not None
    return evidence.scores


def _between_ends(
    shape: DecoderShape, ladders: tuple[LayerLadders, ...], options: PruneOptions
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """Allocate within the middle layers; LLM-Pruner spares the first four and the last two of LLaMA-7B's 32."""
    count = len(shape.layers)
    first, last = (max(round(count * share), 1) if count > 2 else 0 for share in (4 / 32, 2 / 32))
    middle = slice(first, count - last)
    inner = shape.model_copy(update={"layers": shape.layers[middle]})
    assert options.ratio is not None
    share = options.ratio * shape.decoder_parameters / inner.decoder_parameters
    if share >= 1:
        raise BudgetError(
            f"{options.method} spares the first {first} and the last {last} of {count} layers, the others hold less "
            f"than a ratio of {options.ratio}; ask for less"
        )
    assert options.structure is not None
    plans, found = allocate_ladders(
        ladders[middle],
        inner,
        share,
        options.structure,
        remove_heads=options.remove_heads,
        align_channels=options.align_channels,
    )
    achieved = found.achieved * inner.decoder_parameters / shape.decoder_parameters
    whole = [
        LayerPlan(
            layer=index,
            query_heads=tuple(range(layer.query_heads)),
            kv_heads=tuple(range(layer.kv_heads)),
            **ffn_plan(range(layer.ffn_elements), layer),
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
        **({"unused": options.unused} if options.unused else {}),
        "head_units": options.head_units,
        "align_channels": options.align_channels,
        "layout": options.layout,
        "rates": True if options.rates is not None else None,
        "seed": _seed(options, text),
        "statistics": _statistics_name(evidence),
        "calibration": text.source if text is not None else None,
        "samples": text.samples if text is not None else None,
        "sequence_length": text.sequence_length if text is not None else None,
    }


def _seed(options: PruneOptions, text: CalibrationText | None) -> int | None:
    """Of the units that chance chose, or of the sequences that were calibrated on; None where nothing was drawn."""
    if options.method == "random":
        return options.seed
    return text.seed if text is not None else None


def _digests_of_rates(options: PruneOptions) -> dict[str, str]:
    if options.rates is None:
        return {}
    return {"rates": digest_of_json([rate.model_dump(mode="json") for rate in options.rates])}
