"""The experts of a mixture as one FFN with the channels of all, weighed by the router.

Three products for all tokens, however many experts there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flap_export.families import EVERY_EXPERT
from flap_export.models.modeling_pruned import Experts


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
