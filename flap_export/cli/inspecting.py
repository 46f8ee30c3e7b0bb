"""`inspect`: what a path is, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from flap_export.artifact import is_artifact, load_artifact
from flap_export.building.record import check_runnable, is_engine, is_runnable, load_engine
from flap_export.cli.summaries import of_shape
from flap_export.models.opening import open_checkpoint
from flap_export.shapes import DecoderShape


def described(path: str) -> tuple[dict[str, Any], Sequence[RenderableType]]:
    """A JSON object and its words for an artifact or a checkpoint.

    Raises:
        InputError: the path is neither.
    """
    directory = Path(path)
    if is_runnable(directory):
        check_runnable(directory)
    if is_artifact(directory):
        artifact = load_artifact(directory)
        facts: dict[str, Any] = {"kind": "artifact", "family": artifact.family, "dtype": artifact.dtype}
        return _described({**facts, "max_length": artifact.max_length, "opset": artifact.opset}, artifact.shape)
    if is_engine(directory):
        record = load_engine(directory)
        facts = {"kind": f"{record.flavour} engine", "family": record.family, "dtype": record.dtype}
        targets = ", ".join(record.targets) or "the GPU it was built on"
        return _described({**facts, "max_length": record.max_length, "targets": targets}, record.shape)
    checkpoint = open_checkpoint(path)
    kind = "pruned checkpoint" if checkpoint.is_pruned else "dense checkpoint"
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    facts = {"kind": kind, "family": checkpoint.family.model_type, "dtype": dtype}
    # Learned positions, norms and biases too, which no budget counts.
    return _described({**facts, "parameters": checkpoint.weights.parameters}, checkpoint.shape)


def _described(facts: dict[str, Any], shape: DecoderShape) -> tuple[dict[str, Any], Sequence[RenderableType]]:
    head = 0 if shape.tied_embeddings else shape.head_parameters
    facts |= {
        "decoder_parameters": shape.decoder_parameters,
        "embedding_parameters": shape.head_parameters + head,
    }
    lines = [f"{escape(name.replace('_', ' '))}: [bold]{escape(_grouped(value))}[/]" for name, value in facts.items()]
    return {**facts, "shape": shape.model_dump(mode="json")}, [*lines, "", *of_shape(shape)]


def _grouped(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
