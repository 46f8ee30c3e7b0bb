"""Configurations as they are published on the hub, in the fields that matter: accepted, and of the stated size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_FAMILIES

from flap_export.ideal import stored_parameters
from flap_export.models.attention import rotary_modules
from flap_export.models.loading import meta_model
from flap_export.models.opening import open_checkpoint

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any) -> Any:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **others,
    }


GPT_OSS = sizes(
    2880, 2880, 36, 64, 8, 201088, head_dim=64, sliding_window=128, rope_theta=150000, hidden_act="silu"
) | {
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}
LATENTS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
YARN_40 = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
PUBLISHED: dict[str, tuple[str, float, dict[str, Any]]] = {
    "apertus-8b-2509": (
        "apertus",
        8.05,
        sizes(4096, 21504, 32, 32, 8, 131072)
        | {"hidden_act": "xielu", "mlp_bias": False, "post_norm": False, "qk_norm": True, "rope_theta": 12000000}
        | {"rope_scaling": {**LLAMA3, "rope_type": "llama3", "type": "llama3"}, "tie_word_embeddings": False},
    ),
    "afm-4.5b": (
        "arcee",
        4.62,
        sizes(2560, 18432, 36, 20, 4, 128004, head_dim=128, hidden_act="relu2", rope_theta=10000.0)
        | {
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 20.0,
                "mscale": 1.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "type": "yarn",
            }
        },
    ),
    "cwm": (
        "cwm",
        32.58,
        sizes(6144, 21504, 64, 48, 8, 128256, head_dim=128, sliding_window=8192, rope_theta=1000000.0)
        | {"layer_types": ["sliding_attention" if index % 4 else "full_attention" for index in range(64)]}
        | {"rope_scaling": {**LLAMA3, "factor": 16.0, "rope_type": "llama3"}},
    ),
    "ernie-4.5-0.3b-pt": (
        "ernie4_5",
        0.36,
        sizes(1024, 3072, 18, 16, 2, 103424, head_dim=128, use_bias=False, rope_theta=500000.0)
        | {"hidden_dropout_prob": 0.0, "compression_ratio": 1.0, "rope_scaling": None, "tie_word_embeddings": True},
    ),
    "ernie-4.5-21b-a3b-pt": (
        "ernie4_5_moe",
        21.83,
        sizes(2560, 12288, 28, 20, 4, 103424, use_bias=False, rope_theta=500000.0, tie_word_embeddings=True)
        | {"moe_capacity": [64, 64, 64], "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_interval": 1}
        | {"moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1},
    ),
    "exaone-4.0-1.2b": (
        "exaone4",
        1.28,
        sizes(2048, 4096, 30, 32, 8, 102400, head_dim=64, sliding_window=None, sliding_window_pattern=None)
        | {"layer_types": ["full_attention"] * 30, "rope_scaling": {**LLAMA3, "factor": 16.0, "rope_type": "llama3"}}
        | {"rope_theta": 1000000, "tie_word_embeddings": True},
    ),
    "exaone-4.0-32b": (
        "exaone4",
        32.0,
        sizes(5120, 27392, 64, 40, 8, 102400, head_dim=128, sliding_window=4096, sliding_window_pattern="LLLG")
        | {"layer_types": ["full_attention" if index % 4 == 3 else "sliding_attention" for index in range(64)]}
        | {"rope_scaling": {**LLAMA3, "factor": 16.0, "rope_type": "llama3"}, "rope_theta": 1000000},
    ),
    "exaone-3.5-7.8b-instruct": (
        "exaone",
        7.82,
        {
            "activation_function": "silu",
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "layer_norm_epsilon": 1e-05,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_layers": 32,
            "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "vocab_size": 102400,
        },
    ),
    "gemma-2b": (
        "gemma",
        2.51,
        sizes(2048, 16384, 18, 8, 1, 256000, head_dim=256, hidden_act="gelu", hidden_activation=None)
        | {"rope_scaling": None, "rope_theta": 10000.0},
    ),
    "granite-3.3-8b-instruct": (
        "granite",
        8.17,
        sizes(4096, 12800, 40, 32, 8, 49159, attention_bias=False, mlp_bias=False, tie_word_embeddings=True)
        | {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 16.0}
        | {"residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000000.0},
    ),
    "helium-1-preview-2b": (
        "helium",
        2.17,
        sizes(2560, 7040, 24, 20, 20, 48000, head_dim=128, rms_norm_eps=1e-08, rope_theta=100000.0, pretraining_tp=1),
    ),
    "hunyuan-7b-instruct": (
        "hunyuan_v1_dense",
        7.50,
        sizes(4096, 14336, 32, 32, 8, 128167, head_dim=128, attention_head_dim=128, tie_word_embeddings=True)
        | {"use_qk_norm": True, "use_cla": False, "cla_share_factor": 2, "norm_type": "rms", "rope_theta": 10000.0}
        | {
            "rope_scaling": {
                "alpha": 1000.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.0,
                "type": "dynamic",
            }
        },
    ),
    "internlm3-8b-instruct": (
        "internlm3",
        8.80,
        sizes(4096, 10240, 48, 32, 2, 128512, head_dim=128, bias=False, qkv_bias=False, rope_theta=50000000)
        | {"rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}}
        | {"auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config"}},
    ),
    "ministral-8b-instruct-2410": (
        "ministral",
        8.02,
        sizes(4096, 12288, 36, 32, 8, 131072, head_dim=128, sliding_window=32768, rope_theta=100000000.0)
        | {"layer_types": ["sliding_attention" if index % 4 else "full_attention" for index in range(36)]},
    ),
    "ministral-3-8b-base-2512, its text model": (
        "ministral3",
        8.49,
        sizes(4096, 14336, 34, 32, 8, 131072, head_dim=128, sliding_window=None, max_position_embeddings=262144)
        | {
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
            }
        },
    ),
    "qwen1.5-moe-a2.7b": (
        "qwen2_moe",
        14.32,
        sizes(2048, 5632, 24, 16, 16, 151936, use_sliding_window=False, sliding_window=32768, max_window_layers=21)
        | {"moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False}
        | {"shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "rope_theta": 1000000.0},
    ),
    "seed-oss-36b-instruct": (
        "seed_oss",
        36.15,
        sizes(5120, 27648, 64, 80, 8, 155136, head_dim=128, attention_bias=True, attention_out_bias=False)
        | {"mlp_bias": False, "residual_dropout": 0.1, "rope_scaling": {"rope_type": "default"}, "rope_theta": 1e7},
    ),
    "smollm3-3b": (
        "smollm3",
        3.08,
        sizes(2048, 11008, 36, 16, 4, 128256, use_sliding_window=False, sliding_window=None, max_window_layers=28)
        | {"layer_types": ["full_attention"] * 36, "no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4}
        | {"rope_scaling": None, "rope_theta": 5000000.0, "pretraining_tp": 2},
    ),
    "starcoder2-7b": (
        "starcoder2",
        7.17,
        {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 4608,
            "intermediate_size": 18432,
            "max_position_embeddings": 16384,
            "mlp_type": "default",
            "norm_epsilon": 1e-05,
            "norm_type": "layer_norm",
            "num_attention_heads": 36,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
            "rope_theta": 1000000,
            "sliding_window": 4096,
            "use_bias": True,
            "vocab_size": 49152,
        },
    ),
    "stablelm-2-1_6b": (
        "stablelm",
        1.644,
        {
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "use_qkv_bias": True,
            "vocab_size": 100352,
        },
    ),
    "c4ai-command-r-plus": (
        "cohere",
        103.81,
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 12288,
            "intermediate_size": 33792,
            "layer_norm_eps": 1e-05,
            "logit_scale": 0.8333333333333334,
            "max_position_embeddings": 8192,
            "model_max_length": 131072,
            "num_attention_heads": 96,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
            "rope_theta": 75000000.0,
            "use_qk_norm": True,
            "vocab_size": 256000,
        },
    ),
    "c4ai-command-r7b-12-2024": (
        "cohere2",
        8.03,
        {
            "attention_bias": False,
            "cache_implementation": "hybrid",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "layer_norm_eps": 1e-05,
            "layer_switch": 4,
            "logit_scale": 0.25,
            "max_position_embeddings": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rope_scaling": None,
            "rope_theta": 50000,
            "rotary_pct": 1.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "vocab_size": 256000,
        },
    ),
    "glm-4-9b-hf": (
        "glm",
        9.40,
        {
            "attention_bias": True,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "max_position_embeddings": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1.5625e-07,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 151552,
        },
    ),
    "glm-4-32b-0414": (
        "glm4",
        32.57,
        {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 6144,
            "intermediate_size": 23040,
            "max_position_embeddings": 32768,
            "num_attention_heads": 48,
            "num_hidden_layers": 61,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 151552,
        },
    ),
    "phi-2": (
        "phi",
        2.78,
        {
            "embd_pdrop": 0.0,
            "hidden_act": "gelu_new",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.4,
            "qk_layernorm": False,
            "resid_pdrop": 0.1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 51200,
        },
    ),
    "minimax-m2": (
        "minimax_m2",
        228.69,
        sizes(3072, 1536, 62, 48, 8, 200064, head_dim=128, rotary_dim=64, rms_norm_eps=1e-06, rope_theta=5000000)
        | {"num_local_experts": 256, "num_experts_per_tok": 8, "scoring_func": "sigmoid", "use_routing_bias": True}
        | {"qk_norm_type": "per_layer", "use_qk_norm": True, "mlp_intermediate_size": 8192, "hidden_act": "silu"}
        | {"max_position_embeddings": 196608, "shared_intermediate_size": 0, "tie_word_embeddings": False},
    ),
    "minitron-4b-base": (
        "nemotron",
        4.19,
        {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "relu2",
            "hidden_size": 3072,
            "intermediate_size": 9216,
            "max_position_embeddings": 4096,
            "mlp_bias": False,
            "norm_eps": 1e-05,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "vocab_size": 256000,
        },
    ),
    "olmo-7b-0424-hf": (
        "olmo",
        6.89,
        {
            "attention_bias": False,
            "clip_qkv": 8.0,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
    ),
    "olmo-2-1124-7b": (
        "olmo2",
        7.30,
        sizes(4096, 11008, 32, 32, 32, 100352, attention_bias=False, rms_norm_eps=1e-06, rope_theta=500000)
        | {"max_position_embeddings": 4096, "rope_scaling": None, "tie_word_embeddings": False},
    ),
    "olmo-2-0325-32b": (
        "olmo2",
        32.23,
        sizes(5120, 27648, 64, 40, 8, 100352, attention_bias=False, rms_norm_eps=1e-06, rope_theta=500000)
        | {"max_position_embeddings": 4096, "rope_scaling": None, "tie_word_embeddings": False},
    ),
    "olmo-3-1025-7b": (
        "olmo3",
        7.30,
        sizes(4096, 11008, 32, 32, 32, 100278, attention_bias=False, rms_norm_eps=1e-06, rope_theta=500000)
        | {"layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8, "sliding_window": 4096}
        | {"max_position_embeddings": 65536, "tie_word_embeddings": False}
        | {
            "rope_scaling": {
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "yarn",
            }
        },
    ),
    "granite-3.1-3b-a800m-instruct": (
        "granitemoe",
        3.30,
        sizes(1536, 512, 32, 24, 8, 49155, attention_bias=False, rms_norm_eps=1e-06, rope_theta=10000000.0)
        | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 6.0}
        | {"num_experts_per_tok": 8, "num_local_experts": 40, "residual_multiplier": 0.22, "rope_scaling": None}
        | {"max_position_embeddings": 131072, "output_router_logits": False, "tie_word_embeddings": True},
    ),
    "deepseek-v2-lite": (
        "deepseek_v2",
        15.71,
        sizes(2048, 10944, 27, 16, 16, 102400, moe_intermediate_size=1408, q_lora_rank=None, **LATENTS)
        | {"first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6}
        | {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False, "scoring_func": "softmax"}
        | {"moe_layer_freq": 1, "routed_scaling_factor": 1.0, "attention_bias": False, "rope_theta": 10000}
        | {"rope_scaling": {**YARN_40, "mscale": 0.707, "mscale_all_dim": 0.707}, "max_position_embeddings": 163840},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        671.03,
        sizes(7168, 18432, 61, 128, 128, 129280, moe_intermediate_size=2048, q_lora_rank=1536, **LATENTS)
        | {"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8}
        | {"n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "norm_topk_prob": True, "scoring_func": "sigmoid"}
        | {"moe_layer_freq": 1, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "rope_theta": 10000}
        | {"rope_scaling": {**YARN_40, "mscale": 1.0, "mscale_all_dim": 1.0}, "max_position_embeddings": 163840},
    ),
    "minicpm3-4b": (
        "minicpm3",
        4.07,
        sizes(2560, 6400, 62, 40, 40, 73448, q_lora_rank=768, kv_lora_rank=256, qk_nope_head_dim=64)
        | {"qk_rope_head_dim": 32, "dim_model_base": 256, "scale_depth": 1.4, "scale_emb": 12, "rms_norm_eps": 1e-05}
        | {"tie_word_embeddings": True},
    ),
    "youtu-llm-2b": (
        "youtu",
        1.96,
        sizes(2048, 6144, 32, 16, 16, 128256, q_lora_rank=1536, rope_theta=1600000, **LATENTS)
        | {"tie_word_embeddings": True},
    ),
    "gpt-oss-20b": ("gpt_oss", 20.91, GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("gpt_oss", 116.83, GPT_OSS),
    "olmoe-1b-7b-0924": (
        "olmoe",
        6.92,
        sizes(
            2048, 1024, 16, 16, 16, 50304, attention_bias=False, clip_qkv=None, rms_norm_eps=1e-05, rope_theta=10000.0
        )
        | {"norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8, "output_router_logits": False}
        | {"max_position_embeddings": 4096, "rope_scaling": None, "tie_word_embeddings": False},
    ),
    "flexolmo-7x7b-1t": (
        "flex_olmo",
        33.27,
        sizes(4096, 11008, 32, 32, 32, 100352, attention_bias=False, rms_norm_eps=1e-06, rope_theta=500000)
        | {"norm_topk_prob": False, "num_experts": 7, "num_experts_per_tok": 5, "output_router_logits": False}
        | {"max_position_embeddings": 4096, "rope_scaling": None, "tie_word_embeddings": False},
    ),
    "solar-open-100b": (
        "solar_open",
        102.65,
        sizes(4096, 10240, 48, 64, 8, 196608, head_dim=128, rms_norm_eps=1e-05, rope_theta=1000000)
        | {"moe_intermediate_size": 1280, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8}
        | {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    ),
}


@pytest.mark.parametrize("name", [name for name, (family, *_) in PUBLISHED.items() if family in ALL_FAMILIES])
def test_a_published_configuration(name: str, tmp_path: Path) -> None:
    family, billions, fields = PUBLISHED[name]
    raw = {"model_type": family, "max_position_embeddings": 32768, "torch_dtype": "bfloat16", **fields}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.family.model_type == family
    assert checkpoint.dtype == torch.bfloat16
    model = meta_model(checkpoint, torch.bfloat16)
    tied = checkpoint.shape.head_parameters if checkpoint.shape.tied_embeddings else 0
    parameters = sum(tensor.numel() for name, tensor in model.state_dict().items()) - tied
    assert parameters / 1e9 == pytest.approx(billions, abs=0.006)
    # Biases of queries, keys and values, and norms within layers, are not counted.
    assert stored_parameters(checkpoint.shape) == pytest.approx(parameters, rel=1e-3)
    # Which channels turn, no parameter tells.
    turned = {
        2 * buffer.numel()
        for _, module in rotary_modules(model)
        for name, buffer in module.named_buffers()
        if name.endswith("inv_freq")
    }
    part = int(checkpoint.shape.head_dim * fields.get("partial_rotary_factor", 1))
    assert turned == {fields.get("rotary_dim", fields.get("qk_rope_head_dim", part))}
