"""The exported artifact: what `export` and `build` write, and what every runner reads.

The interface of the graph, with B sequences, n new tokens and a cache of fixed length L:

    input_ids                       int64 [B, n]
    write_indices                   int64 [B]           first cache row the new tokens are written to
    past_key_values.<i>.key/.value  dtype [B, K_i, L, D]
    logits                          dtype [B, n, V]     (graph `last`: [B, 1, V], the last position only)
    present.<i>.key/.value          dtype [B, K_i, L, D]

With multi-head latent attention a layer has one cache instead, `past_key_values.<i>.latent`, of one head: the latent,
and beside it the part of a key that turns.

Positions and the number of valid keys follow from `write_indices` and n inside the graph. Ragged prompts are padded
on the right and fed with the same `write_indices`; decoding then overwrites the padding rows. A layer that kept no
head has no cache inputs or outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from flap_export.errors import ArtifactError
from flap_export.precision import DtypeName
from flap_export.shapes import DecoderShape
from flap_export.storage import Record

ARTIFACT_NAME: Final = "artifact.json"
INPUT_IDS: Final = "input_ids"
WRITE_INDICES: Final = "write_indices"
LOGITS: Final = "logits"

LogitsKind = Literal["all", "last"]


@dataclass(frozen=True)
class CacheTensor:
    """One cache of one layer: an input of the graph that is also an output, updated in place."""

    past: str
    """Name of the input."""
    present: str
    """Name of the output."""
    shape: tuple[int, int, int, int]
    """[B, K_i, L, D]; K_i is 1 of a latent."""


class Artifact(Record):
    """`artifact.json`: how to run what lies beside it."""

    kind: ClassVar[str] = "artifact"

    format: Literal["onnx"] = "onnx"
    model: str
    """The checkpoint it was exported from, as named by the user."""
    family: str
    dtype: DtypeName
    max_length: Annotated[int, Field(ge=1)]
    """Rows of the cache: prompt and generated tokens together."""
    shape: DecoderShape
    graphs: dict[LogitsKind, str]
    """File name of the graph per kind of logits; both share one file of weights."""
    opset: int
    digests: dict[str, str]
    versions: dict[str, str]

    @property
    def cache_layers(self) -> tuple[int, ...]:
        """Layers that have a cache."""
        return tuple(index for index, layer in enumerate(self.shape.layers) if layer.kv_heads)

    def caches(self, batch_size: int) -> tuple[CacheTensor, ...]:
        """The caches of all layers that have one, in the order of the graph's inputs and outputs."""
        return cache_tensors(self.shape, self.max_length, batch_size)


def cache_tensors(shape: DecoderShape, length: int, batch_size: int) -> tuple[CacheTensor, ...]:
    """The caches of a decoder with L rows each, in the order of a graph's inputs and outputs; see `Artifact`."""
    return tuple(
        CacheTensor(f"past_key_values.{index}.{name}", f"present.{index}.{name}", (batch_size, heads, length, width))
        for index, layer in enumerate(shape.layers)
        for name, (heads, width) in shape.caches(layer).items()
    )


def is_artifact(path: Path) -> bool:
    """Whether `path` is the directory of an exported artifact."""
    return (path / ARTIFACT_NAME).is_file()


def load_artifact(path: Path) -> Artifact:
    """Read `artifact.json` of a directory and check that its graphs are there.

    Raises:
        ArtifactError: the directory is not an artifact, or a graph file is missing.
    """
    if not is_artifact(path):
        raise ArtifactError(f"'{path}' is no exported artifact (no {ARTIFACT_NAME} in it); run `flap-export export`")
    artifact = Artifact.load(path / ARTIFACT_NAME)
    missing = [name for name in artifact.graphs.values() if not (path / name).is_file()]
    if missing:
        raise ArtifactError(f"artifact '{path}' lacks {', '.join(missing)}; export it again")
    return artifact
