"""The ONNX dialect: while it is spoken, a transformers model calls standard operators instead of torch code.

Attention, cache updates, norms and rotary embeddings each become one node:

    TensorScatter (opset 24)        new K/V rows into the cache [B, K, L, D] at `write_indices`
    Attention (24)                  queries against the whole cache, GQA by shape
    RMSNormalization (23)
    RotaryEmbedding (23)
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flap_export.loading import Checkpoint

NAME = "flap_export_onnx"
TABLE_NAMES = ("cosine", "sine")


def _symbolic(operator: str, inputs: tuple[Tensor | None, ...], like: Tensor, since: int, **attributes: Any) -> Tensor:
    """One standard node whose result has the shape and dtype of `like`."""
    result: Tensor = torch.onnx.ops.symbolic(
        operator, inputs, attrs=attributes, dtype=like.dtype, shape=like.shape, version=since
    )
    return result


@dataclass
class Decoding:
    """What one traced step knows: where its tokens stand, and the caches. One per trace."""

    past: Mapping[int, tuple[Tensor, Tensor]]
    """Key and value cache [B, K, L, D] of every layer that kept a head."""
    write_indices: Tensor
    new_tokens: int
    max_length: int
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    position_ids: Tensor = field(init=False)
    """[B, n]"""
    valid_keys: Tensor = field(init=False)
    """[B]: rows of the cache that hold keys. The operator aligns the last new query with the last valid key."""
    _window_masks: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position_ids = self.write_indices.unsqueeze(1) + torch.arange(self.new_tokens).unsqueeze(0)
        self.valid_keys = self.write_indices + self.new_tokens

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Scatter new rows [B, K, n, D] into the layer's cache."""

        def scattered(past: Tensor, new: Tensor) -> Tensor:
            return _symbolic("TensorScatter", (past, new, self.write_indices), past, 24, axis=2, mode="linear")

        past_key, past_value = self.past[layer]
        self.present[layer] = scattered(past_key, key), scattered(past_value, value)
        return self.present[layer]

    def window_mask(self, window: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, n, L]: query at position p sees keys p - window < j <= p.

        A float mask that holds causality too, because TensorRT refuses a mask beside `is_causal`. Made once per
        window size and shared by all layers.
        """
        if window not in self._window_masks:
            query = self.position_ids.unsqueeze(1).unsqueeze(-1)
            key = torch.arange(self.max_length).view(1, 1, 1, -1)
            visible = (key <= query) & (key > query - window)
            self._window_masks[window] = torch.where(
                visible, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype)
            )
        return self._window_masks[window]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    decoding: Decoding,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, Q, n, D], caches [B, K, L, D] -> [B, n, Q, D]."""
    if sliding_window is not None and sliding_window < decoding.max_length:
        inputs = (query, key, value, decoding.window_mask(sliding_window, query.dtype))
        output = _symbolic("Attention", inputs, query, 24, scale=float(scaling))
    else:
        padded = (query, key, value, None, None, None, decoding.valid_keys)
        output = _symbolic("Attention", padded, query, 24, scale=float(scaling), is_causal=1)
    return output.transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers' mask interface: causality is the attention operator's own business."""


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    inputs = (hidden_states, module.weight)
    return _symbolic("RMSNormalization", inputs, hidden_states, 23, axis=-1, epsilon=float(module.variance_epsilon))


def rotary_tables(checkpoint: Checkpoint, max_length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [L, R / 2] of every position, from the model's own rotary embedding.

    R channels of a head are rotated, all D in most families.
    Taking the values rather than the formula carries every kind of scaling (linear, llama3, yarn) along.
    """
    from flap_export.loading import meta_model

    rotary = meta_model(checkpoint, torch.float32).get_submodule(checkpoint.family.rotary)
    cosine, sine = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(max_length).unsqueeze(0))
    half = cosine.shape[-1] // 2
    return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()


@contextmanager
def speaking_onnx(model: nn.Module, checkpoint: Checkpoint, tables: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Make `model`, built for this trace only, speak the dialect; global functions are put back at the end.

    Args:
        model: a causal LM with fake weights.
        checkpoint: what it was built from.
        tables: cosine and sine tables as the trace sees them, [L, R / 2].
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.config._attn_implementation = NAME  # type: ignore[union-attr]
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)
    rotary = model.get_submodule(checkpoint.family.rotary)
    for name, table in zip(TABLE_NAMES, tables, strict=True):
        rotary.register_buffer(name, table)
    rotary.forward = MethodType(_rotary_tables, rotary)
    modeling = importlib.import_module(type(model).__module__)
    original = modeling.apply_rotary_pos_emb
    modeling.apply_rotary_pos_emb = _apply_rotary  # type: ignore[attr-defined]
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = original  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Table:
    values: Tensor
    position_ids: Tensor


def _rotary_tables(module: Any, hidden_states: Tensor, position_ids: Tensor) -> tuple[_Table, _Table]:
    return _Table(module.cosine, position_ids), _Table(module.sine, position_ids)


def _apply_rotary(
    query: Tensor, key: Tensor, cosine: _Table, sine: _Table, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    width = 2 * cosine.values.shape[-1]

    def rotated(heads: Tensor) -> Tensor:
        partial = {"rotary_embedding_dim": width} if width < heads.shape[-1] else {}
        inputs = (heads, cosine.values, sine.values, cosine.position_ids)
        return _symbolic("RotaryEmbedding", inputs, heads, 23, **partial)

    return rotated(query), rotated(key)
