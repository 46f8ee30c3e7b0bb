"""From a graph to TensorRT's network: parsed, marked, checked and summarised, all of it without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from flap_export.artifact import INPUT_IDS, LOGITS, WRITE_INDICES, Artifact
from flap_export.building.flavours import quiet_polygraphy
from flap_export.building.record import NetworkSummary
from flap_export.errors import ArtifactError, InputError
from flap_export.families import family_of
from flap_export.precision import PRECISIONS

_PLACE: Final = re.compile(r"ModelImporter\.cpp|\[!\]|In node ")
_TOLD_LINES: Final = 4
_ITEM_BYTES: Final = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "BOOL": 1}
_COMPUTING_LAYERS: Final = ("MATRIX_MULTIPLY", "ATTENTION_INPUT", "ATTENTION_OUTPUT", "KV_CACHE_UPDATE")
"""Layers that must compute in the graph's precision: all that move weights or caches."""

# The shapes for which TensorRT-RTX 1.7 found a fused kernel, tried on all of its targets.
FUSED_HEADS: Final = 4
FUSED_HEAD_DIM: Final = range(16, 257, 8)


def parsed_network(graph: Path, polygraphy: Any) -> tuple[Any, Any, Any]:
    """Builder, strongly typed network and parser of a graph.

    Raises:
        ArtifactError: TensorRT refuses the graph; its reasons are named.
    """
    from polygraphy.exception import PolygraphyException

    with quiet_polygraphy() as errors:
        try:
            builder, network, parser = polygraphy.NetworkFromOnnxPath(str(graph), strongly_typed=True)()
        except PolygraphyException as error:
            raise ArtifactError(f"TensorRT refuses the graph '{graph.name}': {reason_of(errors, error)}") from error
    return builder, network, parser


def reason_of(errors: list[str], error: Exception) -> str:
    """What was logged, on one line and without the places in TensorRT's sources; Polygraphy's exception says little."""
    lines = [line.removeprefix("[E]").strip() for message in errors for line in message.splitlines()]
    told = [line for line in lines if line and not _PLACE.match(line)]
    return "; ".join(dict.fromkeys(told[:_TOLD_LINES])) or " ".join(str(error).split())


def layers_of(network: Any) -> Iterator[Any]:
    """The layers of a network."""
    for index in range(network.num_layers):
        yield network.get_layer(index)


def attentions_of(network: Any, trt: Any) -> Iterator[Any]:
    """The attentions of a network."""
    for layer in layers_of(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Layers come typed as their base class; this is the way down that TensorRT's bindings offer.
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def allow_decomposition(network: Any, trt: Any) -> int:
    """Let TensorRT take an attention apart where it has no fused kernel for it; returns how many those are.

    Where a fused kernel exists an attention stays in one piece, or the build fails.
    """
    decomposable = [attention for attention in attentions_of(network, trt) if not _has_fused_kernel(attention)]
    for attention in decomposable:
        attention.decomposable = True
    return len(decomposable)


def _has_fused_kernel(attention: Any) -> bool:
    query = attention.get_input(0)
    _, heads, _, head_dim = tuple(query.shape)
    return query.dtype.name != PRECISIONS["float32"].tensorrt and heads >= FUSED_HEADS and head_dim in FUSED_HEAD_DIM


def limit_keys(network: Any, trt: Any) -> None:
    """Tell every attention how many rows of the cache are valid, write_indices + n, besides what its mask says.

    The mask alone decides about the result. The lengths let a kernel leave out rows that no query sees.

    Raises:
        InputError: this version's attention takes none.
    """
    inputs = {tensor.name: tensor for tensor in inputs_of(network)}
    shape = network.add_shape(inputs[INPUT_IDS]).get_output(0)
    tokens = network.add_slice(shape, (1,), (1,), (1,)).get_output(0)
    lengths = network.add_elementwise(inputs[WRITE_INDICES], tokens, trt.ElementWiseOperation.SUM).get_output(0)
    narrowed = network.add_cast(lengths, trt.int32).get_output(0)
    for attention in attentions_of(network, trt):
        if not hasattr(attention, "key_value_lengths"):
            raise InputError(f"version {trt.__version__} takes no key lengths; leave --limit-keys out")
        attention.key_value_lengths = narrowed


def inputs_of(network: Any) -> list[Any]:
    """The inputs of a network."""
    return [network.get_input(index) for index in range(network.num_inputs)]


def outputs_of(network: Any) -> list[Any]:
    """The outputs of a network."""
    return [network.get_output(index) for index in range(network.num_outputs)]


def check_network(network: Any, artifact: Artifact, trt: Any) -> None:
    """Whether the network says what the graph means, as far as that can be seen before it is built.

    Raises:
        ArtifactError: inputs, outputs, caches, masks or types are not what the artifact implies.
    """
    rules = (
        *_interface_problems(network, artifact),
        *_attention_problems(network, trt),
        *_type_problems(network, artifact),
    )
    if rules:
        raise ArtifactError(f"TensorRT reads the graph otherwise than it is meant: {'; '.join(rules)}; export it again")


def _interface_problems(network: Any, artifact: Artifact) -> Iterator[str]:
    expected: dict[str, tuple[int, ...] | None] = {INPUT_IDS: (-1, -1), WRITE_INDICES: (-1,), LOGITS: None}
    caches = artifact.caches(-1)
    expected |= {name: cache.shape for cache in caches for name in (cache.past, cache.present)}
    found = {tensor.name: tuple(tensor.shape) for tensor in (*inputs_of(network), *outputs_of(network))}
    for name in sorted(set(expected) ^ set(found)):
        yield f"{name} is {'missing' if name in expected else 'not one of its inputs and outputs'}"
    for name, shape in found.items():
        if expected.get(name) not in (None, shape):
            yield f"{name} must be {expected[name]}, found {shape}"
    updates = Counter(layer.type.name for layer in layers_of(network))["KV_CACHE_UPDATE"]
    if updates != len(caches):
        yield f"{len(caches)} caches must be updated in place, found {updates}"


def _attention_problems(network: Any, trt: Any) -> Iterator[str]:
    for attention in attentions_of(network, trt):
        # Versions before causal kinds have a flag only.
        if attention.causal or attention.mask is None:
            yield f"attention {attention.name} must be masked, and not causal: its causality ignores the cache"


def _type_problems(network: Any, artifact: Artifact) -> Iterator[str]:
    wanted, routers = PRECISIONS[artifact.dtype].tensorrt, _single_precision_widths(artifact)
    for layer in layers_of(network):
        if layer.type.name in _COMPUTING_LAYERS and (found := layer.get_output(0).dtype.name) != wanted:
            is_router = layer.type.name == "MATRIX_MULTIPLY" and tuple(layer.get_output(0).shape)[-1] in routers
            if not (is_router and found == PRECISIONS["float32"].tensorrt):
                yield f"layer {layer.name} must compute in {wanted}, found {found}"


def _single_precision_widths(artifact: Artifact) -> set[int]:
    """Outputs of the routers, where their family computes them in single precision."""
    mixture = family_of(artifact.family).mixture
    if mixture is None or not mixture.router_in_float32:
        return set()
    return {layer.experts for layer in artifact.shape.layers if layer.experts}


def summary_of(network: Any, artifact: Artifact, trt: Any) -> NetworkSummary:
    """The network in numbers."""
    attentions = list(attentions_of(network, trt))
    kinds = Counter(layer.type.name for layer in layers_of(network))
    is_single = artifact.dtype == "float32"
    return NetworkSummary(
        layers=network.num_layers,
        attentions=len(attentions),
        decomposable_attentions=sum(bool(attention.decomposable) for attention in attentions),
        cache_updates=kinds["KV_CACHE_UPDATE"],
        caches={
            tensor.name: tuple(tensor.shape)
            for tensor in inputs_of(network)
            if tensor.name not in (INPUT_IDS, WRITE_INDICES)
        },
        types=dict(sorted(Counter(tensor.dtype.name for _, tensor in _results(network)).items())),
        float32_layers={} if is_single else dict(sorted(_float32_layers(network).items())),
    )


def _results(network: Any) -> Iterator[tuple[Any, Any]]:
    for layer in layers_of(network):
        for index in range(layer.num_outputs):
            yield layer, layer.get_output(index)


def _float32_layers(network: Any) -> Counter[str]:
    return Counter(
        layer.type.name for layer, tensor in _results(network) if tensor.dtype.name == PRECISIONS["float32"].tensorrt
    )


def weights_bytes(network: Any) -> int:
    """Bytes of all constants."""
    total = 0
    for layer, tensor in _results(network):
        if layer.type.name == "CONSTANT":
            count = 1
            for size in tuple(tensor.shape):
                count *= size
            total += count * _ITEM_BYTES.get(tensor.dtype.name, 1)
    return total
