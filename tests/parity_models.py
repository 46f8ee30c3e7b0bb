"""Tiny random checkpoints for the tests of runners and parity."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from flap_export.families import family_of, shape_from_config
from flap_export.models.loading import pruned_section
from flap_export.models.modeling_pruned import PrunedConfig, PrunedForCausalLM
from flap_export.shapes import DecoderShape, LayerShape

VOCABULARY = 96
MAX_LENGTH = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Large enough that every layer moves the logits.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def save_dense(path: Path, **changes: int) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).save_pretrained(path)
    return path


def save_sliding(path: Path, window: int) -> Path:
    torch.manual_seed(1)
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).save_pretrained(path)
    return path


def save_uneven(path: Path) -> Path:
    """Layer 0 without heads, layer 1 without channels, layer 2 with half of both, all with biases."""
    torch.manual_seed(2)
    config = LlamaConfig(**SIZES)
    layers = (
        LayerShape(query_heads=0, kv_heads=0, ffn_channels=20, attention_bias=True, ffn_bias=True),
        LayerShape(query_heads=4, kv_heads=2, ffn_channels=0, attention_bias=True, ffn_bias=True),
        LayerShape(query_heads=2, kv_heads=1, ffn_channels=24, attention_bias=True, ffn_bias=True),
    )
    family = family_of("llama")
    shape: DecoderShape = shape_from_config(config, family).model_copy(update={"layers": layers})
    model = PrunedForCausalLM(PrunedConfig(pruned=pruned_section(family, shape), **SIZES))
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path
