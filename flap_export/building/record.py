"""`engine.json`: what an engine's directory holds, and how a runner must feed it.

An engine has the interface of the graph it was built from (see `flap_export.artifact`): caches of a fixed length L,
bound as `past_key_values` input and as `present` output at one address. It takes batches and new tokens within the
ranges of its profiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Final, Literal

from pydantic import Field

from flap_export.artifact import ARTIFACT_NAME, Artifact, LogitsKind, is_artifact, load_artifact
from flap_export.building.flavours import Flavour
from flap_export.errors import ArtifactError
from flap_export.manifest import check_opened
from flap_export.precision import DtypeName
from flap_export.shapes import DecoderShape
from flap_export.storage import Record, Value, digest_of_file

ENGINE_NAME: Final = "engine.json"

Range = tuple[int, int, int]
"""Least, usual and largest; an engine is tuned for the usual."""


class Profile(Value):
    """One optimization profile: batches and new tokens an engine was compiled for."""

    phase: Literal["prefill", "decode"]
    batch_sizes: Range
    new_tokens: Range

    def takes(self, batch_size: int, new_tokens: int) -> bool:
        """Whether a call of this shape lies within the profile."""
        return _within(batch_size, self.batch_sizes) and _within(new_tokens, self.new_tokens)


def _within(value: int, bounds: Range) -> bool:
    return bounds[0] <= value <= bounds[2]


class NetworkSummary(Value):
    """The network TensorRT parsed from a graph, in numbers."""

    layers: int
    attentions: int
    decomposable_attentions: int
    """Those for which the flavour has no fused kernel."""
    cache_updates: int
    caches: dict[str, tuple[int, ...]]
    """Shape of every cache input, -1 where it is dynamic."""
    types: dict[str, int]
    """Layer outputs by type, such as HALF."""
    float32_layers: dict[str, int] = Field(default_factory=dict)
    """Kinds of layers that compute in float32, in a network of another precision."""


class Engine(Value):
    """One serialized engine."""

    file: str
    size_bytes: int
    weights_bytes: int
    """Of the constants of the parsed network."""
    network: NetworkSummary


class EngineRecord(Record):
    """`engine.json`."""

    kind: ClassVar[str] = "engine record"

    format: Literal["tensorrt"] = "tensorrt"
    flavour: Flavour
    model: str
    family: str
    dtype: DtypeName
    max_length: int
    """Rows of the cache."""
    shape: DecoderShape
    engines: dict[LogitsKind, Engine]
    profiles: tuple[Profile, ...]
    """In the order of the engine's own; every engine has all of them."""
    targets: tuple[str, ...]
    """Compute capabilities, such as sm80; empty where it was built for the GPU at hand."""
    weights: str | None = None
    """Of engines without weights: the artifact to refit them from, relative to the engine's directory."""
    settings: dict[str, int | float | str | bool | None]
    digests: dict[str, str]
    versions: dict[str, str]

    @property
    def artifact(self) -> Artifact:
        """The artifact it was built from, as far as runners care: names, shapes and precision."""
        return Artifact(
            model=self.model,
            family=self.family,
            dtype=self.dtype,
            max_length=self.max_length,
            shape=self.shape,
            graphs={kind: engine.file for kind, engine in self.engines.items()},
            opset=0,
            digests=self.digests,
            versions=self.versions,
        )

    def profile_for(self, batch_size: int, new_tokens: int) -> int:
        """Index of the narrowest profile that takes a call of this shape.

        Raises:
            ArtifactError: there is none.
        """
        taking = [index for index, profile in enumerate(self.profiles) if profile.takes(batch_size, new_tokens)]
        if not taking:
            raise ArtifactError(
                f"the engine takes {_listed(self.profiles)}, got a batch of {batch_size} with {new_tokens} new tokens; "
                "build it with a larger --max-batch or --max-prompt"
            )
        return min(taking, key=lambda index: self.profiles[index].new_tokens[2])

    @property
    def largest_step(self) -> int:
        """The most new tokens of a sequence that one call takes."""
        return max(profile.new_tokens[2] for profile in self.profiles)


def _listed(profiles: Iterable[Profile]) -> str:
    def described(bounds: Range) -> str:
        return str(bounds[0]) if bounds[0] == bounds[2] else f"{bounds[0]}..{bounds[2]}"

    return " or ".join(
        f"batches of {described(profile.batch_sizes)} with {described(profile.new_tokens)} new tokens"
        for profile in profiles
    )


def is_engine(path: Path) -> bool:
    """Whether `path` is the directory of built engines."""
    return (path / ENGINE_NAME).is_file()


def load_engine(path: Path) -> EngineRecord:
    """Read `engine.json` of a directory and check that its engines are there.

    Raises:
        ArtifactError: the directory holds no engines, or one is missing.
    """
    if not is_engine(path):
        raise ArtifactError(f"'{path}' holds no engine (no {ENGINE_NAME} in it); run `flap-export build`")
    record = EngineRecord.load(path / ENGINE_NAME)
    missing = [engine.file for engine in record.engines.values() if not (path / engine.file).is_file()]
    if missing:
        raise ArtifactError(f"engine directory '{path}' lacks {', '.join(missing)}; build it again")
    return record


def is_runnable(path: Path) -> bool:
    """Whether `path` is the directory of an exported artifact or of built engines."""
    return is_artifact(path) or is_engine(path)


def load_runnable(path: Path) -> Artifact:
    """What an exported artifact or built engines compute.

    Raises:
        ArtifactError: the directory holds neither, or something of it is missing.
    """
    return load_engine(path).artifact if is_engine(path) else load_artifact(path)


def check_runnable(path: Path, *, weights: bool = False) -> dict[str, str]:
    """Hold an artifact or engines against their manifest before they are run; see `flap_export.manifest.check_opened`.

    Raises:
        ArtifactError: the directory holds neither, or something of it is missing or is not what was written.
    """
    if not is_engine(path):
        graphs = load_artifact(path).graphs.values()
        return check_opened(path, (ARTIFACT_NAME, *graphs), weights=weights, remedy="export again")
    record = load_engine(path)
    files = (engine.file for engine in record.engines.values())
    found = check_opened(path, (ENGINE_NAME, *files), weights=weights, remedy="build again")
    # Opening the engines reads their weights from there, and says so where it is gone.
    if record.weights is not None and is_artifact(source := path / record.weights):
        check_runnable(source, weights=weights)
    return found


def record_digest(path: Path, found: Mapping[str, str]) -> str:
    """SHA-256 of the file that describes an artifact or engines, which `check_runnable` may have found already."""
    file = record_file(path)
    return found.get(file.name) or digest_of_file(file)


def record_file(path: Path) -> Path:
    """The file that describes an exported artifact or built engines."""
    return path / (ENGINE_NAME if is_engine(path) else ARTIFACT_NAME)
