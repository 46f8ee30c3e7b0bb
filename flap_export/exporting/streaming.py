"""Weights on their way from the checkpoint to the artifact: cast, transposed and joined one tensor at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from flap_export.errors import ModelError
from flap_export.exporting.passes.values import lazy_initializer
from flap_export.families import EVERY_EXPERT
from flap_export.models.opening import Checkpoint
from flap_export.models.weights import is_finite
from flap_export.storage import writing_errors

EXTERNAL_FROM_BYTES = 1024
"""Tensors below this size stay inside the graph's own file."""
_NORMS: Final = ("RMSNormalization", "LayerNormalization")
_SCALE_INPUT: Final = 1


def bind_weights(ir_model: ir.Model, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Let every initializer that is named in the checkpoint stream from there, cast to what it was traced in.

    A tied head is the embedding. Where a family's norms add to their weights, the sum is stored, as `<norm>.scale`.
    """
    graph, family = ir_model.graph, checkpoint.family
    head, embedding = f"{family.modules.head}.weight", f"{family.modules.embedding}.weight"
    if checkpoint.shape.tied_embeddings and head in graph.initializers:
        if embedding in graph.initializers:
            ir.convenience.replace_all_uses_with(graph.initializers[head], graph.initializers[embedding])
            graph.initializers.pop(head)
        else:
            graph.initializers[head].name = embedding
    for name in [name for name in graph.initializers if name in checkpoint.weights or EVERY_EXPERT in name]:
        traced = graph.initializers.pop(name)
        assert traced.shape is not None
        assert traced.dtype is not None
        is_scale = any(use.node.op_type in _NORMS and use.idx == _SCALE_INPUT for use in traced.uses())
        offset = family.norm.offset if is_scale else 0.0
        stored = f"{name.removesuffix('.weight')}.scale" if offset else name
        # Routers stay in single precision in some families.
        precision = torch.float32 if traced.dtype == ir.DataType.FLOAT else dtype
        read = partial(_read, checkpoint, name, precision, offset)
        bound = lazy_initializer(graph, stored, traced.dtype, traced.shape.numpy(), read)
        ir.convenience.replace_all_uses_with(traced, bound)


def _read(checkpoint: Checkpoint, name: str, dtype: torch.dtype, offset: float) -> NDArray[np.generic]:
    tensor = _stacked(checkpoint, name) if EVERY_EXPERT in name else checkpoint.weights.finite(name)
    tensor = (tensor.to(torch.float32) + offset if offset else tensor).to(dtype)
    if dtype == torch.float16 and not is_finite(tensor):
        raise ModelError(
            f"tensor '{name}' in '{checkpoint.directory}' holds values beyond {torch.finfo(dtype).max:g}, the largest "
            "of float16; export in bfloat16 or float32"
        )
    if dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _stacked(checkpoint: Checkpoint, name: str) -> Tensor:
    """The tensor of every expert in one: weights [E, F, H], whichever way a projection goes, and biases."""
    path, _, kind = name.removeprefix(f"{checkpoint.family.modules.layers}.").partition(".")[2].rpartition(".")
    projection = checkpoint.family.projection(path)
    assert projection is not None, name
    layer = checkpoint.shape.layers[int(name.removeprefix(f"{checkpoint.family.modules.layers}.").partition(".")[0])]
    parts = [checkpoint.weights.finite(name.replace(EVERY_EXPERT, str(expert))) for expert in range(layer.experts)]
    return torch.stack([part.T if kind == "weight" and projection.restores else part for part in parts])


def write_graph(ir_model: ir.Model, path: Path, data_name: str | None) -> None:
    """Write the graph to `path` and its weights, one at a time, to `data_name` beside it.

    With `data_name` None the weights are references to a file written before (see `share_weights`).

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    with writing_errors(path):
        ir.save(ir_model, path, external_data=data_name, size_threshold_bytes=EXTERNAL_FROM_BYTES)


def share_weights(ir_model: ir.Model, written: Path) -> None:
    """Let the weights of `ir_model` refer to those that the graph at `written` stored, instead of streaming again."""
    stored = ir.load(written).graph.initializers
    for name, value in ir_model.graph.initializers.items():
        value.const_value = stored[name].const_value
