"""What a run directory holds: the records of its stages, each None where the stage has not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, final

from pydantic import ValidationError

from flap_export.artifact import ARTIFACT_NAME, Artifact
from flap_export.benchmarking.alignment import ALIGNMENT_NAME, AlignmentReport
from flap_export.benchmarking.report import LATENCY_NAME, LatencyReport
from flap_export.building.record import ENGINE_NAME, EngineRecord
from flap_export.errors import InputError, PlanError
from flap_export.evaluation import QualityReport
from flap_export.manifest import Manifest
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.recipe import GatesSection
from flap_export.reporting.engines import ENGINES, read_engines
from flap_export.searching import SEARCH_NAME, SearchReport
from flap_export.storage import MANIFEST_NAME, Record, digest_of_file
from flap_export.validation.report import PARITY_NAME, ParityReport

CHECKPOINT: Final = "checkpoint"
DENSE_ARTIFACT: Final = "onnx/dense"
PRUNED_ARTIFACT: Final = "onnx/pruned"
SEARCH: Final = "search"
QUALITY_NAME: Final = "quality.json"
_ONNX_FILES: Final = (".onnx", ".data")

_RECORDS: Final = (
    PLAN_NAME,
    PARITY_NAME,
    QUALITY_NAME,
    LATENCY_NAME,
    ALIGNMENT_NAME,
    f"{SEARCH}/{SEARCH_NAME}",
    *(f"{name}/{ARTIFACT_NAME}" for name in (DENSE_ARTIFACT, PRUNED_ARTIFACT)),
    *(f"{name}/{ENGINE_NAME}" for name in ENGINES.values()),
)
"""What the page is made of."""

AnyRecord = TypeVar("AnyRecord", bound=Record)


@final
@dataclass(frozen=True)
class ExportedModel:
    """One artifact of the run."""

    record: Artifact
    record_digest: str
    """SHA-256 of its `artifact.json`."""
    onnx_bytes: int | None
    """Of graphs and weights; None where neither the files nor a manifest tell."""


@final
@dataclass(frozen=True)
class RunRecords:
    """Everything the report is made of."""

    directory: Path
    plan: PruningPlan
    dense: ExportedModel
    pruned: ExportedModel
    parity: ParityReport | None
    quality: QualityReport | None
    latency: LatencyReport | None
    manifest: Manifest | None
    recipe: Mapping[str, Any] | None
    gates: GatesSection
    search: SearchReport | None
    alignment: AlignmentReport | None
    engines: Mapping[str, EngineRecord]
    """Dense and pruned, where they were built."""
    altered: tuple[str, ...]
    """Records that are not as the manifest has them."""


def read_run(directory: Path, recipe: Mapping[str, Any] | None) -> RunRecords:
    """Read the records of a run.

    Args:
        directory: where the run was written.
        recipe: what the run was asked to do; None takes it from the manifest, where there is one.

    Raises:
        InputError: no plan or no artifact, a record that cannot be read, or a plan of another model.
    """
    plan = _read_required(PruningPlan, directory / PLAN_NAME, directory)
    manifest = _read_optional(Manifest, directory / MANIFEST_NAME)
    dense, pruned = (_read_exported(directory, name, manifest) for name in (DENSE_ARTIFACT, PRUNED_ARTIFACT))
    _check_same_run(plan, dense.record, pruned.record, directory)
    if recipe is None and manifest is not None:
        recipe = manifest.recipe
    return RunRecords(
        directory=directory,
        plan=plan,
        dense=dense,
        pruned=pruned,
        parity=_read_optional(ParityReport, directory / PARITY_NAME),
        quality=_read_optional(QualityReport, directory / QUALITY_NAME),
        latency=_read_optional(LatencyReport, directory / LATENCY_NAME),
        manifest=manifest,
        recipe=recipe,
        gates=_gates(recipe),
        search=_read_optional(SearchReport, directory / SEARCH / SEARCH_NAME),
        alignment=_read_optional(AlignmentReport, directory / ALIGNMENT_NAME),
        engines=read_engines(directory),
        altered=altered_records(directory, _RECORDS, manifest),
    )


def altered_records(directory: Path, names: Iterable[str], manifest: Manifest | None) -> tuple[str, ...]:
    """Those of the files that are there and that the manifest, where there is one, does not list as they are."""
    if manifest is None:
        return ()
    listed = manifest.files
    found = (name for name in names if (directory / name).is_file())
    return tuple(name for name in found if name not in listed or not listed[name].matches(directory / name))


def _read_required(kind: type[AnyRecord], path: Path, directory: Path) -> AnyRecord:
    if not path.is_file():
        raise InputError(
            f"a run directory must hold {path.relative_to(directory)}, found none in '{directory}'; "
            "name the output directory of `flap-export run`"
        )
    return kind.load(path)


def _read_optional(kind: type[AnyRecord], path: Path) -> AnyRecord | None:
    return kind.load(path) if path.exists() else None


def _read_exported(directory: Path, name: str, manifest: Manifest | None) -> ExportedModel:
    path = directory / name / ARTIFACT_NAME
    record = _read_required(Artifact, path, directory)
    return ExportedModel(record, digest_of_file(path), _onnx_bytes(directory, name, manifest))


def _onnx_bytes(directory: Path, name: str, manifest: Manifest | None) -> int | None:
    """Size of graphs and weights on disk, or as the manifest has it where the files were left behind."""
    sizes = [path.stat().st_size for path in (directory / name).iterdir() if path.suffix in _ONNX_FILES]
    if not sizes and manifest is not None:
        sizes = [
            entry.size_bytes
            for file, entry in manifest.files.items()
            if file.startswith(f"{name}/") and file.endswith(_ONNX_FILES)
        ]
    return sum(sizes) if sizes else None


def _check_same_run(plan: PruningPlan, dense: Artifact, pruned: Artifact, directory: Path) -> None:
    plan.check(dense.shape)
    planned = [(len(kept.query_heads), len(kept.kv_heads), kept.ffn_width, kept.shared_width) for kept in plan.layers]
    exported = [
        (layer.query_heads, layer.kv_heads, layer.ffn_channels, layer.shared_width) for layer in pruned.shape.layers
    ]
    if planned != exported:
        raise PlanError(
            f"'{directory / PRUNED_ARTIFACT}' must have the shape that '{directory / PLAN_NAME}' plans, and has "
            "another: it comes from a different run; export again"
        )


def _gates(recipe: Mapping[str, Any] | None) -> GatesSection:
    try:
        return GatesSection.model_validate((recipe or {}).get("gates") or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("gates", *first["loc"]))
        raise InputError(f"the recipe of the run cannot be read: {where}: {first['msg']}") from error
