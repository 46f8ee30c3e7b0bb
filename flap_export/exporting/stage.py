"""The stage itself: trace once with fake weights, optimize, and stream the weights into the artifact."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Final

import torch

from flap_export.artifact import ARTIFACT_NAME, Artifact, LogitsKind
from flap_export.errors import InputError, check_choice
from flap_export.exporting.passes import keep_all_logits, optimize
from flap_export.exporting.streaming import bind_weights, share_weights, write_graph
from flap_export.exporting.trace import OPSET, trace
from flap_export.families.rope import table_positions
from flap_export.manifest import installed_versions, write_manifest
from flap_export.models.loading import check_weights, meta_model
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.plan import PLAN_NAME
from flap_export.precision import PRECISIONS, DtypeName, torch_dtype
from flap_export.rewriting.checkpoint import copy_companions, write_generation_settings
from flap_export.storage import new_directory

logger = logging.getLogger(__name__)

GRAPHS: Final[dict[LogitsKind, str]] = {"all": "model.onnx", "last": "model-last.onnx"}
DATA_NAME: Final = "model.onnx.data"
DEFAULT_MAX_LENGTH: Final = 2048


def export(
    checkpoint: str | Path, output: str | Path, *, dtype: DtypeName = "float32", max_length: int | None = None
) -> Artifact:
    """Export a dense or pruned checkpoint to ONNX (opset 24, standard operators only).

    The directory holds two graphs over one file of weights: `model.onnx` gives the logits of every new token,
    `model-last.onnx` those of the last one. The interface is described in `flap_export.artifact`.

    Args:
        checkpoint: a model directory or hub name.
        output: the directory to make; an older artifact there is replaced once the new one is complete.
        dtype: precision of weights, activations and cache.
        max_length: rows of the cache, fixed per artifact; None is 2048, or all of a shorter model's positions.

    Raises:
        ModelError: the checkpoint is unusable, or float16 cannot hold one of its weights.
        InputError: `max_length` is not positive or beyond what the model's positions allow.
        OutputError: `output` holds something else, or the disk is full.
    """
    opened = open_checkpoint(checkpoint)
    check_choice("dtype", dtype, PRECISIONS)
    max_length = cache_length(opened, max_length)
    check_weights(meta_model(opened, torch.float32), opened)
    with new_directory(Path(output), ARTIFACT_NAME) as directory:
        ir_model = trace(opened, torch_dtype(dtype), max_length, "last")
        bind_weights(ir_model, opened, torch_dtype(dtype))
        optimize(ir_model)
        write_graph(ir_model, directory / GRAPHS["last"], DATA_NAME)
        share_weights(ir_model, directory / GRAPHS["last"])
        keep_all_logits(ir_model)
        write_graph(ir_model, directory / GRAPHS["all"], None)
        logger.info("exported %s: %d nodes", opened.name, len(ir_model.graph))
        artifact = _describe(opened, dtype, max_length)
        copy_companions(opened.directory, directory)
        write_generation_settings(opened, directory)
        if (opened.directory / PLAN_NAME).is_file():
            shutil.copyfile(opened.directory / PLAN_NAME, directory / PLAN_NAME)
        artifact.save(directory / ARTIFACT_NAME)
        write_manifest(directory, digests=artifact.digests)
    return artifact


def cache_length(checkpoint: Checkpoint, max_length: int | None) -> int:
    """Rows of the cache that `export` gives an artifact of `checkpoint`.

    Raises:
        InputError: `max_length` is not positive or beyond what the model's positions allow.
    """
    positions, held = checkpoint.positions, table_positions(checkpoint.config)
    if max_length is None:
        return min(length for length in (DEFAULT_MAX_LENGTH, positions, held) if length is not None)
    if max_length < 2:
        raise InputError(f"max_length must be at least 2 (a prompt and a new token), got {max_length}")
    if positions is not None and max_length > positions:
        raise InputError(f"max_length {max_length} is beyond the model's {positions} positions; lower it")
    if held is not None and max_length > held:
        raise InputError(
            f"max_length {max_length} is beyond the {held} positions after which this model's rotary embedding "
            f"(longrope) changes for all tokens at once, which one table cannot hold; lower it to {held}"
        )
    return max_length


def _describe(checkpoint: Checkpoint, dtype: DtypeName, max_length: int) -> Artifact:
    packages = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "flap-export")
    return Artifact(
        model=checkpoint.name,
        family=checkpoint.family.model_type,
        dtype=dtype,
        max_length=max_length,
        shape=checkpoint.shape,
        graphs=GRAPHS,
        opset=OPSET,
        digests={"weights": checkpoint.weights.digest},
        versions={package: version for package, version in installed_versions().items() if package in packages},
    )
