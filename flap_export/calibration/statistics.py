"""What calibration leaves behind: per-channel statistics of what enters `o_proj` and `down_proj`, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Literal, NamedTuple, final

import torch
from torch import Tensor

from flap_export.errors import InputError
from flap_export.families import Part
from flap_export.shapes import LayerShape
from flap_export.storage import load_tensors, save_tensors

STATISTICS_NAME: Final = "statistics.safetensors"
KIND: Final = "calibration statistics"
SCHEMA_VERSION: Final = 2

CutSpace = Literal["query", "ffn", "shared"]
StatisticsName = Literal["welford", "reference"]
"""Exact statistics, or those of the official code; see `flap_export.calibration.reference`."""
CUT_SPACES: Final[tuple[CutSpace, ...]] = ("query", "ffn")
"""Spaces of every layer whose channels can go: the inputs of o_proj (Q D channels) and of down_proj (F channels)."""
_WITH_SHARED: Final[tuple[CutSpace, ...]] = (*CUT_SPACES, "shared")
"""And the inputs of a shared expert's down_proj (S channels)."""


def cut_spaces(layer: LayerShape) -> tuple[CutSpace, ...]:
    """Spaces of a layer whose channels can go."""
    return CUT_SPACES if layer.shared_channels is None else _WITH_SHARED


def part_of(space: CutSpace) -> Part:
    """Which part of a layer a cut space lies in."""
    return "query" if space == "query" else "ffn"


class Site(NamedTuple):
    """Where one restoring projection stands."""

    layer: int
    space: CutSpace
    expert: int | None
    """None where the space is not divided among experts."""


@final
@dataclass(frozen=True)
class SiteStatistics:
    """One layer's statistics in one cut space, over C channels; float64 [C] each.

    In a mixture of experts they are [E, F], of the tokens that were sent to each expert. All are zero, but for the
    weights', where there was none: nothing is known to be lost with these channels, and they go first.
    """

    mean: Tensor
    """Mean of X_j over all tokens."""
    variance: Tensor
    """Var(X_j), the fluctuation."""
    square_norm: Tensor
    """||X_j||^2, up to a factor that all channels share."""
    weight_square_norm: Tensor
    """||W_:j||^2 of the restoring projection's columns."""
    weight_absolute_mean: Tensor
    """Mean over rows of |W_ij|."""


def stored_spaces(tensors: Mapping[str, Tensor], layer: int) -> tuple[CutSpace, ...]:
    """The cut spaces of a layer that saved tensors, named `layers.<layer>.<space>...`, must tell of."""
    has_shared = any(name.startswith(f"layers.{layer}.shared.") for name in tensors)
    return _WITH_SHARED if has_shared else CUT_SPACES


def stacked_sites(experts: Sequence[SiteStatistics]) -> SiteStatistics:
    """The statistics [C] of every expert as those [E, C] of a mixture."""
    return SiteStatistics(*(torch.stack([getattr(expert, name) for expert in experts]) for name in _FIELDS))


_FIELDS: Final = tuple(field.name for field in fields(SiteStatistics))


@final
@dataclass(frozen=True)
class CalibrationStatistics:
    """The statistics of all layers, and where they came from."""

    model: str
    source: str
    sequences: int
    sequence_length: int
    seed: int
    """Chose the sequences of a longer text: with it the same ones can be read again."""
    kind: StatisticsName
    sites: Mapping[tuple[int, CutSpace], SiteStatistics]
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the weights and of the calibration text."""

    def save(self, path: Path) -> None:
        """Write as safetensors, under a temporary name first."""
        tensors = {
            f"layers.{layer}.{space}.{name}": getattr(site, name)
            for (layer, space), site in self.sites.items()
            for name in _FIELDS
        }
        header = {name: getattr(self, name) for name in _HEADER}
        layers = len({layer for layer, _ in self.sites})
        save_tensors(path, KIND, SCHEMA_VERSION, tensors, {**header, "layers": layers})

    @classmethod
    def load(cls, path: Path) -> CalibrationStatistics:
        """Read saved statistics.

        Raises:
            InputError: no such file, or not calibration statistics.
        """
        tensors, header = load_tensors(path, KIND, SCHEMA_VERSION)
        try:
            sites = {
                (layer, space): SiteStatistics(*(tensors[f"layers.{layer}.{space}.{name}"] for name in _FIELDS))
                for layer in range(header["layers"])
                for space in stored_spaces(tensors, layer)
            }
            return cls(**{name: header[name] for name in _HEADER}, sites=sites)
        except KeyError as error:
            raise InputError(f"'{path}' lacks {error}; calibrate again") from error


_HEADER: Final = ("model", "source", "sequences", "sequence_length", "seed", "kind", "digests")
