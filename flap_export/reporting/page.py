"""The page as a value: every number formatted, every section present or named as missing. The template only places."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from flap_export.artifact import Artifact
from flap_export.ideal import cache_bytes, stored_parameters
from flap_export.precision import PRECISIONS
from flap_export.reporting import formats
from flap_export.reporting.alignment import AlignmentSection, alignment_section
from flap_export.reporting.comparisons import CASES, ParityRow, ParityRule, parity_rows, parity_rule
from flap_export.reporting.engines import EngineSection, engine_section
from flap_export.reporting.layers import LayerChart, LayerRow, layer_charts, layer_rows
from flap_export.reporting.measurements import UNKNOWN, QualityRow, SpeedRow, quality_rows, speed_rows
from flap_export.reporting.provenance import (
    Digest,
    Row,
    SettingsTable,
    digests_of,
    settings_of,
    tool_version,
    versions_of,
)
from flap_export.reporting.records import ExportedModel, RunRecords
from flap_export.reporting.searches import SearchCurve, search_curve
from flap_export.reporting.verdicts import (
    Overall,
    Verdict,
    overall_verdict,
    parity_verdict,
    quality_verdict,
    speedup_verdict,
)
from flap_export.shapes import DecoderShape


@final
@dataclass(frozen=True)
class Figure:
    """One size before and after."""

    name: str
    dense: str
    pruned: str
    change: str
    note: str


@final
@dataclass(frozen=True)
class Page:
    """Everything the template places."""

    model: str
    facts: tuple[str, ...]
    achieved: str
    requested: str
    reason: str | None
    altered: str | None
    """A warning that records were changed after they were written."""
    overall: Overall
    parity: Verdict
    quality: Verdict
    speedup: Verdict
    figures: tuple[Figure, ...]
    speed_rows: tuple[SpeedRow, ...]
    quality_rows: tuple[QualityRow, ...]
    quality_limit: str | None
    charts: tuple[LayerChart, ...]
    layer_rows: tuple[LayerRow, ...]
    parity_rows: tuple[ParityRow, ...]
    parity_rule: ParityRule
    parity_cases: tuple[Row, ...]
    search: SearchCurve | None
    alignment: AlignmentSection | None
    engines: EngineSection | None
    digests: tuple[Digest, ...]
    settings: tuple[SettingsTable, ...]
    versions: tuple[Row, ...]
    recipe: str | None
    tool_version: str


def page_from(records: RunRecords) -> Page:
    """Turn the records of a run into what a person reads."""
    parity, quality, speedup = parity_verdict(records), quality_verdict(records), speedup_verdict(records)
    plan, limit = records.plan, records.gates.maximum_perplexity_ratio
    shapes = records.dense.record.shape, records.pruned.record.shape
    return Page(
        model=plan.model,
        facts=_facts(records),
        achieved=_ratio(plan.ratio.achieved),
        requested=_ratio(plan.ratio.requested),
        reason=plan.ratio.reason,
        altered=formats.altered(records.altered),
        overall=overall_verdict((parity, quality, speedup)),
        parity=parity,
        quality=quality,
        speedup=speedup,
        figures=_figures(records),
        speed_rows=speed_rows(records),
        quality_rows=quality_rows(records),
        quality_limit=None if limit is None else formats.change(1.0, limit),
        charts=layer_charts(*shapes),
        layer_rows=layer_rows(*shapes),
        parity_rows=parity_rows(records.parity),
        parity_rule=parity_rule(records.parity),
        parity_cases=tuple(CASES.items()),
        search=search_curve(records.search) if records.search else None,
        alignment=alignment_section(records.alignment, records.quality),
        engines=engine_section(records.engines),
        digests=digests_of(records),
        settings=settings_of(records),
        versions=versions_of(records),
        recipe=None
        if records.recipe is None
        else json.dumps(dict(records.recipe), indent=2, ensure_ascii=False, default=str),
        tool_version=tool_version(),
    )


def _ratio(share: float) -> str:
    """With a second decimal only where the first would hide something."""
    return formats.percent(share, 1 if abs(share - round(share, 3)) < 5e-6 else 2)


def _facts(records: RunRecords) -> tuple[str, ...]:
    artifact, method = records.pruned.record, records.plan.method
    chosen = [str(method[key]) for key in ("method", "metric", "structure", "compensation") if method.get(key)]
    backend = [f"{records.latency.backend} on {records.latency.device}"] if records.latency else []
    layers = f"{len(artifact.shape.layers)} layers"
    return (f"family {artifact.family}", layers, " / ".join(chosen), artifact.dtype, *backend)


def _figures(records: RunRecords) -> tuple[Figure, ...]:
    dense, pruned = records.dense.record, records.pruned.record
    shapes = dense.shape, pruned.shape
    parameters, decoder = ([size(shape) for shape in shapes] for size in (stored_parameters, _decoder_parameters))
    cache = [_cache_bytes_per_token(artifact) for artifact in (dense, pruned)]
    return (
        _figure("Parameters", parameters, formats.compact, "embeddings, head and biases included"),
        _figure("Attention and FFN", decoder, formats.compact, "weights the ratio is a share of"),
        _files_figure(records.dense, records.pruned),
        _figure("KV cache per token", cache, formats.byte_size, f"keys and values in {pruned.dtype}"),
    )


def _decoder_parameters(shape: DecoderShape) -> int:
    return shape.decoder_parameters


def _cache_bytes_per_token(artifact: Artifact) -> float:
    width = PRECISIONS[artifact.dtype].bytes_per_value
    return cache_bytes(artifact.shape, batch_size=1, context_length=1, bytes_per_value=width)


def _files_figure(dense: ExportedModel, pruned: ExportedModel) -> Figure:
    sizes = [size for size in (dense.onnx_bytes, pruned.onnx_bytes) if size is not None]
    if len(sizes) == len((dense, pruned)):
        return _figure("ONNX files", sizes, formats.byte_size, "graphs and weights on disk")
    shown = [UNKNOWN if model.onnx_bytes is None else formats.byte_size(model.onnx_bytes) for model in (dense, pruned)]
    return Figure("ONNX files", shown[0], shown[1], "", "not all of them are beside this report")


def _figure(name: str, sizes: Sequence[float], formatted: Callable[[float], str], note: str) -> Figure:
    dense, pruned = sizes
    return Figure(name, formatted(dense), formatted(pruned), formats.change(dense, pruned), note)
