"""The artifact's graph as a GPU gets it: the same computation without loops, and for TensorRT with explicit masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flap_export.artifact import Artifact
from flap_export.building.experts import join_experts
from flap_export.building.masks import mask_explicitly

if TYPE_CHECKING:
    import onnx_ir as ir


def cuda_graph(graph: Path) -> bytes | None:
    """`graph` with joined experts, its weights left in their file; None where there are no loops over experts."""
    import onnx_ir as ir

    model = ir.load(graph)
    serialized: bytes | None = ir.to_proto(model).SerializeToString() if join_experts(model) else None
    return serialized


def tensorrt_graph(graph: Path, artifact: Artifact) -> bytes:
    """`graph` as TensorRT reads it rightly, its weights left in their file."""
    import onnx_ir as ir

    serialized: bytes = ir.to_proto(_prepared(graph, artifact)).SerializeToString()
    return serialized


def write_tensorrt_graph(graph: Path, artifact: Artifact, folder: Path) -> Path:
    """Write `tensorrt_graph` into `folder`, where its weights are linked to; returns the new file.

    Args:
        graph: one of the artifact's graphs; its weights lie beside it.
        artifact: what the graph is of.
        folder: an existing directory.
    """
    import onnx_ir as ir

    model = _prepared(graph, artifact)
    for name in {str(value.location) for value in _external_tensors(model)}:
        link = folder / name
        if not link.exists():
            link.symlink_to((graph.parent / name).resolve())
    target = folder / graph.name
    ir.save(model, target)
    return target


def _prepared(graph: Path, artifact: Artifact) -> ir.Model:
    import onnx_ir as ir

    model = ir.load(graph)
    mask_explicitly(model, artifact)
    join_experts(model)
    return model


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    import onnx_ir as ir

    values = (value.const_value for value in model.graph.initializers.values())
    return [value for value in values if isinstance(value, ir.ExternalTensor)]
