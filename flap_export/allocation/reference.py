"""The units that the official FLAP code removes (CASIA-IVA-Lab/FLAP), for `--statistics reference`.

It departs from the paper, and published numbers come from it. The default differs in each of these points:

    scores          attention scores are squared before they are standardised
    costs           a head costs 4 head_dim / 3 FFN channels, rounded down to an integer
    choice          the unit at the threshold goes, and with it every unit of the same score

and in the statistics, see `flap_export.calibration.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flap_export.errors import BudgetError
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape


def check_known(shape: DecoderShape) -> None:
    """Whether the code can prune such a model.

    Raises:
        BudgetError: it has experts, joint norms, latents or grouped queries, which the code does not know.
    """
    if any(layer.joint_query_heads for layer in shape.layers):
        raise BudgetError(
            "the reference code cuts query and key heads, and this model's norm them together; use --statistics "
            "welford for this model"
        )
    if shape.latent is not None:
        raise BudgetError(
            "the reference code knows no latents that all heads' keys and values are made of; use --statistics welford "
            "for this model"
        )
    if any(layer.experts for layer in shape.layers):
        raise BudgetError("the reference code knows no mixtures of experts; use --statistics welford for this model")
    if any(layer.query_heads != layer.kv_heads for layer in shape.layers):
        raise BudgetError(
            "the reference code prunes query, key and value heads by one mask and knows no grouped queries; "
            "use --statistics welford for this model"
        )


def removed_units(
    scores: Sequence[LayerScores], shape: DecoderShape, ratio: float, structure: str, remove_heads: int
) -> tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]]]:
    """The heads [Q] and FFN channels [F] of every layer that the code removes (`lib/prune.py`, prune_flap).

    Raises:
        BudgetError: the code does not know such a model (`check_known`), or the request makes it fail.
    """
    check_known(shape)
    heads = np.stack([layer.query_heads.numpy() for layer in scores])
    channels = np.stack([layer.ffn_channels.numpy() for layer in scores])
    head_count, channel_count = _counts(shape, ratio, structure, remove_heads)
    if structure == "al-am":
        threshold = _common_threshold(heads, channels, ratio, 4 * shape.head_dim // 3)
        return list(heads <= threshold), list(channels <= threshold)
    if structure == "al-mm":
        return list(heads <= _lowest(heads, head_count)), list(channels <= _lowest(channels, channel_count))
    _check_leaves_some(structure, "heads", head_count, heads.shape[1])
    _check_leaves_some(structure, "FFN channels", channel_count, channels.shape[1])
    return (
        [row < np.sort(row)[head_count] for row in heads],
        [row < np.sort(row)[channel_count] for row in channels],
    )


def _counts(shape: DecoderShape, ratio: float, structure: str, remove_heads: int) -> tuple[int, int]:
    """Heads and channels that go: per layer for the uniform structures, altogether for `al-mm`."""
    layer, layers = shape.layers[0], len(shape.layers)
    if structure == "ul-um":
        return int(ratio * layer.query_heads), int(layer.ffn_channels * ratio)
    per = 1 if structure == "ul-mm" else layers
    heads = remove_heads // layers if structure == "ul-mm" else remove_heads
    removed = per * ratio * (shape.attention_parameters(layer) + shape.ffn_parameters(layer))
    head_parameters = 4 * heads * shape.head_block_parameters
    return heads, int((removed - head_parameters) / shape.ffn_channel_parameters)


def _lowest(values: NDArray[np.float64], count: int) -> float:
    """The score of the last unit to go; with none to go the code drops all of them, which nobody can want."""
    if not 0 < count <= values.size:
        raise BudgetError(f"al-mm of the reference code must remove between 1 and {values.size} units, got {count}")
    return float(np.sort(values, axis=None)[count - 1])


def _check_leaves_some(structure: str, what: str, count: int, available: int) -> None:
    """Whether so many units of a layer can go; a negative number the code counts from the other end of the ranking."""
    if not 0 <= count < available:
        raise BudgetError(
            f"{structure} of the reference code must remove between 0 and {available - 1} {what} of every layer, got "
            f"{count}; change --ratio or --remove-heads"
        )


def _common_threshold(heads: NDArray[np.float64], channels: NDArray[np.float64], ratio: float, head_cost: int) -> float:
    values = np.concatenate([heads.ravel(), channels.ravel()])
    costs = np.concatenate([np.full(heads.size, head_cost), np.ones(channels.size, dtype=np.int64)])
    order = np.argsort(-values, kind="stable")
    kept = np.cumsum(costs[order])
    return float(values[order][np.argmin(np.abs(kept - costs.sum() * (1 - ratio)))])
