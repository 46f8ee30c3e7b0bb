"""What parity compared: each measured value beside its bound, and the rule the bounds follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from flap_export.reporting import formats
from flap_export.reporting.verdicts import Status
from flap_export.validation.report import CaseName, Comparison, ParityReport
from flap_export.validation.tolerance import FLOOR_ULPS, SAFETY_FACTOR

_NONE: Final = "–"
_STATUS: Final[dict[bool | None, Status]] = {True: "passed", False: "breached", None: "not run"}
CASES: Final[dict[CaseName, str]] = {
    "single": "one prompt",
    "chunked": "a prompt that fills the cache, prefilled in chunks",
    "ragged": "a batch of prompts of different lengths",
    "last": "the graph that gives only the last token's logits",
}


@final
@dataclass(frozen=True)
class Bounded:
    """A measured value beside its bound."""

    value: str
    bound: str | None
    is_exceeded: bool


@final
@dataclass(frozen=True)
class ParityRow:
    """One comparison."""

    candidate: str
    reference: str
    phase: str
    case: str
    case_in_words: str
    positions: str
    max_abs: Bounded
    max_rel: str
    kl: Bounded
    top1_agreement: str
    top1_gap: Bounded
    status: Status
    reason: str | None
    remedy: str | None


@final
@dataclass(frozen=True)
class ParityRule:
    """Where the bounds come from."""

    summary: str
    largest_error: str
    divergence: str
    top1: str


def parity_rows(report: ParityReport | None) -> tuple[ParityRow, ...]:
    """One row per comparison; none where parity has not run."""
    return () if report is None else tuple(_parity_row(found) for found in report.comparisons)


def _parity_row(found: Comparison) -> ParityRow:
    agreement = found.top1_agreement
    return ParityRow(
        candidate=found.candidate,
        reference=found.reference,
        phase=found.phase,
        case=found.case,
        case_in_words=CASES[found.case],
        positions=formats.count(found.positions) if found.positions else _NONE,
        max_abs=_bounded(found.max_abs, found.tolerance_max_abs),
        max_rel=_optional(found.max_rel),
        kl=_bounded(found.kl, found.tolerance_kl),
        top1_agreement=_NONE if agreement is None else _agreement(agreement),
        top1_gap=_bounded(found.top1_gap, found.tolerance_max_abs),
        status=_STATUS[found.passed],
        reason=found.reason,
        remedy=found.remedy,
    )


def _bounded(value: float | None, bound: float | None) -> Bounded:
    is_exceeded = value is not None and bound is not None and not value <= bound
    return Bounded(_optional(value), None if bound is None else formats.number(bound), is_exceeded)


def _optional(value: float | None) -> str:
    return _NONE if value is None else formats.number(value)


def _agreement(share: float) -> str:
    """Never rounded up to all of them."""
    text = formats.percent(share, 2)
    return f"under {text}" if share < 1 and text == formats.percent(1.0, 2) else text


def parity_rule(report: ParityReport | None) -> ParityRule:
    """The rule in words, with the constants the report was made with."""
    settings = {} if report is None else report.settings
    factor, floor_ulps = (settings.get(key) or default for key, default in _CONSTANTS.items())
    own = f"in {settings['dtype']}" if settings.get("dtype") else "in the artifact's precision"
    reference = f"in {settings['reference_dtype']}" if settings.get("reference_dtype") else "in a higher precision"
    return ParityRule(
        summary=(
            f"Bounds are stated before anything is measured. The reference is PyTorch {reference}; the yardstick is "
            f"PyTorch's own distance from it {own}, over the same inputs."
        ),
        largest_error=(
            f"at most {factor:g} times the yardstick's largest error, and never held below {floor_ulps:g} units in "
            "the last place at the scale of the logits, f"
        ),
        divergence=f"at most {factor:g} times the yardstick's divergence, and never held below f² / 2",
        top1=(
            "wherever the most likely token differs, the reference prefers its own by no more than the bound on the "
            "largest error"
        ),
    )


_CONSTANTS: Final = {"safety_factor": SAFETY_FACTOR, "floor_ulps": FLOOR_ULPS}
