"""Attention and cache updates: Attention and TensorScatter (opset 24), a node each.

Notation: B sequences, n new tokens, L rows of cache, Q query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from flap_export.exporting.dialect.node import node
from flap_export.models.attention import StepCache, plain_attention


@final
class ScatterCache(StepCache):
    """The caches of one traced step.

    Args:
        past: the caches [B, K, L, D] of every layer that kept a head.
        write_indices: int64 [B].
        new_tokens: n.
        length: L.
    """

    def __init__(
        self, past: Mapping[int, tuple[Tensor, ...]], write_indices: Tensor, new_tokens: int, length: int
    ) -> None:
        super().__init__(write_indices, new_tokens, length)
        self.past, self.write_indices = past, write_indices
        self.present: dict[int, tuple[Tensor, ...]] = {}
        self.valid_keys = write_indices + new_tokens
        """[B]: rows of the cache that hold keys. The operator aligns the last new query with the last valid key."""

    def write(self, layer_idx: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Scatter new rows [B, K, n, D] into the layer's caches, which are returned whole."""
        self.present[layer_idx] = tuple(map(self._scattered, self.past[layer_idx], new))
        return self.present[layer_idx]

    def _scattered(self, past: Tensor, new: Tensor) -> Tensor:
        return node("TensorScatter", (past, new, self.write_indices), past, 24, axis=2, mode="linear")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step_cache: ScatterCache,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, Q, n, D], caches [B, K, L, D] -> [B, n, Q, D]."""
    window = sliding_window if sliding_window is not None and sliding_window < step_cache.length else None
    if softcap is not None or s_aux is not None:
        mask = step_cache.mask(window, query.dtype)
        output = plain_attention(query * scaling, key, value, mask, softcap=softcap, sinks=s_aux)
    elif window is not None or slopes is not None:
        # A float mask that holds causality too: TensorRT refuses a mask beside `is_causal`.
        inputs = (query, key, value, step_cache.mask(window, query.dtype, slopes))
        output = node("Attention", inputs, query, 24, scale=float(scaling))
    else:
        padded = (query, key, value, None, None, None, step_cache.valid_keys)
        output = node("Attention", padded, query, 24, scale=float(scaling), is_causal=1)
    return output.transpose(1, 2), None
