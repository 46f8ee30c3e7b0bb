"""Every error flap_export raises on purpose.

    FlapExportError
    ├── InputError                 wrong usage or input                          exit code 2
    │   ├── ModelError             a model: family, configuration, weights, tokenizer
    │   ├── TextError              a text source: missing, too short, ids outside the vocabulary
    │   ├── BudgetError            a ratio or a budget that cannot be met
    │   ├── PlanError              a pruning plan that does not fit its model
    │   ├── RecipeError            a recipe: unknown key, wrong type
    │   ├── ArtifactError          an exported artifact: damaged, or asked for more than it holds
    │   ├── OtherSearchError       a search's directory: begun with other settings
    │   ├── DamagedSearchError     a search's directory: damaged, or of another version
    │   └── OutputError            an output directory: holds something else, disk full
    ├── MissingRequirementError    a package extra or a device is not there      exit code 3
    └── GateBreachedError          parity, quality or speedup below its gate     exit code 1

A message says what must hold, what was found, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

LARGEST_SEED: Final = 2**63 - 1
"""What every generator of random numbers takes."""


class FlapExportError(Exception):
    """Base of all errors below; `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(FlapExportError):
    """Wrong usage or wrong input."""


class ModelError(InputError):
    """A model directory that cannot be used: family, configuration, weights or tokenizer."""


class TextError(InputError):
    """A text source that cannot be used."""


class BudgetError(InputError):
    """A pruning ratio or budget that cannot be met."""


class PlanError(InputError):
    """A pruning plan that does not fit the model it is applied to."""


class RecipeError(InputError):
    """A recipe with an unknown key or a value of the wrong type."""


class ArtifactError(InputError):
    """An exported artifact that is damaged or asked for more than it holds."""


class OtherSearchError(InputError):
    """The directory of a search holds one that was begun with other settings."""


class DamagedSearchError(InputError):
    """The directory of a search holds one that cannot be continued: damaged, or of another version."""


class OutputError(InputError):
    """An output directory that cannot be written."""


class MissingRequirementError(FlapExportError):
    """A package extra or a device that is not there; `remedy` is the command that supplies it."""

    exit_code = 3

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; to mend it: {remedy}")
        self.remedy = remedy


class GateBreachedError(FlapExportError):
    """A measured value that breached its gate; `gate` names it."""

    exit_code = 1

    def __init__(self, gate: str, message: str) -> None:
        super().__init__(f"{gate}: {message}")
        self.gate = gate


def check_seed(seed: int) -> None:
    """Whether random numbers can be drawn from `seed`.

    Raises:
        InputError: they cannot.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed must lie in 0..{LARGEST_SEED}, got {seed}")


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Whether `value` is one of the names a table knows.

    Raises:
        InputError: it is not.
    """
    names = list(known)
    if value not in names:
        raise InputError(f"{what} must be one of {', '.join(names)}, got '{value}'")
