"""Random ladders and spaces of rates: grouped, single and jointly normed heads, narrow FFNs, layers that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from flap_export.allocation.ladders import HEAD_UNITS, HeadUnits, LayerLadders, ladders_from_scores
from flap_export.allocation.rates import SPLITTINGS
from flap_export.errors import BudgetError
from flap_export.scoring import LayerScores
from flap_export.searching.space import GRANULARITIES, Space
from flap_export.shapes import DecoderShape, LayerShape


def shape_of(layers: Sequence[LayerShape], head_dim: int = 2) -> DecoderShape:
    return DecoderShape(
        hidden_size=4,
        head_dim=head_dim,
        vocabulary_size=11,
        ffn_matrices=3,
        tied_embeddings=False,
        layers=tuple(layers),
    )


def layer_of(
    query_heads: int = 4,
    kv_heads: int = 2,
    channels: int = 24,
    experts: int = 0,
    shared: int | None = None,
    *,
    joint: bool = False,
) -> LayerShape:
    return LayerShape(
        query_heads=query_heads,
        kv_heads=kv_heads,
        ffn_channels=channels,
        joint_query_heads=query_heads * joint,
        joint_key_heads=kv_heads * joint,
        experts=experts,
        shared_channels=shared,
    )


def ladders_of(
    shape: DecoderShape, seed: int = 0, head_units: HeadUnits = "groups", align_channels: int = 1
) -> tuple[LayerLadders, ...]:
    """Of random scores, few of them distinct, so that ties are common."""
    random = np.random.default_rng(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.from_numpy(random.integers(-2, 5, size).astype(float))

    scores = [
        LayerScores(
            drawn(layer.query_heads),
            drawn(*layer.ffn_scores),
            None if layer.shared_channels is None else drawn(layer.shared_channels),
        )
        for layer in shape.layers
    ]
    return ladders_from_scores(scores, shape, head_units=head_units, align_channels=align_channels)


@st.composite
def layers(draw: st.DrawFn) -> LayerShape:
    kv_heads = draw(st.integers(1, 4))
    group_size, channels = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 3, 12, 24, 60]))
    experts, joint = draw(st.sampled_from([0, 0, 0, 3])), draw(st.sampled_from([False, False, True]))
    shared = draw(st.sampled_from([None, channels, 2 * channels + 1])) if experts else None
    return layer_of(kv_heads * group_size, kv_heads, channels, experts, shared, joint=joint)


@st.composite
def shapes(draw: st.DrawFn, *, alike: bool | None = None) -> DecoderShape:
    """Layers that cost the same, or some that do not."""
    count = draw(st.integers(1, 6))
    same = draw(st.booleans()) if alike is None else alike
    drawn = [draw(layers())] * count if same else [draw(layers()) for _ in range(count)]
    return shape_of(drawn, draw(st.sampled_from([1, 2, 8])))


@st.composite
def spaces(draw: st.DrawFn, *, alike: bool | None = None, aligned: bool | None = None, **given: Any) -> Space:
    """Any space whose bounds leave room for its budget."""
    shape = draw(shapes(alike=alike))
    align = 1 if aligned is False or (aligned is None and draw(st.booleans())) else draw(st.sampled_from([4, 8]))
    ladders = ladders_of(shape, draw(st.integers(0, 99)), draw(st.sampled_from(HEAD_UNITS)), align)
    settings: dict[str, Any] = {
        "granularity": draw(st.sampled_from(GRANULARITIES)),
        "splitting": draw(st.sampled_from(list(SPLITTINGS))),
        "step": draw(st.sampled_from([0.01, 0.05, 0.17])),
        "least": draw(st.sampled_from([0.0, 0.0, 0.1])),
        "greatest": draw(st.sampled_from([0.5, 0.9, 1.0])),
        "protect_first": draw(st.integers(0, 1)),
        "protect_last": draw(st.integers(0, 1)),
    }
    try:
        return Space.of(ladders, draw(st.floats(0.02, 0.8)), **{**settings, **given})
    except BudgetError:
        assume(False)
        raise
