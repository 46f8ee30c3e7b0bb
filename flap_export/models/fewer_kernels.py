"""The same model in fewer kernels: what transformers' classes launch one after the other, launched at once.

A decode step reads every weight once; between these reads it launches kernels that read next to nothing and take a
microsecond or two each, however few heads and channels are left. In a layer of Llama these are 16 for its norms, 10
where heads turn and 3 for projections of what others read too; here 2, 4 and none.

Notation: B sequences, n new tokens, Q query heads, K KV heads, D head_dim, H hidden_size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, rms_norm

from flap_export.families import EVERY_EXPERT, Family, Norm, Projection
from flap_export.models.rebinding import own_names, rebound

_TURN: Final = "apply_rotary_pos_emb"
"""What transformers calls the function that turns heads."""


def use_fewer_kernels(model: nn.Module, family: Family) -> None:
    """Let `model`, which has its weights, launch fewer kernels; it computes the same, but for the rounding of norms."""
    for module in model.modules():
        if family.norm.covers(module):
            _norm_at_once(module, family.norm)
    for layer in model.get_submodule(family.modules.layers).children():
        _turn_at_once(layer.get_submodule(family.modules.attention), family)
        for paths in _reading_the_same(family.projections):
            _join(layer, paths)


def _norm_at_once(module: Any, norm: Norm) -> None:
    weight = module._parameters.get("weight")
    scale = None if weight is None else (weight + norm.offset if norm.offset else weight).detach()
    module.register_buffer("scale", scale, persistent=False)
    module.forward = partial(_normed, module, norm)


def _normed(module: Any, norm: Norm, hidden_states: Tensor) -> Tensor:
    """What `module` makes of [..., H]; its weights are those of one head or of each, [heads, D]."""
    scale, size, epsilon = module.scale, hidden_states.shape[-1:], norm.epsilon_of(module)
    # One row of weights for all heads is all that the kernels take.
    inner = scale if scale is not None and scale.ndim == 1 else None
    normed = (
        layer_norm(hidden_states, size, inner, module._parameters.get("bias"), epsilon)
        if norm.is_centred
        else rms_norm(hidden_states, size, inner, epsilon)
    )
    return normed if scale is inner else normed * scale


def _turn_at_once(attention: Any, family: Family) -> None:
    """Let queries and keys turn together, where channels i and i + D / 2 do and the class itself calls for it."""
    rotary, names = family.rotary, own_names(type(attention).forward)
    turns_otherwise = rotary.interleaved or rotary.sines_first or rotary.in_float32 or rotary.backwards
    if turns_otherwise or "forward" in vars(attention) or _TURN not in names:
        return
    forward = rebound(type(attention).forward, **{_TURN: partial(_turned, names[_TURN])})
    attention.forward = MethodType(forward, attention)


def _turned(
    original: Any, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *given: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """Heads turned by angles [B, n, D], as transformers' function does it, which turns parts of heads itself.

    Args:
        original: that function.
        query: [B, Q, n, D]
        key: [B, K, n, D]
        cosine: of every channel's angle; both channels of a pair have the same.
        sine: likewise.
        given: what else the function is told.
        named: likewise.
    """
    if given or named or cosine.shape[-1] != query.shape[-1]:
        turned: tuple[Tensor, Tensor] = original(query, key, cosine, sine, *given, **named)
        return turned
    heads, half = torch.cat([query, key], dim=1), query.shape[-1] // 2
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    together = heads * cosine
    together[..., :half].addcmul_(heads[..., half:], sine[..., :half], value=-1)
    together[..., half:].addcmul_(heads[..., :half], sine[..., half:])
    queries, keys = torch.split(together.to(query.dtype), [query.shape[1], key.shape[1]], dim=1)
    return queries, keys


def _reading_the_same(projections: Iterable[Projection]) -> list[list[str]]:
    """Paths of projections that are given the same hidden states: those of attention, and gate and up of an FFN."""
    by_owner = defaultdict(list)
    for projection in projections:
        if projection.inputs == "hidden" and EVERY_EXPERT not in projection.path:
            by_owner[projection.path.rpartition(".")[0]].append(projection.path)
    return [paths for paths in by_owner.values() if len(paths) > 1]


def _join(layer: nn.Module, paths: Sequence[str]) -> None:
    """Put parts of one product in the place of a layer's projections, where it has them all."""
    modules = dict(layer.named_modules())
    joined = [modules[path] for path in paths if type(modules.get(path)) is nn.Linear]
    if len(joined) < len(paths) or len({module.bias is None for module in joined}) > 1:
        return
    product = _Product(joined)
    for place, path in enumerate(paths):
        layer.set_submodule(path, _Part(product, place))


@final
class _Product(nn.Module):
    """What several linear modules make of the same hidden states, computed when the first of them is asked."""

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__()
        self._widths = [module.out_features for module in modules]
        self.weight = _stacked([module.weight for module in modules])
        self.bias = None if modules[0].bias is None else _stacked([module.bias for module in modules])
        self._read: Tensor | None = None
        self._left: dict[int, Tensor] = {}

    def forward(self, place: int, hidden_states: Tensor) -> Tensor:
        """What the module at `place` makes of [..., H]; each part is handed out once, and not kept."""
        if self._read is not hidden_states or place not in self._left:
            parts = torch.split(linear(hidden_states, self.weight, self.bias), self._widths, dim=-1)
            self._read, self._left = hidden_states, dict(enumerate(parts))
        part = self._left.pop(place)
        if not self._left:
            self._read = None
        return part


def _stacked(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([*parameters]), requires_grad=False)


@final
class _Part(nn.Module):
    """Stands for one of the modules of a product."""

    def __init__(self, product: _Product, place: int) -> None:
        super().__init__()
        self.product, self._place = product, place

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., its own width]."""
        part: Tensor = self.product(self._place, hidden_states)
        return part
