"""What the passes ask of values: what a constant holds, who reads it, and tensors that are computed when written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def constant_integers(value: ir.Value | None) -> list[int] | None:
    """The integers a small constant holds, or None if `value` is not one."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size > 16:
        return None
    return [int(number) for number in np.atleast_1d(tensor.numpy()).ravel()]


def constant_number(value: ir.Value | None) -> float | None:
    """The one number a constant holds, or None if `value` is not such a one."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None and not is_weight(value) else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is an initializer that streams from disk."""
    return value is not None and value.is_initializer() and isinstance(value.const_value, ir.LazyTensor)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads `value`, if there is one and no other."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None


def lazy_initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int], compute: Callable[[], NDArray[np.generic]]
) -> ir.Value:
    """Register an initializer whose values `compute` gives when it is written; nothing is kept in memory."""
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(compute()), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
        cache=False,
    )
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def integers_initializer(graph: ir.Graph, kind: str, numbers: Sequence[int]) -> ir.Value:
    """A small constant int64 vector, named after what it holds and registered once per graph."""
    name = f"{kind}_" + "_".join(str(number) if number >= 0 else "rest" for number in numbers)
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name,
        shape=ir.Shape((len(numbers),)),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.Tensor(np.array(numbers, dtype=np.int64), name=name),
    )
    graph.register_initializer(value)
    return value
