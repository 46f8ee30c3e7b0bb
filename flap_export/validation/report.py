"""What a parity check found: one `Comparison` per candidate, phase and case, and the `ParityReport` around them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from flap_export.errors import GateBreachedError, InputError, MissingRequirementError
from flap_export.precision import DtypeName
from flap_export.storage import Record, Value
from flap_export.validation import errormetrics
from flap_export.validation.errormetrics import Array
from flap_export.validation.tolerance import SAFETY_FACTOR, tolerance_from

PARITY_NAME: Final = "parity.json"

Phase = Literal["prefill", "decode"]
CaseName = Literal["single", "chunked", "ragged", "last"]


class Comparison(Value):
    """A candidate's logits against the reference's over one phase of one case."""

    reference: str
    candidate: str
    phase: Phase
    case: CaseName
    positions: int = 0
    """Logit vectors compared."""
    max_abs: float | None = None
    max_rel: float | None = None
    """`max_abs` over the largest magnitude among the reference's logits."""
    kl: float | None = None
    """KL(reference || candidate) in nats, mean over positions."""
    top1_agreement: float | None = None
    top1_gap: float | None = None
    """By how much the reference prefers its own token where the two differ, at worst."""
    tolerance_max_abs: float | None = None
    """Bound on `max_abs` and on `top1_gap`."""
    tolerance_kl: float | None = None
    passed: bool | None
    """None where the candidate could not run here."""
    reason: str | None = None
    """Why it did not pass."""
    remedy: str | None = None
    """What would let it run here."""

    @property
    def where(self) -> str:
        """Candidate, phase and case in words."""
        return f"{self.candidate} against {self.reference}, {self.phase} of case '{self.case}'"

    @property
    def severity(self) -> float:
        """The larger of the two errors in units of its bound; infinite where no error could be measured."""
        if self.max_abs is None or self.kl is None or not self.tolerance_max_abs or not self.tolerance_kl:
            return float("inf")
        return max(self.max_abs / self.tolerance_max_abs, self.kl / self.tolerance_kl)


class ParityReport(Record):
    """`parity.json`."""

    kind: ClassVar[str] = "parity report"

    passed: bool
    """Whether something was compared and nothing that was compared failed."""
    complete: bool
    """Whether everything that was asked about ran; older files leave it out, and their comparisons tell."""
    comparisons: tuple[Comparison, ...]
    first_divergence: None = None
    settings: dict[str, str | int | float | None] = Field(default_factory=dict)
    digests: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the artifact's files and of the reference's weights."""

    @classmethod
    def of(
        cls,
        comparisons: tuple[Comparison, ...],
        settings: dict[str, str | int | float | None],
        digests: dict[str, str],
    ) -> Self:
        """The report over `comparisons`; one that did not run counts neither as passed nor as failed."""
        passed, complete = _summed(comparison.passed for comparison in comparisons)
        return cls(passed=passed, complete=complete, comparisons=comparisons, settings=settings, digests=digests)

    @model_validator(mode="before")
    @classmethod
    def _of_older_files(cls, values: Any) -> Any:
        if isinstance(values, dict) and "complete" not in values and isinstance(values.get("comparisons"), list):
            found = [one.get("passed") for one in values["comparisons"] if isinstance(one, dict)]
            return {**values, "complete": _summed(found)[1]}
        return values

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a saved report.

        Raises:
            InputError: no such file, not a parity report, or its verdict is not what its comparisons come to.
        """
        report = super().load(path)
        stated, found = (report.passed, report.complete), _summed(one.passed for one in report.comparisons)
        if stated != found:
            raise InputError(
                f"'{path}' is not a valid {cls.kind}: passed and complete must be what its comparisons come to, "
                f"{found[0]} and {found[1]}, and are {stated[0]} and {stated[1]}; validate again"
            )
        return report

    @property
    def worst(self) -> Comparison | None:
        """The failed comparison furthest beyond its bounds; None when none failed."""
        failed = [comparison for comparison in self.comparisons if comparison.passed is False]
        return max(failed, key=lambda comparison: comparison.severity, default=None)

    def raise_if_breached(self) -> None:
        """Refuse an artifact that is not known to compute what its checkpoint computes.

        Raises:
            GateBreachedError: a comparison failed; the message names the worst.
            MissingRequirementError: nothing could be compared on this machine.
        """
        if self.worst is not None:
            raise GateBreachedError("parity", f"{self.worst.where}: {self.worst.reason}")
        if not self.passed:
            first = next((comparison for comparison in self.comparisons if comparison.remedy), None)
            raise MissingRequirementError(
                f"parity {first.reason}" if first and first.reason else "parity not run: no backend was named",
                (first and first.remedy) or "name a backend that runs on this machine",
            )

    def raise_if_incomplete(self) -> None:
        """Refuse a report in which something that was asked about did not run.

        Raises:
            MissingRequirementError: a candidate needs what is not on this machine.
        """
        for comparison in self.comparisons:
            if comparison.passed is None:
                raise MissingRequirementError(
                    f"parity of {comparison.candidate} {comparison.reason}",
                    comparison.remedy or "run it on a machine that has what it needs",
                )


def _summed(verdicts: Iterable[bool | None]) -> tuple[bool, bool]:
    """Whether comparisons pass together, and whether all of them ran."""
    found = set(verdicts)
    return True in found and False not in found, bool(found) and None not in found


def compared(blank: Comparison, reference: Array, yardstick: Array, candidate: Array, dtype: DtypeName) -> Comparison:
    """Fill `blank` with the errors of `candidate` and the verdict; the arrays are logits [N, V], N >= 1."""
    if broken := errormetrics.non_finite(candidate):
        return _failed(blank, f"{broken} of its logits are NaN or infinite")
    if broken := errormetrics.non_finite(yardstick) + errormetrics.non_finite(reference):
        return _failed(
            blank,
            f"there is nothing to hold it against: {broken} of PyTorch's own logits in {dtype} are NaN or infinite; "
            "export in bfloat16 or float32",
        )
    tolerance = tolerance_from(reference, yardstick, dtype)
    measured = blank.model_copy(
        update={
            "positions": len(reference),
            "max_abs": errormetrics.max_abs(reference, candidate),
            "max_rel": errormetrics.max_rel(reference, candidate),
            "kl": errormetrics.kl(reference, candidate),
            "top1_agreement": errormetrics.top1_agreement(reference, candidate),
            "top1_gap": errormetrics.top1_gap(reference, candidate),
            "tolerance_max_abs": tolerance.max_abs,
            "tolerance_kl": tolerance.kl,
        }
    )
    breaches = _breaches(measured)
    return measured.model_copy(update={"passed": not breaches, "reason": "; ".join(breaches) or None})


def not_run(blank: Comparison, error: MissingRequirementError) -> Comparison:
    """`blank` with the reason why it could not run here."""
    what = str(error).removesuffix(f"; to mend it: {error.remedy}")
    return blank.model_copy(update={"passed": None, "reason": f"not run: {what}", "remedy": error.remedy})


def _failed(blank: Comparison, reason: str) -> Comparison:
    return blank.model_copy(update={"passed": False, "reason": reason})


def _breaches(measured: Comparison) -> list[str]:
    """Each bound that `measured` exceeds, in words; see `flap_export.validation.tolerance` for the rule."""
    yardstick = f"{SAFETY_FACTOR:g} times PyTorch's own in this precision"
    bounds = (
        ("largest error", measured.max_abs, measured.tolerance_max_abs, ""),
        ("KL divergence", measured.kl, measured.tolerance_kl, " nats"),
        ("gap to another most likely token", measured.top1_gap, measured.tolerance_max_abs, ""),
    )
    return [
        f"{what} {found:.3g}{unit} exceeds {bound:.3g}{unit}, {yardstick}"
        for what, found, bound, unit in bounds
        if found is not None and bound is not None and not found <= bound
    ]
