"""Rotary embeddings: tables of every position's cosines and sines, and RotaryEmbedding (opset 23) that reads them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flap_export.exporting.dialect.node import node
from flap_export.models import own_attention
from flap_export.models.alibi import register_tables
from flap_export.models.attention import rotary_modules
from flap_export.models.opening import Checkpoint


def rotary_tables(checkpoint: Checkpoint, max_length: int) -> dict[str, Tensor]:
    """Cosines and sines float32 [L, R / 2] of every position, by name, from the model's own rotary embeddings.

    R channels of a head are rotated, all D in most families. A family that rotates its kinds of layers differently
    has a pair of tables for each.

    Taking the values rather than the formula carries every kind of scaling (linear, llama3, yarn) along.
    """
    from flap_export.models.loading import meta_model

    row, tables = checkpoint.family.rotary, dict[str, Tensor]()
    position_ids, like = torch.arange(max_length).unsqueeze(0), torch.zeros(1, dtype=torch.float32)
    for path, rotary in rotary_modules(meta_model(checkpoint, torch.float32)):
        for kind in getattr(rotary, "layer_types", None) or [None]:
            values = rotary(like, position_ids) if kind is None else rotary(like, position_ids, kind)
            # DeepSeek-V2's are complex numbers.
            values = (values.real, values.imag) if isinstance(values, Tensor) else values
            cosine, sine = reversed(values) if row.sines_first else values
            for name, value in zip(_table_names(kind), (cosine, -sine if row.backwards else sine), strict=True):
                tables[f"{path}.{name}"] = value[0] if row.angles_once else _every_value_once(value[0])
    return tables


def _every_value_once(values: Tensor) -> Tensor:
    """[L, R] -> [L, R / 2]: rotary embeddings give both channels of a pair their angle.

    Most give one half of a head after the other, whatever pairs the attention makes of it, some one pair after the
    other.
    """
    first, second = values.chunk(2, dim=-1)
    if not torch.equal(first, second):
        first, second = values[..., ::2], values[..., 1::2]
        assert torch.equal(first, second), "the channels of a pair turn by different angles"
    return first.contiguous()


def _table_names(kind: str | None) -> tuple[str, str]:
    prefix = "" if kind is None else f"{kind}_"
    return f"{prefix}cosine", f"{prefix}sine"


@contextmanager
def turning_by(tables: Mapping[str, Tensor], model: nn.Module, *, interleaved: bool) -> Iterator[None]:
    """Let the heads of `model` turn by `tables`, in one node each; see `Rotary.interleaved` of the family."""
    register_tables(model, tables)
    for _, rotary in rotary_modules(model):
        rotary.forward = partial(_tables_at, rotary)
    with ExitStack() as replaced:
        turned = partial(_turned, interleaved=interleaved)
        for modeling in (importlib.import_module(type(model).__module__), own_attention):
            for name in own_attention.TURN_FUNCTIONS:
                replaced.enter_context(_turning(modeling, name, turned))
        yield


@contextmanager
def _turning(modeling: Any, name: str, turned: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let a module's function of this name be `turned`."""
    # Families with learned positions have none.
    original = getattr(modeling, name, None)
    setattr(modeling, name, turned)
    try:
        yield
    finally:
        if original is None:
            delattr(modeling, name)
        else:
            setattr(modeling, name, original)


@dataclass(frozen=True)
class _Table:
    values: Tensor
    position_ids: Tensor


def _tables_at(
    module: nn.Module, hidden_states: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[_Table, _Table]:
    cosine, sine = (module.get_buffer(name) for name in _table_names(layer_type))
    return _Table(cosine, position_ids), _Table(sine, position_ids)


def _turned(
    query: Tensor, key: Tensor, cosine: _Table, sine: _Table, *_: Any, interleaved: bool, **__: Any
) -> tuple[Tensor, Tensor]:
    width = 2 * cosine.values.shape[-1]

    def rotated(heads: Tensor) -> Tensor:
        attributes = {"rotary_embedding_dim": width} if width < heads.shape[-1] else {}
        if interleaved:
            attributes["interleaved"] = 1
        inputs = (heads, cosine.values, sine.values, cosine.position_ids)
        return node("RotaryEmbedding", inputs, heads, 23, **attributes)

    return rotated(query), rotated(key)
