"""One node of the graph to be, as a call while the model is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def node(operator: str, inputs: tuple[Tensor | None, ...], like: Tensor, since: int, **attributes: Any) -> Tensor:
    """One standard node whose result has the shape and dtype of `like`.

    Args:
        operator: its name in ONNX.
        inputs: None for those left out.
        like: what the result looks like.
        since: the opset whose definition is meant.
        attributes: the operator's.
    """
    result: Tensor = torch.onnx.ops.symbolic(
        operator, inputs, attrs=attributes, dtype=like.dtype, shape=like.shape, version=since
    )
    return result
