"""Nodes of the graph to be, as calls while the model is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

MARKS: Final = "flap_export"
"""Domain of nodes that only mark where a loop begins and ends; a pass takes them out, see `passes/loops.py`."""
EACH: Final = "Each"
CARRIED: Final = "Carried"
AFTER_ALL: Final = "AfterAll"


def node(operator: str, inputs: tuple[Tensor | None, ...], like: Tensor, since: int, **attributes: Any) -> Tensor:
    """One standard node whose result has the shape and dtype of `like`.

    Args:
        operator: its name in ONNX.
        inputs: None for those left out.
        like: what the result looks like.
        since: the opset whose definition is meant.
        attributes: the operator's.
    """
    return _symbolic(operator, inputs, like, like.shape, since, **attributes)


def gathered(values: Tensor, rows: Tensor) -> Tensor:
    """GatherND (opset 13): `rows` [t, 1] of values [T, ...] -> [t, ...]."""
    return _symbolic("GatherND", (values, rows), values, (rows.shape[0], *values.shape[1:]), 13)


def each(values: Tensor) -> Tensor:
    """[E, ...] -> [...]: a different one in every round of a loop, one after another.

    A loop is written as its one round: what depends on `each` or `carried`, up to `after_all`, is computed E times.
    Loops neither overlap nor nest.
    """
    return _symbolic(f"{MARKS}::{EACH}", (values,), values, values.shape[1:], 1)


def carried(initial: Tensor) -> Tensor:
    """What the round before made of it; `initial` in the first one."""
    return _symbolic(f"{MARKS}::{CARRIED}", (initial,), initial, initial.shape, 1)


def after_all(made: Tensor) -> Tensor:
    """What the last round made of what is carried."""
    return _symbolic(f"{MARKS}::{AFTER_ALL}", (made,), made, made.shape, 1)


def _symbolic(
    operator: str,
    inputs: tuple[Tensor | None, ...],
    like: Tensor,
    shape: Sequence[int | torch.SymInt],
    since: int,
    **attributes: Any,
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        operator, inputs, attrs=attributes, dtype=like.dtype, shape=shape, version=since
    )
    return result
