"""Attention of families whose classes compute it themselves, written so that it asks transformers' interface.

A class that asks nobody may also repeat the keys of a group for each of its queries before it caches them. Each
function here stands in for the `forward` of one such class, at the same weights: K heads are cached, and `attend`, an
attention function as transformers' interface has them, does the arithmetic.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

Attend = Callable[..., tuple[Tensor, None]]
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries [B, Q, n, D], keys and values [B, K, n, D]."""
_QUERIES_KEY_VALUE: Final = (-1, 1, 1)
"""Heads of each kind in a KV group."""


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
    fused = module.query_key_value(hidden_states)
    query, key, value = _heads(fused, module.num_kv_heads, module.head_dim, _QUERIES_KEY_VALUE)
    query, key = modeling.apply_rotary_pos_emb(query, key, *position_embeddings)
    attended = _attended(attend, module, (query, key, value), step_cache, scaling=module.inv_norm_factor)
    return module.dense(attended), None


def bloom(
    attend: Attend, module: Any, hidden_states: Tensor, residual: Tensor, *, step_cache: Any, **_: Any
) -> tuple[Tensor, None]:
    """BLOOM's attention of tokens [B, n, H], which adds the residual; the slopes say all that its `alibi` does."""
    heads = _heads(module.query_key_value(hidden_states), module.num_heads, module.head_dim, _QUERIES_KEY_VALUE)
    attended = _attended(attend, module, heads, step_cache, scaling=module.inv_norm_factor, slopes=module.slopes)
    return residual + module.dense(attended), None


def codegen(
    attend: Attend,
    module: Any,
    hidden_states: Tensor,
    *,
    step_cache: Any,
    position_embeddings: tuple[Any, Any],
    **_: Any,
) -> tuple[Tensor, None]:
    """CodeGen's attention of tokens [B, n, H], with heads laid out before they turn, all at once."""
    fused, blocks = module.qkv_proj(hidden_states), module.mp_num
    in_block = fused.shape[-1] // (3 * blocks * module.head_dim)
    query, value, key = _heads(fused, blocks, module.head_dim, (in_block,) * 3)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    attended = _attended(attend, module, (query, key, value), step_cache, scaling=module.scaling)
    return module.out_proj(attended), None


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
    query, key, value = _projected(module, hidden_states)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    attended = _attended(attend, module, (query, key, value), step_cache, scaling=module.scaling)
    return module.out_proj(attended), None


def gpt_neo(attend: Attend, module: Any, hidden_states: Tensor, *, step_cache: Any, **_: Any) -> tuple[Tensor, None]:
    """GPT-Neo's attention of tokens [B, n, H], whose scores are not scaled and whose windows are its layers' own."""
    window = module.config.window_size if module.attention_type == "local" else None
    heads = _projected(module, hidden_states)
    return module.out_proj(_attended(attend, module, heads, step_cache, scaling=1.0, sliding_window=window)), None


def mpt(attend: Attend, module: Any, hidden_states: Tensor, *, step_cache: Any, **_: Any) -> tuple[Tensor, None]:
    """MPT's attention of tokens [B, n, H]; the slopes say all that its `position_bias` does."""
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    laid_out = (*hidden_states.shape[:2], module.n_heads, module.head_dim)
    query, key, value = (part.view(laid_out).transpose(1, 2) for part in fused.chunk(3, dim=-1))
    settings = {"scaling": module.softmax_scale, "slopes": module.slopes}
    return module.out_proj(_attended(attend, module, (query, key, value), step_cache, **settings)), None


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


def _projected(module: Any, hidden_states: Tensor) -> Heads:
    """The heads that projections of their own give."""
    laid_out = (*hidden_states.shape[:2], -1, module.head_dim)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (project(hidden_states).view(laid_out).transpose(1, 2) for project in projections)
    return query, key, value


def _heads(fused: Tensor, blocks: int, head_dim: int, parts: Sequence[int]) -> Heads:
    """The heads of fused outputs that stand block after block, as KV groups do.

    Args:
        fused: [B, n, all heads times D].
        blocks: how many there are.
        head_dim: D.
        parts: heads of each of three kinds in a block, in their order; -1 for all that are left.
    """
    grouped = fused.view(*fused.shape[:2], blocks, -1, head_dim).permute(0, 2, 3, 1, 4)
    left = grouped.shape[2] - sum(part for part in parts if part > 0)
    first, second, third = torch.split(grouped, [part if part > 0 else left for part in parts], dim=2)
    return first.flatten(1, 2), second.flatten(1, 2), third.flatten(1, 2)


def _attended(attend: Attend, module: Any, heads: Heads, step_cache: Any, **settings: Any) -> Tensor:
    """What the heads see of the cache, new rows included: [B, n, Q D]."""
    query, key, value = heads
    layer_idx = module.layer_id if hasattr(module, "layer_id") else module.layer_idx
    key, value = step_cache.update(key, value, layer_idx)
    output, _ = attend(module, query, key, value, None, step_cache=step_cache, **settings)
    return output.flatten(2)


OWN_ATTENTION: Final[Mapping[str, Callable[..., tuple[Tensor, None]]]] = {
    "BloomAttention": bloom,
    "CodeGenAttention": codegen,
    "FalconAttention": falcon,
    "GPTJAttention": gptj,
    "GPTNeoSelfAttention": gpt_neo,
    "MptAttention": mpt,
}
"""By the name of the class whose `forward` they replace."""
