"""Attention through transformers' interface, for families whose own classes compute it themselves.

What the ONNX dialect and the static runner register there takes the place of an attention's arithmetic. Falcon's class
asks nobody, hands on no further arguments, and repeats the keys of a group for each of its queries before it caches
them.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def ask_the_interface(model: nn.Module) -> None:
    """Let the attentions of `model` that compute by themselves call the implementation that its configuration names.

    They cache K heads each, and hand the cache on as `step_cache`.
    """
    for module in model.modules():
        if type(module).__name__ == "FalconAttention":
            module.forward = partial(_falcon, module)


def _falcon(
    module: Any,
    hidden_states: Tensor,
    *,
    attention_mask: Tensor | None,
    layer_past: Any,
    position_embeddings: tuple[Any, Any],
    **_: Any,
) -> tuple[Tensor, None]:
    """Falcon's attention of tokens [B, n, H], as its class calls it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modeling = importlib.import_module(type(module).__module__)
    query, key, value = _heads(module.query_key_value(hidden_states), module.num_kv_heads, module.head_dim)
    query, key = modeling.apply_rotary_pos_emb(query, key, *position_embeddings)
    key, value = layer_past.update(key, value, module.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    output, _ = attend(module, query, key, value, attention_mask, scaling=module.inv_norm_factor, step_cache=layer_past)
    return module.dense(output.flatten(2)), None


def _heads(fused: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, Q, n, D], keys and values [B, K, n, D] of fused outputs that stand KV group after KV group."""
    groups = fused.view(*fused.shape[:2], kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    query, key, value = torch.split(groups, [groups.shape[2] - 2, 1, 1], dim=2)
    return query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)
