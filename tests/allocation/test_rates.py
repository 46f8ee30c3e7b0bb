"""Rates of every layer: from files to cut points, and from `prune --rates` to the same plan again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spaces import ladders_of, layer_of, shape_of, shapes
from tiny import MIXTURES, save_tokens, tiny_checkpoint, tokens_of

from flap_export.allocation.ladders import HEAD_UNITS, LayerLadders
from flap_export.allocation.rates import (
    RATES_NAME,
    SPLITTINGS,
    LayerCosts,
    LayerRate,
    Rates,
    Splitting,
    allocate_by_rates,
    check_rates,
    rates_of_steps,
    split,
    steps_of_rates,
)
from flap_export.allocation.stage import Steps, plan_layers
from flap_export.errors import BudgetError, InputError
from flap_export.evidence.methods import METHODS, MethodName, PruneOptions, resolved
from flap_export.evidence.record import CalibrationText, Evidence
from flap_export.evidence.stage import evidence_options, gather
from flap_export.models.loading import load_model
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.plan import PruningPlan
from flap_export.pruning import choosing
from flap_export.pruning.stage import prune, prune_with
from flap_export.shapes import DecoderShape


@st.composite
def cuts(draw: st.DrawFn) -> tuple[DecoderShape, tuple[LayerLadders, ...], Steps]:
    shape = draw(shapes())
    head_units, align = draw(st.sampled_from(HEAD_UNITS)), draw(st.sampled_from([1, 4, 8]))
    ladders = ladders_of(shape, draw(st.integers(0, 99)), head_units, align)
    steps = [
        (draw(st.integers(0, len(layer.attention.costs))), draw(st.integers(0, len(layer.ffn.costs))))
        for layer in ladders
    ]
    return shape, ladders, steps


@pytest.mark.parametrize("splitting", SPLITTINGS)
@given(cut=cuts())
def test_the_rates_of_cut_points_mean_them_exactly(
    splitting: Splitting, cut: tuple[DecoderShape, tuple[LayerLadders, ...], Steps]
) -> None:
    shape, ladders, steps = cut
    rates = Rates(layers=rates_of_steps(ladders, steps))
    again = Rates.model_validate_json(rates.model_dump_json())
    assert steps_of_rates(ladders, again.layers, splitting) == steps
    gone = sum(LayerCosts.of(layer).removed(*taken) for layer, taken in zip(ladders, steps, strict=True))
    if 0 < gone < shape.decoder_parameters:
        layers, ratio = allocate_by_rates(ladders, shape, again.layers, splitting)
        assert layers == plan_layers(ladders, shape, steps)
        assert ratio.achieved == gone / shape.decoder_parameters == pytest.approx(ratio.requested)
        assert ratio.reason is None


@pytest.mark.parametrize("splitting", SPLITTINGS)
@given(cut=cuts(), data=st.data())
def test_a_layers_rate_is_met_as_nearly_as_its_ffn_allows(
    splitting: Splitting, cut: tuple[DecoderShape, tuple[LayerLadders, ...], Steps], data: st.DataObject
) -> None:
    _, ladders, _ = cut
    given_rates = data.draw(st.lists(st.floats(0, 1), min_size=len(ladders), max_size=len(ladders)))
    steps = steps_of_rates(ladders, [LayerRate(rate=rate) for rate in given_rates], splitting)
    for layer, rate, taken in zip(ladders, given_rates, steps, strict=True):
        costs = LayerCosts.of(layer)
        target = rate * costs.total
        best = float(np.abs(costs.attention[:, None] + costs.ffn[None, :] - target).min())
        half = float(np.diff(costs.ffn).max()) / 2
        assert abs(costs.removed(*taken) - target) <= max(best, half) + 1e-6


@given(cut=cuts(), rate=st.floats(0, 1))
def test_the_split_by_losses_is_the_least_sum(
    cut: tuple[DecoderShape, tuple[LayerLadders, ...], Steps], rate: float
) -> None:
    for layer in cut[1]:
        costs = LayerCosts.of(layer)
        target = rate * costs.total
        losses = {
            steps: layer.attention.scores[:steps].sum() + layer.ffn.scores[: costs.ffn_steps(target, steps)].sum()
            for steps in costs.attention_steps(target)
        }
        assert losses[split(costs, target, "losses")] == pytest.approx(min(losses.values()))


def test_the_uniform_split_is_by_heads_where_their_projections_stay() -> None:
    """Half of eight heads at half of the layer; by weights it would be seven, as the last one frees half of all."""
    (layer,) = ladders_of(shape_of([layer_of(8, 8, 80, joint=True)]))
    costs = LayerCosts.of(layer)
    assert costs.attention.tolist() == [*range(0, 8 * 16, 16), 32 * 8]
    assert split(costs, costs.total / 2, "uniform") == 4
    assert costs.removed(4, costs.ffn_steps(costs.total / 2, 4)) == pytest.approx(costs.total / 2, abs=6)


def test_the_split_by_scores_takes_what_is_lowest_and_the_uniform_one_the_same_share() -> None:
    (layer,) = ladders_of(shape_of([layer_of(8, 8, 48)]))
    attention, ffn = layer.attention, layer.ffn
    assert (attention.costs[0], ffn.costs[0]) == (32, 12)
    low, high = (
        LayerCosts.of(LayerLadders(type(attention)(attention.order, attention.gone, attention.costs, scores), ffn))
        for scores in (np.full(8, -9.0), np.full(8, 9.0))
    )
    assert [split(costs, 0.4 * costs.total, "scores") for costs in (low, high)] == [8, 0]
    assert [split(low, share * low.total, "uniform") for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 2, 4, 6, 8]


def test_an_ffn_that_is_too_small_leaves_the_nearest_head() -> None:
    """Heads of 240 weights and an FFN of 12: a rate is met by heads, rounded."""
    (layer,) = ladders_of(shape_of([layer_of(4, 4, 1)], head_dim=15))
    costs = LayerCosts.of(layer)
    assert [int(costs.attention[1]), int(costs.ffn[-1])] == [240, 12]
    for splitting in SPLITTINGS:
        taken = [split(costs, share * costs.total, splitting) for share in (0.0, 0.1, 0.3, 0.45, 0.6, 0.8, 1.0)]
        assert taken == [0, 0, 1, 2, 2, 3, 4]


def test_nothing_and_all_of_a_layer_are_met_exactly() -> None:
    """However cheap a head is beside an aligned step of the FFN."""
    (layer,) = ladders_of(shape_of([layer_of(4, 4, 64)], head_dim=1), align_channels=64)
    costs = LayerCosts.of(layer)
    assert costs.attention_steps(0.0) == [0]
    assert costs.attention_steps(float(costs.total)) == [4]
    assert costs.attention_steps(1.0) == [0, 1, 2, 3, 4]


def test_the_first_of_aligned_steps_may_be_a_smaller_one() -> None:
    (layer,) = ladders_of(shape_of([layer_of(2, 2, 40)]), align_channels=16)
    costs = LayerCosts.of(layer)
    assert (costs.ffn // 12).tolist() == [0, 8, 24, 40]
    assert [costs.ffn_steps(12.0 * channels, 0) for channels in (0, 4, 5, 16, 17, 32, 33, 99)] == [
        *(0, 0, 1, 1, 2, 2, 3, 3)
    ]


def written(folder: Path, value: Any) -> Path:
    path = folder / RATES_NAME
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([0.2, 0, 1], [LayerRate(rate=0.2), LayerRate(rate=0.0), LayerRate(rate=1.0)]),
        ([0.2, {"attention": 0.1, "ffn": 0.3}], [LayerRate(rate=0.2), LayerRate(attention=0.1, ffn=0.3)]),
        ({"schema_version": 1, "layers": [{"rate": 0.5}], "model": "m"}, [LayerRate(rate=0.5)]),
        ({"layers": [0.5, 0.25]}, [LayerRate(rate=0.5), LayerRate(rate=0.25)]),
    ],
)
def test_files_of_rates(value: Any, expected: list[LayerRate], tmp_path: Path) -> None:
    assert list(Rates.read(written(tmp_path, value)).layers) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "is not valid JSON"),
        ("[0.1, ", "is not valid JSON"),
        ("[" * 99999, "is not valid JSON"),
        ("[NaN]", r"layers\.0\.rate is nan: input should be a finite number"),
        ("[0.1, Infinity]", r"layers\.1\.rate is inf: input should be a finite number"),
        (f"[{'9' * 500}]", r"layers\.0\.rate is 9+\.\.\.: input should be a valid number"),
        ([0.1, -0.1], r"layers\.1\.rate is -0\.1: input should be greater than or equal to 0"),
        ([0.1, 1.1], r"share between 0 and 1 per layer.*layers\.1\.rate is 1\.1: input should be less than or equal"),
        ([20], "less than or equal to 1"),
        ([], r"layers is \[\]: tuple should have at least 1 item"),
        ([True], r"layers\.0\.rate is True: input should be a valid number"),
        (["0.1"], r"layers\.0 is '0\.1'"),
        ([[0.1]], r"layers\.0 is \[0\.1\]"),
        ([None], r"layers\.0 is None"),
        ([{}], r"layers\.0 is {}: a layer must state its rate, or both attention and ffn"),
        ([{"attention": 0.1}], "a layer must state its rate, or both"),
        ([{"rate": 0.1, "ffn": 0.1}], "a layer must state its rate, or both"),
        ([{"rate": 0.1, "heads": 3}], r"layers\.0\.heads is 3: extra inputs are not permitted"),
        ({"layers": [0.1], "schema_version": 2}, r"schema_version is 2"),
        ({"rates": [0.1]}, "layers is .*: field required"),
        (3, "top level is 3"),
        ("null", "top level is None"),
        ([{"rate": ["x" * 500]}], r"layers\.0\.rate is \['x{50,60}\.\.\.: "),
    ],
)
def test_files_that_hold_something_else(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Rates.read(written(tmp_path, value))
    assert RATES_NAME in str(caught.value)
    assert len(str(caught.value)) < 500


def test_places_without_rates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file of rates at '.*none\.json'"):
        Rates.read(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        Rates.read(tmp_path)
    huge = tmp_path / "model.safetensors"
    with huge.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(InputError, match="has 3072 MiB, which no file of rates has"):
        Rates.read(huge)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not valid JSON"):
        Rates.read(binary)


def rates_of(*values: Any) -> tuple[LayerRate, ...]:
    return tuple(LayerRate.model_validate(value) for value in values)


def test_rates_must_fit_model_and_ratio() -> None:
    """Attention is a third of each of the two layers."""
    shape = shape_of([layer_of(4, 2, 16)] * 2)
    assert (shape.attention_parameters(shape.layers[0]), shape.ffn_parameters(shape.layers[0])) == (96, 192)
    check_rates(rates_of(0.1, {"attention": 0.6, "ffn": 0.15}), shape, 0.2)
    check_rates(rates_of(0.1, {"attention": 0.6, "ffn": 0.15, "rate": 0.304}), shape, 0.205)
    for rates, ratio, message in (
        (rates_of(0.1), None, "a rate for each of the model's 2 layers, got 1"),
        (rates_of(0.1, 0.1, 0.1), None, "each of the model's 2 layers, got 3"),
        (rates_of(0.1, {"rate": 0.2, "attention": 0.6, "ffn": 0.15}), None, r"layer 1: .* a rate of 0\.3000 .* 0\.2;"),
        (rates_of(0, 0), None, "they are 0 in every layer"),
        (rates_of(1, {"attention": 1, "ffn": 1}), None, "they are 1 in every layer"),
        (rates_of(0.1, 0.3), 0.21, r"rates remove 20\.00% of .* the ratio asks for 21\.00%; leave out the ratio"),
    ):
        with pytest.raises(BudgetError, match=message):
            check_rates(rates, shape, ratio)


def test_rates_below_half_a_unit_remove_nothing() -> None:
    shape = shape_of([layer_of()])
    with pytest.raises(BudgetError, match="removes nothing"):
        allocate_by_rates(ladders_of(shape), shape, rates_of(0.001), "scores")


def test_a_rate_that_whole_units_miss_says_why() -> None:
    shape = shape_of([layer_of(channels=40)])
    _, ratio = allocate_by_rates(
        ladders_of(shape, align_channels=16), shape, rates_of({"attention": 0, "ffn": 0.3}), "scores"
    )
    assert ratio.reason == "every layer meets its own rate in whole heads and FFN steps"


def gathered(folder: Path, family: str, **given: Any) -> tuple[Path, Evidence, PruneOptions, Checkpoint]:
    path = folder / "dense"
    if not path.exists():
        tiny_checkpoint(family, path, num_hidden_layers=3)
    options = resolved(PruneOptions(**{"ratio": 0.3, **given}))
    source = save_tokens(folder / "ids.npy", tokens_of(9, 8))
    return path, gather(path, CalibrationText(source=source), options), options, open_checkpoint(path)


def steps_of(plan: PruningPlan, ladders: tuple[LayerLadders, ...]) -> Steps:
    """The cut points of a plan."""
    return [
        (
            int(
                np.searchsorted(layer.attention.gone, len(layer.attention.order) - len(kept.query_heads), side="right")
            ),
            int(np.searchsorted(layer.ffn.gone, len(layer.ffn.order) - _channels(kept), side="right")),
        )
        for kept, layer in zip(plan.layers, ladders, strict=True)
    ]


def _channels(kept: Any) -> int:
    return kept.shared_width + (sum(map(len, kept.experts)) if kept.experts else len(kept.ffn_channels))


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", *MIXTURES[:1]])
@pytest.mark.parametrize(
    "given", [{}, {"method": "obs"}, {"align_channels": 16}, {"method": "obs", "align_channels": 16}]
)
def test_a_plans_rates_give_the_same_plan(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    """Grouped, plain and multi-query attention, and experts; all the way to the weights."""
    path, evidence, options, dense = gathered(tmp_path, family, **given)
    plan = prune_with(path, tmp_path / "by ratio", evidence, options)
    ladders = choosing.ladders_of(dense, evidence, options)
    rates = Rates(model=plan.model, layers=rates_of_steps(ladders, steps_of(plan, ladders)), digests=plan.digests)
    rates.save(tmp_path / RATES_NAME)
    again = prune(
        path, tmp_path / "by rates", rates=tmp_path / RATES_NAME, calibration=str(tmp_path / "ids.npy"), **given
    )
    assert again.layers == plan.layers
    assert again.ratio.achieved == plan.ratio.achieved
    assert (plan.method["rates"], again.method["rates"]) == (None, True)
    assert set(again.digests) == {*plan.digests, "rates"}
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "by ratio" / name).read_bytes() == (tmp_path / "by rates" / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_rates(method: MethodName, tmp_path: Path) -> None:
    """Also those that would spare layers, and those that prune while they calibrate."""
    path = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=4)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(9, 8))
    rates = written(tmp_path, [0.5, 0.1, 0.0, 0.2])
    plan = prune(path, tmp_path / "out", ratio=0.2, rates=rates, method=method, calibration=source)
    shape = open_checkpoint(path).shape
    for kept, layer, rate in zip(plan.layers, shape.layers, (0.5, 0.1, 0.0, 0.2), strict=True):
        left = (
            2 * (len(kept.query_heads) + len(kept.kv_heads)) * shape.head_block_parameters
            + kept.ffn_width * shape.ffn_channel_parameters
        )
        whole = shape.attention_parameters(layer) + shape.ffn_parameters(layer)
        assert abs(whole - left - rate * whole) <= shape.ffn_channel_parameters / 2
    with torch.no_grad():
        assert load_model(tmp_path / "out", dtype=torch.float32)(tokens_of(1, 4)).logits.isfinite().all()


@pytest.mark.parametrize("method", ["wanda-sp", "magnitude"])
def test_equal_rates_are_a_uniform_structure(method: MethodName, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=3)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(9, 8))
    by_ratio = prune(path, tmp_path / "a", ratio=0.4, method=method, calibration=source)
    by_rates = prune(path, tmp_path / "b", rates=written(tmp_path, [0.4] * 3), method=method, calibration=source)
    assert by_rates.layers == by_ratio.layers
    assert by_rates.ratio.achieved == by_ratio.ratio.achieved
    assert by_rates.ratio.requested == pytest.approx(0.4)


def test_wanda_sp_masks_what_the_rates_say() -> None:
    """Its evidence is of these rates, that of the others of any."""
    options = {method: resolved(PruneOptions(method=method, rates=rates_of(0.1, 0.3))) for method in METHODS}
    for method, own in options.items():
        assert (evidence_options(own).rates is not None) == (method == "wanda-sp")
        assert (evidence_options(own) == evidence_options(PruneOptions(method=method, ratio=0.2))) == (
            method != "wanda-sp"
        )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "obs"}, "losses"),
        ({"method": "flap"}, "scores"),
        ({"method": "flap", "structure": "al-mm"}, "scores"),
        ({"method": "flap", "structure": "ul-mm"}, "uniform"),
        ({"method": "magnitude"}, "uniform"),
        ({"method": "magnitude", "structure": "al-am"}, "scores"),
        ({"method": "obs", "layout": "stock"}, "uniform"),
    ],
)
def test_how_methods_split_a_rate(given: dict[str, Any], expected: str) -> None:
    assert choosing.splitting_of(PruneOptions(ratio=0.2, **given)) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": "stock"}, "--layout stock needs the same counts in every layer; leave it out where --rates"),
        ({"structure": "al-mm", "remove_heads": 2}, "--remove-heads is a budget of al-mm over all layers"),
        ({"structure": "ul-mm", "remove_heads": 2}, "--remove-heads is a budget of ul-mm"),
        ({"statistics": "reference"}, "thresholds over the whole model, .* use --statistics welford"),
        ({"ratio": 0.3}, r"the rates remove 20\.00% .* the ratio asks for 30\.00%"),
        ({"rates": [0.2] * 3}, "a rate for each of the model's 2 layers, got 3"),
        ({"rates": None}, "--ratio must be given, or --rates of every layer"),
    ],
)
def test_what_rates_do_not_go_with_is_refused_before_calibrating(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrating(*_: Any, **__: Any) -> None:
        pytest.fail("calibrated first")

    monkeypatch.setattr("flap_export.evidence.stage.calibrate", calibrating)
    path = tiny_checkpoint("llama", tmp_path / "dense", num_key_value_heads=4)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(9, 8))
    values = given.get("rates", [0.2, 0.2])
    rates = None if values is None else written(tmp_path, values)
    with pytest.raises(InputError, match=message):
        prune(path, tmp_path / "out", **{"calibration": source, **given, "rates": rates})
    assert not (tmp_path / "out").exists()


def test_evidence_of_the_official_code_has_no_ladders(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", num_key_value_heads=4)
    text = CalibrationText(source=save_tokens(tmp_path / "ids.npy", tokens_of(9, 8)), statistics="reference")
    options = resolved(PruneOptions(ratio=0.3))
    evidence = gather(path, text, options)
    with pytest.raises(InputError, match="no ranking within a layer that a rate could cut"):
        choosing.ladders_of(open_checkpoint(path), evidence, options)
    with pytest.raises(InputError, match="no ranking within a layer that a rate could cut"):
        prune_with(path, tmp_path / "out", evidence, PruneOptions(rates=rates_of(0.2, 0.2)))
