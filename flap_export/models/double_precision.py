"""Models in float64: what transformers computes in float32, whatever a model's precision, computed in full instead."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flap_export.families import Family, Norm
from flap_export.models.rebinding import own_names, rebound


def keep_double_precision(model: nn.Module, family: Family) -> None:
    """Let norms, routers, rotations and attention compute in float64: transformers' own pass through float32."""
    for path, module in model.named_modules():
        if family.norm.covers(module):
            module.forward = partial(_double_norm, module, family.norm)
        if family.rotary.in_float32 and path.endswith(family.modules.attention) and hasattr(module, "head_dim"):
            module.forward = MethodType(_with_double_rotary(type(module).forward, family.rotary.interleaved), module)
        is_own = family.attention_kernel == "eager" or (family.latent and family.rotary.in_float32)
        if is_own and path.endswith(family.modules.attention):
            module.forward = partial(_in_double, module.forward)
        if family.mixture is not None and f".{path}".endswith(f".{family.mixture.router}"):
            module.forward = partial(_in_double, module.forward)


@final
class _DoubleForSingle(TorchFunctionMode):
    """While it is active, what is asked for in float32 comes in float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        doubled = Tensor.double if func is Tensor.float else func
        return doubled(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _in_double(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """What a router gives, or an attention that turns heads or has scores in float32, in float64."""
    with _DoubleForSingle():
        return forward(*args, **kwargs)


def _with_double_rotary(forward: Any, interleaved: bool) -> FunctionType:
    """An attention's `forward` that turns heads in the precision they have."""
    rotate_half = own_names(forward)["rotate_half"]

    def turned(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        angles = (_by_pairs(values) if interleaved else values for values in (cosine, sine))
        cosine, sine = (values.unsqueeze(1) for values in angles)
        return query * cosine + rotate_half(query) * sine, key * cosine + rotate_half(key) * sine

    return rebound(forward, apply_rotary_pos_emb=turned)


def _by_pairs(values: Tensor) -> Tensor:
    """Each pair's value [..., R] twice in a row: some rotary embeddings give it so, others one half after the other."""
    first, second = values.chunk(2, dim=-1)
    return first.repeat_interleave(2, dim=-1) if torch.equal(first, second) else values


def _double_norm(module: Any, norm: Norm, hidden_states: Tensor) -> Tensor:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    size, epsilon = hidden_states.shape[-1:], norm.epsilon_of(module)
    normed = (
        nn.functional.layer_norm(hidden_states, size, eps=epsilon)
        if norm.is_centred
        else nn.functional.rms_norm(hidden_states, size, eps=epsilon)
    )
    scaled = normed if weight is None else normed * (weight + norm.offset)
    return scaled if bias is None else scaled + bias
