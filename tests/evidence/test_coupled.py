"""Scores of coupled weights against sums over the matrices of a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import PLAIN_FAMILIES, grouped_rows, plain_model, tiny_checkpoint, tokens_of
from torch import Tensor

from flap_export.errors import ModelError
from flap_export.evidence.coupled import GRADIENT_SEQUENCES, magnitude_scores, random_scores, taylor_scores
from flap_export.families import FAMILIES
from flap_export.models.opening import open_checkpoint
from flap_export.scoring import LayerScores
from flap_export.shapes import DecoderShape

Importance = dict[str, NDArray[np.float64]]
CALLED = {
    "out_proj": "o_proj",
    "fc1": "up_proj",
    "fc2": "down_proj",
    "fc_in": "up_proj",
    "fc_out": "down_proj",
    "attn.c_proj": "o_proj",
    "c_fc": "up_proj",
    "mlp.c_proj": "down_proj",
    "dense": "o_proj",
    "dense_h_to_4h": "up_proj",
    "dense_4h_to_h": "down_proj",
}


def separate(importance: Importance, family: str, shape: DecoderShape) -> Importance:
    """Fused projections apart."""
    layer, size = shape.layers[0], shape.head_dim
    query, kv, channels = layer.query_heads * size, layer.kv_heads * size, layer.ffn_channels
    # GPT-2 has two modules of one name, all of them transposed.
    found = {name if name.endswith("c_proj") else name.rpartition(".")[2]: value for name, value in importance.items()}
    if FAMILIES[family].stored.transposed:
        found = {name: value.T for name, value in found.items()}
    if "c_attn" in found:
        # One KV head or as many as query heads, space after space.
        found["q_proj"], found["k_proj"], found["v_proj"] = np.split(found.pop("c_attn"), [query, query + kv])
    if family == "codegen":
        # A head in each of its four blocks.
        found["query_key_value"] = found.pop("qkv_proj")
    if "query_key_value" in found:
        fused, group = found.pop("query_key_value"), layer.query_heads // layer.kv_heads
        rows = grouped_rows(range(layer.query_heads), range(layer.kv_heads), group, size)
        found |= {f"{name}_proj": fused[positions] for name, positions in rows.items()}
    if "Wqkv" in found:
        found["q_proj"], found["k_proj"], found["v_proj"] = np.split(found.pop("Wqkv"), [query, query + kv])
    if "qkv_proj" in found:
        found["q_proj"], found["k_proj"], found["v_proj"] = np.split(found.pop("qkv_proj"), [query, query + kv])
    if "gate_up_proj" in found:
        found["gate_proj"], found["up_proj"] = np.split(found.pop("gate_up_proj"), [channels])
    return {CALLED.get(name, name): value for name, value in found.items()}


def standard(values: list[float]) -> NDArray[np.float64]:
    array = np.array(values)
    return (array - array.mean()) / array.std(ddof=1)


def expected_scores(importance: Importance, path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of one layer: a head's rows of q, columns of o and its part of the KV head; a channel's rows and column."""
    checkpoint = open_checkpoint(path)
    shape = checkpoint.shape
    layer, size = shape.layers[0], shape.head_dim
    found = separate(importance, checkpoint.family.model_type, shape)
    group = layer.query_heads // layer.kv_heads
    heads, channels = [], []
    for head in range(layer.query_heads):
        own = slice(head * size, (head + 1) * size)
        shared = slice(head // group * size, (head // group + 1) * size)
        total = found["o_proj"][:, own].sum()
        of_group = 0.0 if shape.latent else found["v_proj"][shared].sum()
        # Where one norm runs over all of them, queries and keys of heads that go stay.
        if shape.latent is not None:
            queries = found["q_b_proj"].reshape(layer.query_heads, -1, found["q_b_proj"].shape[1])
            keys_and_values = found["kv_b_proj"].reshape(layer.query_heads, -1, found["kv_b_proj"].shape[1])
            heads.append(total + queries[head].sum() + keys_and_values[head].sum())
            continue
        if not layer.joint_query_heads:
            total, of_group = total + found["q_proj"][own].sum(), of_group + found["k_proj"][shared].sum()
        heads.append(total + of_group / group)
    for channel in range(layer.ffn_channels):
        gate = found["gate_proj"][channel].sum() if "gate_proj" in found else 0.0
        channels.append(gate + found["up_proj"][channel].sum() + found["down_proj"][:, channel].sum())
    return standard(heads), standard(channels)


def check(found: tuple[LayerScores, ...], importances: list[Importance], path: Path) -> None:
    assert len(found) == len(importances)
    for scores, importance in zip(found, importances, strict=True):
        heads, channels = expected_scores(importance, path)
        np.testing.assert_allclose(scores.query_heads.numpy(), heads, atol=1e-4)
        np.testing.assert_allclose(scores.ffn_channels.numpy(), channels, atol=1e-4)


def weights_of(model: Any, family: str, layer: int) -> dict[str, Tensor]:
    prefix = f"{FAMILIES[family].modules.layers}.{layer}."
    names = {f"{prefix}{projection.path}.weight": projection.path for projection in FAMILIES[family].projections}
    return {names[name]: weight for name, weight in model.named_parameters() if name in names}


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_magnitudes_are_squared_norms_of_all_that_leaves(family: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path / "dense", seed=4)
    model = plain_model(path)
    importances = [
        {name: weight.detach().double().square().numpy() for name, weight in weights_of(model, family, layer).items()}
        for layer in range(2)
    ]
    check(magnitude_scores(open_checkpoint(path)), importances, path)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_taylor_scores_are_weights_times_gradients_of_the_summed_loss(family: str, tmp_path: Path) -> None:
    """Next-token loss by hand, one sequence at a time, of the first ten."""
    path, tokens = tiny_checkpoint(family, tmp_path / "dense", seed=4), tokens_of(GRADIENT_SEQUENCES + 2, 7)
    model = plain_model(path).double()
    for sequence in tokens[:10]:
        log_probabilities = torch.log_softmax(model(input_ids=sequence[None], use_cache=False).logits[0].double(), -1)
        loss = -sum(log_probabilities[position, sequence[position + 1]] for position in range(6)) / 6
        loss.backward()  # type: ignore[union-attr]
    importances = [
        {
            name: (weight.detach() * weight.grad).abs().double().numpy()
            for name, weight in weights_of(model, family, layer).items()
            if weight.grad is not None
        }
        for layer in range(2)
    ]
    check(taylor_scores(open_checkpoint(path), tokens, dtype=torch.float64), importances, path)


def test_half_precision_multiplies_weights_and_gradients_in_double(tmp_path: Path) -> None:
    """Their products lie below the smallest half-precision number where both are as small as in large models."""
    path, tokens = tiny_checkpoint("llama", tmp_path / "dense", seed=4), tokens_of(GRADIENT_SEQUENCES, 7)
    model = plain_model(path)
    model.lm_head.weight.data *= 3e-3
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            projection.weight.data *= 0.05
    model.save_pretrained(path)
    model = plain_model(path, torch.float16)
    for sequence in tokens:
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), sequence[1:]).backward()  # type: ignore[no-untyped-call]
    importances = [
        {
            name: (w.detach().double() * w.grad.double()).abs().numpy()
            for name, w in weights.items()
            if w.grad is not None
        }
        for weights in (weights_of(model, "llama", layer) for layer in range(2))
    ]
    check(taylor_scores(open_checkpoint(path), tokens, dtype=torch.float16), importances, path)


def test_overflowing_gradients_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    model = plain_model(path)
    model.model.layers[0].mlp.up_proj.weight.data *= 3e4
    model.save_pretrained(path)
    with pytest.raises(ModelError, match=r"layer 0: gradients are NaN or infinite.*--dtype float32"):
        taylor_scores(open_checkpoint(path), tokens_of(2, 6), dtype=torch.float16)


def test_chance_follows_the_seed(tmp_path: Path) -> None:
    shape = open_checkpoint(tiny_checkpoint("llama", tmp_path / "dense")).shape
    one, same, other = (random_scores(shape, seed) for seed in (0, 0, 1))
    for scores, again in zip(one, same, strict=True):
        assert scores.query_heads.shape == (4,)
        assert scores.ffn_channels.shape == (40,)
        assert torch.equal(scores.query_heads, again.query_heads)
        assert torch.equal(scores.ffn_channels, again.ffn_channels)
    assert not torch.equal(one[0].ffn_channels, one[1].ffn_channels)
    assert not torch.equal(one[0].ffn_channels, other[0].ffn_channels)
