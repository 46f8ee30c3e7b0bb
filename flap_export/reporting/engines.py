"""What was built: one row per engine of a run, dense beside pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from flap_export.building.record import EngineRecord, is_engine, load_engine
from flap_export.reporting import formats

ENGINES: Final[dict[str, str]] = {"dense": "engine/dense", "pruned": "engine/pruned"}
"""Where a run keeps its engines."""


@final
@dataclass(frozen=True)
class EngineRow:
    """One engine."""

    model: str
    logits: str
    size: str
    weights: str
    layers: str
    attentions: str
    caches: str


@final
@dataclass(frozen=True)
class EngineSection:
    """The engines of a run, and what they were built for."""

    summary: str
    rows: tuple[EngineRow, ...]


def read_engines(directory: Path) -> dict[str, EngineRecord]:
    """The records of a run's engines, by model; empty where none were built.

    Raises:
        InputError: a record cannot be read, or an engine is missing.
    """
    paths = {model: directory / name for model, name in ENGINES.items()}
    return {model: load_engine(path) for model, path in paths.items() if is_engine(path)}


def engine_section(records: Mapping[str, EngineRecord]) -> EngineSection | None:
    """What a person reads about engines; None where there are none."""
    if not records:
        return None
    rows = tuple(row for model, record in records.items() for row in _rows(model, record))
    return EngineSection(_summary(next(iter(records.values()))), rows)


def _summary(record: EngineRecord) -> str:
    target = ", ".join(record.targets) or "the GPU of the machine that built them"
    shapes = "; ".join(
        f"{profile.phase} of up to {profile.new_tokens[2]} tokens in batches of up to {profile.batch_sizes[2]}"
        for profile in record.profiles
    )
    return f"Built with {record.flavour} in {record.dtype} for {target}: {shapes}."


def _rows(model: str, record: EngineRecord) -> Iterator[EngineRow]:
    for kind, engine in record.engines.items():
        network = engine.network
        unfused = f", {network.decomposable_attentions} unfused" if network.decomposable_attentions else ""
        yield EngineRow(
            model=model,
            logits=kind,
            size=formats.byte_size(engine.size_bytes),
            weights=formats.byte_size(engine.weights_bytes),
            layers=str(network.layers),
            attentions=f"{network.attentions}{unfused}",
            caches=f"{network.cache_updates} updated in place",
        )
