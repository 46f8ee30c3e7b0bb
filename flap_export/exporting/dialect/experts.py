"""The experts of a mixture, one after another: each reads the tokens that were sent to it, and is not read without any.

A few nodes however many experts there are: one Scan, whose rounds see an expert's weights where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flap_export.exporting.dialect.node import after_all, carried, each, gathered, node
from flap_export.families import EVERY_EXPERT
from flap_export.models.modeling_pruned import Experts


class StackedExperts(nn.Module):
    """All experts of a layer, whose weights are stacked and named after the experts', `*` for every number."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        first: Any = experts[0]
        self.count, self.width, self.act_fn, self.own_gate = len(experts), first.width, first.act_fn, first.own_gate
        self.gate, self.up, self.down = first.names
        self.add_module(EVERY_EXPERT, _stacked_weights(first, len(experts)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Transformers' experts interface: tokens [T, H], chosen experts and their weights [T, k] -> [T, H].

        Sums are float32, because ONNX Runtime adds rows in no other precision.
        """
        weights: Any = self.get_submodule(EVERY_EXPERT)
        bias = weights.get_submodule(self.down)._parameters["bias"]
        shares = torch.zeros(hidden_states.shape[0], self.count, dtype=torch.float32)
        shares = shares.scatter(1, top_k_index, top_k_weights.to(shares.dtype))
        if not self.width:
            return torch.zeros_like(hidden_states) if bias is None else shares.to(bias.dtype) @ bias
        gate, up, down = (weights.get_submodule(name) for name in (self.gate, self.up, self.down))
        share, total = each(shares.T), carried(torch.zeros_like(hidden_states, dtype=torch.float32))
        tokens = share.nonzero()
        own = gathered(hidden_states, tokens)
        output = self._gated(_widened(own, gate), _widened(own, up)) @ each(down.weight)
        if bias is not None:
            output = output + each(bias)
        weighed = output.to(total.dtype) * gathered(share, tokens).unsqueeze(-1)
        total = node("ScatterND", (total, tokens, weighed), total, 18, reduction="add")
        return after_all(total).to(hidden_states.dtype)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        gated: Tensor = self.act_fn(gate) * up if self.own_gate is None else self.own_gate(_InTurns(gate, up))
        return gated


@dataclass(frozen=True)
class _InTurns:
    """Gate and up values [t, F] for a class that takes every other one of both, without laying them out so."""

    gate: Tensor
    up: Tensor

    def __getitem__(self, taken: tuple[EllipsisType, slice]) -> Tensor:
        _, turns = taken
        assert turns.step == 2, turns
        return self.up if turns.start else self.gate


def _widened(own: Tensor, projection: Any) -> Tensor:
    """Tokens [t, H] -> [t, F], by the weight and the bias of each expert in turn."""
    product = linear(own, each(projection.weight))
    bias = projection._parameters["bias"]
    return product if bias is None else product + each(bias)


def _stacked_weights(first: Any, count: int) -> nn.Module:
    """Parameters of all experts: weights [E, F, H], those of the down projection transposed, and biases."""
    stacked = nn.Module()
    for name in first.names:
        holder = nn.Module()
        module = dict(first.named_children()).get(name)
        weight, bias = (module._parameters.get(kind) if module is not None else None for kind in ("weight", "bias"))
        if weight is not None:
            of_one = weight.T if name == first.names[-1] else weight
            holder.register_parameter("weight", _empty(of_one, count))
        holder.register_parameter("bias", None if bias is None else _empty(bias, count))
        stacked.add_module(name, holder)
    return stacked


def _empty(of_one: Tensor, count: int) -> nn.Parameter:
    return nn.Parameter(of_one.new_empty((count, *of_one.shape)), requires_grad=False)
