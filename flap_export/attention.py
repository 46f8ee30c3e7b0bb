"""Attention through transformers' interface, whatever a family's own class does with it.

What the ONNX dialect and the static runner register there takes the place of an attention's arithmetic, and needs the
cache of the call. Not every family hands on to attention what else its model is called with; and Falcon's class asks
nobody, and repeats the keys of a group for each of its queries before it caches them.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from flap_export.families import Family

_CACHE_ARGUMENTS: Final = ("past_key_values", "layer_past")
"""What families call the cache that they hand to an attention."""


def ask_the_interface(model: nn.Module, family: Family) -> None:
    """Let every attention call the implementation that the configuration names, and give it the cache: `step_cache`."""
    for layer in model.get_submodule(family.layers).children():
        attention: Any = layer.get_submodule(family.attention)
        attention.register_forward_pre_hook(_with_cache, with_kwargs=True)
        if type(attention).__name__ == "FalconAttention":
            attention.forward = partial(_falcon, attention)


def _with_cache(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    cache = next(named[name] for name in _CACHE_ARGUMENTS if name in named)
    return given, {**named, "step_cache": cache}


def _falcon(
    module: Any,
    hidden_states: Tensor,
    *,
    attention_mask: Tensor | None,
    step_cache: Any,
    position_embeddings: tuple[Any, Any],
    **_: Any,
) -> tuple[Tensor, None]:
    """Falcon's attention of tokens [B, n, H], as its class calls it; K heads are cached."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modeling = importlib.import_module(type(module).__module__)
    query, key, value = _heads(module.query_key_value(hidden_states), module.num_kv_heads, module.head_dim)
    query, key = modeling.apply_rotary_pos_emb(query, key, *position_embeddings)
    key, value = step_cache.update(key, value, module.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    scaling = module.inv_norm_factor
    output, _ = attend(module, query, key, value, attention_mask, scaling=scaling, step_cache=step_cache)
    return module.dense(output.flatten(2)), None


def _heads(fused: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, Q, n, D], keys and values [B, K, n, D] of fused outputs that stand KV group after KV group."""
    groups = fused.view(*fused.shape[:2], kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    query, key, value = torch.split(groups, [groups.shape[2] - 2, 1, 1], dim=2)
    return query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)
