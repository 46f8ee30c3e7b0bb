"""Attention of families whose classes compute it themselves, written so that it asks transformers' interface.

A class that asks nobody may also repeat the keys of a group for each of its queries before it caches them. Each
function here stands in for the `forward` of one such class, at the same weights: K heads are cached, and what
`model.config._attn_implementation` names does the arithmetic.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor


def falcon(
    module: Any,
    hidden_states: Tensor,
    *,
    attention_mask: Tensor | None,
    step_cache: Any,
    position_embeddings: tuple[Any, Any],
    **_: Any,
) -> tuple[Tensor, None]:
    """Falcon's attention of tokens [B, n, H], as its class calls it."""
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


OWN_ATTENTION: Final[Mapping[str, Callable[..., tuple[Tensor, None]]]] = {"FalconAttention": falcon}
"""By the name of the class whose `forward` they replace."""
