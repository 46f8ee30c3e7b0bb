"""Where it all came from: digests, versions, settings and the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, final

from flap_export.benchmarking.machine import Machine
from flap_export.manifest import installed_versions
from flap_export.reporting import formats
from flap_export.reporting.records import RunRecords

Row = tuple[str, str]


@final
@dataclass(frozen=True)
class Digest:
    """What was digested, and its SHA-256."""

    names: tuple[str, ...]
    short: str
    full: str


@final
@dataclass(frozen=True)
class SettingsTable:
    """What one stage was told, or where it ran."""

    title: str
    rows: tuple[Row, ...]


def digests_of(records: RunRecords) -> tuple[Digest, ...]:
    """Every digest that some record names, once, with all the names it goes by."""
    names: dict[str, list[str]] = {}
    for name, digest in _named_digests(records):
        known = names.setdefault(digest, [])
        if name not in known:
            known.append(name)
    return tuple(Digest(tuple(known), formats.short_digest(digest), digest) for digest, known in names.items())


def _named_digests(records: RunRecords) -> Iterator[Row]:
    sources: dict[str, Mapping[str, str]] = {
        "plan": records.plan.digests,
        "dense artifact": {"artifact.json": records.dense.record_digest, **records.dense.record.digests},
        "pruned artifact": {"artifact.json": records.pruned.record_digest, **records.pruned.record.digests},
        "parity": records.parity.digests if records.parity else {},
        "quality": records.quality.digests if records.quality else {},
        "latency": records.latency.digests if records.latency else {},
        "manifest": records.manifest.digests if records.manifest else {},
    }
    for source, digests in sources.items():
        for name, digest in digests.items():
            yield f"{source}: {name}", digest


def versions_of(records: RunRecords) -> tuple[Row, ...]:
    """Versions by package; where the stages ran with different ones, all of them."""
    found: dict[str, list[str]] = {}
    for versions in (
        records.manifest.versions if records.manifest else {},
        records.dense.record.versions,
        records.pruned.record.versions,
        records.latency.versions if records.latency else {},
    ):
        for package, version in versions.items():
            known = found.setdefault(package, [])
            if version not in known:
                known.append(version)
    return tuple((package, ", ".join(known)) for package, known in sorted(found.items()))


def tool_version() -> str:
    """Version of the flap_export that writes the page."""
    return installed_versions().get("flap-export", "")


def settings_of(records: RunRecords) -> tuple[SettingsTable, ...]:
    """What each stage was told, and the machine that measured."""
    artifact = records.pruned.record
    exported = {"family": artifact.family, "dtype": artifact.dtype, "max_length": artifact.max_length}
    tables = [
        settings_table("Prune", records.plan.method),
        settings_table("Export", {**exported, "opset": artifact.opset, "format": artifact.format}),
    ]
    if records.parity is not None:
        tables.append(settings_table("Validate", records.parity.settings))
    if (latency := records.latency) is not None:
        told = {"backend": latency.backend, "device": latency.device, **latency.settings}
        tables += [settings_table("Bench", told), settings_table("Machine", _described(latency.machine))]
    return tuple(table for table in tables if table.rows)


def _described(machine: Machine) -> dict[str, object]:
    load = machine.load_average
    return {
        "processor": machine.cpu,
        "cores": machine.cores,
        "system": machine.system,
        "load_average": _UNKNOWN if load is None else " ".join(formats.number(value, 2) for value in load),
    }


def settings_table(title: str, values: Mapping[str, object]) -> SettingsTable:
    """A table of keys in words and values as text."""
    return SettingsTable(title, tuple((_name(key), _text(value)) for key, value in values.items()))


def _name(key: str) -> str:
    """A key in words, its unit in brackets."""
    return _UNIT.sub(r" (\1)", key).replace("_", " ")


def _text(value: object) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


_UNKNOWN: Final = "unknown"
_UNIT: Final = re.compile(r"_(s|ms|bytes)$")
