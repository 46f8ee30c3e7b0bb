"""What decides which units go, kept for further ratios: calibration statistics, measured losses, or scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Final, final

from pydantic import Field
from torch import Tensor

from flap_export.calibration.statistics import STATISTICS_NAME, CalibrationStatistics, StatisticsName
from flap_export.errors import InputError
from flap_export.evidence.methods import METHODS, MethodName
from flap_export.evidence.sensitivity import SENSITIVITY_NAME, Sensitivity
from flap_export.precision import ComputeDtypeName
from flap_export.scoring import LayerScores
from flap_export.storage import Record, Seed, Value, load_tensors, save_tensors

EVIDENCE_NAME: Final = "evidence.json"
SCORES_NAME: Final = "scores.safetensors"
_SCORES_VERSION: Final = 1
_SCORED: Final = tuple(field.name for field in fields(LayerScores))


class CalibrationText(Value):
    """What a model is calibrated on, and how."""

    source: str
    """A text source, see `flap_export.text.sources`."""
    samples: int | None = Field(default=None, gt=0)
    """Sequences; None takes up to 1024 of what the source holds."""
    sequence_length: int | None = Field(default=None, gt=1)
    """Tokens of one sequence; None is 128, or the shape of a token array."""
    seed: Seed = 0
    """Chooses the sequences of a longer text."""
    statistics: StatisticsName = "welford"
    """Exact, or as the official code computes them; see `flap_export.calibration.reference`."""
    dtype: ComputeDtypeName | None = None
    """Precision to compute in; None is float32 on a CPU and the checkpoint's own on a GPU."""


class _EvidenceRecord(Record):
    """What `Evidence` holds beside tensors."""

    kind: ClassVar[str] = "evidence"

    method: MethodName
    text: CalibrationText | None
    digests: dict[str, str]
    scored_layers: int = 0


@final
@dataclass(frozen=True)
class Evidence:
    """What a method goes by, and where it came from."""

    method: MethodName
    """Whose choice it serves."""
    text: CalibrationText | None
    """What was calibrated on, with the numbers of sequences and tokens that were used."""
    digests: Mapping[str, str]
    """SHA-256 of the weights and of the calibration tokens."""
    statistics: CalibrationStatistics | None = None
    sensitivity: Sensitivity | None = None
    scores: tuple[LayerScores, ...] | None = None

    @classmethod
    def of(cls, statistics: CalibrationStatistics) -> Evidence:
        """What FLAP goes by."""
        text = CalibrationText(
            source=statistics.source,
            samples=statistics.sequences,
            sequence_length=statistics.sequence_length,
            seed=statistics.seed,
            statistics=statistics.kind,
        )
        return cls("flap", text, statistics.digests, statistics)

    def save(self, folder: Path) -> None:
        """Write what is there into a folder."""
        if self.statistics is not None:
            self.statistics.save(folder / STATISTICS_NAME)
        if self.sensitivity is not None:
            self.sensitivity.save(folder / SENSITIVITY_NAME)
        if self.scores is not None:
            save_tensors(folder / SCORES_NAME, "scores", _SCORES_VERSION, _score_tensors(self.scores), {})
        layers = len(self.scores or ())
        record = _EvidenceRecord(method=self.method, text=self.text, digests=dict(self.digests), scored_layers=layers)
        record.save(folder / EVIDENCE_NAME)

    @classmethod
    def load(cls, folder: Path) -> Evidence:
        """Read a folder that `save` wrote.

        Raises:
            InputError: it holds nothing of the kind, or not all of it.
        """
        record = _EvidenceRecord.load(folder / EVIDENCE_NAME)
        statistics, sensitivity, scores = (folder / name for name in (STATISTICS_NAME, SENSITIVITY_NAME, SCORES_NAME))
        needed = {"statistics": statistics, "sensitivity": sensitivity}.get(METHODS[record.method].basis, scores)
        if not needed.is_file():
            raise InputError(
                f"'{folder}' lacks {needed.name}, which the method {record.method} goes by; calibrate again"
            )
        return cls(
            record.method,
            record.text,
            record.digests,
            CalibrationStatistics.load(statistics) if statistics.is_file() else None,
            Sensitivity.load(sensitivity) if sensitivity.is_file() else None,
            _loaded_scores(scores, record.scored_layers) if record.scored_layers else None,
        )


def _score_tensors(scores: Sequence[LayerScores]) -> dict[str, Tensor]:
    return {
        f"layers.{index}.{name}": values
        for index, layer in enumerate(scores)
        for name in _SCORED
        if (values := getattr(layer, name)) is not None
    }


def _loaded_scores(path: Path, layers: int) -> tuple[LayerScores, ...]:
    tensors, _ = load_tensors(path, "scores", _SCORES_VERSION)
    return tuple(
        LayerScores(**{name: tensors[key] for name in _SCORED if (key := f"layers.{index}.{name}") in tensors})
        for index in range(layers)
    )
