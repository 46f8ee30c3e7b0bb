"""Allocation against a brute-force count, on random shapes and scores."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ALL_FAMILIES, ALWAYS_MULTI_HEAD, tiny_config
from transformers import AutoModelForCausalLM

from flap_export.allocation.budgets import least_loss
from flap_export.allocation.ladders import HEAD_UNITS, HeadUnits, Ladder, LayerLadders, attention_costs, ffn_steps
from flap_export.allocation.stage import STRUCTURES, StructureName, allocate, allocate_by_loss
from flap_export.errors import BudgetError, PlanError
from flap_export.families import FAMILIES, shape_from_config
from flap_export.plan import LayerPlan, PruningPlan, Ratio
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape, LayerShape


@st.composite
def shapes(draw: st.DrawFn, joint: bool = False) -> DecoderShape:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    query_heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    layer = LayerShape(
        query_heads=query_heads,
        kv_heads=kv_heads,
        ffn_channels=draw(st.integers(1, 24)),
        **({"joint_query_heads": query_heads, "joint_key_heads": kv_heads} if joint else {}),
    )
    return DecoderShape(
        hidden_size=draw(st.sampled_from([4, 6])),
        head_dim=draw(st.sampled_from([1, 2, 5, 8])),
        vocabulary_size=11,
        ffn_matrices=draw(st.sampled_from([2, 3])),
        tied_embeddings=False,
        layers=(layer,) * draw(st.integers(1, 4)),
    )


@st.composite
def problems(draw: st.DrawFn, joint: bool = False) -> tuple[DecoderShape, tuple[LayerScores, ...], float]:
    shape = draw(shapes(joint))
    # Few distinct values, so that ties are common.
    values = st.integers(-3, 3).map(float) | st.floats(-3, 3)

    def scores(count: int) -> torch.Tensor:
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float64)

    layers = tuple(LayerScores(scores(layer.query_heads), scores(layer.ffn_channels)) for layer in shape.layers)
    return shape, layers, draw(st.floats(0.01, 0.99))


def group_scores(layer: LayerShape, scores: LayerScores) -> list[float]:
    """A KV group scores as the mean of its query heads."""
    means: list[float] = scores.query_heads.numpy().reshape(layer.kv_heads, -1).mean(axis=1).tolist()
    return means


def group_parameters(shape: DecoderShape, layer: LayerShape) -> int:
    return int(attention_costs(shape, layer, "groups")[0])


def weights_of(shape: DecoderShape, plans: Sequence[LayerPlan]) -> int:
    """Elements of the matrices that stay, counted matrix by matrix."""
    hidden, size = shape.hidden_size, shape.head_dim
    total = 0
    for plan, layer in zip(plans, shape.layers, strict=True):
        query, kv = len(plan.query_heads), len(plan.kv_heads)
        joint = bool(layer.joint_query_heads and query)
        total += (layer.query_heads if joint else query) * size * hidden  # q_proj
        total += (layer.kv_heads if joint else kv) * size * hidden  # k_proj
        total += (kv + query) * size * hidden  # v_proj, o_proj
        total += shape.ffn_matrices * len(plan.ffn_channels) * hidden
    return total


def dense_weights(shape: DecoderShape) -> int:
    layers = [
        LayerPlan(
            layer=index,
            query_heads=tuple(range(layer.query_heads)),
            kv_heads=tuple(range(layer.kv_heads)),
            ffn_channels=tuple(range(layer.ffn_channels)),
        )
        for index, layer in enumerate(shape.layers)
    ]
    return weights_of(shape, layers)


def tried(
    shape: DecoderShape, scores: Sequence[LayerScores], ratio: float, structure: StructureName
) -> tuple[tuple[LayerPlan, ...], Ratio] | None:
    """None where the budget removes nothing or everything, which is an error."""
    try:
        return allocate(scores, shape, ratio, structure)
    except BudgetError:
        return None


@pytest.mark.parametrize("structure", STRUCTURES)
@given(problem=problems() | problems(joint=True))
def test_the_achieved_ratio_is_what_was_removed(
    structure: StructureName, problem: tuple[DecoderShape, tuple[LayerScores, ...], float]
) -> None:
    shape, scores, ratio = problem
    result = tried(shape, scores, ratio, structure)
    if result is None:
        return
    layers, found = result
    total = dense_weights(shape)
    assert total == shape.decoder_parameters
    removed = total - weights_of(shape, layers)
    assert 0 < removed < total
    assert found.requested == ratio
    assert found.achieved == removed / total
    half_unit = shape.ffn_channel_parameters / 2
    assert (found.reason is None) == (abs(removed - ratio * total) <= half_unit)
    plan = PruningPlan(model="m", family="llama", ratio=found, layers=layers)
    plan.check(shape)
    pruned = plan.pruned_shape(shape, compensated=False)
    assert pruned.decoder_parameters == total - removed


@given(problem=problems())
def test_al_am_removes_the_lowest_scores_of_every_cost(
    problem: tuple[DecoderShape, tuple[LayerScores, ...], float],
) -> None:
    shape, scores, ratio = problem
    result = tried(shape, scores, ratio, "al-am")
    if result is None:
        return
    by_cost: dict[int, tuple[list[float], list[float]]] = {}
    for plan, layer, layer_scores in zip(result[0], shape.layers, scores, strict=True):
        for kept, values, cost in (
            (plan.kv_heads, group_scores(layer, layer_scores), group_parameters(shape, layer)),
            (plan.ffn_channels, layer_scores.ffn_channels.tolist(), shape.ffn_channel_parameters),
        ):
            for unit, value in enumerate(values):
                by_cost.setdefault(cost, ([], []))[unit in kept].append(value)
    for removed, kept in by_cost.values():
        assert not removed or not kept or max(removed) <= min(kept)


@given(problem=problems())
def test_al_am_is_optimal_where_every_unit_costs_the_same(
    problem: tuple[DecoderShape, tuple[LayerScores, ...], float],
) -> None:
    """No head in the way: the count is the nearest to the budget."""
    shape, scores, ratio = problem
    shape = shape.model_copy(update={"head_dim": 3, "ffn_matrices": 12})
    layer = shape.layers[0].model_copy(update={"query_heads": shape.layers[0].kv_heads})
    shape = shape.model_copy(update={"layers": (layer,) * len(shape.layers)})
    scores = tuple(LayerScores(each.query_heads[: layer.kv_heads], each.ffn_channels) for each in scores)
    assert group_parameters(shape, layer) == shape.ffn_channel_parameters
    result = tried(shape, scores, ratio, "al-am")
    if result is not None:
        units = sum(layer.kv_heads + layer.ffn_channels for layer in shape.layers)
        kept = sum(len(plan.kv_heads) + len(plan.ffn_channels) for plan in result[0])
        assert abs((units - kept) - ratio * units) <= 0.5 + 1e-9
        assert result[1].reason is None


@given(problem=problems())
def test_ul_um_takes_the_lowest_scores_and_the_same_counts_everywhere(
    problem: tuple[DecoderShape, tuple[LayerScores, ...], float],
) -> None:
    shape, scores, ratio = problem
    result = tried(shape, scores, ratio, "ul-um")
    if result is None:
        return
    assert len({(len(plan.kv_heads), len(plan.query_heads), len(plan.ffn_channels)) for plan in result[0]}) == 1
    for plan, layer, layer_scores in zip(result[0], shape.layers, scores, strict=True):
        for kept, values in (
            (plan.kv_heads, group_scores(layer, layer_scores)),
            (plan.ffn_channels, layer_scores.ffn_channels.tolist()),
        ):
            removed = [value for unit, value in enumerate(values) if unit not in kept]
            assert not removed or not kept or max(removed) <= min(values[unit] for unit in kept)


@given(shape=shapes(), ratio=st.floats(0.05, 0.95), structure=st.sampled_from(list(STRUCTURES)))
def test_equal_scores_are_decided_by_order(shape: DecoderShape, ratio: float, structure: StructureName) -> None:
    """Always the same plan, which removes from the front."""
    scores = tuple(
        LayerScores(
            torch.zeros(layer.query_heads, dtype=torch.float64), torch.zeros(layer.ffn_channels, dtype=torch.float64)
        )
        for layer in shape.layers
    )
    first = tried(shape, scores, ratio, structure)
    assert first == tried(shape, scores, ratio, structure)
    if first is not None:
        for plan, layer in zip(first[0], shape.layers, strict=True):
            kept = len(plan.ffn_channels)
            assert plan.ffn_channels == tuple(range(layer.ffn_channels - kept, layer.ffn_channels))


def test_all_heads_may_go() -> None:
    """Attention that scores below every channel leaves entirely, with its query heads."""
    shape = shape_of(heads=4, kv_heads=2, head_dim=2, hidden=4, channels=30, layers=2)
    scores = tuple(LayerScores(torch.tensor([-9.0, -9.0, -8.0, -8.0]), torch.arange(30.0)) for _ in range(2))
    attention = 2 * shape.attention_parameters(shape.layers[0]) / shape.decoder_parameters
    layers, ratio = allocate(scores, shape, attention + 1e-6, "al-am")
    assert ratio.achieved == pytest.approx(attention)
    for plan in layers:
        assert (plan.query_heads, plan.kv_heads, len(plan.ffn_channels)) == ((), (), 30)


def test_a_group_that_does_not_fit_is_passed_over_for_channels() -> None:
    """The group scores lowest but costs more than the whole budget; reached exactly by channels instead."""
    shape = shape_of(heads=4, kv_heads=2, head_dim=8, hidden=4, channels=40, layers=1)
    scores = (LayerScores(torch.tensor([-9.0, -9.0, 50.0, 50.0]), torch.arange(40.0)),)
    share = 5 * shape.ffn_channel_parameters / shape.decoder_parameters
    layers, ratio = allocate(scores, shape, share, "al-am")
    assert layers[0].kv_heads == (0, 1)
    assert layers[0].ffn_channels == tuple(range(5, 40))
    assert ratio.achieved == pytest.approx(share)
    assert ratio.reason is None


def test_a_budget_that_channels_cannot_fill_says_so() -> None:
    shape = shape_of(heads=4, kv_heads=1, head_dim=64, hidden=4, channels=2, layers=1)
    scores = (LayerScores(torch.zeros(4), torch.tensor([1.0, 2.0])),)
    _, ratio = allocate(scores, shape, 0.5, "al-am")
    assert ratio.achieved < 0.1
    assert ratio.reason is not None
    assert "no FFN channels are left" in ratio.reason


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_ratio_outside_the_open_interval(ratio: float, structure: StructureName) -> None:
    shape = shape_of(heads=2, kv_heads=2, head_dim=2, hidden=4, channels=6, layers=1)
    with pytest.raises(BudgetError, match="strictly between 0 and 1"):
        allocate((LayerScores(torch.zeros(2), torch.zeros(6)),), shape, ratio, structure)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_ratio_below_half_a_unit_or_next_to_everything(structure: StructureName) -> None:
    shape = shape_of(heads=2, kv_heads=2, head_dim=2, hidden=4, channels=60, layers=1)
    scores = (LayerScores(torch.zeros(2), torch.zeros(60)),)
    with pytest.raises(BudgetError, match=r"removes nothing: the smallest unit, one FFN channel, is 0\.0\d+ of"):
        allocate(scores, shape, 1e-6, structure)
    with pytest.raises(BudgetError, match=r"would remove every head and channel|the budget cannot be met"):
        allocate(scores, shape, 1 - 1e-9, structure)


UNCUT = (".gate.", ".router.", "expert_gate", "norm", "_bias")
"""Parts of the names of what is never cut or of vectors, those of all experts in one among them."""


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 2, 8), (6, 2, 12), (4, 1, 10), (1, 1, 4)]
)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_costs_equal_the_sizes_of_transformers_modules(
    family: str, query_heads: int, kv_heads: int, head_dim: int
) -> None:
    if FAMILIES[family].heads.fill_hidden:
        head_dim = 24 // query_heads
    # Falcon's configuration takes no head size.
    stated = (
        {"num_kv_heads": kv_heads} if family == "falcon" else {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    )
    config = tiny_config(family, num_attention_heads=query_heads, hidden_size=24, **stated)
    if family in ("qwen2", "phi3"):
        # Their attention reads head_dim although their configuration does not declare it.
        assert config.head_dim == head_dim
    shape = shape_from_config(config, FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    total = 0
    for sizes, layer in zip(shape.layers, model.get_submodule(FAMILIES[family].modules.layers), strict=True):
        matrices = {
            name: weight.numel()
            for name, weight in layer.named_parameters()
            if weight.ndim > 1 and not any(part in name for part in UNCUT)
        }
        prefix = f"{FAMILIES[family].modules.attention}."
        attention = sum(size for name, size in matrices.items() if name.startswith(prefix))
        ffn = sum(matrices.values()) - attention
        expected = {**dict.fromkeys(ALWAYS_MULTI_HEAD, query_heads), "gpt_bigcode": 1}.get(family, kv_heads)
        assert sizes.kv_heads == expected
        assert attention == shape.attention_parameters(sizes)
        assert {int(attention_costs(shape, sizes, units).sum()) for units in HEAD_UNITS} == {attention}
        shared = sizes.shared_width * shape.ffn_channel_parameters
        assert sizes.ffn_channels * shape.ffn_unit_parameters(sizes) + shared == ffn == shape.ffn_parameters(sizes)
        total += attention + ffn
    assert shape.head_parameters == model.lm_head.weight.numel()
    assert shape.decoder_parameters == total


def shape_of(*, heads: int, kv_heads: int, head_dim: int, hidden: int, channels: int, layers: int) -> DecoderShape:
    layer = LayerShape(query_heads=heads, kv_heads=kv_heads, ffn_channels=channels)
    return DecoderShape(
        hidden_size=hidden,
        head_dim=head_dim,
        vocabulary_size=11,
        ffn_matrices=3,
        tied_embeddings=False,
        layers=(layer,) * layers,
    )


def mixed_shape() -> tuple[DecoderShape, tuple[LayerScores, ...]]:
    shape = shape_of(heads=4, kv_heads=2, head_dim=2, hidden=4, channels=60, layers=2)
    scores = tuple(
        LayerScores(torch.tensor([1.0, 1.0, 2.0, 2.0]) * (index + 1), torch.arange(60.0) * (index + 1))
        for index in range(2)
    )
    return shape, scores


def test_al_mm_removes_the_asked_heads_and_fills_up_with_channels() -> None:
    shape, scores = mixed_shape()
    layers, ratio = allocate(scores, shape, 0.3, "al-mm", remove_heads=2)
    assert [layer.kv_heads for layer in layers] == [(1,), (0, 1)]
    assert [layer.query_heads for layer in layers] == [(2, 3), (0, 1, 2, 3)]
    assert ratio.reason is None
    # The lowest channels of both layers together: layer 1's scores are twice layer 0's.
    assert len(layers[0].ffn_channels) < len(layers[1].ffn_channels)


def test_ul_mm_removes_the_same_heads_in_every_layer() -> None:
    shape, scores = mixed_shape()
    layers, _ = allocate(scores, shape, 0.3, "ul-mm", remove_heads=4)
    assert [layer.kv_heads for layer in layers] == [(1,), (1,)]
    assert len(layers[0].ffn_channels) == len(layers[1].ffn_channels)


@pytest.mark.parametrize(("structure", "asked", "possible"), [("al-mm", 3, 4), ("ul-mm", 2, 0), ("ul-mm", 5, 4)])
def test_heads_that_are_no_whole_groups_are_refused(structure: StructureName, asked: int, possible: int) -> None:
    shape, scores = mixed_shape()
    with pytest.raises(
        BudgetError, match=rf"{asked} query heads cannot .* only {possible}; set --remove-heads {possible}"
    ):
        allocate(scores, shape, 0.3, structure, remove_heads=asked)


@pytest.mark.parametrize("structure", ["al-mm", "ul-mm"])
@pytest.mark.parametrize(("ratio", "heads", "remedy"), [(0.01, 8, "fewer"), (0.99, 0, "more")])
def test_a_budget_that_channels_cannot_meet_is_refused(
    structure: StructureName, ratio: float, heads: int, remedy: str
) -> None:
    shape, scores = mixed_shape()
    with pytest.raises(BudgetError, match=rf"the budget cannot be met.*remove {remedy} heads"):
        allocate(scores, shape, ratio, structure, remove_heads=heads)


@pytest.mark.parametrize("head_units", HEAD_UNITS)
@pytest.mark.parametrize("align_channels", [1, 4, 7])
@pytest.mark.parametrize("structure", STRUCTURES)
@given(problem=problems())
def test_shapes_stay_regular(
    structure: StructureName,
    align_channels: int,
    head_units: HeadUnits,
    problem: tuple[DecoderShape, tuple[LayerScores, ...], float],
) -> None:
    """Every group of a layer keeps the same number of query heads, widths are aligned, and the ratio is counted."""
    shape, scores, ratio = problem
    try:
        layers, found = allocate(scores, shape, ratio, structure, head_units=head_units, align_channels=align_channels)
    except BudgetError:
        return
    total = dense_weights(shape)
    assert found.achieved == (total - weights_of(shape, layers)) / total
    PruningPlan(model="m", family="llama", ratio=found, layers=layers).check(shape)
    for plan, layer in zip(layers, shape.layers, strict=True):
        assert len(plan.ffn_channels) % align_channels == 0 or len(plan.ffn_channels) == layer.ffn_channels
        # Single heads are units of their own, whatever was asked for.
        if head_units == "queries" and plan.query_heads and layer.query_heads > layer.kv_heads:
            assert len(plan.kv_heads) == layer.kv_heads


@given(problem=problems(), align_channels=st.sampled_from([2, 3, 5]))
def test_alignment_keeps_the_budget_to_half_a_step(
    problem: tuple[DecoderShape, tuple[LayerScores, ...], float], align_channels: int
) -> None:
    shape, scores, ratio = problem
    try:
        layers, found = allocate(scores, shape, ratio, "al-am", align_channels=align_channels)
    except BudgetError:
        return
    some_left = any(plan.ffn_channels for plan in layers)
    step = align_channels * shape.ffn_channel_parameters
    if some_left and found.achieved < ratio:
        assert (ratio - found.achieved) * shape.decoder_parameters <= step
    assert (found.achieved - ratio) * shape.decoder_parameters <= step / 2 + 1e-6


def test_one_query_head_of_every_group_goes_at_a_time() -> None:
    shape = shape_of(heads=6, kv_heads=2, head_dim=2, hidden=4, channels=60, layers=1)
    scores = (LayerScores(torch.tensor([3.0, 1.0, 2.0, 7.0, 9.0, 8.0]), 100 + torch.arange(60.0)),)
    share = 2 * 2 * 2 * 4 / shape.decoder_parameters
    layers, ratio = allocate(scores, shape, share, head_units="queries")
    assert layers[0].query_heads == (0, 2, 4, 5)
    assert layers[0].kv_heads == (0, 1)
    assert (ratio.achieved, ratio.reason) == (pytest.approx(share), None)


@pytest.mark.parametrize(
    ("channels", "align", "gone"), [(5, 1, [1, 2, 3, 4, 5]), (10, 4, [2, 6, 10]), (8, 4, [4, 8]), (3, 4, [3])]
)
def test_what_is_left_after_a_step_is_a_multiple(channels: int, align: int, gone: list[int]) -> None:
    assert ffn_steps(channels, align).tolist() == gone


def test_an_alignment_must_be_positive() -> None:
    shape, scores = mixed_shape()
    with pytest.raises(PlanError, match="--align-channels must be at least 1, got 0"):
        allocate(scores, shape, 0.3, align_channels=0)


@st.composite
def ladder_problems(draw: st.DrawFn, *, convex: bool) -> tuple[DecoderShape, tuple[LayerLadders, ...], float]:
    """Few steps, so that every combination can be tried; losses rise ever faster where they are convex."""
    kv_heads = draw(st.integers(1, 2))
    layer = LayerShape(query_heads=2 * kv_heads, kv_heads=kv_heads, ffn_channels=draw(st.integers(1, 4)))
    shape = shape_of(heads=2, kv_heads=1, head_dim=draw(st.sampled_from([1, 2])), hidden=4, channels=1, layers=1)
    shape = shape.model_copy(update={"layers": (layer,) * draw(st.integers(1, 2))})
    rises = st.floats(0, 5, allow_subnormal=False) | st.just(0.0)

    def ladder(order: int, gone: np.ndarray, costs: np.ndarray) -> Ladder:
        added = np.array(draw(st.lists(rises, min_size=len(gone), max_size=len(gone))))
        return Ladder(np.arange(order), gone, costs, np.sort(added / costs) * costs if convex else added)

    groups = 2 * (np.arange(kv_heads) + 1)
    ffn = np.arange(layer.ffn_channels) + 1
    ladders = tuple(
        LayerLadders(
            ladder(layer.query_heads, groups, attention_costs(shape, layer, "groups")),
            ladder(layer.ffn_channels, ffn, np.full(layer.ffn_channels, shape.ffn_channel_parameters)),
        )
        for _ in shape.layers
    )
    return shape, ladders, draw(st.floats(0.02, 0.98))


def choices(ladders: Sequence[LayerLadders], most: float) -> Iterator[tuple[float, int]]:
    """Loss and cost of every combination of steps that costs at most so much."""
    modules = [ladder for layer in ladders for ladder in (layer.attention, layer.ffn)]
    sums = [
        [(float(m.scores[:taken].sum()), int(m.costs[:taken].sum())) for taken in range(len(m.costs) + 1)]
        for m in modules
    ]
    for combination in itertools.product(*sums):
        cost = sum(cost for _, cost in combination)
        if cost <= most:
            yield sum(loss for loss, _ in combination), cost


def loss_of(ladders: Sequence[LayerLadders], layers: Sequence[LayerPlan], shape: DecoderShape) -> float:
    total = 0.0
    for plan, ladder, full in zip(layers, ladders, shape.layers, strict=True):
        for module, gone in (
            (ladder.attention, full.query_heads - len(plan.query_heads)),
            (ladder.ffn, full.ffn_channels - len(plan.ffn_channels)),
        ):
            total += float(module.scores[: int(np.searchsorted(module.gone, gone, side="right"))].sum())
    return total


@pytest.mark.parametrize("convex", [True, False])
@given(data=st.data())
def test_theleast_loss_keeps_within_the_budget_and_leaves_no_room(convex: bool, data: st.DataObject) -> None:
    shape, ladders, ratio = data.draw(ladder_problems(convex=convex))
    try:
        layers, found = allocate_by_loss(ladders, shape, ratio)
    except BudgetError:
        return
    total = dense_weights(shape)
    removed = total - weights_of(shape, layers)
    smallest = min(int(m.costs.min()) for layer in ladders for m in (layer.attention, layer.ffn))
    assert removed <= ratio * total + smallest / 2
    steps_left = [
        cost
        for plan, ladder in zip(layers, ladders, strict=True)
        for cost, left in (
            (int(ladder.attention.costs[-1]), plan.kv_heads),
            (int(ladder.ffn.costs[-1]), plan.ffn_channels),
        )
        if left
    ]
    assert all(removed + cost > ratio * total + smallest / 2 for cost in steps_left)
    assert found.achieved == removed / total


@given(problem=ladder_problems(convex=True))
def test_convex_losses_are_least_for_what_is_removed_with_equal_costs(
    problem: tuple[DecoderShape, tuple[LayerLadders, ...], float],
) -> None:
    """Where all steps cost the same, no other choice that removes as much loses less."""
    shape, ladders, ratio = problem
    unit = shape.ffn_channel_parameters
    ladders = tuple(
        LayerLadders(dataclasses.replace(layer.attention, costs=np.full(len(layer.attention.costs), unit)), layer.ffn)
        for layer in ladders
    )
    modules = [ladder for layer in ladders for ladder in (layer.attention, layer.ffn)]
    budget = ratio * unit * sum(len(ladder.costs) for ladder in modules)
    taken = least_loss([(np.sort(m.scores), m.costs) for m in modules], budget)
    ladders = tuple(
        LayerLadders(*(dataclasses.replace(m, scores=np.sort(m.scores)) for m in (layer.attention, layer.ffn)))
        for layer in ladders
    )
    cost = unit * sum(taken)
    assert abs(cost - budget) <= unit / 2 + 1e-9
    least = min(loss for loss, other in choices(ladders, cost) if other == cost)
    found = sum(float(np.sort(m.scores)[:steps].sum()) for m, steps in zip(modules, taken, strict=True))
    assert found == pytest.approx(least, rel=1e-9, abs=1e-12)


@given(problem=ladder_problems(convex=True))
def test_convex_losses_stay_within_one_step_of_the_best(
    problem: tuple[DecoderShape, tuple[LayerLadders, ...], float],
) -> None:
    """Costs that differ leave a rest; what loses more than the best choice within the budget loses one step more."""
    shape, ladders, ratio = problem
    try:
        layers, _ = allocate_by_loss(ladders, shape, ratio)
    except BudgetError:
        return
    cost = dense_weights(shape) - weights_of(shape, layers)
    best = min(loss for loss, other in choices(ladders, cost) if other == cost)
    dearest = max(float(m.scores.max()) for layer in ladders for m in (layer.attention, layer.ffn))
    assert best - 1e-9 <= loss_of(ladders, layers, shape) <= best + 2 * dearest + 1e-9


def two_modules(attention: list[float], ffn: list[float]) -> tuple[DecoderShape, tuple[LayerLadders, ...]]:
    """One layer; a group costs as much as four channels."""
    shape = shape_of(heads=len(attention), kv_heads=len(attention), head_dim=3, hidden=4, channels=len(ffn), layers=1)
    costs = attention_costs(shape, shape.layers[0], "groups")
    gone = np.arange(len(attention)) + 1
    return shape, (
        LayerLadders(
            Ladder(np.arange(len(attention)), gone, costs, np.array(attention)),
            Ladder(np.arange(len(ffn)), np.arange(len(ffn)) + 1, np.full(len(ffn), 12), np.array(ffn)),
        ),
    )


def test_a_step_that_frees_cheaper_ones_is_taken() -> None:
    """The first channel is dear, but all together they cost less per weight than a head."""
    shape, ladders = two_modules([4.0, 9.0], [3.0, 0, 0, 0, 9, 9, 9, 9])
    layers, ratio = allocate_by_loss(ladders, shape, 4 * 12 / shape.decoder_parameters)
    assert (layers[0].kv_heads, layers[0].ffn_channels) == ((0, 1), (4, 5, 6, 7))
    assert ratio.reason is None


def test_nothing_to_lose_still_meets_the_budget() -> None:
    shape, ladders = two_modules([0.0, 0.0], [0.0] * 40)
    for ratio in (0.03, 0.5, 0.97):
        _, found = allocate_by_loss(ladders, shape, ratio)
        assert abs(found.achieved - ratio) * shape.decoder_parameters <= 6


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_the_scale_of_losses_does_not_matter(scale: float) -> None:
    shape, ladders = two_modules([1.0, 5.0], [0.1 * 1.3**channel for channel in range(20)])
    scaled = tuple(
        LayerLadders(*(dataclasses.replace(m, scores=scale * m.scores) for m in (layer.attention, layer.ffn)))
        for layer in ladders
    )
    assert allocate_by_loss(scaled, shape, 0.4) == allocate_by_loss(ladders, shape, 0.4)


def test_ratios_at_the_ends_of_theleast_loss() -> None:
    shape, ladders = two_modules([1.0, 1.0], [1.0] * 40)
    with pytest.raises(BudgetError, match="removes nothing"):
        allocate_by_loss(ladders, shape, 1e-6)
    with pytest.raises(BudgetError, match="would remove every head and channel"):
        allocate_by_loss(ladders, shape, 1 - 1e-9)
    with pytest.raises(BudgetError, match="strictly between 0 and 1"):
        allocate_by_loss(ladders, shape, 1.0)
    assert allocate_by_loss(ladders, shape, 1 - 12 / shape.decoder_parameters)[1].reason is None


def test_the_alignedleast_loss_says_why_it_misses() -> None:
    shape, ladders = two_modules([9.0, 9.0], [1.0] * 40)
    aligned = tuple(
        LayerLadders(layer.attention, Ladder(np.arange(40), ffn_steps(40, 8), np.full(5, 8 * 12), np.ones(5)))
        for layer in ladders
    )
    layers, ratio = allocate_by_loss(aligned, shape, 11 * 12 / shape.decoder_parameters, align_channels=8)
    assert len(layers[0].ffn_channels) == 32
    assert ratio.reason is not None
    assert "multiples of 8" in ratio.reason


def test_the_official_choice_knows_no_alignment() -> None:
    shape = shape_of(heads=2, kv_heads=2, head_dim=2, hidden=4, channels=60, layers=1)
    scores = (LayerScores(torch.zeros(2), torch.arange(60.0)),)
    allocate(scores, shape, 0.3, selection="reference")
    with pytest.raises(BudgetError, match="know no aligned widths; leave out --align-channels"):
        allocate(scores, shape, 0.3, selection="reference", align_channels=8)


@pytest.mark.parametrize(
    ("ratio", "remove_heads", "found"),
    [(0.3, 2, "0 and 1 heads of every layer, got 2"), (0.02, 1, "0 and 59 FFN channels of every layer, got -1")],
)
def test_uniform_counts_that_the_official_code_cannot_take_are_refused(
    ratio: float, remove_heads: int, found: str
) -> None:
    shape = shape_of(heads=2, kv_heads=2, head_dim=2, hidden=4, channels=60, layers=1)
    scores = (LayerScores(torch.arange(2.0), torch.arange(60.0)),)
    with pytest.raises(BudgetError, match=found):
        allocate(scores, shape, ratio, "ul-mm", selection="reference", remove_heads=remove_heads)


JOINT = LayerShape(query_heads=4, kv_heads=2, ffn_channels=40, joint_query_heads=4, joint_key_heads=2)
"""Matrices [H, D] of 4 x 2 weights: 12, of which 6 serve all heads; a group takes 3 along."""


def joint_shape(layers: int) -> DecoderShape:
    return shape_of(heads=4, kv_heads=2, head_dim=2, hidden=4, channels=40, layers=1).model_copy(
        update={"layers": (JOINT,) * layers}
    )


def test_the_group_that_empties_attention_takes_joint_projections_along() -> None:
    """All of attention scores below every channel: the first group is its own weights, the second everything else."""
    shape = joint_shape(1)
    scores = (LayerScores(torch.tensor([-9.0, -9.0, -8.0, -8.0]), torch.arange(40.0)),)
    total, block, channel = shape.decoder_parameters, 4 * 2, 3 * 4
    assert total == 12 * block + 40 * channel
    one, _ = allocate(scores, shape, 3 * block / total, "al-am")
    assert (one[0].kv_heads, len(one[0].ffn_channels)) == ((1,), 40)
    # Too little for the second group, which costs nine: channels make up for it.
    some, ratio = allocate(scores, shape, (3 * block + 5 * channel) / total, "al-am")
    assert (some[0].kv_heads, len(some[0].ffn_channels)) == ((1,), 35)
    assert ratio.reason is None
    everything, ratio = allocate(scores, shape, 12 * block / total, "al-am")
    assert (everything[0].kv_heads, len(everything[0].ffn_channels)) == ((), 40)
    assert ratio.achieved == 12 * block / total


@pytest.mark.parametrize(("ratio", "groups"), [(0.2, 2), (0.4, 1), (0.7, 1), (0.74, 1), (0.8, 0)])
def test_a_uniform_share_is_one_of_heads_where_their_projections_stay(ratio: float, groups: int) -> None:
    """By weights, a group is a quarter of attention and the last one three quarters: 0.7 would empty it everywhere."""
    shape = joint_shape(2)
    scores = tuple(LayerScores(torch.arange(4.0), torch.arange(40.0)) for _ in range(2))
    layers, found = allocate(scores, shape, ratio, "ul-um")
    assert {len(layer.kv_heads) for layer in layers} == {groups}
    # Half a channel of either layer.
    assert abs(found.achieved - ratio) * shape.decoder_parameters <= shape.ffn_channel_parameters


def test_a_uniform_share_that_the_ffn_cannot_bear_says_so() -> None:
    """A head of many frees little: the FFN has to go, and attention does not for its sake."""
    layer = LayerShape(query_heads=8, kv_heads=8, ffn_channels=4, joint_query_heads=8, joint_key_heads=8)
    shape = joint_shape(1).model_copy(update={"layers": (layer,)})
    scores = (LayerScores(torch.arange(8.0), torch.arange(4.0)),)
    layers, found = allocate(scores, shape, 0.5, "ul-um")
    assert (len(layers[0].kv_heads), len(layers[0].ffn_channels)) == (4, 0)
    assert found.reason is not None
    assert "or less than the FFN can bear" in found.reason


def test_the_reference_code_knows_no_joint_norms() -> None:
    layer = LayerShape(query_heads=4, kv_heads=4, ffn_channels=40, joint_query_heads=4, joint_key_heads=4)
    shape = joint_shape(1).model_copy(update={"layers": (layer,)})
    scores = (LayerScores(torch.arange(4.0), torch.arange(40.0)),)
    with pytest.raises(BudgetError, match=r"norm them together; use --statistics welford"):
        allocate(scores, shape, 0.3, "ul-um", selection="reference")
