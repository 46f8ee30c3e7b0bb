"""Activations that transformers writes out and one operator computes, or that lose digits in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import gelu

from flap_export.exporting.dialect.node import node


def softplus(values: Tensor) -> Tensor:
    """Torch's own becomes ten nodes."""
    return node("Softplus", (values,), values, 1)


def xielu(module: Any, hidden_states: Tensor) -> Tensor:
    """Apertus' activation in float32: ONNX has no expm1, and what exp(x) - 1 - x leaves in half precision is noise."""
    x, beta, epsilon, positive, negative = (
        tensor.to(torch.float32) for tensor in (hidden_states, module.beta, module.eps, module.alpha_p, module.alpha_n)
    )
    convex = softplus(positive) * x * x
    concave = (torch.exp(torch.minimum(x, epsilon)) - 1 - x) * (beta + softplus(negative))
    return (torch.where(x > 0, convex, concave) + beta * x).to(hidden_states.dtype)


def new_gelu(_: Any, hidden_states: Tensor) -> Tensor:
    """Gelu by the hyperbolic tangent."""
    return gelu(hidden_states, approximate="tanh")


ACTIVATIONS: Final[Mapping[str, Callable[[Any, Tensor], Tensor]]] = {
    "BloomGelu": new_gelu,
    "NewGELUActivation": new_gelu,
    "XIELUActivation": xielu,
}
"""By the name of the class whose `forward` they replace."""
