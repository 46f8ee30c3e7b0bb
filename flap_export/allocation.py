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

from flap_export.errors import BudgetError, check_choice
from flap_export.plan import LayerPlan, Ratio
from flap_export.reference import removed_units
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape, LayerShape

StructureName = Literal["al-am", "al-mm", "ul-mm", "ul-um"]
Selection = Literal["exact", "reference"]


@final
@dataclass(frozen=True)
class Removal:
    """Per layer, the KV groups and FFN channels that go; boolean [K] and [F], True where removed."""

    kv_groups: Sequence[NDArray[np.bool_]]
    ffn_channels: Sequence[NDArray[np.bool_]]


def group_parameters(shape: DecoderShape, layer: LayerShape) -> int:
    """Weights of one KV group, (2 g + 2) H D."""
    return (layer.query_heads // layer.kv_heads) * shape.query_head_parameters + shape.kv_head_parameters


def allocate(
    scores: Sequence[LayerScores],
    shape: DecoderShape,
    ratio: float,
    structure: StructureName = "al-am",
    *,
    remove_heads: int = 0,
    selection: Selection = "exact",
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """Decide what every layer keeps.

    Args:
        scores: standardised scores per layer.
        shape: the dense decoder.
        ratio: share of the decoder's attention and FFN weights that goes, in (0, 1).
        structure: `al-am` ranks all units of all layers together; `al-mm` ranks groups among groups and channels
            among channels; `ul-mm` takes the same counts in every layer; `ul-um` the same share of every module too.
        remove_heads: query heads that go in the whole model, for `al-mm` and `ul-mm`; the channels make up the rest.
        selection: by rank at exact costs, or by the official code's thresholds (`flap_export.reference`).

    Raises:
        BudgetError: the ratio is outside (0, 1), removes nothing or everything, or `remove_heads` cannot be met.
    """
    if not 0 < ratio < 1:
        raise BudgetError(f"the ratio must lie strictly between 0 and 1, got {ratio}; 0.2 removes 20 %")
    check_choice("structure", structure, STRUCTURES)
    if selection == "reference":
        removal = Removal(*removed_units(scores, shape, ratio, structure, remove_heads))
    else:
        removal = STRUCTURES[structure](scores, shape, ratio, remove_heads)
    layers = tuple(
        _layer_plan(index, layer, groups, channels)
        for index, (layer, groups, channels) in enumerate(
            zip(shape.layers, removal.kv_groups, removal.ffn_channels, strict=True)
        )
    )
    return layers, _achieved(shape, layers, ratio, structure, selection)


def _al_am(scores: Sequence[LayerScores], shape: DecoderShape, ratio: float, remove_heads: int) -> Removal:
    """FLAP's AL-AM: one ranking over all groups and channels; lowest scores go first, each at its exact cost.

    A unit that would overshoot the budget by more than half of the smallest unit is passed over for smaller ones
    further up, so that the budget is met to half an FFN channel.
    """
    units = [
        (values.numpy(), cost)
        for layer, layer_scores in zip(shape.layers, scores, strict=True)
        for values, cost in (
            (layer_scores.kv_groups, group_parameters(shape, layer)),
            (layer_scores.ffn_channels, shape.ffn_channel_parameters),
        )
    ]
    chosen = _cheapest_first(units, ratio * shape.decoder_parameters)
    return Removal(tuple(chosen[0::2]), tuple(chosen[1::2]))


def _al_mm(scores: Sequence[LayerScores], shape: DecoderShape, ratio: float, remove_heads: int) -> Removal:
    """FLAP's AL-MM: the lowest groups of all layers until `remove_heads` heads are gone, then the lowest channels."""
    attention = [
        (s.kv_groups.numpy(), layer.query_heads // layer.kv_heads)
        for layer, s in zip(shape.layers, scores, strict=True)
    ]
    groups = _cheapest_first(attention, remove_heads)
    _check_heads(remove_heads, shape, sum(int(g.sum()) * size for g, (_, size) in zip(groups, attention, strict=True)))
    rest = ratio * shape.decoder_parameters - _group_cost(groups, shape)
    _check_rest(rest, shape, remove_heads)
    channels = _cheapest_first([(s.ffn_channels.numpy(), shape.ffn_channel_parameters) for s in scores], rest)
    return Removal(tuple(groups), tuple(channels))


def _ul_mm(scores: Sequence[LayerScores], shape: DecoderShape, ratio: float, remove_heads: int) -> Removal:
    """FLAP's UL-MM: the same number of heads in every layer, and channels for the rest of every layer's budget."""
    layers = len(shape.layers)
    sizes = [layer.query_heads // layer.kv_heads for layer in shape.layers]
    counts = [remove_heads // layers // size for size in sizes]
    _check_heads(remove_heads, shape, sum(count * size for count, size in zip(counts, sizes, strict=True)))
    gone = [np.arange(layer.kv_heads) < count for layer, count in zip(shape.layers, counts, strict=True)]
    _check_rest(ratio * shape.decoder_parameters - _group_cost(gone, shape), shape, remove_heads)
    return _uniform(scores, shape, ratio, counts)


def _check_rest(rest: float, shape: DecoderShape, remove_heads: int) -> None:
    """Whether the FFN channels can make up the `rest` of the budget, in weights."""
    available = sum(shape.ffn_parameters(layer) for layer in shape.layers)
    if not -shape.ffn_channel_parameters / 2 <= rest <= available + shape.ffn_channel_parameters / 2:
        more = "more" if rest > 0 else "fewer"
        raise BudgetError(
            f"the budget cannot be met: beside {remove_heads} query heads, {rest:.0f} weights of FFN channels would "
            f"have to go, and there are {available}; remove {more} heads (--remove-heads)"
        )


def _check_heads(asked: int, shape: DecoderShape, found: int) -> None:
    if asked != found:
        size = shape.layers[0].query_heads // shape.layers[0].kv_heads
        raise BudgetError(
            f"{asked} query heads cannot be removed as whole KV groups of {size} in this structure, only {found}; "
            f"set --remove-heads {found}"
        )


def _group_cost(groups: Sequence[NDArray[np.bool_]], shape: DecoderShape) -> int:
    return sum(
        int(gone.sum()) * group_parameters(shape, layer) for gone, layer in zip(groups, shape.layers, strict=True)
    )


def _cheapest_first(units: Sequence[tuple[NDArray[np.float64], int]], budget: float) -> list[NDArray[np.bool_]]:
    """Take units from the lowest score on while they fit `budget` to half of the smallest unit's cost.

    Args:
        units: per kind and layer the scores [N], and what each of these units costs.
        budget: in the same units as the costs.

    Returns:
        Per kind and layer boolean [N], True where taken.
    """
    values = np.concatenate([scores for scores, _ in units])
    costs = np.concatenate([np.full(len(scores), cost, dtype=np.int64) for scores, cost in units])
    chosen, removed, smallest = np.zeros(len(values), dtype=bool), 0, int(costs.min())
    # A stable sort: equal scores go in layer order, so that the same statistics always give the same plan.
    for unit in np.argsort(values, kind="stable"):
        cost = int(costs[unit])
        if removed + cost <= budget + smallest / 2:
            chosen[unit] = True
            removed += cost
        elif cost == smallest:
            break
    return np.split(chosen, np.cumsum([len(scores) for scores, _ in units])[:-1])


def _ul_um(scores: Sequence[LayerScores], shape: DecoderShape, ratio: float, remove_heads: int) -> Removal:
    """FLAP's UL-UM: the same share of every module; FFN channels make up for what whole groups cannot express."""
    return _uniform(scores, shape, ratio, [round(ratio * layer.kv_heads) for layer in shape.layers])


def _uniform(scores: Sequence[LayerScores], shape: DecoderShape, ratio: float, group_counts: Sequence[int]) -> Removal:
    """Remove `group_counts` groups, and of every layer the channels that bring it to `ratio`."""
    groups, channels = [], []
    for layer, layer_scores, group_count in zip(shape.layers, scores, group_counts, strict=True):
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


STRUCTURES: Final[Mapping[StructureName, Callable[[Sequence[LayerScores], DecoderShape, float, int], Removal]]] = {
    "al-am": _al_am,
    "al-mm": _al_mm,
    "ul-mm": _ul_mm,
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


def _achieved(
    shape: DecoderShape, layers: Sequence[LayerPlan], ratio: float, structure: StructureName, selection: Selection
) -> Ratio:
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
    reason = _why_missed(missed / unit, len(shape.layers), structure, selection) if missed > unit / 2 else None
    return Ratio(requested=ratio, achieved=(total - kept) / total, reason=reason)


def _why_missed(channels: float, layers: int, structure: StructureName, selection: Selection) -> str:
    """Why the achieved ratio is `channels` FFN channels off."""
    if selection == "reference":
        return "the official code's thresholds and integer costs are reproduced"
    if structure.startswith("ul") and channels <= layers / 2:
        return (
            f"{structure} removes the same number in each of {layers} layers, so it moves {layers} channels at a time"
        )
    return "no FFN channels are left to make up for whole KV groups"
