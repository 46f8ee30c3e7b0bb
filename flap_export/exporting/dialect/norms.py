"""A family's own norms: RMSNormalization (opset 23) or LayerNormalization (17)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import layer_norm

from flap_export.exporting.dialect.node import node
from flap_export.families import Norm


def normalized(module: Any, norm: Norm, hidden_states: Tensor) -> Tensor:
    """What `module` makes of [..., H].

    The weight stands for the whole scale; a family's offset is added when weights are bound.
    """
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    attributes = {"axis": -1, "epsilon": norm.epsilon_of(module)}
    if not norm.is_centred:
        weight = hidden_states.new_ones(hidden_states.shape[-1:]) if weight is None else weight
        return node("RMSNormalization", (hidden_states, weight), hidden_states, 23, **attributes)
    if weight is None or weight.ndim > 1:
        # The operator takes one row of weights, for all heads.
        normed = layer_norm(hidden_states, hidden_states.shape[-1:], eps=norm.epsilon_of(module))
        return normed if weight is None else normed * weight
    inputs = (hidden_states, weight) if bias is None else (hidden_states, weight, bias)
    return node("LayerNormalization", inputs, hidden_states, 17, **attributes)
