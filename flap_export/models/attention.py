"""Attention over caches of a fixed length, through transformers' interfaces, whatever a family's own class does.

Who traces or runs a model step by step gives two things: a `StepCache`, which holds the caches of one call, and an
attention function, which is called in place of transformers' own and finds that cache in its keyword `step_cache`.

Notation: B sequences, n new tokens, L rows of cache, Q query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from flap_export.families import Family
from flap_export.models.own_attention import OWN_ATTENTION


class StepCache(Cache):  # type: ignore[misc]
    """Transformers' cache interface for one call, over caches whose layers each have their own K.

    Args:
        write_indices: int64 [B], the row of the first new token.
        new_tokens: n.
        length: rows of the caches that attention sees.
    """

    counts_empty_layers = False

    def __init__(self, write_indices: Tensor, new_tokens: int, length: int) -> None:
        self.layers: list[Any] = []
        self.length = length
        steps = torch.arange(new_tokens, device=write_indices.device)
        self.position_ids = write_indices.unsqueeze(1) + steps.unsqueeze(0)
        """[B, n]"""
        self._keys = torch.arange(length, device=write_indices.device).view(1, 1, 1, -1)
        """Positions of all rows, [1, 1, 1, L]; made once, so that all masks of a graph are seen to follow from them."""
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new rows [B, K, n, D] and return what is seen of the layer's caches, [B, K, L, D] each."""
        keys, values = self.write(layer_idx, key, value)
        return keys, values

    @abstractmethod
    def write(self, layer_idx: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write new rows [B, K, n, D] for each of the layer's caches, in their order; see `update`."""

    def mask(self, window: int | None, dtype: torch.dtype, slopes: Tensor | None = None) -> Tensor:
        """Additive mask [B, 1, n, L]: query at position p sees keys p - window < j <= p, or all up to p.

        Made once per window size and tensor of slopes, and shared by all layers that have these.

        Args:
            window: how many keys are seen.
            dtype: of the scores.
            slopes: [Q, 1, 1], of ALiBi: head h subtracts slope_h (p - j) from the score of key j, and the mask is
                [B, Q, n, L]. Made of distances, not of positions, it keeps its digits in half precision.
        """
        kind = window, None if slopes is None else id(slopes)
        if kind not in self._masks:
            query = self.position_ids.unsqueeze(1).unsqueeze(-1)
            key = self._keys
            visible = key <= query if window is None else (key <= query) & (key > query - window)
            seen, hidden = (torch.full((), x, dtype=dtype, device=query.device) for x in (0, torch.finfo(dtype).min))
            if slopes is not None:
                seen = slopes * (key - query).to(dtype)
            self._masks[kind] = torch.where(visible, seen, hidden)
        return self._masks[kind]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Unused: positions are always given."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Unused: attention makes its own mask."""
        return self.length, 0


def attend_by(attention: Callable[..., tuple[Tensor, None]], name: str, model: nn.Module, family: Family) -> None:
    """Let every attention of `model` call `attention`, which gets the cache of the call as `step_cache`.

    Not every family hands on to attention what else its model is called with, and some ask nobody.

    Args:
        attention: as transformers' attention interface has it: query [B, Q, n, D], caches [B, K, L, D] -> [B, n, Q, D].
        name: what it is registered as.
        model: a causal LM; its calls need a `StepCache` from now on.
        family: its row.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, partial(_with_own_window, attention))
    AttentionMaskInterface.register(name, _no_mask)
    model.config._attn_implementation = name  # type: ignore[union-attr]
    for layer in model.get_submodule(family.modules.layers).children():
        module: Any = layer.get_submodule(family.modules.attention)
        module.register_forward_pre_hook(_with_cache, with_kwargs=True)
        if own := OWN_ATTENTION.get(type(module).__name__):
            module.forward = partial(own, attention, module)


def cache_argument(model: nn.Module) -> str:
    """What the causal LM `model` calls the cache that it is given: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _with_cache(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # Families and versions of transformers call it by different names.
    cache = next(value for value in (*given, *named.values()) if isinstance(value, Cache))
    return given, {**named, "step_cache": cache}


def _with_own_window(
    attention: Callable[..., tuple[Tensor, None]], module: nn.Module, *tensors: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """Call `attention` with the window of its module; that of Qwen2-MoE names it to nobody, and has it in its mask."""
    return attention(module, *tensors, **{"sliding_window": getattr(module, "sliding_window", None), **named})


def _no_mask(*_: Any, device: Any = None, cache_position: Tensor | None = None, **__: Any) -> Tensor:
    """Transformers' mask interface: what is seen is the attention's own business.

    A tensor that nothing reads, because MPT's model asks for another dtype of whatever it gets; on the model's device,
    of which transformers 4 tells by positions.
    """
    return torch.zeros((), device=device if cache_position is None else cache_position.device)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in plain operators, for scores s that no operator takes.

    With a softcap they become softcap tanh(s / softcap), which TensorRT refuses. A sink is one score more in the
    softmax, of a key without value.

    The query heads of a KV head stand one below the other, g n rows, so that caches are neither repeated nor read
    more than once. No shape is stated that depends on L.

    Args:
        query: scaled, [B, Q, n, D].
        key: [B, K, L, D]
        value: [B, K, L, D]
        mask: additive, [B, 1, n, L].
        softcap: bound of the scores.
        sinks: [Q], the score of each head's.
    """
    (batch, heads, tokens, size), kv_heads = query.shape, key.shape[1]
    group = heads // kv_heads
    scores = query.reshape(batch, kv_heads, group * tokens, size) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    masked = scores + torch.cat([mask] * group, dim=2)
    shares = masked.softmax(dim=-1, dtype=torch.float32)
    output = shares.to(value.dtype) @ value
    if sinks is not None:
        of_rows = sinks.view(1, kv_heads, group, 1).expand(-1, -1, -1, tokens).reshape(1, kv_heads, group * tokens, 1)
        output = output * _left_by_sinks(masked, shares, of_rows).to(value.dtype)
    return output.reshape(query.shape)


def _left_by_sinks(scores: Tensor, shares: Tensor, sinks: Tensor) -> Tensor:
    """What part of a softmax is left when sinks s join it: 1 / (1 + exp(s - l)), l the logarithm of its sum.

    l follows from the largest share, which is exp(m - l) where m is the largest score: the scores are neither copied
    with a column more for the sinks, nor summed again. The operator itself could take a sink as a row of zeros in the
    cache, at the price of a mask [B, Q, n, L] for every layer and of one row. Measured on ONNX Runtime's CPU, the
    column was slower than this, the operator was slower in decode, and the logarithm of another sum was slowest.

    Args:
        scores: [B, K, g n, L]
        shares: their softmax, float32.
        sinks: [1, K, g n, 1]

    Returns:
        float32 [B, K, g n, 1]
    """
    largest = scores.amax(dim=-1, keepdim=True).to(torch.float32)
    total = largest - shares.amax(dim=-1, keepdim=True).log()
    return torch.sigmoid(total - sinks.to(torch.float32))


def rotary_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every rotary embedding."""
    for path, module in model.named_modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            yield path, module
