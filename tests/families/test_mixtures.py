"""What sets mixtures of experts apart: whose channels go, whose tokens count, and what an expert leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from refitting import fitted
from safetensors.torch import load_file, save_file
from tiny import (
    MIXTURES,
    expert_channels,
    expert_projections,
    experts_path,
    keep_all_plan,
    layer_plan,
    plain_model,
    plan_of,
    save_tokens,
    tiny_checkpoint,
    tiny_config,
    tiny_pruned,
    tokens_of,
    uneven_plan,
)
from torch import Tensor

from flap_export import validate
from flap_export.allocation.budgets import cheapest_first
from flap_export.allocation.ladders import Ladder, ffn_ladder, ladders_from_scores
from flap_export.allocation.ladders import layer_plan as layer_plan_of
from flap_export.allocation.stage import STRUCTURES, StructureName, allocate
from flap_export.artifact import load_artifact
from flap_export.building.graphs import cuda_graph
from flap_export.calibration.stage import calibrate
from flap_export.errors import BudgetError, InputError, ModelError, PlanError
from flap_export.evidence.coupled import magnitude_scores, taylor_scores
from flap_export.evidence.measuring import measure
from flap_export.evidence.methods import METHODS
from flap_export.evidence.sensitivity import Sensitivity, hull_slopes
from flap_export.exporting import export
from flap_export.ideal import read_parameters
from flap_export.models.loading import check_weights, load_model, meta_model
from flap_export.models.opening import open_checkpoint
from flap_export.models.weights import Weights
from flap_export.plan import PruningPlan
from flap_export.pruning.stage import prune
from flap_export.rewriting.cutting import rewrite
from flap_export.rewriting.restoring import fitted_restorer, restore
from flap_export.runners import open_runner
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape, LayerShape

SHAPE = DecoderShape(
    hidden_size=4,
    head_dim=2,
    vocabulary_size=11,
    ffn_matrices=3,
    tied_embeddings=False,
    layers=(LayerShape(query_heads=2, kv_heads=1, ffn_channels=5, experts=3),) * 3,
)
pytestmark = pytest.mark.skipif(not MIXTURES, reason="transformers 4.57 keeps experts in other classes")


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def routed_inputs(path: Path, tokens: Tensor) -> dict[tuple[int, int], list[Tensor]]:
    """What enters every expert's down projection by transformers' own stacked weights, token by token, in float64."""
    model = plain_model(path)
    found: dict[tuple[int, int], list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):

        def note(module: Any, arguments: Any, index: int = index) -> None:
            hidden_states, top_k_index, _ = arguments
            for token, chosen in zip(hidden_states, top_k_index.tolist(), strict=True):
                for expert in chosen:
                    found.setdefault((index, expert), []).append(expert_channels(module, expert, token).double())

        if experts := dict(layer.named_modules()).get(experts_path(open_checkpoint(path).family.model_type)):
            experts.register_forward_pre_hook(note)
    model(input_ids=tokens, use_cache=False)
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_statistics_are_of_the_tokens_an_expert_was_sent(family: str, tmp_path: Path) -> None:
    dense, tokens = tiny_checkpoint(family, tmp_path / "dense"), tokens_of(7, 12)
    statistics = calibrate(dense, save_tokens(tmp_path / "ids.npy", tokens), chunk_sequences=3)
    *_, down = expert_projections(family)
    weights = open_checkpoint(dense).weights
    inputs = routed_inputs(dense, tokens)
    counts = {len(values) for values in inputs.values()}
    assert len(counts) > 1, "routing is even, the test shows little"
    for (index, expert), values in inputs.items():
        site, together = statistics.sites[index, "ffn"], torch.stack(values)
        torch.testing.assert_close(site.mean[expert], together.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(site.variance[expert], together.var(0, unbiased=False), atol=1e-5, rtol=1e-4)
        weight = weights[f"model.layers.{index}.{experts_path(family)}.{expert}.{down}.weight"].double()
        torch.testing.assert_close(site.weight_square_norm[expert], weight.square().sum(0))


def last_of_three_experts_is_never_chosen(dense: Path) -> dict[str, Tensor]:
    """What the router gives it lies between what the other two get, and one expert sees each token."""
    tensors = load_file(dense / "model.safetensors")
    for name in [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]:
        tensors[name][2] = (tensors[name][0] + tensors[name][1]) / 2
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("method", ["flap", "obs", "llm-pruner"])
def test_an_expert_without_tokens(method: Any, tmp_path: Path) -> None:
    """Nothing is known of it; its channels go as many as the others', and nothing is NaN."""
    dense = tiny_checkpoint("mixtral", tmp_path / "dense", num_experts_per_tok=1)
    last_of_three_experts_is_never_chosen(dense)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    site = calibrate(dense, source).sites[0, "ffn"]
    assert site.mean[:2].all()
    assert not site.mean[2].any()
    assert not site.variance[2].any()
    for compensation in (None, "least-squares"):
        out = tmp_path / str(compensation)
        options: dict[str, Any] = {"method": method, "compensation": compensation}
        prune(dense, out, ratio=0.4, calibration=source, **options)
        assert logits_of(load_model(out, dtype=torch.float32), tokens_of(2, 9)).isfinite().all()


def scores_of(shape: DecoderShape, seed: int = 0) -> tuple[LayerScores, ...]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return tuple(
        LayerScores(
            drawn(layer.query_heads),
            drawn(*layer.ffn_scores),
            None if layer.shared_channels is None else drawn(layer.shared_channels),
        )
        for layer in shape.layers
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("align_channels", [1, 2])
def test_every_expert_loses_its_own_lowest_and_as_many(structure: StructureName, align_channels: int) -> None:
    scores = scores_of(SHAPE)
    layers, ratio = allocate(scores, SHAPE, 0.4, structure, align_channels=align_channels)
    plan = PruningPlan(model="m", family="mixtral", ratio=ratio, layers=layers)
    plan.check(SHAPE)
    kept = 0
    for layer, own in zip(layers, scores, strict=True):
        assert not layer.ffn_channels
        for channels, values in zip(layer.experts, own.ffn_channels, strict=True):
            assert set(channels) == set(values.argsort()[5 - layer.ffn_width :].tolist())
        kept += 8 * (2 * len(layer.query_heads) + 2 * len(layer.kv_heads)) + 3 * 4 * 3 * layer.ffn_width
        assert layer.ffn_width % align_channels == 0 or layer.ffn_width == 5
    assert ratio.achieved == pytest.approx(1 - kept / SHAPE.decoder_parameters)
    assert 0.2 < ratio.achieved < 0.6


def test_a_step_costs_a_channel_of_every_expert() -> None:
    scores = torch.tensor([[5.0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5]], dtype=torch.float64)
    ladder = ffn_ladder(scores.numpy(), SHAPE)
    assert ladder.costs.tolist() == [3 * 3 * 4] * 5
    assert ladder.gone.tolist() == [3, 6, 9, 12, 15]
    assert ladder.order[:6].tolist() == [1, 5, 14, 2, 6, 13]
    np.testing.assert_allclose(ladder.scores, scores.sort(dim=1).values.mean(dim=0).numpy())
    assert ladder.kept(4) == (0, 9, 10)


def step(elements: list[int], cost: int, score: float) -> tuple[list[int], int, float]:
    return elements, cost, score


def steps_of(ladder: Ladder) -> list[tuple[list[int], int, float]]:
    parts = np.split(ladder.order, ladder.gone[:-1])
    return [step(list(own), *rest) for own, *rest in zip(parts, ladder.costs, ladder.scores, strict=True)]


WITH_SHARED = SHAPE.layers[0].model_copy(update={"ffn_channels": 2, "experts": 2, "shared_channels": 3})
ROUTED_SCORES, SHARED_SCORES = torch.tensor([[3.0, 1.0], [4.0, 6.0]]).double(), torch.tensor([9.0, 2.0, 3.0]).double()


@pytest.mark.parametrize("proportional", [False, True])
def test_a_step_takes_of_every_routed_expert_or_of_the_shared_one(proportional: bool) -> None:
    shape = SHAPE.model_copy(update={"layers": (WITH_SHARED,)})
    scores = LayerScores(torch.zeros(2).double(), ROUTED_SCORES, SHARED_SCORES)
    ladder = ladders_from_scores([scores], shape, proportional=proportional)[0].ffn
    if proportional:
        # Half of two channels, and a third of three; then the rest.
        assert steps_of(ladder) == [step([1, 2, 5], 36, 4.5), step([0, 3, 6, 4], 48, 16.5)]
    else:
        alone = [step([5], 12, 2.0), step([1, 2], 24, 2.5), step([6], 12, 3.0), step([0, 3], 24, 4.5)]
        assert steps_of(ladder) == [*alone, step([4], 12, 9.0)]
    assert ladder.costs.sum() == shape.ffn_parameters(WITH_SHARED)
    plan = layer_plan_of(0, shape, ladders_from_scores([scores], shape, proportional=proportional)[0], 0, 1)
    assert plan.shared_channels == (0, 2)
    assert plan.experts == (((0,), (1,)) if proportional else ((0, 1), (0, 1)))


@pytest.mark.parametrize("align_channels", [1, 4, 8])
@pytest.mark.parametrize("times", [1, 3])
def test_shared_channels_stay_in_proportion(times: int, align_channels: int) -> None:
    layer = SHAPE.layers[0].model_copy(update={"ffn_channels": 24, "shared_channels": 24 * times})
    shape = SHAPE.model_copy(update={"layers": (layer,)})
    ladders = ladders_from_scores(scores_of(shape), shape, align_channels=align_channels, proportional=True)[0]
    for steps in range(len(ladders.ffn.gone) + 1):
        plan = layer_plan_of(0, shape, ladders, 0, steps)
        assert plan.shared_width == times * plan.ffn_width
        assert plan.ffn_width % align_channels == 0
    assert len(ladders.ffn.gone) == 24 // align_channels


def test_what_is_too_large_ends_its_ladder() -> None:
    """A cheaper step behind it would take elements that stand before it, too."""
    first = np.array([1.0, 2.0, 3.0]), np.array([1, 10, 1])
    second = np.array([4.0, 5.0]), np.array([1, 1])
    assert cheapest_first([first, second], 3) == [1, 2]


def test_losses_are_spent_along_their_hull() -> None:
    """Per weight, and never falling: what is cheap behind something dear comes with it."""
    ladder = Ladder(np.arange(6), np.arange(6) + 1, np.array([2, 2, 2, 4, 4, 2]), np.array([4.0, 1, 1, 8, 16, 2]))
    assert hull_slopes(ladder).tolist() == [1, 1, 1, 2, 3, 3]


def test_a_plan_states_shared_channels_beside_experts(tmp_path: Path) -> None:
    dense = open_checkpoint(tiny_checkpoint("glm4_moe", tmp_path / "dense", num_hidden_layers=4))
    plan = uneven_plan(dense)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    first, second, *_ = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert set(first) == {"layer", "query_heads", "kv_heads", "ffn_channels"}
    assert set(second) == {"layer", "query_heads", "kv_heads", "experts", "shared_channels"}
    assert second["shared_channels"] == list(range(1, 24, 3))


@pytest.mark.parametrize(
    ("index", "shared", "message"),
    [
        (1, None, "layer 1: the plan must list the shared_channels of the model's shared expert, got none"),
        (1, (0, 24), r"layer 1: shared_channels must lie in 0\.\.23"),
        (0, (), "layer 0: the plan lists shared_channels, and this layer has no shared expert"),
    ],
)
def test_shared_channels_that_do_not_fit(index: int, shared: Any, message: str, tmp_path: Path) -> None:
    dense = open_checkpoint(tiny_checkpoint("glm4_moe", tmp_path / "dense"))
    plan = keep_all_plan(dense)
    layers = list(plan.layers)
    layers[index] = layers[index].model_copy(update={"shared_channels": shared})
    with pytest.raises(PlanError, match=message):
        plan.model_copy(update={"layers": tuple(layers)}).check(dense.shape)


def test_a_plan_states_experts_instead_of_channels(tmp_path: Path) -> None:
    dense = open_checkpoint(tiny_checkpoint("mixtral", tmp_path / "dense", num_hidden_layers=4))
    plan = uneven_plan(dense)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    layer = json.loads((tmp_path / "plan.json").read_text())["layers"][1]
    assert set(layer) == {"layer", "query_heads", "kv_heads", "experts"}
    assert layer["experts"][0] != layer["experts"][1]
    assert [len(channels) for channels in layer["experts"]] == [13] * 3


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (((0, 1), (0,), (0, 1)), r"layer 0: every expert must keep the same number of channels, got \[1, 2\]"),
        (((0, 1), (1, 0), (0, 1)), "layer 0: channels of expert 1 must be ascending"),
        (((0, 5), (0, 1), (0, 1)), r"layer 0: channels of expert 0 must lie in 0\.\.4"),
        (((0,), (0,)), "layer 0: the plan must list the channels of each of the layer's 3 experts, got 2 experts"),
        ((), "layer 0: the plan must list .* 3 experts, got ffn_channels alone"),
    ],
)
def test_plans_that_do_not_fit(experts: tuple[tuple[int, ...], ...], message: str) -> None:
    layers, ratio = allocate(scores_of(SHAPE), SHAPE, 0.4)
    wrong = layers[0].model_copy(update={"experts": experts})
    plan = PruningPlan(model="m", family="mixtral", ratio=ratio, layers=(wrong, *layers[1:]))
    with pytest.raises(PlanError, match=message):
        plan.check(SHAPE)


def test_experts_in_a_plan_for_a_plain_model_are_refused(tmp_path: Path) -> None:
    plain = open_checkpoint(tiny_checkpoint("llama", tmp_path / "llama"))
    mixture = open_checkpoint(tiny_checkpoint("mixtral", tmp_path / "mixtral"))
    with pytest.raises(PlanError, match="layer 0: the plan lists experts, and this layer has none"):
        keep_all_plan(mixture).check(plain.shape)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(family: str, method: Any, tmp_path: Path) -> None:
    """Plan, checkpoint and counted weights agree."""
    dense = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=3)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    plan = prune(dense, tmp_path / "pruned", ratio=0.3, calibration=source, method=method)
    pruned = open_checkpoint(tmp_path / "pruned")
    check_weights(meta_model(pruned, torch.float32), pruned)
    assert plan.ratio.achieved == pytest.approx(0.3, abs=0.02)
    before = open_checkpoint(dense).shape.decoder_parameters
    assert 1 - pruned.shape.decoder_parameters / before == pytest.approx(plan.ratio.achieved)
    assert logits_of(load_model(pruned.directory, dtype=torch.float32), tokens_of(2, 9)).isfinite().all()


@pytest.mark.parametrize("family", MIXTURES)
def test_least_squares_come_closer_than_the_bias_and_the_bias_than_nothing(family: str, tmp_path: Path) -> None:
    """On the calibration tokens, with the same channels gone: the weighted biases of experts do their work."""
    all_mixtures: dict[str, Any] = {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"]}
    overrides = {name: value for name, value in all_mixtures.items() if hasattr(tiny_config(family), name)}
    dense = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=1, **overrides)
    tokens = tokens_of(40, 11)
    source = save_tokens(tmp_path / "ids.npy", tokens)
    expected, errors = logits_of(load_model(dense, dtype=torch.float32), tokens), []
    for compensation in ("none", "bias", "least-squares"):
        out = tmp_path / compensation
        options: dict[str, Any] = {"structure": "al-mm", "compensation": compensation}
        prune(dense, out, ratio=0.4, calibration=source, **options)
        found = logits_of(load_model(out, dtype=torch.float32), tokens)
        errors.append(float((found - expected).square().mean()))
    assert errors[0] > 1.02 * errors[1] > 1.02 * 1.02 * errors[2], errors


def test_losses_are_measured_channel_by_channel_of_every_expert(tmp_path: Path) -> None:
    dense = tiny_checkpoint("qwen3_moe", tmp_path / "dense")
    found = measure(dense, save_tokens(tmp_path / "ids.npy", tokens_of(6, 11)))
    module = found.modules[0, "ffn"]
    assert sorted(module.order.tolist()) == list(range(5 * 40))
    assert module.gone.tolist() == list(range(5, 201, 5))
    assert sorted(element // 40 for element in module.order[:5].tolist()) == list(range(5))
    ladder = found.ladders(open_checkpoint(dense).shape)[0].ffn
    assert ladder.costs.sum() == 3 * 32 * 5 * 40


def test_losses_of_a_shared_expert_are_measured_by_itself(tmp_path: Path) -> None:
    dense = tiny_checkpoint("qwen2_moe", tmp_path / "dense")
    found = measure(dense, save_tokens(tmp_path / "ids.npy", tokens_of(6, 11)))
    found.save(tmp_path / "sensitivity.safetensors")
    assert (0, "shared") not in found.modules
    module = found.modules[1, "shared"]
    assert sorted(module.order.tolist()) == list(range(56))
    assert module.gone.tolist() == list(range(1, 57))
    assert module.losses[-1] > 0
    shape = open_checkpoint(dense).shape
    for ladders in (found.ladders(shape), Sensitivity.load(tmp_path / "sensitivity.safetensors").ladders(shape)):
        ladder = ladders[1].ffn
        assert sorted(ladder.order.tolist()) == list(range(5 * 24 + 56))
        assert ladder.scores.sum() == pytest.approx(float(module.losses[-1] + found.modules[1, "ffn"].losses[-1]))
        shared = ladder.order[ladder.order >= 120] - 120
        assert shared.tolist() == module.order.tolist()


def test_a_shared_experts_least_squares_are_those_of_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, from what enters transformers' own module; its gate comes behind."""
    monkeypatch.setattr("flap_export.rewriting.restoring.best_ridge", lambda *_: 0.02)
    dense, tokens = tiny_checkpoint("qwen2_moe", tmp_path / "dense"), tokens_of(40, 11)
    checkpoint, seen = open_checkpoint(dense), []
    model = plain_model(dense)
    model.model.layers[1].mlp.shared_expert.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    logits_of(model, tokens)
    plan = plan_of(checkpoint, [layer_plan(checkpoint, i, range(2), range(0, 24, 2 + i)) for i in range(2)])
    (tmp_path / "restored").mkdir()
    found = dict(rewrite(checkpoint, plan, fitted_restorer(restore(checkpoint, plan, tokens, tmp_path / "restored"))))
    name, kept = "model.layers.1.mlp.shared_expert.down_proj", list(plan.layers[1].shared_channels or ())
    weight = checkpoint.weights[f"{name}.weight"].double().numpy()
    expected, bias = fitted(weight, seen[0].flatten(0, -2).double().numpy(), kept, 0.02)
    np.testing.assert_allclose(found[f"{name}.weight"].numpy(), expected[:, kept], atol=1e-3)
    np.testing.assert_allclose(found[f"{name}.bias"].numpy(), bias, atol=1e-3)


def test_magnitudes_of_a_shared_expert_are_its_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("qwen2_moe", tmp_path / "dense"))
    plain, mixed = magnitude_scores(checkpoint)
    prefix = "model.layers.1.mlp.shared_expert"
    gate, up, down = (checkpoint.weights[f"{prefix}.{n}_proj.weight"].double().square() for n in ("gate", "up", "down"))
    expected = gate.sum(1) + up.sum(1) + down.sum(0)
    assert plain.shared_channels is None
    assert mixed.shared_channels is not None
    torch.testing.assert_close(mixed.shared_channels, (expected - expected.mean()) / expected.std())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("glm4_moe", "model.layers.2.mlp.gate_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.gate_proj.weight"),
    ],
)
def test_what_predicts_several_tokens_is_left_out(family: str, name: str, tmp_path: Path) -> None:
    """Published checkpoints hold it, transformers does not look at it; the layers before are not touched."""
    dense = tiny_checkpoint(family, tmp_path / "dense")
    before = set(open_checkpoint(dense).weights)
    tensors = load_file(dense / "model.safetensors")
    save_file({**tensors, name: torch.zeros(3, 4)}, dense / "model.safetensors", metadata={"format": "pt"})
    assert set(open_checkpoint(dense).weights) == before
    load_model(dense, dtype=torch.float32)


def test_magnitudes_are_counted_expert_by_expert(tmp_path: Path) -> None:
    dense = tiny_checkpoint("mixtral", tmp_path / "dense")
    checkpoint = open_checkpoint(dense)
    rows = []
    for expert in range(3):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        gate, up, down = (checkpoint.weights[f"{prefix}.{n}.weight"].double().square() for n in ("w1", "w3", "w2"))
        rows.append(gate.sum(1) + up.sum(1) + down.sum(0))
    expected = torch.stack(rows)
    expected = (expected - expected.mean()) / expected.std()
    torch.testing.assert_close(magnitude_scores(checkpoint)[0].ffn_channels, expected)


def test_an_experts_least_squares_are_those_of_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, from what transformers' stacked experts see; 0.02 stands for whatever ridge would be chosen."""
    monkeypatch.setattr("flap_export.rewriting.restoring.best_ridge", lambda *_: 0.02)
    dense, tokens = tiny_checkpoint("mixtral", tmp_path / "dense"), tokens_of(40, 11)
    checkpoint = open_checkpoint(dense)
    plan = plan_of(checkpoint, [layer_plan(checkpoint, i, range(2), range(0, 40, 2 + i)) for i in range(2)])
    (tmp_path / "restored").mkdir()
    found = dict(rewrite(checkpoint, plan, fitted_restorer(restore(checkpoint, plan, tokens, tmp_path / "restored"))))
    for (index, expert), values in routed_inputs(dense, tokens).items():
        name, kept = f"model.layers.{index}.mlp.experts.{expert}.w2", list(plan.layers[index].experts[expert])
        weight = checkpoint.weights[f"{name}.weight"].double().numpy()
        expected, bias = fitted(weight, torch.stack(values).numpy(), kept, 0.02)
        np.testing.assert_allclose(found[f"{name}.weight"].numpy(), expected[:, kept], atol=1e-3)
        np.testing.assert_allclose(found[f"{name}.bias"].numpy(), bias, atol=1e-3)


def test_taylor_scores_are_those_of_transformers_stacked_weights(tmp_path: Path) -> None:
    dense, tokens = tiny_checkpoint("qwen3_moe", tmp_path / "dense"), tokens_of(4, 7)
    model = plain_model(dense)
    for sequence in tokens:
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sequence[1:]).backward()  # type: ignore[no-untyped-call]
    for scores, layer in zip(taylor_scores(open_checkpoint(dense), tokens), model.model.layers, strict=True):
        experts = layer.mlp.experts
        gate_up = (experts.gate_up_proj * experts.gate_up_proj.grad).abs().sum(2).double()
        down = (experts.down_proj * experts.down_proj.grad).abs().sum(1).double()
        expected = (gate_up[:, :40] + gate_up[:, 40:] + down).detach()
        expected = (expected - expected.mean()) / expected.std()
        torch.testing.assert_close(scores.ffn_channels, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", MIXTURES)
def test_pruned_artifacts_pass_validation(family: str, tmp_path: Path) -> None:
    pruned = tiny_pruned(family, tmp_path)
    export(pruned, tmp_path / "onnx", max_length=64)
    validate(tmp_path / "onnx", reference=pruned).raise_if_breached()


def test_what_overflows_in_an_expert_that_was_not_chosen_does_not_matter(tmp_path: Path) -> None:
    """A GPU's graph computes every expert for every token, and infinity times a routing weight of zero would be NaN."""
    dense = tiny_checkpoint("mixtral", tmp_path / "dense", num_experts_per_tok=1)
    tensors = last_of_three_experts_is_never_chosen(dense)
    expected = logits_of(load_model(dense, dtype=torch.float32), tokens_of(2, 9))
    for name in [name for name in tensors if name.endswith("experts.2.w3.weight")]:
        tensors[name] = tensors[name].sign() * 3e38
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    export(dense, tmp_path / "onnx", max_length=20)
    with open_runner(tmp_path / "onnx", threads=1) as runner:
        found = runner.prefill(tokens_of(2, 9).tolist())
    np.testing.assert_allclose(found, expected[:, -1].numpy(), atol=1e-4, rtol=1e-4)
    joined = cuda_graph(tmp_path / "onnx" / "model-last.onnx")
    assert joined is not None
    (tmp_path / "onnx" / "model-last.onnx").write_bytes(joined)
    feeds = feeds_of(tmp_path / "onnx", tokens_of(2, 9).numpy())
    (found,) = session_of(tmp_path / "onnx" / "model-last.onnx").run(["logits"], feeds)
    np.testing.assert_allclose(found[:, 0], expected[:, -1].numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_gpus_graph_means_the_same(family: str, tmp_path: Path) -> None:
    """Over the same weights: with biases, emptied experts, and some widths of both."""
    artifact = export(tiny_pruned(family, tmp_path), tmp_path / "onnx", max_length=20)
    assert any(layer.ffn_bias and layer.ffn_channels for layer in artifact.shape.layers)
    joined = cuda_graph(tmp_path / "onnx" / "model.onnx")
    assert joined is not None
    (tmp_path / "onnx" / "joined.onnx").write_bytes(joined)
    feeds = feeds_of(tmp_path / "onnx", tokens_of(2, 9).numpy())
    graphs = [tmp_path / "onnx" / name for name in ("model.onnx", "joined.onnx")]
    expected, found = (session_of(graph).run(["logits"], feeds)[0] for graph in graphs)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert cuda_graph(graphs[1]) is None


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_is_computed_by_its_own_experts_only(family: str, tokens: int, tmp_path: Path) -> None:
    """By the rows of every product that ONNX Runtime's profile of a call tells of."""
    dense = tiny_checkpoint(family, tmp_path / "dense")
    export(dense, tmp_path / "onnx", max_length=20)
    session = session_of(tmp_path / "onnx" / "model.onnx", profile=tmp_path / "profile")
    session.run(["logits"], feeds_of(tmp_path / "onnx", tokens_of(2, tokens).numpy()))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    outputs = [event["args"]["output_type_shape"] for event in events if event["args"].get("op_name") == "Gemm"]
    widths = [next(iter(output[0].values())) for output in outputs]
    shape = load_artifact(tmp_path / "onnx").shape
    mixtures = [layer for layer in shape.layers if layer.experts]
    # Two products of [rows, F] in each of these layers, and each token's own experts.
    own = sum(rows for rows, width in widths if width == mixtures[0].ffn_channels)
    assert own == len(mixtures) * 2 * shape.experts_per_token * 2 * tokens


def session_of(graph: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def feeds_of(directory: Path, tokens: Any) -> dict[str, Any]:
    """A prompt with empty caches."""
    artifact, batch = load_artifact(directory), len(tokens)
    caches = {cache.past: np.zeros(cache.shape, np.float32) for cache in artifact.caches(batch)}
    return {"input_ids": tokens, "write_indices": np.zeros(batch, np.int64), **caches}


def test_experts_are_stored_as_the_family_stores_them(tmp_path: Path) -> None:
    """A plan of equal layers, in the family's own classes: transformers stacks what it finds under the old names."""
    dense = tiny_checkpoint("mixtral", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    options: dict[str, Any] = {"ratio": 0.5, "calibration": source, "layout": "stock"}
    prune(dense, tmp_path / "stock", compensation="none", align_channels=8, **options)
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in Weights(tmp_path / "stock")
    found = logits_of(plain_model(tmp_path / "stock"), tokens_of(2, 9))
    torch.testing.assert_close(found, logits_of(load_model(tmp_path / "stock", dtype=torch.float32), tokens_of(2, 9)))
    with pytest.raises(PlanError, match=r"mixtral's class has no place for a bias of self_attn\.o_proj"):
        prune(dense, tmp_path / "biased", **options)
    with pytest.raises(PlanError, match=r"experts of mixtral .* no multiple of 8; set --align-channels 8"):
        prune(dense, tmp_path / "odd", compensation="none", align_channels=4, **options)


def test_the_reference_code_knows_no_experts(tmp_path: Path) -> None:
    dense = tiny_checkpoint("mixtral", tmp_path / "dense", num_key_value_heads=4)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(3, 11))
    with pytest.raises(InputError, match=r"--statistics reference .* knows no mixtures .*use --statistics welford"):
        calibrate(dense, source, statistics="reference")
    with pytest.raises(BudgetError, match="the reference code knows no mixtures"):
        allocate(scores_of(SHAPE), SHAPE, 0.4, selection="reference")


@pytest.mark.parametrize(
    ("family", "field", "stated", "found"),
    [
        ("mixtral", "num_experts_per_tok", 3, 3),
        ("mixtral", "num_experts_per_tok", 4, r"must lie in 1\.\.3 \(num_local_experts\), got 4"),
        ("mixtral", "num_experts_per_tok", 0, r"must lie in 1\.\.3 \(num_local_experts\), got 0"),
        ("dots1", "num_experts_per_tok", None, r"must lie in 1\.\.6 \(n_routed_experts\), got None"),
        ("hunyuan_v1_moe", "moe_topk", [2, 2], 2),
        ("hunyuan_v1_moe", "moe_topk", [2, 3], 0),
        ("hunyuan_v1_moe", "moe_topk", [2, 9], r"must lie in 1\.\.5 \(num_experts\), got \[2, 9\]"),
        ("hunyuan_v1_moe", "moe_topk", [2], "must be one number, or one for each of 2 layers, got 1"),
    ],
)
def test_tokens_are_sent_to_as_many_experts_as_there_are_at_most(
    family: str, field: str, stated: Any, found: int | str, tmp_path: Path
) -> None:
    if family not in MIXTURES:
        pytest.skip("transformers is too old")
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config(family).to_dict(), field: stated}))
    if isinstance(found, int):
        assert open_checkpoint(tmp_path).shape.experts_per_token == found
        return
    with pytest.raises(ModelError, match=f"num_experts_per_tok {found}"):
        open_checkpoint(tmp_path)


def test_older_transformers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = tiny_pruned("mixtral", tmp_path)
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(ModelError, match=r"mixtral is supported from transformers 5 on, found 4\.57\.6; pip install"):
        open_checkpoint(pruned)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    dense = tiny_checkpoint("qwen3_moe", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 'model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight'"):
        load_model(dense, dtype=torch.float32)


@pytest.mark.parametrize("family", MIXTURES)
def test_every_stored_parameter_can_be_read(family: str, tmp_path: Path) -> None:
    """All but the embedding, by enough tokens."""
    pruned = open_checkpoint(tiny_pruned(family, tmp_path))
    left_out = ("embed_tokens", "e_score_correction_bias", "q_proj.bias", "k_proj.bias", "v_proj.bias")
    left_out += ("sinks", "router.bias", "gate_proj.bias", "up_proj.bias")
    # Norms of single heads are not counted, those over all heads are.
    left_out += () if pruned.family.heads.parameters else ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
    stored = sum(pruned.weights[name].numel() for name in pruned.weights if not any(part in name for part in left_out))
    # Norms before emptied attention and emptied plain FFNs are stored and not read.
    norms = 2 + sum(not layer.experts and not layer.ffn_channels for layer in pruned.shape.layers)
    assert read_parameters(pruned.shape) == stored - norms * pruned.shape.hidden_size
    assert pruned.shape.experts_per_token == {"deepseek_v3": 3, "dots1": 3}.get(family, 2)


def test_a_graph_holds_the_stacked_experts_bit_for_bit(tmp_path: Path) -> None:
    pruned = tiny_pruned("mixtral", tmp_path)
    export(pruned, tmp_path / "onnx", max_length=20)
    weights, layer = open_checkpoint(pruned).weights, "model.layers.1.mlp.experts"
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, turned in (("w1", False), ("w3", False), ("w2", True)):
        parts = [weights[f"{layer}.{expert}.{name}.weight"] for expert in range(3)]
        expected = torch.stack([part.T if turned else part for part in parts])
        assert np.array_equal(stored[f"{layer}.*.{name}.weight"], expected.numpy())
    biases = torch.stack([weights[f"{layer}.{expert}.w2.bias"] for expert in range(3)])
    assert np.array_equal(stored[f"{layer}.*.w2.bias"], biases.numpy())
