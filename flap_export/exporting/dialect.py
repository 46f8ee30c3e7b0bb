"""The ONNX dialect: while it is spoken, a transformers model calls standard operators instead of torch code.

Attention, cache updates, a family's own norms and rotary embeddings each become one node:

    TensorScatter (opset 24)        new K/V rows into the cache [B, K, L, D] at `write_indices`
    Attention (24)                  queries against the whole cache, GQA by shape
    RMSNormalization (23)           or LayerNormalization (17)
    RotaryEmbedding (23)
    Gelu (20)                       for the activation that transformers writes out as `gelu_new`

The experts of a mixture become one FFN with the channels of all, weighed by the router: three products for all tokens,
however many experts there are.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from flap_export.attention import ask_the_interface
from flap_export.families import EVERY_EXPERT, Norm
from flap_export.modeling_pruned import Experts
from flap_export.opening import Checkpoint

NAME = "flap_export_onnx"


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
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

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

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, n, L]: query at position p sees keys p - window < j <= p, or all up to p.

        A float mask that holds causality too, because TensorRT refuses a mask beside `is_causal`. Made once per
        window size and shared by all layers.
        """
        if window not in self._masks:
            query = self.position_ids.unsqueeze(1).unsqueeze(-1)
            key = torch.arange(self.max_length).view(1, 1, 1, -1)
            visible = key <= query if window is None else (key <= query) & (key > query - window)
            self._masks[window] = torch.where(
                visible, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype)
            )
        return self._masks[window]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step_cache: Any,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, Q, n, D], caches [B, K, L, D] -> [B, n, Q, D]."""
    decoding: Decoding = step_cache.decoding
    window = sliding_window if sliding_window is not None and sliding_window < decoding.max_length else None
    if softcap is not None:
        output = softcapped_attention(query * scaling, key, value, decoding.mask(window, query.dtype), softcap)
    elif window is not None:
        inputs = (query, key, value, decoding.mask(window, query.dtype))
        output = _symbolic("Attention", inputs, query, 24, scale=float(scaling))
    else:
        padded = (query, key, value, None, None, None, decoding.valid_keys)
        output = _symbolic("Attention", padded, query, 24, scale=float(scaling), is_causal=1)
    return output.transpose(1, 2), None


def softcapped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float) -> Tensor:
    """Attention whose scores s become softcap tanh(s / softcap), in plain operators: TensorRT refuses the one.

    The query heads of a KV head stand one below the other, g n rows, so that caches are neither repeated nor read
    more than once.

    Args:
        query: scaled, [B, Q, n, D].
        key: [B, K, L, D]
        value: [B, K, L, D]
        mask: additive, [B, 1, n, L].
        softcap: bound of the scores.
    """
    (batch, heads, tokens, size), (_, kv_heads, length, _) = query.shape, key.shape
    group = heads // kv_heads
    rows = (batch, kv_heads, group * tokens)
    scores = query.reshape(*rows, size) @ key.transpose(-1, -2)
    capped = torch.tanh(scores / softcap) * softcap
    masked = capped.reshape(batch, kv_heads, group, tokens, length) + mask.unsqueeze(1)
    probabilities = masked.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (probabilities.reshape(*rows, length) @ value).reshape(query.shape)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers' mask interface: causality is the attention operator's own business."""


class JoinedExperts(nn.Module):
    """All experts as one FFN of E F channels, whose weights are named after the experts', `*` for every number.

    A token's channels of experts that it was not sent to become zero. Gathering the chosen experts' weights instead
    would copy them once per token, and a loop over experts would have shapes that depend on what is routed where.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        first: Any = experts[0]
        self.count, self.width, self.act_fn = len(experts), first.width, first.act_fn
        self.gate, self.up, self.down = first.names
        self.add_module(EVERY_EXPERT, _joined_weights(first, len(experts)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Transformers' experts interface: tokens [T, H], chosen experts and their weights [T, k] -> [T, H]."""
        weights: Any = self.get_submodule(EVERY_EXPERT)
        bias = weights.get_submodule(self.down)._parameters["bias"]
        shares = hidden_states.new_zeros(hidden_states.shape[0], self.count)
        shares = shares.scatter(1, top_k_index, top_k_weights.to(shares.dtype))
        output = shares @ bias if bias is not None else torch.zeros_like(hidden_states)
        if not self.width:
            return output
        gate, up, down = (weights.get_submodule(name).weight for name in (self.gate, self.up, self.down))
        channels = self.act_fn(linear(hidden_states, gate)) * linear(hidden_states, up)
        share = shares.unsqueeze(-1)
        weighed = channels.view(-1, self.count, self.width) * share
        # What an expert makes of tokens that are not meant for it may overflow, and infinity times zero is not zero.
        weighed = torch.where(share > 0, weighed, torch.zeros((), dtype=weighed.dtype))
        product = linear(weighed.view(-1, self.count * self.width), down)
        return product if bias is None else product + output


def _joined_weights(first: Any, count: int) -> nn.Module:
    """Parameters of all experts: weights [E F, H] and [H, E F], biases [E, H]."""
    joined = nn.Module()
    for name in first.names:
        holder = nn.Module()
        module = dict(first.named_children()).get(name)
        weight, bias = (module._parameters.get(kind) if module is not None else None for kind in ("weight", "bias"))
        if weight is not None:
            rows, columns = weight.shape
            size = (rows, count * columns) if name == first.names[-1] else (count * rows, columns)
            holder.register_parameter("weight", nn.Parameter(weight.new_empty(size), requires_grad=False))
        size = (count, *bias.shape) if bias is not None else ()
        empty = None if bias is None else nn.Parameter(bias.new_empty(size), requires_grad=False)
        holder.register_parameter("bias", empty)
        joined.add_module(name, holder)
    return joined


def _norm(module: Any, norm: Norm, hidden_states: Tensor) -> Tensor:
    """The weight stands for the whole scale; a family's offset is added when weights are bound."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    attributes = {"axis": -1, "epsilon": norm.epsilon_of(module)}
    if not norm.is_centred:
        return _symbolic("RMSNormalization", (hidden_states, weight), hidden_states, 23, **attributes)
    if weight is None or weight.ndim > 1:
        # The operator takes one row of weights, for all heads.
        normed = layer_norm(hidden_states, hidden_states.shape[-1:], eps=norm.epsilon_of(module))
        return normed if weight is None else normed * weight
    inputs = (hidden_states, weight) if bias is None else (hidden_states, weight, bias)
    return _symbolic("LayerNormalization", inputs, hidden_states, 17, **attributes)


def _softplus(values: Tensor) -> Tensor:
    """Torch's own becomes ten nodes."""
    return _symbolic("Softplus", (values,), values, 1)


def _xielu(module: Any, hidden_states: Tensor) -> Tensor:
    """Apertus' activation in float32: ONNX has no expm1, and what exp(x) - 1 - x leaves in half precision is noise."""
    x, beta, epsilon, positive, negative = (
        tensor.to(torch.float32) for tensor in (hidden_states, module.beta, module.eps, module.alpha_p, module.alpha_n)
    )
    convex = _softplus(positive) * x * x
    concave = (torch.exp(torch.minimum(x, epsilon)) - 1 - x) * (beta + _softplus(negative))
    return (torch.where(x > 0, convex, concave) + beta * x).to(hidden_states.dtype)


def rotary_tables(checkpoint: Checkpoint, max_length: int) -> dict[str, Tensor]:
    """Cosines and sines float32 [L, R / 2] of every position, by name, from the model's own rotary embeddings.

    R channels of a head are rotated, all D in most families. A family that rotates its kinds of layers differently
    has a pair of tables for each.

    Taking the values rather than the formula carries every kind of scaling (linear, llama3, yarn) along.
    """
    from flap_export.loading import meta_model

    tables: dict[str, Tensor] = {}
    position_ids, like = torch.arange(max_length).unsqueeze(0), torch.zeros(1, dtype=torch.float32)
    for path, rotary in rotary_modules(meta_model(checkpoint, torch.float32)):
        for kind in getattr(rotary, "layer_types", None) or [None]:
            values = rotary(like, position_ids) if kind is None else rotary(like, position_ids, kind)
            for name, value in zip(_table_names(kind), values, strict=True):
                tables[f"{path}.{name}"] = _every_value_once(value[0])
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


def rotary_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every rotary embedding."""
    for path, module in model.named_modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            yield path, module


def _table_names(kind: str | None) -> tuple[str, str]:
    prefix = "" if kind is None else f"{kind}_"
    return f"{prefix}cosine", f"{prefix}sine"


@contextmanager
def speaking_onnx(model: nn.Module, checkpoint: Checkpoint, tables: Mapping[str, Tensor]) -> Iterator[None]:
    """Make `model`, built for this trace only, speak the dialect; global functions are put back at the end.

    Args:
        model: a causal LM with fake weights.
        checkpoint: what it was built from.
        tables: `rotary_tables` as the trace sees them.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.config._attn_implementation = NAME  # type: ignore[union-attr]
    ask_the_interface(model, checkpoint.family)
    for module in model.modules():
        if checkpoint.family.norm.covers(module):
            module.forward = partial(_norm, module, checkpoint.family.norm)
        if type(module).__name__ == "NewGELUActivation":
            module.forward = partial(gelu, approximate="tanh")
        if type(module).__name__ == "XIELUActivation":
            module.forward = partial(_xielu, module)
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(path, JoinedExperts(module))
    for path, table in tables.items():
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner).register_buffer(name, table)
    for _, rotary in rotary_modules(model):
        rotary.forward = partial(_rotary_tables, rotary)
    modeling = importlib.import_module(type(model).__module__)
    # Families with learned positions have no such function.
    original = getattr(modeling, "apply_rotary_pos_emb", None)
    speaking = partial(_apply_rotary, interleaved=checkpoint.family.rotary_interleaved)
    modeling.apply_rotary_pos_emb = speaking  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if original is None:
            del modeling.apply_rotary_pos_emb
        else:
            modeling.apply_rotary_pos_emb = original  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Table:
    values: Tensor
    position_ids: Tensor


def _rotary_tables(
    module: nn.Module, hidden_states: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[_Table, _Table]:
    cosine, sine = (module.get_buffer(name) for name in _table_names(layer_type))
    return _Table(cosine, position_ids), _Table(sine, position_ids)


def _apply_rotary(
    query: Tensor, key: Tensor, cosine: _Table, sine: _Table, *_: Any, interleaved: bool, **__: Any
) -> tuple[Tensor, Tensor]:
    width = 2 * cosine.values.shape[-1]

    def rotated(heads: Tensor) -> Tensor:
        attributes = {"rotary_embedding_dim": width} if width < heads.shape[-1] else {}
        if interleaved:
            attributes["interleaved"] = 1
        inputs = (heads, cosine.values, sine.values, cosine.position_ids)
        return _symbolic("RotaryEmbedding", inputs, heads, 23, **attributes)

    return rotated(query), rotated(key)
