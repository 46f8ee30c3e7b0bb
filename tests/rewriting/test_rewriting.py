"""The rewritten model against the dense one with removed channels held at their calibration mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ALL_FAMILIES,
    MIXTURES,
    OLD_FALCON,
    ROUTING,
    assert_same_logits,
    expert_channels,
    expert_output,
    expert_projections,
    experts_path,
    grouped_rows,
    is_routing,
    keep_all_plan,
    layer_plan,
    plain_model,
    plan_of,
    save_pruned,
    tiny_checkpoint,
    tiny_statistics,
    tokens_of,
    uneven_plan,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from flap_export.calibration.statistics import CUT_SPACES, CalibrationStatistics, cut_spaces
from flap_export.errors import ModelError, PlanError
from flap_export.families import FAMILIES, Family, Projection
from flap_export.models.attention import cache_argument
from flap_export.models.loading import MetaLayers, load_model, materialize
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.plan import LayerPlan, PruningPlan
from flap_export.rewriting.cutting import check_kind, cut, grouped_order, kept_channels, rewrite, rewrite_layer
from flap_export.rewriting.restoring import cut_only, mean_restorer

RESTORING = {
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "codegen": ("attn.out_proj", "mlp.fc_out"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_bigcode": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "persimmon": ("self_attn.dense", "mlp.dense_4h_to_h"),
    "nanochat": ("self_attn.o_proj", "mlp.fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
}
"""What families call the projections back to the residual stream, where it is not as in Llama."""
JOINTLY_NORMED = ("flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmoe")
NORM_NAMES = (
    "layernorm",
    "layer_norm",
    "ln_1",
    "ln_2",
    "ln_attn",
    "ln_mlp",
    "norm_1",
    "norm_2",
    "post_norm1",
    "post_norm2",
)
NORMS = tuple(f"{norm}.{kind}" for norm in NORM_NAMES for kind in ("weight", "bias"))
WIDENING = (
    "ffn.up_proj",
    "mlp.fc_in",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.fc1",
    "fc1",
    "mlp.dense_h_to_4h",
    "mlp.c_fc",
)
SHARED = {"qwen2_moe": "shared_expert", "hunyuan_v1_moe": "shared_mlp"}
LLAMA_BIASES = {"attention_bias": True, "mlp_bias": True}
_VARIANTS = [
    *[pytest.param(family, {}, id=family) for family in ALL_FAMILIES],
    *[pytest.param(family, {"tie_word_embeddings": True}, id=f"{family}-tied") for family in ALL_FAMILIES],
    pytest.param("bloom", {"apply_residual_connection_post_layernorm": True}, id="bloom-normed-residuals"),
    pytest.param("bloom", {"hidden_size": 48, "num_attention_heads": 6}, id="bloom-six-heads"),
    pytest.param("codegen", {"num_attention_heads": 8}, id="codegen-two-heads-in-a-block"),
    pytest.param("mpt", {"hidden_size": 48, "num_attention_heads": 6, "attn_config": {}}, id="mpt-six-heads"),
    pytest.param("falcon", {**OLD_FALCON, "bias": True}, id="falcon-mqa"),
    pytest.param("falcon", {**OLD_FALCON, "multi_query": False, "parallel_attn": False}, id="falcon-mha"),
    pytest.param("falcon", {"num_attention_heads": 8, "num_ln_in_parallel_attn": 1}, id="falcon-groups-of-four"),
    pytest.param("gpt_bigcode", {"multi_query": False}, id="gpt_bigcode-mha"),
    pytest.param("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}, id="gpt_neox-one-by-one"),
    pytest.param("llama", LLAMA_BIASES, id="llama-biases"),
    pytest.param("llama", {"num_key_value_heads": 4}, id="llama-mha"),
    pytest.param("llama", {"num_key_value_heads": 1, "mlp_bias": True}, id="llama-mqa"),
    pytest.param("qwen3", {"attention_bias": True}, id="qwen3-biases"),
    pytest.param("gemma2", {"attention_bias": True}, id="gemma2-biases"),
    pytest.param("opt", {"enable_bias": False, "do_layer_norm_before": False}, id="opt-no-biases-norms-after"),
    pytest.param("starcoder2", {"use_bias": False}, id="starcoder2-no-biases"),
    pytest.param("cohere", {"use_qk_norm": False, "attention_bias": True}, id="cohere-plain-heads"),
    pytest.param("cohere", {"num_key_value_heads": 4}, id="cohere-mha"),
    pytest.param("phi", {"qk_layernorm": True}, id="phi-norms"),
    pytest.param("olmo2", {"attention_bias": True}, id="olmo2-biases"),
    pytest.param("olmo2", {"num_key_value_heads": 4}, id="olmo2-mha"),
    pytest.param("olmo2", {"num_attention_heads": 8}, id="olmo2-groups-of-four"),
    pytest.param("olmoe", {"attention_bias": True, "num_key_value_heads": 4}, id="olmoe-mha-biases"),
    pytest.param("qwen3_moe", {"mlp_only_layers": [0, 2]}, id="qwen3_moe-plain-layers"),
    pytest.param("qwen2_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [3]}, id="qwen2_moe-plain-end"),
    pytest.param("ernie4_5_moe", {"moe_num_shared_experts": 0}, id="ernie4_5_moe-none-shared"),
    pytest.param("dots1", {"first_k_dense_replace": 0}, id="dots1-all-mixtures"),
]
VARIANTS = [variant for variant in _VARIANTS if variant.values[0] in ALL_FAMILIES]


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def masked_dense_logits(
    dense: Path, plan: PruningPlan, tokens: Tensor, statistics: CalibrationStatistics | None
) -> Tensor:
    """Logits of the dense model, by transformers alone, whose removed channels stay at their mean (or at zero)."""
    checkpoint = open_checkpoint(dense)
    model = plain_model(dense)
    for index, kept_units in enumerate(plan.layers):
        layer = model.get_submodule(f"{checkpoint.family.modules.layers}.{index}")
        for space in cut_spaces(checkpoint.shape.layers[index]):
            if space == "ffn" and kept_units.experts:
                means = statistics.sites[index, space].mean.float() if statistics else None
                experts = layer.get_submodule(experts_path(checkpoint.family.model_type))
                hold_experts(experts, kept_units.experts, means)
                continue
            mean = statistics.sites[index, space].mean.float() if statistics else None
            module = layer.get_submodule(checkpoint.family.restoring(space, checkpoint.shape.layers[index]).path)
            kept = kept_positions(checkpoint, kept_units, space)
            inputs = module.nx if isinstance(module, Conv1D) else module.in_features
            removed = [i for i in range(inputs) if i not in kept]

            def hold(_: nn.Module, inputs: Any, removed: list[int] = removed, mean: Tensor | None = mean) -> Any:
                held = inputs[0].clone()
                held[..., removed] = 0 if mean is None else mean[removed]
                return (held,)

            module.register_forward_pre_hook(hold)
    return logits_of(model, tokens)


def hold_experts(module: Any, kept: Sequence[Sequence[int]], means: Tensor | None) -> None:
    """Let transformers' stacked experts see removed channels at their mean (or at zero), token by token."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for expert, weight in zip(chosen, weights, strict=True):
                channels = expert_channels(module, expert, hidden_states[token])
                removed = [i for i in range(len(channels)) if i not in kept[expert]]
                channels[removed] = 0 if means is None else means[expert, removed]
                output[token] += weight * expert_output(module, expert, channels)
        return output

    module.forward = forward


def kept_positions(checkpoint: Checkpoint, plan: Any, space: str) -> set[int]:
    size = checkpoint.shape.head_dim
    if space in ("ffn", "shared"):
        return set(plan.ffn_channels if space == "ffn" else plan.shared_channels)
    return {head * size + i for head in plan.query_heads for i in range(size)}


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_pruned_equals_dense_with_removed_channels_at_their_mean(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    dense = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=4, **overrides)
    plan, statistics = uneven_plan(open_checkpoint(dense)), tiny_statistics(dense, tmp_path)
    tokens = tokens_of(2, 13)
    for compensation, held in (("bias", statistics), ("none", None)):
        pruned = save_pruned(dense, plan, tmp_path / compensation, statistics, compensation=compensation)
        found = logits_of(load_model(pruned, dtype=torch.float32), tokens)
        expected = masked_dense_logits(dense, plan, tokens, held)
        assert expected.std() > 0.5, "logits too flat to tell anything"
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    with_bias = masked_dense_logits(dense, plan, tokens, statistics)
    assert (with_bias - expected).abs().max() > 0.1, "compensation changed nothing, the comparison proves nothing"


@pytest.mark.parametrize("family", [family for family in JOINTLY_NORMED if family in ALL_FAMILIES])
def test_heads_normed_together_decode_as_if_the_others_were_mute(family: str, tmp_path: Path) -> None:
    """Prefill, a chunk and single tokens over caches of fewer heads, against a dense model whose o_proj ignores them.

    Whole groups go in the first layer, a query head of every group in the second, and both in the third.
    """
    dense = tiny_checkpoint(
        family, tmp_path / "dense", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4
    )
    checkpoint = open_checkpoint(dense)
    every = range(checkpoint.shape.layers[0].ffn_channels)
    kept = [((2, 3, 6, 7), (1, 3)), ((1, 2, 5, 6), (0, 1, 2, 3)), ((1, 7), (0, 3)), (tuple(range(8)), (0, 1, 2, 3))]
    plans = [layer_plan(checkpoint, index, kv_heads, every) for index, (_, kv_heads) in enumerate(kept)]
    plan = plan_of(
        checkpoint,
        [own.model_copy(update={"query_heads": heads}) for own, (heads, _) in zip(plans, kept, strict=True)],
    )
    pruned = tmp_path / "pruned"
    save_pruned(dense, plan, pruned, tiny_statistics(dense, tmp_path), compensation="none")
    reference, size = plain_model(dense), checkpoint.shape.head_dim
    for (heads, _), layer in zip(kept, reference.model.layers, strict=True):
        gone = [head * size + i for head in range(8) if head not in heads for i in range(size)]
        layer.self_attn.o_proj.weight.data[:, gone] = 0
    loaded = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = tokens_of(2, 17)
    expected = logits_by_pieces(reference, tokens, [8] * 4, [4] * 4)
    assert expected.std() > 0.5
    torch.testing.assert_close(expected, logits_of(reference, tokens), atol=2e-4, rtol=1e-4)
    for model in (loaded, load_model(pruned, dtype=torch.float32)):
        found = logits_by_pieces(model, tokens, [4, 4, 2, 8], [2, 4, 2, 4])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def logits_by_pieces(model: Any, tokens: Tensor, query_heads: list[int], kv_heads: list[int]) -> Tensor:
    """Of prompt, chunk and single tokens, each with the cache of those before."""
    cache, found = DynamicCache(config=model.config), []
    for piece in torch.split(tokens, [7, 5, *[1] * (tokens.shape[1] - 12)], dim=1):
        found.append(model(input_ids=piece, use_cache=True, **{cache_argument(model): cache}).logits)
    assert [layer.keys.shape[1] for layer in cache.layers] == kv_heads
    widths = [layer.self_attn.o_proj.in_features // layer.self_attn.head_dim for layer in model.model.layers]
    assert widths == query_heads
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_kept_weights_are_slices_and_biases_are_added(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """In bfloat16: every tensor is cut out of the dense one bit for bit, but for the compensated biases."""
    dense = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=4, dtype=torch.bfloat16, **overrides)
    checkpoint, statistics = open_checkpoint(dense), tiny_statistics(dense, tmp_path)
    plan = uneven_plan(checkpoint)
    yielded = list(rewrite(checkpoint, plan, mean_restorer(statistics)))
    found = dict(yielded)
    assert len(found) == len(yielded), "a tensor was given twice, and may land in two shards"
    expected = expected_tensors(checkpoint, plan, statistics)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        # Transformers saves some routers in single precision.
        assert found[name].dtype == (tensor.dtype if is_routing(name) else torch.bfloat16), name
        assert found[name].is_contiguous(), name
        assert torch.equal(found[name], tensor), name


def expected_tensors(checkpoint: Checkpoint, plan: PruningPlan, statistics: CalibrationStatistics) -> dict[str, Tensor]:
    """Written out by hand, projection by projection."""
    dense = {name: checkpoint.weights[name] for name in checkpoint.weights}
    expected = {name: tensor for name, tensor in dense.items() if not name.startswith(checkpoint.family.modules.layers)}
    size, layer = checkpoint.shape.head_dim, checkpoint.shape.layers[0]
    queries, keys = layer.query_heads * size, layer.kv_heads * size
    attention = f"{checkpoint.family.modules.attention}."
    output, down = RESTORING.get(checkpoint.family.model_type, ("self_attn.o_proj", "mlp.down_proj"))

    def heads(indices: tuple[int, ...]) -> list[int]:
        return [head * size + i for head in indices for i in range(size)]

    for index, kept in enumerate(plan.layers):
        prefix = f"{checkpoint.family.modules.layers}.{index}."
        rows = {"q": heads(kept.query_heads), "k": heads(kept.kv_heads), "v": heads(kept.kv_heads)}
        if checkpoint.family.model_type in JOINTLY_NORMED:
            # All rows stay, those of kept heads before the others.
            rows |= {"q": kept_first(rows["q"], queries), "k": kept_first(rows["k"], keys)}
        rows["qkv"] = [*rows["q"], *(queries + i for i in rows["k"]), *(queries + keys + i for i in rows["v"])]
        grouped = grouped_rows(kept.query_heads, kept.kv_heads, layer.query_heads // layer.kv_heads, size)
        rows["query"] = sorted(row for part in grouped.values() for row in part)
        rows["c"] = rows["query"] if checkpoint.family.model_type == "gpt_bigcode" else rows["qkv"]
        rows["Wqkv.weight"] = rows["qkv"]
        if checkpoint.family.model_type == "codegen":
            rows["qkv"] = head_by_head(kept.query_heads, layer.query_heads // 4, size)
        channels = list(kept.ffn_channels)
        expected |= expected_experts(checkpoint, index, kept, statistics.sites[index, "ffn"].mean)
        shared = f"mlp.{SHARED.get(checkpoint.family.model_type, 'shared_experts')}"
        gate_and_up = [*channels, *(layer.ffn_channels + i for i in channels)]
        for name in [name for name in dense if name.startswith(prefix)]:
            tensor, path = dense[name], name.removeprefix(prefix)
            is_of_heads = path.startswith(attention) and "norm." in path and "_a_" not in path
            if "_a_" in path:
                # What makes latents stays as it is while there are heads.
                if kept.query_heads:
                    expected[name] = tensor
                continue
            if checkpoint.family.latent and path.startswith(attention):
                # Queries of 10 + 6 channels; keys of 10, which do not turn, and values of 12.
                rows["q"] = [head * 16 + i for head in kept.query_heads for i in range(16)]
                rows["kv"] = [head * 22 + i for head in kept.kv_heads for i in range(22)]
            if (path.startswith(ROUTING) or path.endswith(NORMS)) and not is_of_heads:
                expected[name] = tensor
            elif path == "self_attn.sinks":
                if kept.query_heads:
                    expected[name] = tensor[list(kept.query_heads)]
            elif is_of_heads:
                heads_of = kept.query_heads if path.startswith("self_attn.q") else kept.kv_heads
                if checkpoint.family.model_type in JOINTLY_NORMED and kept.query_heads:
                    expected[name] = tensor[rows[path.removeprefix(attention).partition("_")[0]]]
                elif kept.query_heads:
                    expected[name] = tensor[list(heads_of)] if tensor.ndim == 2 else tensor
            elif path.startswith(f"{output}."):
                continue
            elif path.startswith(attention) and path.removeprefix(attention).partition("_")[0] in rows:
                if kept.query_heads:
                    expected[name] = tensor[rows[path.removeprefix(attention).partition("_")[0]]]
            elif path.startswith("mlp.gate_up_proj") and channels:
                expected[name] = tensor[gate_and_up]
            elif path.startswith("mlp.act_fn.") and channels:
                expected[name] = tensor
            elif path.startswith(WIDENING) and channels:
                expected[name] = tensor[channels]
            elif path.startswith((f"{shared}.gate_proj", f"{shared}.up_proj")) and kept.shared_channels:
                expected[name] = tensor[list(kept.shared_channels)]
        restoring = [(output, "query", heads(kept.query_heads))]
        if not kept.experts:
            restoring.append((down, "ffn", channels))
        if kept.shared_channels is not None:
            restoring.append((f"{shared}.down_proj", "shared", list(kept.shared_channels)))
        for path, space, columns in restoring:
            weight = dense[f"{prefix}{path}.weight"]
            if columns:
                expected[f"{prefix}{path}.weight"] = weight[:, columns]
            bias = dense.get(f"{prefix}{path}.bias")
            gone = [i for i in range(weight.shape[1]) if i not in columns]
            if gone:
                mean = statistics.sites[index, space].mean
                added = weight[:, gone].double() @ mean[gone]
                bias = (added if bias is None else bias.double() + added).to(weight.dtype)
            if bias is not None:
                expected[f"{prefix}{path}.bias"] = bias
    return expected


def kept_first(kept: list[int], count: int) -> list[int]:
    return [*kept, *(row for row in range(count) if row not in kept)]


def head_by_head(heads: Sequence[int], in_block: int, size: int) -> list[int]:
    """Rows of query, value and key of one head after another, from blocks of as many queries, values and keys."""
    starts = [(head // in_block * 3 + part) * in_block + head % in_block for head in heads for part in range(3)]
    return [start * size + i for start in starts for i in range(size)]


def expected_experts(checkpoint: Checkpoint, index: int, kept: LayerPlan, means: Tensor) -> dict[str, Tensor]:
    gate, up, down = expert_projections(checkpoint.family.model_type)
    expected, weights = {}, checkpoint.weights
    for expert, channels in enumerate(kept.experts):
        prefix = f"model.layers.{index}.{experts_path(checkpoint.family.model_type)}.{expert}."
        if channels:
            widening = [f"{prefix}{name}.{kind}" for name in (gate, up) for kind in ("weight", "bias")]
            expected |= {name: weights[name][list(channels)] for name in widening if name in weights}
            expected[f"{prefix}{down}.weight"] = weights[f"{prefix}{down}.weight"][:, list(channels)]
        gone = [i for i in range(means.shape[1]) if i not in channels]
        name = f"{prefix}{down}.bias"
        # The weights are no dictionary.
        bias = weights[name] if name in weights else None  # noqa: SIM401
        if gone:
            weight = weights[f"{prefix}{down}.weight"]
            added = weight[:, gone].double() @ means[expert, gone]
            bias = (added if bias is None else bias.double() + added).to(weight.dtype)
        if bias is not None:
            expected[name] = bias
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_plan_that_keeps_everything_changes_no_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    overrides = LLAMA_BIASES if family == "llama" else {}
    dense = tiny_checkpoint(family, tmp_path / "dense", dtype=dtype, **overrides)
    checkpoint, statistics = open_checkpoint(dense), tiny_statistics(dense, tmp_path)
    same = save_pruned(dense, keep_all_plan(checkpoint), tmp_path / "same", statistics)
    tokens = tokens_of(2, 9)
    assert open_checkpoint(same).shape == checkpoint.shape
    expected = logits_of(plain_model(dense, dtype), tokens)
    assert_same_logits(logits_of(load_model(same, dtype=dtype), tokens), expected, family)
    assert torch.equal(
        logits_of(load_model(same, dtype=dtype), tokens), logits_of(load_model(dense, dtype=dtype), tokens)
    )


@pytest.mark.parametrize("compensation", ["bias", "none"])
@pytest.mark.parametrize("family", ["llama", "qwen3", *MIXTURES])
def test_a_decoder_without_any_head_or_channel(family: str, compensation: Any, tmp_path: Path) -> None:
    overrides = {"llama": LLAMA_BIASES, "mixtral": {}}.get(family, {"attention_bias": True})
    dense = tiny_checkpoint(family, tmp_path / "dense", **overrides)
    checkpoint, statistics = open_checkpoint(dense), tiny_statistics(dense, tmp_path)
    plan = plan_of(checkpoint, [layer_plan(checkpoint, index, [], []) for index in range(2)])
    pruned = save_pruned(dense, plan, tmp_path / "pruned", statistics, compensation=compensation)
    tokens = tokens_of(2, 9)
    expected = masked_dense_logits(dense, plan, tokens, statistics if compensation == "bias" else None)
    torch.testing.assert_close(
        logits_of(load_model(pruned, dtype=torch.float32), tokens), expected, atol=1e-5, rtol=1e-5
    )


def test_the_plan_is_checked_before_anything_is_yielded(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    checkpoint = open_checkpoint(dense)
    plan = keep_all_plan(checkpoint)
    short = plan.model_copy(update={"layers": plan.layers[:1]})
    with pytest.raises(PlanError, match="1 layers, the model 2"):
        next(rewrite(checkpoint, short, cut_only))


def test_kept_channels_are_whole_heads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("qwen3", tmp_path / "dense", num_hidden_layers=4))
    kept = kept_channels(uneven_plan(checkpoint).layers[1], checkpoint.shape)
    assert kept["hidden"] is None
    assert kept["query"] is not None
    assert kept["query"].tolist() == list(range(36, 48))
    assert kept["kv"] is not None
    assert kept["kv"].tolist() == list(range(12, 24))


def test_fused_outputs_are_cut_space_by_space() -> None:
    """Phi-3's q, k and v stand in one matrix."""
    fused = FAMILIES["phi3"].projection("self_attn.qkv_proj")
    assert fused is not None
    weight = torch.arange(8 * 3).view(8, 3)
    widths = {"hidden": 3, "query": 4, "kv": 2, "ffn": 1}
    kept = {"hidden": None, "query": torch.tensor([2, 3]), "kv": torch.tensor([1]), "ffn": None}
    assert torch.equal(cut(weight, fused, "weight", kept, widths), weight[[2, 3, 5, 7]])
    only_query = {**kept, "kv": None}
    assert torch.equal(cut(weight[:, 0], fused, "bias", only_query, widths), weight[[2, 3, 4, 5, 6, 7], 0])


@pytest.mark.parametrize("biased", [False, True], ids=["weight", "bias"])
def test_fused_outputs_are_cut_group_by_group(biased: bool) -> None:
    """Two KV groups of three query heads of two channels: q0 q1 q2 k0 v0, q3 q4 q5 k1 v1."""
    fused = Projection("fused", "hidden", ("query", "kv", "kv"), blocks=None)
    heads = ["q0", "q1", "q2", "k0", "v0", "q3", "q4", "q5", "k1", "v1"]
    names = [f"{head}.{i}" for head in heads for i in range(2)]
    weight = torch.arange(20 * 3).view(20, 3)
    tensor = weight[:, 0] if biased else weight
    widths = {"hidden": 3, "query": 12, "kv": 4, "ffn": 1}

    def rows(query: list[int] | None, kv: list[int] | None) -> list[str]:
        units = {"query": query, "kv": kv}
        kept: Any = {
            "hidden": None,
            "ffn": None,
            **{
                space: None if found is None else torch.tensor([2 * head + i for head in found for i in range(2)])
                for space, found in units.items()
            },
        }
        found = cut(tensor, fused, "bias" if biased else "weight", kept, widths, 2)
        assert found.is_contiguous()
        return [names[int(row) // 3] for row in (found if biased else found[:, 0])]

    assert rows(None, None) == names
    assert rows([4, 5], [1]) == ["q4.0", "q4.1", "q5.0", "q5.1", "k1.0", "k1.1", "v1.0", "v1.1"]
    one_of_each = rows([1, 3], None)
    assert one_of_each[::2] == ["q1.0", "k0.0", "v0.0", "q3.0", "k1.0", "v1.0"]
    assert rows([], []) == []


def test_outputs_in_blocks_of_several_heads_are_cut_head_by_head() -> None:
    """What stays would not fill the blocks evenly."""
    fused = Projection("fused", "hidden", ("query", "kv", "kv"), blocks=2)
    names = ["q0", "q1", "v0", "v1", "k0", "k1", "q2", "q3", "v2", "v3", "k2", "k3"]
    widths: Any = {"hidden": 1, "query": 4, "kv": 4, "ffn": 1}

    def rows(heads: list[int] | None) -> list[str]:
        kept = None if heads is None else torch.tensor(heads, dtype=torch.int64)
        found = cut(torch.arange(12), fused, "bias", {"hidden": None, "query": kept, "kv": kept}, widths, 4)
        return [names[int(row)] for row in found]

    assert rows(None) == names
    assert rows([0, 2, 3]) == ["q0", "v0", "k0", "q2", "v2", "k2", "q3", "v3", "k3"]
    assert rows([1]) == ["q1", "v1", "k1"]
    assert rows([]) == []


@pytest.mark.skipif("codegen" not in ALL_FAMILIES, reason="needs transformers 5.24")
@pytest.mark.parametrize("heads", [(0, 3, 5, 6, 7), (1, 2), tuple(range(8))], ids=str)
def test_any_heads_of_codegen_stay(heads: tuple[int, ...], tmp_path: Path) -> None:
    """Two heads in each of its four blocks; five heads fill none of them evenly."""
    dense = tiny_checkpoint("codegen", tmp_path / "dense", num_attention_heads=8)
    checkpoint, tokens = open_checkpoint(dense), tokens_of(2, 13)
    plan = plan_of(checkpoint, [layer_plan(checkpoint, 0, heads, range(40)), layer_plan(checkpoint, 1, [4], range(9))])
    pruned = save_pruned(dense, plan, tmp_path / "pruned", tiny_statistics(dense, tmp_path), compensation="none")
    found = logits_of(load_model(pruned, dtype=torch.float32), tokens)
    torch.testing.assert_close(found, masked_dense_logits(dense, plan, tokens, None), atol=1e-5, rtol=1e-5)


def test_grouped_outputs_in_the_order_of_spaces() -> None:
    """One query head a group is what multi-head attention has; with one group, spaces stand one after another."""
    assert grouped_order([4, 2, 2], 2).tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert grouped_order([2, 2, 2], 2).tolist() == [0, 2, 4, 1, 3, 5]
    assert grouped_order([4, 2, 2], 1).tolist() == list(range(8))


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_attention_and_ffn_together_are_the_layer(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Each tensor in one of the parts, the same as in the whole; and all that a layer of that shape has."""
    dense = tiny_checkpoint(family, tmp_path / "dense", **{"num_hidden_layers": 4, **overrides})
    checkpoint = open_checkpoint(dense)
    plan, restore = uneven_plan(checkpoint), mean_restorer(tiny_statistics(dense, tmp_path))
    layers = MetaLayers(checkpoint, torch.float32)
    for index, layer in enumerate(plan.layers):
        kept = kept_channels(layer, checkpoint.shape)
        whole = dict(rewrite_layer(checkpoint, index, kept, restore))
        attention, ffn = (dict(rewrite_layer(checkpoint, index, kept, restore, (part,))) for part in CUT_SPACES)
        assert not attention.keys() & ffn.keys()
        assert attention.keys() | ffn.keys() == whole.keys()
        for name, tensor in (attention | ffn).items():
            assert torch.equal(tensor, whole[name]), name
        # A part does not depend on what becomes of the other one.
        for part, found in (("query", attention), ("ffn", ffn)):
            own = {"ffn", "shared"}
            if part == "query":
                own = {"query", "kv", "joint_query", "joint_key", "score", "key_value"}
            alone = {space: channels if space in own else None for space, channels in kept.items()}
            again = dict(rewrite_layer(checkpoint, index, alone, restore, (part,)))
            assert again.keys() == found.keys()
            assert all(torch.equal(tensor, found[name]) for name, tensor in again.items())
        made = layers.made(index, layer.shape(checkpoint.shape.layers[index], compensated=True))
        prefix = f"{checkpoint.family.modules.layers}.{index}."
        assert {f"{prefix}{name}" for name in made.state_dict()} == whole.keys()
        assert all(parameter.is_meta for parameter in made.parameters())
        parameters = ((name.removeprefix(prefix), tensor) for name, tensor in whole.items())
        materialize(made, parameters, dtype=torch.float32, device="cpu")
        for name, tensor in made.state_dict().items():
            assert torch.equal(tensor, whole[f"{prefix}{name}"]), name


def test_quantised_projections_are_refused() -> None:
    projection = FAMILIES["llama"].projection("self_attn.q_proj")
    assert projection is not None
    with pytest.raises(ModelError, match=r"self_attn\.q_proj.*'qweight'.*quantised.*full-precision"):
        check_kind(projection, "qweight")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_a_restoring_projection_undoes_every_cut_space(family: Family) -> None:
    for space in CUT_SPACES:
        assert family.restoring(space).outputs == ("hidden",)
        beside = {"query": "score" if family.latent else "joint_query", "ffn": None}[space]
        joint = beside in family.heads.parameters.values()
        assert family.has_space(beside) if joint else family.has_space(space)
        assert any({space, beside} & {*projection.outputs} for projection in family.projections)
