"""Stage `allocate`: rankings and a budget become a pruning plan. Pure; costs are exact for any head_dim and GQA.

A structure decides how many steps each ladder of `flap_export.allocation.ladders` goes down. A new one is one function
and one row of `STRUCTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from flap_export.allocation.budgets import cheapest_first, least_loss
from flap_export.allocation.ladders import HEAD_UNITS, HeadUnits, Ladder, LayerLadders, ladders_from_scores, layer_plan
from flap_export.allocation.ratios import achieved_ratio, check_ratio, remainder, smallest_unit
from flap_export.allocation.reference import removed_units
from flap_export.errors import BudgetError, check_choice
from flap_export.plan import LayerPlan, Ratio
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape

StructureName = Literal["al-am", "al-mm", "ul-mm", "ul-um"]
Selection = Literal["exact", "reference"]
Steps = Sequence[tuple[int, int]]
"""Per layer, how many steps its attention and its FFN go down their ladders."""


@final
@dataclass(frozen=True)
class _Task:
    """What a structure works on."""

    ladders: Sequence[LayerLadders]
    shape: DecoderShape
    ratio: float
    remove_heads: int
    allowed_heads: Sequence[int] | None
    """Numbers of query heads a layer may keep; None allows any."""

    @property
    def budget(self) -> float:
        """Weights that shall go."""
        return self.ratio * self.shape.decoder_parameters


def allocate(
    scores: Sequence[LayerScores],
    shape: DecoderShape,
    ratio: float,
    structure: StructureName = "al-am",
    *,
    remove_heads: int = 0,
    selection: Selection = "exact",
    head_units: HeadUnits = "groups",
    align_channels: int = 1,
    allowed_heads: Sequence[int] | None = None,
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """Decide what every layer keeps.

    Args:
        scores: standardised scores per layer.
        shape: the dense decoder.
        ratio: share of the decoder's attention and FFN weights that goes, in (0, 1).
        structure: `al-am` ranks all units of all layers together; `al-mm` ranks groups among groups and channels
            among channels; `ul-mm` takes the same counts in every layer; `ul-um` the same share of every module too.
        remove_heads: query heads that go in the whole model, for `al-mm` and `ul-mm`; the channels make up the rest.
        selection: by rank at exact costs, or by the official code's thresholds (`flap_export.allocation.reference`).
        head_units: whole KV groups, or one query head of every group; see `flap_export.allocation.ladders`.
        align_channels: FFN widths that are left are multiples of this, or the dense width.
        allowed_heads: numbers of query heads a layer may keep, for `ul-um`; None allows any.

    Raises:
        BudgetError: the ratio is outside (0, 1), removes nothing or everything, or `remove_heads` cannot be met; or
            aligned widths were asked of the official code's choice.
    """
    check_ratio(ratio)
    check_choice("structure", structure, STRUCTURES)
    check_choice("head units", head_units, HEAD_UNITS)
    if selection == "reference":
        if align_channels > 1:
            raise BudgetError(
                "the official code's thresholds know no aligned widths; leave out --align-channels, or use "
                "--statistics welford"
            )
        layers = _reference_layers(scores, shape, ratio, structure, remove_heads)
        return layers, achieved_ratio(shape, layers, ratio, _reason(shape, structure, selection, align_channels))
    ladders = ladders_from_scores(
        scores, shape, head_units=head_units, align_channels=align_channels, proportional=takes_shares(structure)
    )
    return allocate_ladders(
        ladders,
        shape,
        ratio,
        structure,
        remove_heads=remove_heads,
        align_channels=align_channels,
        allowed_heads=allowed_heads,
    )


def takes_shares(structure: StructureName | None) -> bool:
    """Whether a structure takes the same of every layer, whatever the scores of its units are beside other layers'."""
    return (structure or "").startswith("ul")


def allocate_ladders(
    ladders: Sequence[LayerLadders],
    shape: DecoderShape,
    ratio: float,
    structure: StructureName,
    *,
    remove_heads: int = 0,
    align_channels: int = 1,
    allowed_heads: Sequence[int] | None = None,
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """Decide how many steps of every ladder are taken; see `allocate`."""
    task = _Task(ladders, shape, ratio, remove_heads, allowed_heads)
    layers = plan_layers(ladders, shape, STRUCTURES[structure](task))
    return layers, achieved_ratio(shape, layers, ratio, _reason(shape, structure, "exact", align_channels))


def allocate_by_loss(
    ladders: Sequence[LayerLadders], shape: DecoderShape, ratio: float, *, align_channels: int = 1
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """Spend the budget where the sum of the modules' losses stays smallest.

    For a price per weight, every module goes down its ladder to where loss minus price times weights removed is least;
    the price is the highest that keeps within the budget, which makes the choice optimal for what it removes. The rest
    of the budget is filled with the cheapest single steps.

    Args:
        ladders: whose scores are what each step adds to a loss that adds up over modules.
        shape: the dense decoder.
        ratio: share of the decoder's attention and FFN weights that goes, in (0, 1).
        align_channels: as the ladders were made.

    Raises:
        BudgetError: the ratio is outside (0, 1), or removes nothing or everything.
    """
    check_ratio(ratio)
    modules = [ladder for layer in ladders for ladder in (layer.attention, layer.ffn)]
    taken = least_loss([(ladder.scores, ladder.costs) for ladder in modules], ratio * shape.decoder_parameters)
    layers = plan_layers(ladders, shape, list(zip(taken[0::2], taken[1::2], strict=True)))
    return layers, achieved_ratio(shape, layers, ratio, remainder(shape, align_channels))


def plan_layers(ladders: Sequence[LayerLadders], shape: DecoderShape, steps: Steps) -> tuple[LayerPlan, ...]:
    """What every layer keeps after so many steps."""
    return tuple(
        layer_plan(index, shape, layer, *taken) for index, (layer, taken) in enumerate(zip(ladders, steps, strict=True))
    )


def _reference_layers(
    scores: Sequence[LayerScores], shape: DecoderShape, ratio: float, structure: StructureName, remove_heads: int
) -> tuple[LayerPlan, ...]:
    heads, channels = removed_units(scores, shape, ratio, structure, remove_heads)
    return tuple(
        LayerPlan(layer=index, query_heads=kept, kv_heads=kept, ffn_channels=tuple(np.flatnonzero(~gone).tolist()))
        for index, (kept, gone) in enumerate(
            zip((tuple(np.flatnonzero(~gone).tolist()) for gone in heads), channels, strict=True)
        )
    )


def _al_am(task: _Task) -> Steps:
    """FLAP's AL-AM: one ranking over all groups and channels; lowest scores go first, each at its exact cost.

    A unit that would overshoot the budget by more than half of the smallest unit is passed over for smaller ones
    further up, so that the budget is met to half an FFN channel.
    """
    ladders = [ladder for layer in task.ladders for ladder in (layer.attention, layer.ffn)]
    taken = cheapest_first([(ladder.scores, ladder.costs) for ladder in ladders], task.budget)
    return list(zip(taken[0::2], taken[1::2], strict=True))


def _al_mm(task: _Task) -> Steps:
    """FLAP's AL-MM: the lowest groups of all layers until `remove_heads` heads are gone, then the lowest channels."""
    attention = [layer.attention for layer in task.ladders]
    taken = cheapest_first([(a.scores, np.diff(a.gone, prepend=0)) for a in attention], task.remove_heads)
    found = sum(_heads_gone(ladder, steps) for ladder, steps in zip(attention, taken, strict=True))
    _check_heads(task, found)
    rest = task.budget - sum(_cost(ladder, steps) for ladder, steps in zip(attention, taken, strict=True))
    _check_rest(task, rest)
    channels = cheapest_first([(layer.ffn.scores, layer.ffn.costs) for layer in task.ladders], rest)
    return list(zip(taken, channels, strict=True))


def _ul_mm(task: _Task) -> Steps:
    """FLAP's UL-MM: the same number of heads in every layer, and channels for the rest of every layer's budget."""
    per_layer = task.remove_heads // len(task.ladders)
    attention = [layer.attention for layer in task.ladders]
    counts = [int(np.searchsorted(ladder.gone, per_layer, side="right")) for ladder in attention]
    _check_heads(task, sum(_heads_gone(ladder, count) for ladder, count in zip(attention, counts, strict=True)))
    _check_rest(task, task.budget - sum(_cost(ladder, count) for ladder, count in zip(attention, counts, strict=True)))
    return _uniform(task, counts)


def _ul_um(task: _Task) -> Steps:
    """FLAP's UL-UM: the same share of every module; FFN channels make up for what whole groups cannot express.

    A share of attention is one of what its heads hold themselves, which no joint norm keeps in place.
    """
    shares = [
        nearest_steps(
            layer.attention.own_removed, task.ratio * layer.attention.own_removed[-1], _allowed_steps(layer, task)
        )
        for layer in task.ladders
    ]
    return _uniform(task, shares)


def _allowed_steps(layer: LayerLadders, task: _Task) -> NDArray[np.bool_] | None:
    """Which numbers of attention's steps leave heads that are allowed; None where all do."""
    if task.allowed_heads is None:
        return None
    left = len(layer.attention.order) - np.concatenate([[0], layer.attention.gone])
    return np.isin(left, task.allowed_heads)


def _uniform(task: _Task, attention_steps: Sequence[int]) -> Steps:
    """Take these steps of attention, and of every layer the channels that bring it to the ratio."""
    steps = []
    for layer, ladders, taken in zip(task.shape.layers, task.ladders, attention_steps, strict=True):
        budget = task.ratio * (task.shape.attention_parameters(layer) + task.shape.ffn_parameters(layer))
        steps.append((taken, nearest_steps(ladders.ffn.own_removed, budget - _cost(ladders.attention, taken))))
    return steps


STRUCTURES: Final[Mapping[StructureName, Callable[[_Task], Steps]]] = {
    "al-am": _al_am,
    "al-mm": _al_mm,
    "ul-mm": _ul_mm,
    "ul-um": _ul_um,
}


def _cost(ladder: Ladder, steps: int) -> int:
    """Weights that `steps` steps remove."""
    return int(ladder.costs[:steps].sum())


def _heads_gone(ladder: Ladder, steps: int) -> int:
    return len(ladder.removed(steps))


def nearest_steps(removed: NDArray[np.int64], budget: float, allowed: NDArray[np.bool_] | None = None) -> int:
    """The number of steps whose cost is nearest to `budget`; fewer where two are.

    Args:
        removed: weights that are gone after 0, 1, ... steps.
        budget: weights that shall go.
        allowed: whether so many steps may be taken; None allows any.
    """
    misses = np.abs(removed - budget)
    return int(np.argmin(misses if allowed is None else np.where(allowed, misses, np.inf)))


def _check_rest(task: _Task, rest: float) -> None:
    """Whether the FFN channels can make up the `rest` of the budget, in weights."""
    available = sum(task.shape.ffn_parameters(layer) for layer in task.shape.layers)
    channel = smallest_unit(task.shape)
    if not -channel / 2 <= rest <= available + channel / 2:
        more = "more" if rest > 0 else "fewer"
        raise BudgetError(
            f"the budget cannot be met: beside {task.remove_heads} query heads, {rest:.0f} weights of FFN channels "
            f"would have to go, and there are {available}; remove {more} heads (--remove-heads)"
        )


def _check_heads(task: _Task, found: int) -> None:
    if task.remove_heads != found:
        together = int(task.ladders[0].attention.gone[0])
        raise BudgetError(
            f"{task.remove_heads} query heads cannot be removed as whole units of {together} in this structure, only "
            f"{found}; set --remove-heads {found}"
        )


def _reason(shape: DecoderShape, structure: StructureName, selection: Selection, align_channels: int) -> str:
    """Why a ratio may be missed by more than half a unit."""
    if selection == "reference":
        return "the official code's thresholds and integer costs are reproduced"
    if takes_shares(structure):
        layers = len(shape.layers)
        return (
            f"{structure} removes the same in each of {layers} layers, so it moves {layers * align_channels} channels "
            "at a time, and cannot make up for heads that cost more than a layer's share, or less than the FFN can bear"
        )
    return remainder(shape, align_channels)
