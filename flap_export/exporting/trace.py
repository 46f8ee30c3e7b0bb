"""Trace a decoder with fake weights into an ONNX graph that names its weights and holds none."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flap_export.artifact import INPUT_IDS, LOGITS, WRITE_INDICES, LogitsKind, cache_tensors
from flap_export.exporting.dialect import ScatterCache, rotary_tables, speaking_onnx
from flap_export.models.alibi import slope_tables
from flap_export.models.attention import cache_argument
from flap_export.models.loading import build_model, meta_model
from flap_export.models.opening import Checkpoint
from flap_export.shapes import DecoderShape

OPSET = 24


class DecoderStep(nn.Module):
    """One call of the exported graph: `(input_ids, write_indices, caches) -> (logits, caches)`."""

    def __init__(self, model: nn.Module, cache_layers: Sequence[int], max_length: int) -> None:
        super().__init__()
        self.model, self.cache_layers, self.max_length = model, tuple(cache_layers), max_length
        self.cache_argument = cache_argument(model)

    def forward(
        self, input_ids: Tensor, write_indices: Tensor, past: Sequence[tuple[Tensor, ...]] = ()
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Run the causal LM on n new tokens; shapes as in `flap_export.artifact`."""
        past_of_layer = dict(zip(self.cache_layers, past, strict=True))
        cache = ScatterCache(past_of_layer, write_indices, input_ids.shape[1], self.max_length)
        output = self.model(
            input_ids=input_ids,
            position_ids=cache.position_ids,
            use_cache=True,
            **{self.cache_argument: cache},
        )
        return output.logits, [cache.present[layer] for layer in self.cache_layers]


def trace(checkpoint: Checkpoint, dtype: torch.dtype, max_length: int, logits: LogitsKind) -> ir.Model:
    """The graph as torch emits it, unoptimized; initializers are named as in the checkpoint and hold fake values."""
    tables = {**rotary_tables(checkpoint, max_length), **slope_tables(checkpoint)}
    shape = checkpoint.shape
    cache_layers = [index for index, layer in enumerate(shape.layers) if layer.kv_heads]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model = build_model(checkpoint, dtype)
        fake_tables = {name: mode.from_tensor(table.to(dtype)) for name, table in tables.items()}
        with speaking_onnx(model, checkpoint, fake_tables):
            if logits == "last":
                model.get_submodule(checkpoint.family.modules.head).register_forward_pre_hook(_last_token)
            step = DecoderStep(model, cache_layers, max_length).eval()
            arguments, axes = _example(shape, cache_layers, max_length, dtype)
            with _quiet_exporter():
                program = torch.onnx.export(
                    step,
                    arguments,
                    dynamo=True,
                    opset_version=OPSET,
                    optimize=False,
                    verbose=False,
                    dynamic_shapes=axes,
                )
    assert program is not None
    ir_model: ir.Model = program.model
    _name_interface(ir_model, checkpoint)
    _bind(ir_model, {name: table.to(dtype) for name, table in tables.items()})
    buffers = meta_model(checkpoint, dtype).named_buffers()
    _bind(ir_model, {name: buffer for name, buffer in buffers if not buffer.is_meta})
    return ir_model


def _last_token(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """What the head gets; not every family of every version of transformers knows `logits_to_keep`."""
    return (inputs[0][:, -1:],)


def _example(
    shape: DecoderShape, cache_layers: Sequence[int], max_length: int, dtype: torch.dtype
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments to trace `DecoderStep.forward` with, and the names of their free axes."""
    sizes = [shape.caches(shape.layers[layer]).values() for layer in cache_layers]
    caches = [
        tuple(torch.zeros(2, heads, max_length, width, dtype=dtype) for heads, width in of_layer) for of_layer in sizes
    ]
    tokens, write_indices = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    batch, new = torch.export.Dim("batch"), torch.export.Dim("new_tokens")
    if not caches:
        # The exporter loses all axis names over an empty list (and over a None) among the arguments.
        return (tokens, write_indices), ({0: batch, 1: new}, {0: batch})
    cache_axes = [({0: batch},) * len(of_layer) for of_layer in caches]
    return (tokens, write_indices, caches), ({0: batch, 1: new}, {0: batch}, cache_axes)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself: missing torchvision, its own deprecations, axis names."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _name_interface(ir_model: ir.Model, checkpoint: Checkpoint) -> None:
    """Name inputs, outputs and initializers as `flap_export.artifact` and the checkpoint do."""
    caches = cache_tensors(checkpoint.shape, 1, 1)
    inputs = [INPUT_IDS, WRITE_INDICES, *(cache.past for cache in caches)]
    outputs = [LOGITS, *(cache.present for cache in caches)]
    graph = ir_model.graph
    assert len(graph.inputs) == len(inputs), [value.name for value in graph.inputs]
    assert len(graph.outputs) == len(outputs), [value.name for value in graph.outputs]
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    for name in list(graph.initializers):
        graph.initializers[name].name = name.removeprefix("model.")


def _bind(ir_model: ir.Model, values: Mapping[str, Tensor]) -> None:
    """Give initializers that no checkpoint stores their values."""
    for name in values.keys() & ir_model.graph.initializers.keys():
        ir_model.graph.initializers[name].const_value = ir.tensor(values[name], name=name)
