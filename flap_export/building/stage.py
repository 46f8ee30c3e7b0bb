"""The stage itself: parse, check, build and write, one engine per kind of logits."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from flap_export.artifact import ARTIFACT_NAME, Artifact, LogitsKind, load_artifact
from flap_export.building.flavours import (
    MODULES,
    Flavour,
    compute_capabilities,
    has_gpu,
    import_polygraphy,
    import_tensorrt,
    quiet_polygraphy,
)
from flap_export.building.graphs import write_tensorrt_graph
from flap_export.building.inspection import INSPECTION_NAME, inspected
from flap_export.building.network import (
    allow_decomposition,
    check_network,
    limit_keys,
    parsed_network,
    reason_of,
    summary_of,
    weights_bytes,
)
from flap_export.building.profiles import polygraphy_profile, profiles_of
from flap_export.building.record import ENGINE_NAME, Engine, EngineRecord, Profile, check_runnable
from flap_export.errors import ArtifactError, InputError, MissingRequirementError, check_choice
from flap_export.manifest import installed_versions, write_manifest
from flap_export.plan import PLAN_NAME
from flap_export.storage import SCRATCH_PREFIX, check_output, digest_of_file, new_directory, write_text

logger = logging.getLogger(__name__)

LogitsChoice = Literal["last", "all", "both"]
ENGINES: Final[dict[LogitsKind, str]] = {"last": "model-last.engine", "all": "model.engine"}


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built; what an option means is said at `build`."""

    optimization_level: int | None = None
    weight_stripped: bool = False
    limit_keys: bool = False
    tf32: bool = False
    timing_cache: Path | None = None


def build(
    artifact: str | Path,
    output: str | Path,
    *,
    backend: Flavour,
    targets: Sequence[str] = (),
    logits: LogitsChoice = "last",
    batch_size: int = 1,
    max_batch: int = 4,
    prompt: int | None = None,
    max_prompt: int | None = None,
    options: BuildOptions | None = None,
) -> EngineRecord:
    """Build TensorRT engines from an exported artifact.

    Networks are strongly typed: an engine computes in the precision its artifact was exported in.

    Args:
        artifact: directory that `export` wrote.
        output: the directory to make; older engines there are replaced once the new ones are complete.
        backend: `tensorrt` builds for the GPU at hand and needs one; `tensorrt-rtx` also builds for named targets,
            on any machine.
        targets: compute capabilities to build for, such as `sm80` (A100); none means the GPU at hand.
        logits: `last` for generating, `all` for validating every position, or `both`, an engine each with weights of
            its own.
        batch_size: the usual batch.
        max_batch: the largest batch.
        prompt: the usual number of tokens of a prefill.
        max_prompt: the most tokens of one prefill; the cache's length by default. Longer prompts are fed in pieces.
        options: builder optimization level (0 to 5, the builder's default by default); `weight_stripped` engines,
            refitted from the artifact when they are opened; `limit_keys`, see `network.limit_keys`; `tf32` matrix
            products in float32 engines; a timing cache to read and extend (`tensorrt` only, which measures kernels).

    Raises:
        ArtifactError: the artifact is damaged or not what was written, or TensorRT refuses its graph.
        InputError: an option is out of its range or not one of the flavour's.
        MissingRequirementError: the flavour's package or a GPU is not there.
        OutputError: `output` holds something else, or the disk is full.
    """
    from flap_export.rewriting.checkpoint import copy_companions

    source, opened, chosen = Path(artifact), load_artifact(Path(artifact)), options or BuildOptions()
    check_output(Path(output), ENGINE_NAME)
    kinds = _kinds(logits, opened, source)
    profiles = profiles_of(
        opened.max_length, batch_size=batch_size, max_batch=max_batch, prompt=prompt, max_prompt=max_prompt
    )
    trt, polygraphy = check_build(backend, targets, chosen)
    check_runnable(source, weights=True)
    builder = _Builder(source, opened, backend, trt, polygraphy, tuple(targets), profiles, chosen)
    with new_directory(Path(output), ENGINE_NAME) as directory:
        engines = {kind: builder.build(kind, directory) for kind in kinds}
        record = builder.record(engines, Path(output))
        copy_companions(source, directory)
        if (source / PLAN_NAME).is_file():
            shutil.copyfile(source / PLAN_NAME, directory / PLAN_NAME)
        record.save(directory / ENGINE_NAME)
        write_manifest(directory, digests=record.digests)
    return record


def check_build(backend: Flavour, targets: Sequence[str], options: BuildOptions) -> tuple[Any, Any]:
    """Whether engines can be built so on this machine, to be asked before there is an artifact.

    Returns:
        The flavour's Python module, and Polygraphy's backend for it.

    Raises:
        InputError: an option is out of its range or not one of the flavour's, or a target does not exist.
        MissingRequirementError: the flavour's package or a GPU is not there.
    """
    trt = import_tensorrt(backend)
    _check_options(backend, targets, options)
    if targets:
        compute_capabilities(targets, trt)
    return trt, import_polygraphy(backend)


def _kinds(logits: LogitsChoice, artifact: Artifact, path: Path) -> tuple[LogitsKind, ...]:
    check_choice("logits", logits, get_args(LogitsChoice))
    kinds: tuple[LogitsKind, ...] = ("last", "all") if logits == "both" else (logits,)
    for kind in kinds:
        if kind not in artifact.graphs:
            raise ArtifactError(f"artifact '{path}' has no graph for logits '{kind}'; export it again")
    return kinds


def _check_options(backend: Flavour, targets: Sequence[str], options: BuildOptions) -> None:
    is_rtx = backend == "tensorrt-rtx"
    if targets and not is_rtx:
        raise InputError("tensorrt builds for the GPU at hand only; leave --target out, or use --backend tensorrt-rtx")
    if options.timing_cache is not None and is_rtx:
        raise InputError("tensorrt-rtx measures no kernels while building and has no timing cache; leave it out")
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise InputError(f"the builder's optimization level must lie in 0..5, got {options.optimization_level}")
    if options.weight_stripped and not has_gpu():
        raise MissingRequirementError(
            "the builder compiles engines without weights on a GPU, and PyTorch sees none",
            "build on a machine with an NVIDIA GPU, or leave --weight-stripped out",
        )
    if not targets and not has_gpu():
        remedy = "name a GPU to build for, such as --target sm80" if is_rtx else "build on a machine with an NVIDIA GPU"
        raise MissingRequirementError(f"{backend} builds for the GPU at hand, and PyTorch sees none", remedy)


@dataclass(frozen=True)
class _Builder:
    """One artifact, one flavour, one set of profiles."""

    source: Path
    artifact: Artifact
    backend: Flavour
    trt: Any
    polygraphy: Any
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    options: BuildOptions

    def build(self, kind: LogitsKind, directory: Path) -> Engine:
        """Build the engine of one graph into `directory`."""
        with tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}build-") as folder:
            graph = write_tensorrt_graph(self.source / self.artifact.graphs[kind], self.artifact, Path(folder))
            network = parsed_network(graph, self.polygraphy)
            self._prepare(network[1])
            serialized = self._serialized(network, graph.name)
        file = directory / ENGINES[kind]
        with memoryview(serialized) as content, file.open("wb") as target:
            target.write(content)
        # Another GPU's engine cannot be opened here.
        if not self.targets:
            write_text(directory / INSPECTION_NAME.format(kind), inspected(file, self.trt))
        logger.info("built %s: %d layers, %d bytes", file.name, network[1].num_layers, file.stat().st_size)
        return Engine(
            file=file.name,
            size_bytes=file.stat().st_size,
            weights_bytes=weights_bytes(network[1]),
            network=summary_of(network[1], self.artifact, self.trt),
        )

    def _prepare(self, network: Any) -> None:
        check_network(network, self.artifact, self.trt)
        allow_decomposition(network, self.trt)
        if self.options.limit_keys:
            limit_keys(network, self.trt)

    def _serialized(self, network: tuple[Any, Any, Any], name: str) -> Any:
        from polygraphy.exception import PolygraphyException

        cache = None if self.options.timing_cache is None else str(self.options.timing_cache)
        with quiet_polygraphy() as errors:
            try:
                load = self.polygraphy.EngineBytesFromNetwork(network, config=self._config(), save_timing_cache=cache)
                return load()
            except PolygraphyException as error:
                raise ArtifactError(f"{self.backend} cannot build '{name}': {reason_of(errors, error)}") from error

    def _config(self) -> Any:
        """The builder's configuration, as Polygraphy makes it."""
        common: dict[str, Any] = {
            "profiles": [polygraphy_profile(profile, self.artifact, self.polygraphy) for profile in self.profiles],
            "builder_optimization_level": self.options.optimization_level,
            "strip_plan": self.options.weight_stripped or None,
        }
        if self.backend == "tensorrt":
            if self.options.timing_cache is not None and self.options.timing_cache.is_file():
                common["load_timing_cache"] = str(self.options.timing_cache)
            made = self.polygraphy.CreateConfig(**common)
        else:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            capabilities = compute_capabilities(self.targets, self.trt)
            target: dict[str, Any] = {"compute_capabilities": capabilities} if capabilities else {"use_gpu": True}
            made = CreateConfigRTX(**common, **target)
        return self.polygraphy.PostprocessConfig(made, func=self._set_tf32)

    def _set_tf32(self, builder: Any, network: Any, config: Any) -> None:
        """TF32 is on by default in one flavour and off in the other; parity in float32 needs it off."""
        flag = self.trt.BuilderFlag.TF32
        config.set_flag(flag) if self.options.tf32 else config.clear_flag(flag)

    def record(self, engines: dict[LogitsKind, Engine], output: Path) -> EngineRecord:
        """Describe the directory that will be at `output`."""
        packages = ("flap-export", "polygraphy")
        versions = {package: version for package, version in installed_versions().items() if package in packages}
        return EngineRecord(
            flavour=self.backend,
            model=self.artifact.model,
            family=self.artifact.family,
            dtype=self.artifact.dtype,
            max_length=self.artifact.max_length,
            shape=self.artifact.shape,
            engines=engines,
            profiles=self.profiles,
            targets=self.targets,
            weights=os.path.relpath(self.source.resolve(), output.resolve()) if self.options.weight_stripped else None,
            settings={
                "optimization_level": self.options.optimization_level,
                "weight_stripped": self.options.weight_stripped,
                "limit_keys": self.options.limit_keys,
                "tf32": self.options.tf32,
            },
            digests={"artifact": digest_of_file(self.source / ARTIFACT_NAME), **self.artifact.digests},
            versions={**versions, MODULES[self.backend]: str(self.trt.__version__)},
        )
