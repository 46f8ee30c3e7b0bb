"""Attention of families whose classes compute it themselves, written so that it asks transformers' interface.

A class that asks nobody may also repeat the keys of a group for each of its queries before it caches them. Each
function here stands in for the `forward` of one such class, at the same weights: K heads, or one latent, are cached,
and `attend`, an attention function as transformers' interface has them, does the arithmetic.
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
TURN_FUNCTIONS: Final = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
"""Functions of transformers' modules that turn heads by cosines and sines: halves of them, or pairs of neighbours."""


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


def latent(
    attend: Attend, module: Any, hidden_states: Tensor, *, step_cache: Any, position_embeddings: Any, **_: Any
) -> tuple[Tensor, None]:
    """Multi-head latent attention of tokens [B, n, H], over latents rather than the keys and values made of them.

    What makes keys of a latent is taken to the queries, and what makes values to what attention gives (DeepSeek-V2,
    section 2.1.2). All heads then attend to the same rows: the latent, and the part of a key that turns beside it. The
    rows serve as values too, whose last channels are dropped, so that they are cached once and never put together.
    """
    still, turning, rank = module.qk_nope_head_dim, module.qk_rope_head_dim, module.kv_lora_rank
    queries = _latent_queries(module, hidden_states).view(*hidden_states.shape[:2], -1, still + turning)
    still_query, query = torch.split(queries.transpose(1, 2), [still, turning], dim=-1)
    compressed, key = torch.split(module.kv_a_proj_with_mqa(hidden_states), [rank, turning], dim=-1)
    query, key = _turned(module, query, key.unsqueeze(1), position_embeddings)
    own = torch.cat([module.kv_a_layernorm(compressed).unsqueeze(1), key], dim=-1)
    (rows,) = step_cache.write(module.layer_idx, own)
    parts = module.kv_b_proj.weight.view(-1, still + module.v_head_dim, rank)
    to_keys, to_values = torch.split(parts, [still, module.v_head_dim], dim=1)
    query = torch.cat([still_query @ to_keys, query], dim=-1)
    output = attend(module, query, rows, rows, None, step_cache=step_cache, scaling=module.scaling)[0]
    values = output.transpose(1, 2)[..., :rank] @ to_values.transpose(1, 2)
    return module.o_proj(values.transpose(1, 2).flatten(2)), None


def _latent_queries(module: Any, hidden_states: Tensor) -> Tensor:
    """Queries of all heads, of a latent of their own where the model has one."""
    queries: Tensor
    if module.q_lora_rank is None:
        queries = module.q_proj(hidden_states)
    else:
        queries = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states)))
    return queries


def _turned(module: Any, query: Tensor, key: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
    """Heads turned as the class of `module` turns them: by cosines and sines, or as complex numbers."""
    if isinstance(position_embeddings, Tensor):
        return apply_rotary_pos_emb(query, key, position_embeddings.imag, position_embeddings.real)
    by_pairs = getattr(module.config, "rope_interleave", False)
    turn = getattr(importlib.import_module(type(module).__module__), TURN_FUNCTIONS[by_pairs])
    turned: tuple[Tensor, Tensor] = turn(query, key, *position_embeddings)
    return turned


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
    "DeepseekV2Attention": latent,
    "DeepseekV3Attention": latent,
    "FalconAttention": falcon,
    "GPTJAttention": gptj,
    "GPTNeoSelfAttention": gpt_neo,
    "Glm4MoeLiteAttention": latent,
    "MiniCPM3Attention": latent,
    "MptAttention": mpt,
    "YoutuAttention": latent,
}
"""By the name of the class whose `forward` they replace."""
