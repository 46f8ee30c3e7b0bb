"""Stage `allocate`: scores and a budget become a pruning plan. Pure; costs are exact for any head_dim and GQA.

Units are whole KV groups (a KV head with its g query heads, (2 g + 2) H D weights) and FFN channels (3 H when gated).
A new structure is one function and one row of `STRUCTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from flap_export.errors import BudgetError
from flap_export.plan import LayerPlan, Ratio
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape, LayerShape

StructureName = Literal["al-am", "ul-um"]


@final
@dataclass(frozen=True)
class Removal:
    """Per layer, the KV groups and FFN channels that go; boolean [K] and [F], True where removed."""

    kv_groups: tuple[NDArray[np.bool_], ...]
    ffn_channels: tuple[NDArray[np.bool_], ...]


def group_parameters(shape: DecoderShape, layer: LayerShape) -> int:
    """Weights of one KV group, (2 g + 2) H D."""
    return (layer.query_heads // layer.kv_heads) * shape.query_head_parameters + shape.kv_head_parameters


def allocate(
    scores: Sequence[LayerScores], shape: DecoderShape, ratio: float, structure: StructureName = "al-am"
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """Decide what every layer keeps.

    Args:
        scores: standardised scores per layer.
        shape: the dense decoder.
        ratio: share of the decoder's attention and FFN weights that goes, in (0, 1).
        structure: `al-am` ranks all units of all layers together; `ul-um` takes the same share everywhere.

    Raises:
        BudgetError: the ratio is outside (0, 1), removes nothing or everything.
    """
    if not 0 < ratio < 1:
        raise BudgetError(f"the ratio must lie strictly between 0 and 1, got {ratio}; 0.2 removes 20 %")
    removal = STRUCTURES[structure](scores, shape, ratio)
    layers = tuple(
        _layer_plan(index, layer, groups, channels)
        for index, (layer, groups, channels) in enumerate(
            zip(shape.layers, removal.kv_groups, removal.ffn_channels, strict=True)
        )
    )
    return layers, _achieved(shape, layers, ratio, structure)


def _al_am(scores: Sequence[LayerScores], shape: DecoderShape, ratio: float) -> Removal:
    """FLAP's AL-AM: one ranking over all groups and channels; lowest scores go first, each at its exact cost.

    A unit that would overshoot the budget by more than half of the smallest unit is passed over for smaller ones
    further up, so that the budget is met to half an FFN channel.
    """
    units = [
        (values.numpy(), cost, kind, index)
        for index, (layer, layer_scores) in enumerate(zip(shape.layers, scores, strict=True))
        for kind, values, cost in (
            (0, layer_scores.kv_groups, group_parameters(shape, layer)),
            (1, layer_scores.ffn_channels, shape.ffn_channel_parameters),
        )
    ]
    values = np.concatenate([unit[0] for unit in units])
    costs = np.concatenate([np.full(len(unit[0]), unit[1], dtype=np.int64) for unit in units])
    # A stable sort: equal scores go in layer order, so that the same statistics always give the same plan.
    chosen = _cheapest_first(np.argsort(values, kind="stable"), costs, ratio * shape.decoder_parameters)
    split = np.split(chosen, np.cumsum([len(unit[0]) for unit in units])[:-1])
    return Removal(tuple(split[0::2]), tuple(split[1::2]))


def _cheapest_first(order: NDArray[np.intp], costs: NDArray[np.int64], budget: float) -> NDArray[np.bool_]:
    """Take units in `order` while they fit `budget` to half of the smallest unit's cost."""
    chosen, removed, smallest = np.zeros(len(order), dtype=bool), 0, int(costs.min())
    for unit in order:
        cost = int(costs[unit])
        if removed + cost <= budget + smallest / 2:
            chosen[unit] = True
            removed += cost
        elif cost == smallest:
            break
    return chosen


def _ul_um(scores: Sequence[LayerScores], shape: DecoderShape, ratio: float) -> Removal:
    """FLAP's UL-UM: the same counts go in every layer; FFN channels make up for what whole groups cannot express."""
    groups, channels = [], []
    for layer, layer_scores in zip(shape.layers, scores, strict=True):
        group_count = round(ratio * layer.kv_heads)
        budget = ratio * (shape.attention_parameters(layer) + shape.ffn_parameters(layer))
        rest = budget - group_count * group_parameters(shape, layer)
        channel_count = min(max(round(rest / shape.ffn_channel_parameters), 0), layer.ffn_channels)
        groups.append(_lowest(layer_scores.kv_groups.numpy(), group_count))
        channels.append(_lowest(layer_scores.ffn_channels.numpy(), channel_count))
    return Removal(tuple(groups), tuple(channels))


def _lowest(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[np.argsort(scores, kind="stable")[:count]] = True
    return chosen


STRUCTURES: Final[Mapping[StructureName, Callable[[Sequence[LayerScores], DecoderShape, float], Removal]]] = {
    "al-am": _al_am,
    "ul-um": _ul_um,
}


def _layer_plan(index: int, layer: LayerShape, groups: NDArray[np.bool_], channels: NDArray[np.bool_]) -> LayerPlan:
    kept_groups, size = np.flatnonzero(~groups).tolist(), layer.query_heads // layer.kv_heads
    return LayerPlan(
        layer=index,
        query_heads=tuple(group * size + head for group in kept_groups for head in range(size)),
        kv_heads=tuple(kept_groups),
        ffn_channels=tuple(np.flatnonzero(~channels).tolist()),
    )


def _achieved(shape: DecoderShape, layers: Sequence[LayerPlan], ratio: float, structure: StructureName) -> Ratio:
    kept = sum(
        len(plan.kv_heads) * group_parameters(shape, layer) + len(plan.ffn_channels) * shape.ffn_channel_parameters
        for plan, layer in zip(layers, shape.layers, strict=True)
    )
    total, unit = shape.decoder_parameters, shape.ffn_channel_parameters
    if kept == total:
        raise BudgetError(
            f"a ratio of {ratio} removes nothing: the smallest unit, one FFN channel, is {unit / total:.2g} of the "
            "decoder's weights; ask for more than half of that"
        )
    if kept == 0:
        raise BudgetError(f"a ratio of {ratio} would remove every head and channel of the decoder; ask for less")
    missed = abs(total - kept - ratio * total)
    reason = None
    if missed > unit / 2:
        step = len(shape.layers) if structure == "ul-um" else 1
        reason = (
            f"{structure} can only move {step} FFN channels at a time, {step * unit / total:.2g} of the weights"
            if structure == "ul-um" and missed <= step * unit / 2
            else "no FFN channels are left to make up for whole KV groups"
        )
    return Ratio(requested=ratio, achieved=(total - kept) / total, reason=reason)
