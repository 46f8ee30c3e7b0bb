"""Each gate's verdict: passed, breached, or not known. What was not measured on this artifact is never passed."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

from flap_export.benchmarking.report import LATENCY_NAME, PhaseLatency
from flap_export.evaluation import SourceQuality
from flap_export.ideal import Phase
from flap_export.reporting import formats
from flap_export.reporting.records import CHECKPOINT, DENSE_ARTIFACT, PRUNED_ARTIFACT, RunRecords
from flap_export.validation.report import PARITY_NAME, ParityReport

Status = Literal["passed", "breached", "not run", "no gate"]
GateName = Literal["parity", "quality", "speedup"]

_PHASES: Final[tuple[Phase, ...]] = ("decode", "prefill")
OF_ANOTHER_MODEL: Final = "What was measured is another model, not this artifact."


@final
@dataclass(frozen=True)
class Verdict:
    """One gate."""

    name: GateName
    status: Status
    headline: str
    notes: tuple[str, ...] = ()
    command: str | None = None
    """What supplies the measurement where it is missing."""


@final
@dataclass(frozen=True)
class Overall:
    """All gates together."""

    status: Status
    text: str


def parity_verdict(records: RunRecords) -> Verdict:
    """Whether the artifact computes what its checkpoint computes."""
    report = records.parity
    if report is None:
        return _missing(records, "parity", "The artifact was not compared with its checkpoint.")
    expected = {"reference": records.pruned.record.digests.get("weights", "")}
    if _differs(report.digests, expected):
        return _missing(records, "parity", OF_ANOTHER_MODEL)
    passed, failed = (sum(found.passed is verdict for found in report.comparisons) for verdict in (True, False))
    compared, skipped = passed + failed, len(report.comparisons) - passed - failed
    notes = (f"{skipped} of {len(report.comparisons)} comparisons did not run here.",) if skipped else ()
    if not report.complete:
        notes = ("The check is not complete.", *notes)
    if failed:
        assert report.worst is not None
        headline = f"{failed} of {compared} comparisons beyond tolerance."
        return Verdict("parity", "breached", headline, (f"Worst: {report.worst.where}.", *notes))
    if not passed:
        return _missing(records, "parity", "No comparison could run on this machine.")
    if not report.passed:
        return Verdict("parity", "breached", "The parity report does not pass.", notes)
    headline = f"{passed} of {compared} comparisons within tolerance."
    return Verdict("parity", "passed", headline, (*_distance_notes(report), *notes))


def _distance_notes(report: ParityReport) -> tuple[str, ...]:
    severities = [found.severity for found in report.comparisons if found.passed]
    largest = max(severities)
    return (f"The largest error is {formats.percent(largest, 0)} of its bound.",) if math.isfinite(largest) else ()


def increase_of(source: SourceQuality) -> float | None:
    """Pruned over dense perplexity; None where the dense model was not measured."""
    return None if source.dense_perplexity is None else source.perplexity / (source.dense_perplexity or math.nan)


def quality_verdict(records: RunRecords) -> Verdict:
    """Whether the pruned model still predicts text."""
    report, limit = records.quality, records.gates.maximum_perplexity_ratio
    if report is None or not report.sources:
        return _missing(records, "quality", "Perplexity was not measured.")
    pruned = records.pruned
    if _differs(
        report.digests, {"weights": pruned.record.digests.get("weights", ""), "artifact": pruned.record_digest}
    ):
        return _missing(records, "quality", OF_ANOTHER_MODEL)
    notes = _contamination_notes(report.sources)
    broken = [source.source for source in report.sources if not math.isfinite(source.perplexity)]
    if broken:
        return Verdict("quality", "breached", f"The perplexity is not finite on {', '.join(broken)}.", notes)
    ratios = [ratio for source in report.sources if (ratio := increase_of(source)) is not None]
    if not ratios:
        headline = "The dense model was not measured beside it."
        return _missing(records, "quality", headline) if limit else Verdict("quality", "no gate", headline, notes)
    # A NaN is neither above nor below: it must not hide behind the others.
    worst = next((ratio for ratio in ratios if math.isnan(ratio)), max(ratios))
    headline = f"Perplexity {formats.change(1.0, worst)}" + (" at worst" if len(ratios) > 1 else "")
    if limit is None:
        return Verdict("quality", "no gate", f"{headline}.", notes)
    status: Status = "passed" if all(ratio <= limit for ratio in ratios) else "breached"
    return Verdict("quality", status, f"{headline}, allowed {formats.change(1.0, limit)}.", notes)


def _contamination_notes(sources: tuple[SourceQuality, ...]) -> tuple[str, ...]:
    contaminated = sum(source.contaminated for source in sources)
    if not contaminated:
        return ()
    if contaminated == len(sources):
        return ("Contaminated: every source was also calibrated on.",)
    return (f"Contaminated: {contaminated} of {len(sources)} sources also calibrated on.",)


def speedup_verdict(records: RunRecords) -> Verdict:
    """Whether the pruned artifact is as much faster as was asked."""
    report = records.latency
    if report is None or not report.phases:
        return _missing(records, "speedup", "Latency was not measured.")
    expected = {"pruned.artifact": records.pruned.record_digest, "dense.artifact": records.dense.record_digest}
    if _differs(report.digests, expected):
        return _missing(records, "speedup", OF_ANOTHER_MODEL)
    limits = speedup_limits(records)
    measured = {phase: [found for found in report.phases if found.phase == phase] for phase in _PHASES}
    unmeasured = [phase for phase in limits if not measured[phase]]
    found = [_phase_headline(phase, rows, limits) for phase, rows in measured.items() if rows]
    headline = f"{', '.join(found).capitalize()}."
    notes = tuple(f"{row.described}: no faster than dense." for row in report.phases if not row.speedup > 1)
    if not all(math.isfinite(row.speedup) and row.speedup >= limits.get(row.phase, 0) for row in report.phases):
        return Verdict("speedup", "breached", headline, notes)
    if unmeasured:
        return _missing(records, "speedup", f"{headline[:-1]}; {' and '.join(unmeasured)} not measured.")
    return Verdict("speedup", "passed" if limits else "no gate", headline, notes)


def speedup_limits(records: RunRecords) -> dict[Phase, float]:
    """The least speedup per phase, where one was asked."""
    gates = records.gates
    limits: dict[Phase, float | None] = {
        "decode": gates.minimum_decode_speedup,
        "prefill": gates.minimum_prefill_speedup,
    }
    return {phase: limit for phase, limit in limits.items() if limit is not None}


def _phase_headline(phase: Phase, found: list[PhaseLatency], limits: Mapping[Phase, float]) -> str:
    lowest = next((latency.speedup for latency in found if math.isnan(latency.speedup)), None)
    if lowest is None:
        lowest = min(latency.speedup for latency in found)
    asked = f" (asked {formats.times(limits[phase])})" if phase in limits else ""
    return f"{phase} {'at least ' if len(found) > 1 else ''}{formats.times(lowest)}{asked}"


def overall_verdict(verdicts: tuple[Verdict, ...]) -> Overall:
    """The worst of all gates, in words."""
    named: dict[Status, str] = {
        status: _enumerated([verdict.name for verdict in verdicts if verdict.status == status])
        for status in ("breached", "not run", "no gate", "passed")
    }
    if named["breached"]:
        return Overall("breached", f"Gate breached: {named['breached']}.")
    if named["not run"]:
        return Overall("not run", f"Not known yet: {named['not run']} not run.")
    if not named["passed"]:
        return Overall("no gate", f"No gate set for {named['no gate']}.")
    unset = f" No gate set for {named['no gate']}." if named["no gate"] else ""
    return Overall("passed", f"Passed: {named['passed']}.{unset}")


def _enumerated(names: list[GateName]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _differs(found: Mapping[str, str], expected: Mapping[str, str]) -> bool:
    """Whether a record names a digest of what it measured, and it is another one; an unnamed one tells nothing."""
    return any(expected[key] and found[key] != expected[key] for key in expected if found.get(key))


def _missing(records: RunRecords, name: GateName, headline: str) -> Verdict:
    return Verdict(name, "not run", headline, command=_command(name, records.directory))


def _command(name: GateName, directory: Path) -> str:
    """The commands that supply a missing part and put it on the page."""

    def quoted(*parts: str) -> str:
        return shlex.quote(os.fsencode(directory.joinpath(*parts)).decode("utf-8", "replace"))

    pruned, again = quoted(PRUNED_ARTIFACT), f"\nflap-export report {quoted()}"
    validate = f"flap-export validate {pruned} --reference {quoted(CHECKPOINT)} --output {quoted(PARITY_NAME)}"
    bench = f"flap-export bench {pruned} --baseline {quoted(DENSE_ARTIFACT)} --output {quoted(LATENCY_NAME)}"
    # Only a run measures the dense model beside the pruned one.
    run = f"flap-export run RECIPE.yaml --output {quoted()} --set 'evaluate.sources=[SOURCE]'"
    return {"parity": validate + again, "quality": run, "speedup": bench + again}[name]
