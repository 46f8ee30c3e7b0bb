"""Tiny random models of every family, plans that cut them unevenly, and their statistics.

Weights are large enough that every layer moves the logits, biases and norms are random too, so that a tensor that
is lost, swapped or cut wrongly shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from flap_export.calibration.stage import calibrate
from flap_export.calibration.statistics import CalibrationStatistics
from flap_export.families import EVERY_EXPERT, FAMILIES
from flap_export.families.rope import as_read
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.plan import LayerPlan, PruningPlan, Ratio
from flap_export.rewriting.checkpoint import MAX_SHARD_BYTES, write_checkpoint
from flap_export.rewriting.cutting import rewrite
from flap_export.rewriting.restoring import cut_only, mean_restorer
from flap_export.shapes import LayerShape

VOCABULARY = 89
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


def alternating(layers: int) -> list[str]:
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]


# Sizes of which no two are the same, nor that of a head of other families.
LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
}

# Mixtures behind a plain layer, whose experts stand in groups that are chosen first.
GROUPS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}

# What differs; `...` leaves a field out, a function is asked for as many values as there are layers.
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    # No gate; an activation with parameters; query and key norms.
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    # No gate; the square of what is positive.
    "arcee": {"rope_theta": 50.0},
    # Windows in all but every fourth layer.
    "cwm": {"head_dim": 12, "sliding_window": 6, "rope_theta": 50.0},
    # Keys and values of one latent, angles that are complex numbers; a plain layer in front, groups of experts.
    "deepseek_v2": {
        **LATENTS,
        "q_lora_rank": None,
        **GROUPS,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
    },
    # The same, queries of a latent of their own, and scores that yarn scales.
    "deepseek_v3": {
        **LATENTS,
        **GROUPS,
        "norm_topk_prob": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
        },
    },
    # A plain layer in front, groups of experts, a correction that changes which are chosen.
    "dots1": {
        "head_dim": 12,
        "sliding_window": 6,
        "max_window_layers": 1,
        **GROUPS,
        "norm_topk_prob": True,
    },
    # Neighbouring channels turn together.
    "ernie4_5": {"head_dim": 12, "rope_theta": 50.0},
    # Plain layers before and after the mixtures.
    "ernie4_5_moe": {
        "head_dim": 12,
        "rope_theta": 50.0,
        "moe_intermediate_size": 24,
        "moe_num_experts": 5,
        "moe_num_shared_experts": 2,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    # Llama's classes; its own names on disk.
    "exaone": {"head_dim": 12, "rope_theta": 50.0},
    # Norms behind the blocks, windows in every other layer; in the others no head turns.
    "exaone4": {"head_dim": 12, "sliding_window": 6, "sliding_window_pattern": 2, "rope_theta": 50.0},
    # The same before the blocks, and mixtures behind a plain layer, with two shared experts.
    "exaone_moe": {
        "head_dim": 12,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "rope_theta": 50.0,
        "moe_intermediate_size": 24,
        "num_experts": 5,
        "num_shared_experts": 2,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.7,
    },
    # Norms behind the blocks, and one norm over all queries, and over all keys.
    "flex_olmo": {"head_dim": 12, "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True},
    # Norms whose weights are offsets, embeddings scaled, heads that together are wider than the hidden size.
    "gemma": {"head_dim": 12},
    # Slopes in the place of positions; the FFN has 4 H channels.
    "bloom": {
        "intermediate_size": ...,
        "num_key_value_heads": ...,
        "max_position_embeddings": ...,
    },
    # As GPT-J; queries, values and keys in four blocks.
    "codegen": {"rotary_dim": 4, "n_inner": 40, "intermediate_size": ..., "num_key_value_heads": ...},
    # A norm of its own for every head; logits that are scaled.
    "cohere": {"use_qk_norm": True, "logit_scale": 0.7},
    # Windows in every other layer; the others do not turn.
    "cohere2": {"sliding_window": 6, "sliding_window_pattern": 2, "logit_scale": 0.7},
    # Caps that bite, windows in every other layer, scores scaled by something else than the head size.
    "gemma2": {
        "head_dim": 12,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "query_pre_attn_scalar": 5,
    },
    # Windows in every other layer, whose heads turn faster.
    "gemma3_text": {
        "head_dim": 12,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 5,
        "rope_theta": 700.0,
        "rope_local_base_freq": 15.0,
    },
    # The newer kind, with grouped queries and a norm of the FFN's own.
    "falcon": {
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "ffn_hidden_size": 40,
        "intermediate_size": ...,
        "num_key_value_heads": ...,
    },
    # Scores scaled by something else in every layer.
    "gpt2": {
        "n_inner": 40,
        "scale_attn_by_inverse_layer_idx": True,
        "intermediate_size": ...,
        "num_key_value_heads": ...,
    },
    # All query heads on one KV head.
    "gpt_bigcode": {"n_inner": 40, "intermediate_size": ..., "num_key_value_heads": ...},
    # Windows in every other layer; scores that are not scaled, of small heads.
    "gpt_neo": {
        "num_attention_heads": 8,
        "attention_types": lambda layers: [[["local", "global"] * (layers // 2) + ["local"] * (layers % 2), 1]],
        "window_size": 6,
        "num_key_value_heads": ...,
    },
    # Half of every head turns, by another base; biases everywhere; an FFN beside attention.
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 700, "num_key_value_heads": ...},
    # Half of every head turns, neighbours together; attention and FFN behind one norm.
    "gptj": {"rotary_dim": 4, "n_inner": 40, "intermediate_size": ..., "num_key_value_heads": ...},
    # Sinks beside the keys, windows in every other layer; experts that alternate in stacks, with bounds that bite.
    "gpt_oss": {
        "head_dim": 12,
        "sliding_window": 6,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 4.0,
            "attention_factor": 0.6,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    # Latents; layers that are mixtures by name.
    "glm4_moe_lite": {
        **LATENTS,
        "rope_theta": 50.0,
        "moe_intermediate_size": 24,
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.7,
        "mlp_layer_types": lambda layers: (["dense", "sparse"] * layers)[:layers],
    },
    # Multipliers of embeddings, residuals, scores and logits, of which none is what is usual.
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.6,
        "logits_scaling": 1.7,
    },
    # The same multipliers; sinks, windows, another base in every layer, and none in the first.
    "granite_swa": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.6,
        "logits_scaling": 1.7,
        "sliding_window": 6,
        "layer_types": alternating,
        "layer_rope_theta": lambda layers: [15.0 * index for index in range(layers)],
    },
    # The same multipliers around a mixture whose experts lie in two tensors.
    "granitemoe": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.1,
        "logits_scaling": 1.7,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    # Neighbouring channels turn together; o_proj is [H, H], whatever the heads are.
    "helium": {"head_dim": 8, "rope_theta": 50.0},
    # Multipliers as Granite's, of logits instead of their divisor; norms before and after the blocks.
    "hyperclovax": {
        "head_dim": 12,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.6,
        "logits_scaling": 0.6,
    },
    # Query and key norms after the rotary embedding, whose base is stretched.
    "hunyuan_v1_dense": {
        "head_dim": 12,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 30.0, "factor": 1.0, "alpha": 5.0},
    },
    # A shared expert that is as wide as every other one.
    "hunyuan_v1_moe": {"head_dim": 12, "num_experts": 5, "moe_topk": 2},
    # A plain layer in front; what routed and shared experts give is added in single precision.
    "hy_v3": {
        "head_dim": 12,
        "rope_theta": 50.0,
        "moe_intermediate_size": 24,
        "num_experts": 5,
        "num_shared_experts": 2,
        "num_experts_per_tok": 2,
        "router_scaling_factor": 1.7,
    },
    "iquestcoder": {"head_dim": 12, "rope_theta": 50.0},
    # Layer norms; no gate, the square of what is positive.
    "jais2": {"rope_theta": 50.0},
    "internlm3": {
        "head_dim": 12,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 6.0},
    },
    # A mixture in every other layer, and windows, whose heads turn faster.
    "mellum": {
        "head_dim": 12,
        "intermediate_size": 56,
        "moe_intermediate_size": 40,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": alternating,
        "mlp_layer_types": lambda layers: (["dense", "sparse"] * layers)[:layers],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 15.0},
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
        },
    },
    # One norm over all queries, one over all keys, half of every head turns.
    "minimax_m2": {"head_dim": 12, "rotary_dim": 6, "num_local_experts": 5, "num_experts_per_tok": 2},
    # Latents, halves of heads turning; embeddings, residuals and logits that are scaled.
    "minicpm3": {**LATENTS, "rope_theta": 50.0, "scale_emb": 3, "scale_depth": 1.1, "dim_model_base": 20},
    "ministral": {"head_dim": 12, "sliding_window": 6, "layer_types": alternating},
    # Queries that grow with their position, by steps of four tokens.
    "ministral3": {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.6,
        },
    },
    # Two pairs of neighbours in every head turn.
    "glm": {"head_dim": 12, "partial_rotary_factor": 0.34, "rope_theta": 50.0},
    "glm4": {"head_dim": 12, "partial_rotary_factor": 0.34, "rope_theta": 50.0},
    # A plain layer in front; weights of chosen experts as they are, times a factor.
    "glm4_moe": {
        "head_dim": 12,
        "use_qk_norm": True,
        "attention_bias": True,
        "moe_intermediate_size": 24,
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
    },
    "mistral": {"sliding_window": 6},
    # Experts as wide as the plain families' FFNs, of which two see every token.
    "mixtral": {"sliding_window": 6, "num_local_experts": 3, "num_experts_per_tok": 2},
    # ALiBi; queries, keys and values beyond the bound are cut off; scores scaled by something else; no biases at all.
    "mpt": {
        "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.6},
        "max_seq_len": 256,
        "intermediate_size": ...,
        "num_key_value_heads": ...,
        "max_position_embeddings": ...,
    },
    "nemotron": {"head_dim": 12, "partial_rotary_factor": 0.5},
    # Queries, keys and values beyond the bound are cut off.
    "olmo": {"clip_qkv": 1.0},
    # Norms behind the blocks, and one norm over all queries, and over all keys.
    "olmo2": {"head_dim": 12, "rope_theta": 50.0},
    # The same, with windows in every other layer, whose heads turn faster.
    "olmo3": {
        "head_dim": 12,
        "sliding_window": 6,
        "layer_types": alternating,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 15.0},
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
        },
    },
    # Normed queries, normed keys and values beyond the bound are cut off.
    "olmoe": {"clip_qkv": 0.8, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 40, "intermediate_size": ..., "num_key_value_heads": ...},
    # Norms of queries and keys, half of every head turns; no gate, the square of what is positive.
    "persimmon": {"partial_rotary_factor": 0.5, "rope_theta": 50.0, "num_key_value_heads": ...},
    # Four channels of eight turn.
    "phi": {"partial_rotary_factor": 0.5},
    # Half of every head turns.
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 7},
    # Multi-query attention.
    "qwen2": {"num_key_value_heads": 1},
    # Every other layer is plain; the shared expert has a gate and is wider than a routed one.
    "qwen2_moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 56,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
    },
    # The head size is stated and need not divide the hidden size.
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {
        "head_dim": 12,
        "intermediate_size": 56,
        "moe_intermediate_size": 40,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    # Biases of queries, keys and values, and none of the output.
    "seed_oss": {"head_dim": 12, "attention_bias": True},
    # In every other layer no head turns; those have windows.
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6, "rope_theta": 50.0},
    # A mixture with two shared experts in every layer.
    "solar_open": {
        "head_dim": 12,
        "moe_intermediate_size": 24,
        "n_routed_experts": 5,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 0.7,
        "rope_theta": 50.0,
    },
    # A quarter of every head turns; the same hidden states for attention and FFN, see also the tests of both kinds.
    "stablelm": {"partial_rotary_factor": 0.25, "use_parallel_residual": True, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": 6},
    # Windows in every other layer; the norms of Gemma 2 before the blocks only, and caps only where they are stated.
    "vaultgemma": {
        "head_dim": 12,
        "layer_types": alternating,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "query_pre_attn_scalar": 5,
    },
    # Norms without weights, also of queries and keys after they turned, backwards; capped logits.
    "nanochat": {"final_logit_softcapping": 4.0, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "youtu": {**LATENTS, "rope_theta": 50.0},
}
VERSION = Version(transformers.__version__).release
ALL_FAMILIES = sorted(
    family
    for family, row in FAMILIES.items()
    if Version(row.since).release <= VERSION and family in transformers.CONFIG_MAPPING
)
ALWAYS_MULTI_HEAD = ("bloom", "codegen", "gpt2", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "persimmon")
"""Families without grouped queries, whose heads are as wide as the hidden size gives."""
MIXTURES = [family for family in ALL_FAMILIES if FAMILIES[family].mixture]
PLAIN_FAMILIES = [family for family in ALL_FAMILIES if family not in MIXTURES]
"""Those whose FFN is linear modules in transformers; for the others see test_mixtures.py."""
OLD_FALCON: dict[str, Any] = {"new_decoder_architecture": False, "num_kv_heads": ...}
"""With this, one KV head for all, or one for each; one norm before attention and FFN side by side, or one each."""
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 123.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 100.0,
    },
}

LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 50.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.1, 1.7],
        "long_factor": [3.0, 9.0],
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings": 16,
    "sliding_window": None,
}
"""Phi-3 with long contexts: other factors for all tokens once there are more than 16."""


def tiny_config(family: str, **overrides: Any) -> Any:
    """A configuration of its own: transformers writes defaults into the dictionaries it is handed."""
    sizes = deepcopy({**SIZES, **FAMILY_SIZES.get(family, {}), **overrides})
    values = {name: value for name, value in sizes.items() if value is not ...}
    listed = {name: value(sizes["num_hidden_layers"]) for name, value in values.items() if callable(value)}
    names, generation = FAMILIES[family].rotary.names_in_4, int(transformers.__version__.partition(".")[0])
    return AutoConfig.for_model(family, **as_read({**values, **listed}, names, generation=generation))


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{path}.weight" for path, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.copy_(1 + noise if name in norms else noise)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


def tiny_checkpoint(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str | int = "5GB",
    **overrides: Any,
) -> Path:
    """Save a dense model of `family` with random weights; `overrides` go to its configuration."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)
    randomise(model, seed)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def plain_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it, with an attention that leaves nothing out (4.57's sdpa has no softcap)."""
    family = open_checkpoint(path).family
    experts = {"experts_implementation": "eager"} if family.mixture else {}
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=family.attention_kernel, **experts
    )


def experts_path(family: str) -> str:
    """Where the routed experts of a mixture are, below its layer."""
    return next(p.path.partition(f".{EVERY_EXPERT}")[0] for p in FAMILIES[family].projections if EVERY_EXPERT in p.path)


def expert_channels(experts: Any, expert: int, token: Tensor) -> Tensor:
    """What enters the down projection of one of transformers' stacked experts, by their own function of a gate.

    Args:
        experts: the module, whose weights are [in, out] in some families.
        expert: its number.
        token: [H]
    """
    weight = experts.gate_up_proj[expert]
    gate_up = token @ (weight if getattr(experts, "is_transposed", False) else weight.T)
    bias = getattr(experts, "gate_up_proj_bias", None)
    return experts._apply_gate(gate_up if bias is None else gate_up + bias[expert])


def expert_output(experts: Any, expert: int, channels: Tensor) -> Tensor:
    """What the down projection of one of transformers' stacked experts makes of its channels [F]."""
    weight, bias = experts.down_proj[expert], getattr(experts, "down_proj_bias", None)
    output = channels @ (weight if getattr(experts, "is_transposed", False) else weight.T)
    return output if bias is None else output + bias[expert]


def assert_same_logits(found: Tensor, expected: Tensor, family: str) -> None:
    """Bit for bit; but the gate and up products of experts, one in transformers and two here, round differently."""
    if family in MIXTURES:
        steps = {torch.bfloat16: 0.05, torch.float16: 0.01}
        tolerance = steps.get(found.dtype, 2e-5)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    else:
        assert torch.equal(found, expected)


def grouped_rows(query_heads: Sequence[int], kv_heads: Sequence[int], group: int, size: int) -> dict[str, list[int]]:
    """Rows of heads in a fused projection that holds, KV group after KV group, `group` queries, a key and a value."""

    def rows(positions: Sequence[int]) -> list[int]:
        return [position * size + i for position in positions for i in range(size)]

    return {
        "q": rows([head // group * (group + 2) + head % group for head in query_heads]),
        "k": rows([head * (group + 2) + group for head in kv_heads]),
        "v": rows([head * (group + 2) + group + 1 for head in kv_heads]),
    }


ROUTING = (
    "block_sparse_moe.router.",
    "mlp.gate.",
    "mlp.router.",
    "mlp.shared_expert_gate.",
    "mlp.e_score_correction_bias",
)
"""Beginnings of paths below a layer of what chooses and weighs experts, and is never cut."""


def is_routing(name: str) -> bool:
    return any(f".{part}" in name for part in ROUTING)


def expert_projections(family: str) -> tuple[str, str, str]:
    """Gate, up and down of one expert, as the family calls them."""
    return ("w1", "w3", "w2") if family in ("minimax_m2", "mixtral") else ("gate_proj", "up_proj", "down_proj")


def tokens_of(sequences: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def save_tokens(path: Path, tokens: Tensor) -> str:
    np.save(path, tokens.numpy())
    return str(path)


def tiny_statistics(checkpoint: Path, folder: Path, *, sequences: int = 6, length: int = 11) -> CalibrationStatistics:
    return calibrate(checkpoint, save_tokens(folder / "calibration.npy", tokens_of(sequences, length, seed=7)))


def layer_plan(checkpoint: Checkpoint, index: int, kv_heads: Sequence[int], ffn_channels: Sequence[int]) -> LayerPlan:
    """Keep whole KV groups and some channels."""
    layer = checkpoint.shape.layers[index]
    size = layer.query_heads // layer.kv_heads
    return LayerPlan(
        layer=index,
        query_heads=tuple(head * size + i for head in kv_heads for i in range(size)),
        kv_heads=tuple(kv_heads),
        **ffn_fields(layer, ffn_channels),
    )


def ffn_fields(layer: LayerShape, ffn_channels: Sequence[int]) -> dict[str, Any]:
    """Keep these channels, or in every expert as many but others: all shifted by the expert's number.

    A shared expert keeps the same, over and over again.
    """
    if not layer.experts:
        return {"ffn_channels": tuple(ffn_channels)}
    width = layer.ffn_channels
    shifted = [sorted((channel + expert) % width for channel in ffn_channels) for expert in range(layer.experts)]
    fields = {"experts": tuple(map(tuple, shifted))}
    if layer.shared_channels is None:
        return fields
    return {**fields, "shared_channels": tuple(c for c in range(layer.shared_channels) if c % width in ffn_channels)}


def plan_of(checkpoint: Checkpoint, layers: Sequence[LayerPlan]) -> PruningPlan:
    return PruningPlan(
        model=checkpoint.name,
        family=checkpoint.family.model_type,
        ratio=Ratio(requested=0.5, achieved=0.5),
        layers=tuple(layers),
    )


def keep_all_plan(checkpoint: Checkpoint) -> PruningPlan:
    layers = checkpoint.shape.layers
    return plan_of(
        checkpoint,
        [layer_plan(checkpoint, i, range(s.kv_heads), range(s.ffn_channels)) for i, s in enumerate(layers)],
    )


def uneven_plan(checkpoint: Checkpoint) -> PruningPlan:
    """Four layers: without heads, uneven, without channels, and without either.

    One query head of each KV group goes in the uneven layer, besides whole groups where there are several.
    """
    layer, second = checkpoint.shape.layers[:2]
    assert len(checkpoint.shape.layers) == 4
    size = layer.query_heads // layer.kv_heads
    last = layer.kv_heads - 1
    uneven = LayerPlan(
        layer=1,
        query_heads=tuple(last * size + i for i in range(min(1, size - 1), size)),
        kv_heads=(last,),
        **ffn_fields(second, range(1, second.ffn_channels, 3)),
    )
    return plan_of(
        checkpoint,
        [
            layer_plan(checkpoint, 0, [], range(0, layer.ffn_channels, 2)),
            uneven,
            layer_plan(checkpoint, 2, range(last, layer.kv_heads), []),
            layer_plan(checkpoint, 3, [], []),
        ],
    )


def save_pruned(
    dense: Path,
    plan: PruningPlan,
    directory: Path,
    statistics: CalibrationStatistics,
    *,
    compensation: Literal["none", "bias"] = "bias",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Cut `dense` as `plan` says, whatever the scores would have been."""
    checkpoint = open_checkpoint(dense)
    shape = plan.pruned_shape(checkpoint.shape, compensated=compensation != "none")
    directory.mkdir(parents=True)
    tensors = rewrite(checkpoint, plan, cut_only if compensation == "none" else mean_restorer(statistics))
    write_checkpoint(directory, checkpoint, plan, shape, tensors, max_shard_bytes=max_shard_bytes)
    return directory


def tiny_pruned(family: str, folder: Path, **overrides: Any) -> Path:
    """An uneven checkpoint of four layers; the dense one it came from is beside it, in `folder / "dense"`."""
    dense = tiny_checkpoint(family, folder / "dense", **{"num_hidden_layers": 4, **overrides})
    statistics = tiny_statistics(dense, folder)
    return save_pruned(dense, uneven_plan(open_checkpoint(dense)), folder / "pruned", statistics)
