"""Attention of families whose classes compute it themselves, written so that it asks transformers' interface.

A class that asks nobody may also repeat the keys of a group for each of its queries before it caches them. Each
function here stands in for the `forward` of one such class, at the same weights: K heads are cached, and `attend`, an
attention function as transformers' interface has them, does the arithmetic.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

Attend = Callable[..., tuple[Tensor, None]]
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries [B, Q, n, D], keys and values [B, K, n, D]."""


def falcon(
    attend: Attend,
    module: Any,
    hidden_states: Tensor,
    *,
    step_cache: Any,
    position_embeddings: tuple[Any, Any],
    **_: Any,
) -> tuple[Tensor, None]:
    """Falcon's attention of tokens [B, n, H], as its class calls it."""
    modeling = importlib.import_module(type(module).__module__)
    query, key, value = _heads(module.query_key_value(hidden_states), module.num_kv_heads, module.head_dim)
    query, key = modeling.apply_rotary_pos_emb(query, key, *position_embeddings)
    attended = _attended(attend, module, (query, key, value), step_cache, scaling=module.inv_norm_factor)
    return module.dense(attended), None


def bloom(
    attend: Attend, module: Any, hidden_states: Tensor, residual: Tensor, *, step_cache: Any, **_: Any
) -> tuple[Tensor, None]:
    """BLOOM's attention of tokens [B, n, H], which adds the residual; the slopes say all that its `alibi` does."""
    heads = _heads(module.query_key_value(hidden_states), module.num_heads, module.head_dim)
    attended = _attended(attend, module, heads, step_cache, scaling=module.inv_norm_factor, slopes=module.slopes)
    return residual + module.dense(attended), None


def gptj(
    attend: Attend,
    module: Any,
    hidden_states: Tensor,
    *,
    step_cache: Any,
    position_embeddings: tuple[Any, Any],
    **_: Any,
) -> tuple[Tensor, None]:
    """GPT-J's attention of tokens [B, n, H], with heads laid out before they turn, all at once."""
    laid_out = (*hidden_states.shape[:2], -1, module.head_dim)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (project(hidden_states).view(laid_out).transpose(1, 2) for project in projections)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    attended = _attended(attend, module, (query, key, value), step_cache, scaling=module.scaling)
    return module.out_proj(attended), None


def apply_rotary_pos_emb(query: Tensor, key: Tensor, sine: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Turn neighbours among the first R channels of heads [B, heads, n, D]; named as transformers' functions are.

    Args:
        query: of Q heads.
        key: of K heads.
        sine: [B, n, R / 2]
        cosine: [B, n, R / 2]
    """
    width, (sine, cosine) = 2 * sine.shape[-1], (values.unsqueeze(1) for values in (sine, cosine))

    def turned(heads: Tensor) -> Tensor:
        first, second = heads[..., :width:2], heads[..., 1:width:2]
        pairs = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
        return torch.cat([pairs.flatten(-2).to(heads.dtype), heads[..., width:]], dim=-1)

    return turned(query), turned(key)


def _heads(fused: Tensor, kv_heads: int, head_dim: int) -> Heads:
    """The heads of fused outputs that stand KV group after KV group."""
    groups = fused.view(*fused.shape[:2], kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    query, key, value = torch.split(groups, [groups.shape[2] - 2, 1, 1], dim=2)
    return query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)


def _attended(attend: Attend, module: Any, heads: Heads, step_cache: Any, **settings: Any) -> Tensor:
    """What the heads see of the cache, new rows included: [B, n, Q D]."""
    query, key, value = heads
    key, value = step_cache.update(key, value, module.layer_idx)
    output, _ = attend(module, query, key, value, None, step_cache=step_cache, **settings)
    return output.flatten(2)


OWN_ATTENTION: Final[Mapping[str, Callable[..., tuple[Tensor, None]]]] = {
    "BloomAttention": bloom,
    "FalconAttention": falcon,
    "GPTJAttention": gptj,
}
"""By the name of the class whose `forward` they replace."""
