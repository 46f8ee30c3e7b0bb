"""In which order every module of every layer loses its units, and what each step costs. Pure.

A ladder is one module's ranking: how far down it a layer goes is all that allocation decides, and a searched pruning
rate is a cut point in it. Steps are nested, so that a layer's shapes stay regular after any number of them:

    attention   a whole KV group (a KV head with its g query heads, (2 g + 2) H D weights), or one query head of every
                group (2 H D each; the last ones take the KV heads along)
    FFN         one channel (3 H weights when gated), or as many as bring the width to the next multiple
    experts     the same of every routed expert at a time, each its own lowest (3 E H weights)
    shared      one channel of the expert that every token passes (3 H weights), as of a plain FFN

Where one norm runs over all query heads together and one over all key heads (see `flap_export.shapes`), a head takes
its part of v_proj and o_proj along only: (g + 1) H D weights of a group, H D of a query head. The step that empties
attention frees q_proj and k_proj as well.

The steps of routed experts and of the shared one are one ladder, the FFN's: lowest scores first, or in proportion, so
that after any step both have lost the same share. Element c of expert e is numbered e F + c, channel s of the shared
expert E F + s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from flap_export.calibration.statistics import CutSpace
from flap_export.errors import PlanError
from flap_export.plan import LayerPlan
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape, LayerShape

HeadUnits = Literal["groups", "queries"]
HEAD_UNITS: Final[tuple[HeadUnits, ...]] = ("groups", "queries")


@final
@dataclass(frozen=True)
class Ladder:
    """The order in which one module loses its elements: query heads, or FFN channels."""

    order: NDArray[np.int64]
    """Every element once, the first to go first; [N]."""
    gone: NDArray[np.int64]
    """How many elements are gone after each step; [S]."""
    costs: NDArray[np.int64]
    """Weights that each step removes; [S]."""
    scores: NDArray[np.float64]
    """Importance of what each step removes, ascending; or what each step adds to a measured loss, in any order; [S]."""
    joint: int = 0
    """Weights of the last step that are no element's own: they serve all, and go when none is left."""

    @property
    def own_removed(self) -> NDArray[np.int64]:
        """Weights gone after 0, 1, ... steps without `joint`: in proportion to the module's elements that are gone."""
        removed = np.concatenate([[0], np.cumsum(self.costs)])
        removed[-1] -= self.joint
        return removed

    def kept(self, steps: int) -> tuple[int, ...]:
        """The elements that stay after `steps` steps, ascending."""
        removed = int(self.gone[steps - 1]) if steps else 0
        return tuple(sorted(self.order[removed:].tolist()))

    def removed(self, steps: int) -> NDArray[np.int64]:
        """The elements that are gone after `steps` steps, in the order they went."""
        return self.order[: int(self.gone[steps - 1]) if steps else 0]


@final
@dataclass(frozen=True)
class LayerLadders:
    """Both ladders of one layer."""

    attention: Ladder
    ffn: Ladder


def ladders_from_scores(
    scores: Sequence[LayerScores],
    shape: DecoderShape,
    *,
    head_units: HeadUnits = "groups",
    align_channels: int = 1,
    proportional: bool = False,
) -> tuple[LayerLadders, ...]:
    """Rank the units of every module by their scores; equal scores keep their order.

    Args:
        scores: per layer.
        shape: the dense decoder.
        head_units: whether attention loses whole KV groups, or one query head of every group at a time.
        align_channels: FFN widths that are left are multiples of this, or the dense width.
        proportional: whether routed experts and a shared one lose the same share, whatever their scores.

    Raises:
        PlanError: `align_channels` is not positive.
    """
    check_alignment(align_channels)
    return tuple(
        LayerLadders(
            _attention_ladder(layer_scores.query_heads.numpy(), shape, layer, head_units),
            _ffn_ladder(layer_scores, shape, layer, align_channels, proportional),
        )
        for layer, layer_scores in zip(shape.layers, scores, strict=True)
    )


def check_alignment(align_channels: int) -> None:
    """Whether FFN widths can be multiples of `align_channels`.

    Raises:
        PlanError: they cannot.
    """
    if align_channels < 1:
        raise PlanError(f"--align-channels must be at least 1, got {align_channels}")


def check_widths(shape: DecoderShape, align_channels: int) -> None:
    """Whether the FFNs of a decoder have channels to lose at such an alignment: else only heads could go.

    Raises:
        PlanError: they have not.
    """
    check_alignment(align_channels)
    widths = [width for layer in shape.layers for width in (layer.ffn_channels, layer.shared_channels)]
    width = min(width for width in widths if width is not None)
    if align_channels > width:
        raise PlanError(
            f"--align-channels must be at most {width}, the width of the model's FFN, got {align_channels}; the FFN "
            "could lose nothing"
        )


def units_of_layer(layer: LayerShape, head_units: HeadUnits) -> HeadUnits:
    """What a layer loses at a time: where every query head is a group of its own, that is always one group."""
    return "groups" if layer.query_heads == layer.kv_heads else head_units


def attention_costs(shape: DecoderShape, layer: LayerShape, head_units: HeadUnits) -> NDArray[np.int64]:
    """Weights of every step of an attention ladder, [K] for groups and [g] for query heads."""
    per_group = layer.query_heads // layer.kv_heads
    if units_of_layer(layer, head_units) == "groups":
        left = [(per_group * groups, groups) for groups in range(layer.kv_heads, -1, -1)]
    else:
        left = [(size * layer.kv_heads, layer.kv_heads if size else 0) for size in range(per_group, -1, -1)]
    weights = np.array([shape.attention_parameters(layer.with_heads(*heads)) for heads in left], dtype=np.int64)
    removed: NDArray[np.int64] = weights[:-1] - weights[1:]
    return removed


def _attention_ladder(
    scores: NDArray[np.float64], shape: DecoderShape, layer: LayerShape, head_units: HeadUnits
) -> Ladder:
    heads = np.arange(layer.query_heads).reshape(layer.kv_heads, -1)
    by_group = scores.reshape(heads.shape)
    if units_of_layer(layer, head_units) == "queries":
        # Round r takes the r-th lowest head of every group.
        lowest_first = np.argsort(by_group, axis=1, kind="stable")
        heads = np.take_along_axis(heads, lowest_first, axis=1).T
        by_group = np.take_along_axis(by_group, lowest_first, axis=1).T
    costs = attention_costs(shape, layer, head_units)
    return ladder_of_rows(heads, by_group.mean(axis=1), costs, shape.joint_parameters(layer))


def ladder_of_rows(
    rows: NDArray[np.int64], scores: NDArray[np.float64], costs: NDArray[np.int64], joint: int = 0
) -> Ladder:
    """A ladder whose steps take one row of elements [S, n] each, lowest score first.

    Args:
        rows: elements that go together.
        scores: of every row, [S].
        costs: of the steps, in the order of the ladder; [S].
        joint: weights of the last step that are no row's own.
    """
    order = np.argsort(scores, kind="stable")
    return Ladder(rows[order].ravel(), (np.arange(len(rows)) + 1) * rows.shape[1], costs, scores[order], joint)


def _ffn_ladder(
    scores: LayerScores, shape: DecoderShape, layer: LayerShape, align_channels: int, proportional: bool
) -> Ladder:
    """The ladder of all FFNs of a layer."""
    routed = ffn_ladder(scores.ffn_channels.numpy(), shape, align_channels)
    if scores.shared_channels is None:
        return routed
    shared = numbered_from(
        layer.ffns * layer.ffn_channels, ffn_ladder(scores.shared_channels.numpy(), shape, align_channels)
    )
    if proportional:
        return in_proportion(routed, shared)
    return merged([routed, shared], [routed.scores, shared.scores])


def numbered_from(first: int, ladder: Ladder) -> Ladder:
    """The same ladder of elements that are numbered from `first` on."""
    return replace(ladder, order=ladder.order + first)


def merged(ladders: Sequence[Ladder], turns: Sequence[NDArray[np.float64]]) -> Ladder:
    """One ladder of the steps of several, each in its own order.

    Args:
        ladders: of different elements.
        turns: when each step's turn comes, never falling within a ladder; [S] each. Equal ones keep their order.
    """
    order = np.argsort(np.concatenate(turns), kind="stable")
    parts = [part for ladder in ladders for part in np.split(ladder.order, ladder.gone[:-1])]
    counts = np.concatenate([np.diff(ladder.gone, prepend=0) for ladder in ladders])
    costs, scores = (np.concatenate([getattr(ladder, name) for ladder in ladders]) for name in ("costs", "scores"))
    elements = np.concatenate([parts[step] for step in order])
    return Ladder(elements, np.cumsum(counts[order]), costs[order], scores[order])


def in_proportion(routed: Ladder, shared: Ladder) -> Ladder:
    """A ladder whose every step takes one of `routed` and as many of `shared` as bring it to the same share.

    Where the shared expert is a whole number of times as wide as a routed one, so it is after every step. Scores add.
    """
    rounds = np.arange(len(routed.gone))
    # The first round after which experts have lost the share that is gone after a step of the shared one.
    due = np.searchsorted(routed.gone * len(shared.order), shared.gone * len(routed.order))
    steps = merged([routed, shared], [rounds.astype(float), due.astype(float)])
    ends = rounds + np.searchsorted(due, rounds, side="right")
    starts = np.append(0, ends[:-1] + 1)
    costs, scores = (np.add.reduceat(values, starts) for values in (steps.costs, steps.scores))
    return Ladder(steps.order, steps.gone[ends], costs, scores)


def ffn_ladder(scores: NDArray[np.float64], shape: DecoderShape, align_channels: int = 1) -> Ladder:
    """Channels by ascending score, [F] or [E, F]; a step's score is the mean of its channels'."""
    by_expert = np.atleast_2d(scores)
    lowest_first = np.argsort(by_expert, axis=1, kind="stable")
    # The r-th lowest channel of every expert goes at once.
    by_rank = np.take_along_axis(by_expert, lowest_first, axis=1).mean(axis=0)
    experts, width = by_expert.shape
    gone = ffn_steps(width, align_channels)
    counts = np.diff(gone, prepend=0)
    means = np.add.reduceat(by_rank, gone - counts) / counts
    costs = counts * experts * shape.ffn_channel_parameters
    return Ladder(expert_elements(lowest_first), gone * experts, costs, means)


def expert_elements(orders: NDArray[np.int64]) -> NDArray[np.int64]:
    """The orders of all experts' channels [E, F] as one of elements [F E]: first the first channel of every expert."""
    experts, width = orders.shape
    return np.asarray((orders + np.arange(experts)[:, None] * width).T.ravel(), dtype=np.int64)


def elements_of(space: CutSpace, expert: int | None, layer: LayerShape) -> tuple[int, int]:
    """The numbers of one FFN's elements: the first, and how many there are.

    Args:
        space: `ffn` or `shared`.
        expert: its number, or None where it is no routed one.
        layer: whose FFN it is.
    """
    if space == "shared":
        return layer.ffns * layer.ffn_channels, layer.shared_width
    return (expert or 0) * layer.ffn_channels, layer.ffn_channels


def ffn_steps(channels: int, align_channels: int) -> NDArray[np.int64]:
    """How many channels are gone after each step, so that what is left is a multiple of `align_channels`."""
    left = np.arange((channels - 1) // align_channels, -1, -1) * align_channels
    return channels - left


def layer_plan(index: int, shape: DecoderShape, ladders: LayerLadders, attention: int, ffn: int) -> LayerPlan:
    """What layer `index` keeps after so many steps of its two ladders."""
    layer = shape.layers[index]
    query_heads = ladders.attention.kept(attention)
    group_size = layer.query_heads // layer.kv_heads
    return LayerPlan(
        layer=index,
        query_heads=query_heads,
        kv_heads=tuple(sorted({head // group_size for head in query_heads})),
        **ffn_plan(ladders.ffn.kept(ffn), layer),
    )


def ffn_plan(kept: Sequence[int], layer: LayerShape) -> dict[str, Any]:
    """The fields of a layer's plan that say which elements of its FFN stay."""
    if not layer.experts:
        return {"ffn_channels": tuple(kept)}
    channels: list[list[int]] = [[] for _ in range(layer.experts)]
    shared: list[int] = []
    routed = layer.experts * layer.ffn_channels
    for element in kept:
        if element >= routed:
            shared.append(element - routed)
            continue
        expert, channel = divmod(element, layer.ffn_channels)
        channels[expert].append(channel)
    fields = {"experts": tuple(map(tuple, channels))}
    return fields if layer.shared_channels is None else {**fields, "shared_channels": tuple(shared)}
