from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flap_export.allocation.ladders import (
    HEAD_UNITS,
    HeadUnits,
    attention_costs,
    check_alignment,
    ffn_ladder,
    ffn_steps,
    ladder_of_rows,
    ladders_from_scores,
    layer_plan,
)
from flap_export.errors import PlanError
from flap_export.plan import PruningPlan, Ratio
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape, LayerShape


def shape_of(query_heads: int, kv_heads: int, channels: int, head_dim: int = 3, *, joint: bool = False) -> DecoderShape:
    layer = LayerShape(
        query_heads=query_heads,
        kv_heads=kv_heads,
        ffn_channels=channels,
        joint_query_heads=query_heads * joint,
        joint_key_heads=kv_heads * joint,
    )
    return DecoderShape(
        hidden_size=4, head_dim=head_dim, vocabulary_size=11, ffn_matrices=3, tied_embeddings=False, layers=(layer,)
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[DecoderShape, LayerScores, int]:
    kv_heads, size, channels = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 20))
    # Few distinct values, so that ties are common.
    values = st.integers(-2, 2).map(float) | st.floats(-3, 3)

    def drawn(count: int) -> torch.Tensor:
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float64)

    shape = shape_of(kv_heads * size, kv_heads, channels, joint=draw(st.booleans()))
    return shape, LayerScores(drawn(kv_heads * size), drawn(channels)), draw(st.integers(1, 6))


@pytest.mark.parametrize("head_units", HEAD_UNITS)
@given(problem=problems())
def test_every_step_is_a_valid_layer_at_its_exact_cost(
    head_units: HeadUnits, problem: tuple[DecoderShape, LayerScores, int]
) -> None:
    shape, scores, align = problem
    (ladders,) = ladders_from_scores((scores,), shape, head_units=head_units, align_channels=align)
    dense = shape.decoder_parameters
    attention, ffn = ladders.attention, ladders.ffn
    assert sorted(attention.order.tolist()) == list(range(shape.layers[0].query_heads))
    assert sorted(ffn.order.tolist()) == list(range(shape.layers[0].ffn_channels))
    for ladder in (attention, ffn):
        assert int(ladder.gone[-1]) == len(ladder.order)
        assert len(ladder.gone) == len(ladder.costs) == len(ladder.scores)
        # What `allocation` builds on: costs never fall, and scores do not but for the rounding of means.
        assert bool((np.diff(ladder.costs) >= 0).all())
        assert bool((np.diff(ladder.scores) >= -1e-12).all())
    for heads in range(len(attention.costs) + 1):
        for channels in (0, 1, len(ffn.costs)):
            plan = layer_plan(0, shape, ladders, heads, channels)
            whole = PruningPlan(model="m", family="llama", ratio=Ratio(requested=0.5, achieved=0.5), layers=(plan,))
            pruned = whole.pruned_shape(shape, compensated=False)
            cost = int(attention.costs[:heads].sum() + ffn.costs[:channels].sum())
            assert dense - pruned.decoder_parameters == cost
            assert channels == 0 or len(plan.ffn_channels) % align == 0
            assert set(attention.removed(heads).tolist()) == set(range(len(attention.order))) - set(plan.query_heads)


def test_groups_go_by_the_mean_of_their_heads() -> None:
    scores = LayerScores(torch.tensor([0.0, 9.0, 3.0, 4.0, 1.0, 6.5]), torch.zeros(2))
    (ladders,) = ladders_from_scores((scores,), shape_of(6, 3, 2))
    assert ladders.attention.order.tolist() == [2, 3, 4, 5, 0, 1]
    assert ladders.attention.scores.tolist() == [3.5, 3.75, 4.5]
    # g = 2 query heads and a KV head: (2 g + 2) H D.
    assert ladders.attention.costs.tolist() == [6 * 4 * 3] * 3


def test_every_round_takes_the_lowest_query_head_of_every_group() -> None:
    scores = LayerScores(torch.tensor([5.0, 1.0, 3.0, 2.0, 8.0, 8.0]), torch.zeros(2))
    (ladders,) = ladders_from_scores((scores,), shape_of(6, 2, 2), head_units="queries")
    assert ladders.attention.order.tolist() == [1, 3, 2, 4, 0, 5]
    assert ladders.attention.gone.tolist() == [2, 4, 6]
    assert ladders.attention.scores.tolist() == [1.5, 5.5, 6.5]
    # The last round takes both KV heads along.
    assert ladders.attention.costs.tolist() == [48, 48, 96]
    assert attention_costs(
        shape_of(6, 2, 2), LayerShape(query_heads=6, kv_heads=2, ffn_channels=2), "groups"
    ).tolist() == [
        96,
        96,
    ]


def test_heads_that_are_normed_together_take_values_and_outputs_along() -> None:
    """(g + 1) H D of a group and H D of a query head, until the last step frees q_proj and k_proj too: (Q + K) H D."""
    scores = LayerScores(torch.arange(6.0), torch.zeros(2))
    shape, block = shape_of(6, 2, 2, joint=True), 4 * 3
    (groups,) = ladders_from_scores((scores,), shape)
    assert groups.attention.costs.tolist() == [4 * block, 4 * block + 8 * block]
    assert groups.attention.own_removed.tolist() == [0, 4 * block, 8 * block]
    (queries,) = ladders_from_scores((scores,), shape, head_units="queries")
    assert queries.attention.costs.tolist() == [2 * block, 2 * block, 4 * block + 8 * block]
    assert queries.attention.own_removed.tolist() == [0, 2 * block, 4 * block, 8 * block]


def test_channels_of_a_step_count_by_their_mean() -> None:
    ladder = ffn_ladder(np.array([4.0, 1, 3, 2, 0]), shape_of(1, 1, 5), 2)
    assert ladder.order.tolist() == [4, 1, 3, 2, 0]
    assert ladder.gone.tolist() == [1, 3, 5]
    assert ladder.scores.tolist() == [0, 1.5, 3.5]
    assert ladder.costs.tolist() == [12, 24, 24]
    assert [ladder.kept(steps) for steps in range(4)] == [(0, 1, 2, 3, 4), (0, 1, 2, 3), (0, 2), ()]
    assert [ladder.removed(steps).tolist() for steps in (0, 2)] == [[], [4, 1, 3]]


def test_rows_of_equal_score_keep_their_order() -> None:
    ladder = ladder_of_rows(np.arange(6).reshape(3, 2), np.array([1.0, 0.0, 1.0]), np.array([7, 7, 7]))
    assert ladder.order.tolist() == [2, 3, 0, 1, 4, 5]
    assert ladder.gone.tolist() == [2, 4, 6]


@given(st.integers(1, 60), st.integers(1, 70))
def test_what_is_left_is_a_multiple_down_to_nothing(channels: int, align: int) -> None:
    left = channels - ffn_steps(channels, align)
    assert left[-1] == 0
    assert left.tolist() == [width for width in range(channels - 1, -1, -1) if width % align == 0]


@pytest.mark.parametrize("align", [0, -4])
def test_an_alignment_must_be_positive(align: int) -> None:
    with pytest.raises(PlanError, match=rf"--align-channels must be at least 1, got {align}"):
        check_alignment(align)
    with pytest.raises(PlanError):
        ladders_from_scores((), shape_of(1, 1, 1), align_channels=align)
