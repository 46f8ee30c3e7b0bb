"""Stage `score`: an importance per query head and FFN channel. Pure arithmetic on calibration statistics.

X_j is input channel j of a restoring projection over all calibration tokens, W its weight (FLAP, equations 4 to 6).
A new metric is one function and one row of `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor

from flap_export.calibration.statistics import CalibrationStatistics, CutSpace, SiteStatistics, cut_spaces
from flap_export.errors import PlanError, check_choice
from flap_export.shapes import DecoderShape, LayerShape

MetricName = Literal["wifv", "ifv", "wifn"]
ALIKE_WITHIN: Final = 1e-12
"""Relative difference below which scores of one module count as equal; they are sums in float64."""


def wifv(site: SiteStatistics) -> Tensor:
    """Weighted input-feature variance, Var(X_j) ||W_:j||^2. float64 [C]."""
    return site.variance * site.weight_square_norm


def ifv(site: SiteStatistics) -> Tensor:
    """Input-feature variance, Var(X_j). float64 [C]."""
    return site.variance


def wifn(site: SiteStatistics) -> Tensor:
    """Weighted input-feature norm, mean_i |W_ij| ||X_j||. float64 [C]."""
    return site.weight_absolute_mean * site.square_norm.sqrt()


METRICS: Final[Mapping[MetricName, Callable[[SiteStatistics], Tensor]]] = {"wifv": wifv, "ifv": ifv, "wifn": wifn}


@final
@dataclass(frozen=True)
class LayerScores:
    """Standardised importance of one layer's units; higher is kept longer."""

    query_heads: Tensor
    """float64 [Q]"""
    ffn_channels: Tensor
    """float64 [F], or [E, F] in a mixture of experts"""
    shared_channels: Tensor | None = None
    """float64 [S], of an expert that every token passes"""


def score(
    statistics: CalibrationStatistics,
    shape: DecoderShape,
    metric: MetricName = "wifv",
    *,
    square_attention: bool = False,
) -> tuple[LayerScores, ...]:
    """Standardised scores of every layer's units.

    Args:
        statistics: of the dense model.
        shape: the dense decoder.
        metric: a row of `METRICS`.
        square_attention: square the attention channels' scores before they are standardised, as the official code
            does and the paper does not.

    Raises:
        InputError: an unknown metric.
        PlanError: the statistics are of a model of another shape.
    """
    check_choice("metric", metric, METRICS)
    power = 2 if square_attention else 1
    return tuple(layer_scores(statistics.sites, shape, METRICS[metric], i, power) for i in range(len(shape.layers)))


def layer_scores(
    statistics: Mapping[tuple[int, CutSpace], SiteStatistics],
    shape: DecoderShape,
    metric: Callable[[SiteStatistics], Tensor],
    index: int,
    attention_power: int = 1,
) -> LayerScores:
    """Standardised scores of one layer's units; see `score`."""
    layer = shape.layers[index]
    sites = {space: site for space in cut_spaces(layer) if (site := statistics.get((index, space))) is not None}
    found = {space: site.mean.numel() for space, site in sites.items()}
    ffn = found.get("ffn", 0) + found.get("shared", 0)
    if (found.get("query"), ffn) != (layer.query_heads * shape.head_dim, layer.ffn_elements):
        raise PlanError(
            f"layer {index}: the statistics are of {found.get('query')} attention and {ffn} FFN channels, the model "
            f"has {layer.query_heads * shape.head_dim} and {layer.ffn_elements}; calibrate this model"
        )
    attention = head_means(standardised(metric(sites["query"]) ** attention_power), layer)
    shared = standardised(metric(sites["shared"])) if "shared" in sites else None
    return LayerScores(attention, standardised(metric(sites["ffn"])), shared)


def standardised(scores: Tensor) -> Tensor:
    """(s - mean) / std over one layer and module, [C] or [E, F]; zero where all are alike (FLAP, equation 7).

    Scores are alike when they differ by rounding only: dividing that by its own deviation would make it a ranking.
    """
    centred = scores - scores.mean()
    if float(centred.abs().max()) <= ALIKE_WITHIN * float(scores.abs().max()):
        return torch.zeros_like(scores)
    return centred / scores.std(unbiased=True)


def head_means(channel_scores: Tensor, layer: LayerShape) -> Tensor:
    """Mean over the D channels of every query head: [Q D] -> [Q]."""
    return channel_scores.view(layer.query_heads, -1).mean(dim=1)
