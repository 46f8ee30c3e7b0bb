"""Configurations and tensors' names as the hub has them, of families whose checkpoints are older than their classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny import ALL_FAMILIES, plain_model, tiny_checkpoint, tiny_pruned, tokens_of
from torch import Tensor

from flap_export.errors import ModelError
from flap_export.models.loading import check_weights, load_model, meta_model, parameter_names
from flap_export.models.opening import open_checkpoint
from flap_export.models.weights import SINGLE_FILE

PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
NEOX_20B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_probs_dropout_prob": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 50432,
}
FALCON_7B = {
    "alibi": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}
FALCON_40B = {
    **FALCON_7B,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
FALCON_11B = {
    **FALCON_7B,
    "activation": "gelu",
    "ff_factor": 4,
    "ffn_hidden_size": 16384,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "num_ln_in_parallel_attn": 1,
    "rope_scaling": None,
    "rope_theta": 500042.0,
    "tie_word_embeddings": False,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
STANFORD = {**GPT2, "n_inner": None, "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}
STARCODER = {
    "activation_function": "gelu",
    "architectures": ["GPTBigCodeForCausalLM"],
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "bos_token_id": 0,
    "embd_pdrop": 0.1,
    "eos_token_id": 0,
    "inference_runner": 0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_batch_size": None,
    "max_sequence_length": None,
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 6144,
    "n_head": 48,
    "n_inner": 24576,
    "n_layer": 40,
    "n_positions": 8192,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "resid_pdrop": 0.1,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "use_cache": True,
    "validate_runner_input": True,
    "vocab_size": 49152,
}
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}
GPT_J_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "use_cache": True,
    "vocab_size": 50400,
}
MPT_7B = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "verbose": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
CODEGEN_350M = {
    "activation_function": "gelu_new",
    "architectures": ["CodeGenForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "codegen",
    "n_ctx": 2048,
    "n_embd": 1024,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 20,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary_dim": 32,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 51200,
}
GPT_NEO = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 12,
    "attention_types": [[["global", "local"], 12]],
    "bos_token_id": 50256,
    "embed_dropout": 0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 16,
    "num_layers": 24,
    "resid_dropout": 0,
    "use_cache": True,
    "vocab_size": 50257,
    "window_size": 256,
}
MODELS = {
    # Name: configuration, heads, KV heads, head size, FFN width, and all parameters as the hub counts them.
    "pythia-160m": (PYTHIA, (12, 12, 64, 3072), 162_322_944),
    "bloom-560m": (BLOOM_560M, (16, 16, 64, 4096), 559_214_592),
    "mpt-7b": (MPT_7B, (32, 32, 128, 16384), 6_649_286_656),
    "codegen-350m-mono": (CODEGEN_350M, (16, 16, 64, 4096), 356_712_448),
    "gpt-neo-1.3b": (GPT_NEO, (16, 16, 128, 8192), 1_315_575_808),
    "falcon-7b": (FALCON_7B, (71, 1, 64, 18176), 6_921_720_704),
    "falcon-40b": (FALCON_40B, (128, 8, 64, 32768), 41_303_293_952),
    "falcon-11b": (FALCON_11B, (32, 8, 128, 16384), 11_102_822_400),
    "gpt-j-6b": (GPT_J_6B, (16, 16, 256, 16384), 6_050_882_784),
    "gpt2": (GPT2, (12, 12, 64, 3072), 124_439_808),
    "alias-gpt2-small-x21": (STANFORD, (12, 12, 64, 3072), 124_439_808),
    "starcoder": (STARCODER, (48, 1, 128, 24576), 15_517_456_384),
    "gpt-neox-20b": (NEOX_20B, (64, 64, 96, 24576), 20_554_567_680),
}
OLD_BUFFERS: dict[str, dict[str, Tensor]] = {
    "gpt2": {
        "transformer.h.1.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.1.attn.masked_bias": torch.tensor(-torch.inf),
    },
    "gpt_bigcode": {"transformer.bias": torch.ones(64, 64, dtype=torch.bool)},
    "codegen": {"transformer.h.1.attn.causal_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool)},
    "gpt_neo": {
        "transformer.h.1.attn.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "transformer.h.1.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "gptj": {
        "transformer.h.1.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e9),
    },
    "gpt_neox": {
        "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9).half(),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(2),
    },
}


def supported(families: Any) -> list[str]:
    return [family for family in families if family in ALL_FAMILIES]


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0]["model_type"] in ALL_FAMILIES])
def test_a_configuration_of_the_hub(name: str, tmp_path: Path) -> None:
    config, sizes, parameters = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    layer, shape = checkpoint.shape.layers[0], checkpoint.shape
    assert (layer.query_heads, layer.kv_heads, shape.head_dim, layer.ffn_channels) == sizes
    model = meta_model(checkpoint, torch.float32)
    assert sum(model.get_parameter(name).numel() for name in parameter_names(model, checkpoint)) == parameters
    matrices = sum(
        parameter.numel()
        for layer in model.get_submodule(checkpoint.family.modules.layers).children()
        for parameter in layer.parameters()
        if parameter.ndim == 2
    )
    assert matrices == shape.decoder_parameters


def edit_weights(path: Path, changes: dict[str, Tensor]) -> None:
    save_file({**load_file(path / SINGLE_FILE), **changes}, path / SINGLE_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("family", supported(OLD_BUFFERS))
def test_what_old_checkpoints_hold_beside_parameters_is_left_out(family: str, tmp_path: Path) -> None:
    """Masks, and numbers that are infinite in half precision."""
    path = tiny_checkpoint(family, tmp_path / "dense")
    with torch.no_grad():
        expected = plain_model(path)(tokens_of(2, 9)).logits
    names = set(open_checkpoint(path).weights)
    edit_weights(path, OLD_BUFFERS[family])
    checkpoint = open_checkpoint(path)
    check_weights(meta_model(checkpoint, torch.float32), checkpoint)
    assert set(checkpoint.weights) == names
    with torch.no_grad():
        assert torch.equal(load_model(path, dtype=torch.float32)(tokens_of(2, 9)).logits, expected)


@pytest.mark.skipif("gpt_neox" not in ALL_FAMILIES, reason="needs transformers 5")
def test_the_head_of_gpt_neox_has_its_old_name_on_disk(tmp_path: Path) -> None:
    path = tiny_checkpoint("gpt_neox", tmp_path / "dense")
    assert "embed_out.weight" in load_file(path / SINGLE_FILE)
    assert "lm_head.weight" in open_checkpoint(path).weights
    tensors = load_file(path / SINGLE_FILE)
    bare = {name.removeprefix("gpt_neox."): tensor for name, tensor in tensors.items()}
    save_file(bare, path / SINGLE_FILE, metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    check_weights(meta_model(checkpoint, torch.float32), checkpoint)


@pytest.mark.skipif("exaone" not in ALL_FAMILIES, reason="needs transformers 5.24")
def test_the_weights_of_exaone_have_names_of_their_own_on_disk(tmp_path: Path) -> None:
    """In the dense and the stock checkpoint; an uneven one has those of Llama, whose classes compute it."""
    path = tiny_checkpoint("exaone", tmp_path / "dense")
    stored = set(load_file(path / SINGLE_FILE))
    attention = {f"transformer.h.0.attn.attention.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert attention | {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"} <= stored
    opened = open_checkpoint(path)
    assert "model.layers.0.self_attn.o_proj.weight" in opened.weights
    assert {opened.family.stored_name(name) for name in opened.weights} == stored
    with torch.no_grad():
        assert torch.equal(
            load_model(path, dtype=torch.float32)(tokens_of(2, 9)).logits, plain_model(path)(tokens_of(2, 9)).logits
        )


@pytest.mark.skipif("gpt2" not in ALL_FAMILIES, reason="needs transformers 5")
def test_gpt2_without_a_prefix(tmp_path: Path) -> None:
    """As the hub has it: no `transformer.` before the names, masks in every layer, the head tied."""
    path = tiny_checkpoint("gpt2", tmp_path / "dense", tie_word_embeddings=True)
    with torch.no_grad():
        expected = plain_model(path)(tokens_of(2, 9)).logits
    tensors = {**load_file(path / SINGLE_FILE), **OLD_BUFFERS["gpt2"]}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "wte.weight" in bare
    save_file(bare, path / SINGLE_FILE, metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load_model(path, dtype=torch.float32)(tokens_of(2, 9)).logits, expected)


@pytest.mark.skipif("gpt2" not in ALL_FAMILIES, reason="needs transformers 5")
def test_transposed_weights_stay_transposed_on_disk(tmp_path: Path) -> None:
    """So that GPT-2's own modules read them; everything in between sees [out, in]."""
    pruned = tiny_pruned("gpt2", tmp_path)
    opened, name = open_checkpoint(pruned), "transformer.h.1.attn.c_attn.weight"
    stored = load_file(pruned / SINGLE_FILE)
    layer, size = opened.shape.layers[1], opened.shape.head_dim
    rows = (layer.query_heads + 2 * layer.kv_heads) * size
    assert stored[name].shape == (32, rows)
    assert opened.weights.shape(name) == opened.weights[name].shape == (rows, 32)
    assert torch.equal(opened.weights[name], stored[name].T)
    for other in ("transformer.wpe.weight", "transformer.h.1.ln_1.weight", "transformer.h.1.attn.c_attn.bias"):
        assert torch.equal(opened.weights[other], stored[other])
        assert opened.weights.shape(other) == stored[other].shape


def test_weights_are_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some repositories hold them a second time, for other libraries."""
    stored = ["model-00001-of-00001.safetensors", "consolidated.safetensors", "original/model.safetensors"]
    fetched: list[str] = []

    def snapshot_download(name: str, **patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects([*stored, "config.json", "tokenizer.json"], **patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="holds no config"):
        open_checkpoint("owner/name")
    assert fetched == [stored[0], "config.json", "tokenizer.json"]
