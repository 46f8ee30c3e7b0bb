"""Compensation: what the kept weights and a bias take over from the removed channels. Pure arithmetic.

A new kind is one function and one row of `COMPENSATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

import torch
from torch import Tensor

CompensationName = Literal["none", "bias"]


def bias_compensation(weight: Tensor, removed: Tensor, mean: Tensor) -> Tensor:
    """The removed channels' mean contribution, W[:, removed] mean[removed] (FLAP, equation 9).

    Args:
        weight: [out, in], any floating dtype.
        removed: int64 [R], indices into the inputs.
        mean: float64 [in], mean input of every channel.

    Returns:
        float64 [out]
    """
    return weight[:, removed].to(torch.float64) @ mean[removed]


COMPENSATIONS: Final[Mapping[CompensationName, Callable[[Tensor, Tensor, Tensor], Tensor] | None]] = {
    "none": None,
    "bias": bias_compensation,
}
