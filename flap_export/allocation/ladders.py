"""In which order every module of every layer loses its units, and what each step costs. Pure.

A ladder is one module's ranking: how far down it a layer goes is all that allocation decides, and a searched pruning
rate is a cut point in it. Steps are nested, so that a layer's shapes stay regular after any number of them:

    attention   a whole KV group (a KV head with its g query heads, (2 g + 2) H D weights), or one query head of every
                group (2 H D each; the last ones take the KV heads along)
    FFN         one channel (3 H weights when gated), or as many as bring the width to the next multiple
    experts     the same of every expert at a time, each its own lowest (3 E H weights)

Where one norm runs over all query heads together and one over all key heads (see `flap_export.shapes`), a head takes
its part of v_proj and o_proj along only: (g + 1) H D weights of a group, H D of a query head. The step that empties
attention frees q_proj and k_proj as well.

Element c of expert e is numbered e F + c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

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
    shared: int = 0
    """Weights of the last step that are no element's own: they serve all, and go when none is left."""

    @property
    def own_removed(self) -> NDArray[np.int64]:
        """Elements' own weights that are gone after 0, 1, ... steps: what a share of a module's elements is told by."""
        removed = np.concatenate([[0], np.cumsum(self.costs)])
        removed[-1] -= self.shared
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
) -> tuple[LayerLadders, ...]:
    """Rank the units of every module by their scores; equal scores keep their order.

    Args:
        scores: per layer.
        shape: the dense decoder.
        head_units: whether attention loses whole KV groups, or one query head of every group at a time.
        align_channels: FFN widths that are left are multiples of this, or the dense width.

    Raises:
        PlanError: `align_channels` is not positive.
    """
    check_alignment(align_channels)
    return tuple(
        LayerLadders(
            _attention_ladder(layer_scores.query_heads.numpy(), shape, layer, head_units),
            ffn_ladder(layer_scores.ffn_channels.numpy(), shape, align_channels),
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
    width = min(layer.ffn_channels for layer in shape.layers)
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
    rows: NDArray[np.int64], scores: NDArray[np.float64], costs: NDArray[np.int64], shared: int = 0
) -> Ladder:
    """A ladder whose steps take one row of elements [S, n] each, lowest score first.

    Args:
        rows: elements that go together.
        scores: of every row, [S].
        costs: of the steps, in the order of the ladder; [S].
        shared: weights of the last step that are no row's own.
    """
    order = np.argsort(scores, kind="stable")
    return Ladder(rows[order].ravel(), (np.arange(len(rows)) + 1) * rows.shape[1], costs, scores[order], shared)


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
    for element in kept:
        expert, channel = divmod(element, layer.ffn_channels)
        channels[expert].append(channel)
    return {"experts": tuple(map(tuple, channels))}
