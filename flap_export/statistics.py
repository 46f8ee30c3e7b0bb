"""What calibration leaves behind: per-channel statistics of what enters `o_proj` and `down_proj`, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flap_export.errors import InputError
from flap_export.storage import new_file

STATISTICS_NAME: Final = "statistics.safetensors"
SCHEMA_VERSION: Final = 1

CutSpace = Literal["query", "ffn"]
StatisticsName = Literal["welford", "reference"]
"""Exact statistics, or those of the official code; see `flap_export.reference`."""
CUT_SPACES: Final[tuple[CutSpace, ...]] = ("query", "ffn")
"""Spaces whose channels can go: the inputs of o_proj (Q D channels) and of down_proj (F channels)."""


@final
@dataclass(frozen=True)
class SiteStatistics:
    """One layer's statistics in one cut space, over C channels; float64 [C] each."""

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


_FIELDS: Final = tuple(field.name for field in fields(SiteStatistics))


@final
@dataclass(frozen=True)
class CalibrationStatistics:
    """The statistics of all layers, and where they came from."""

    model: str
    source: str
    sequences: int
    sequence_length: int
    kind: StatisticsName
    sites: Mapping[tuple[int, CutSpace], SiteStatistics]
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the weights and of the calibration text."""

    def save(self, path: Path) -> None:
        """Write as safetensors, under a temporary name first."""
        tensors = {
            f"layers.{layer}.{space}.{name}": getattr(site, name).contiguous()
            for (layer, space), site in self.sites.items()
            for name in _FIELDS
        }
        header = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "source": self.source,
            "sequences": self.sequences,
            "sequence_length": self.sequence_length,
            "kind": self.kind,
            "layers": len({layer for layer, _ in self.sites}),
            "digests": dict(self.digests),
        }
        with new_file(path) as partial:
            save_file(tensors, partial, metadata={"statistics": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> CalibrationStatistics:
        """Read saved statistics.

        Raises:
            InputError: no such file, or not calibration statistics.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["statistics"])
                if header["schema_version"] != SCHEMA_VERSION:
                    raise ValueError(f"schema version {header['schema_version']}, expected {SCHEMA_VERSION}")
                keys = [(layer, space) for layer in range(header["layers"]) for space in CUT_SPACES]
                sites = {key: _read_site(file, *key) for key in keys}
        except FileNotFoundError as error:
            raise InputError(f"no calibration statistics at '{path}'") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{path}' holds no calibration statistics; calibrate again") from error
        return cls(
            model=header["model"],
            source=header["source"],
            sequences=header["sequences"],
            sequence_length=header["sequence_length"],
            kind=header["kind"],
            sites=sites,
            digests=header["digests"],
        )


def _read_site(file: Any, layer: int, space: CutSpace) -> SiteStatistics:
    return SiteStatistics(*(file.get_tensor(f"layers.{layer}.{space}.{name}") for name in _FIELDS))
