"""What calibration leaves behind: per-channel statistics of what enters `o_proj` and `down_proj`, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flap_export.errors import InputError
from flap_export.moments import Moments
from flap_export.storage import new_file

STATISTICS_NAME: Final = "statistics.safetensors"
SCHEMA_VERSION: Final = 1

CutSpace = Literal["query", "ffn"]
CUT_SPACES: Final[tuple[CutSpace, ...]] = ("query", "ffn")
"""Spaces whose channels can go: the inputs of o_proj (Q D channels) and of down_proj (F channels)."""


@final
@dataclass(frozen=True)
class SiteStatistics:
    """One layer's statistics in one cut space, over C channels."""

    moments: Moments
    weight_square_norm: Tensor
    """float64 [C]: ||W_:j||^2 of the restoring projection's columns."""
    weight_absolute_mean: Tensor
    """float64 [C]: mean over rows of |W_ij|."""


@final
@dataclass(frozen=True)
class CalibrationStatistics:
    """The statistics of all layers, and where they came from."""

    model: str
    source: str
    sequences: int
    sequence_length: int
    sites: Mapping[tuple[int, CutSpace], SiteStatistics]
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the weights and of the calibration text."""

    def save(self, path: Path) -> None:
        """Write as safetensors, under a temporary name first."""
        tensors: dict[str, Tensor] = {}
        for (layer, space), site in self.sites.items():
            prefix = f"layers.{layer}.{space}"
            tensors[f"{prefix}.mean"] = site.moments.mean.contiguous()
            tensors[f"{prefix}.square_sum"] = site.moments.square_sum.contiguous()
            tensors[f"{prefix}.weight_square_norm"] = site.weight_square_norm.contiguous()
            tensors[f"{prefix}.weight_absolute_mean"] = site.weight_absolute_mean.contiguous()
        header = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "source": self.source,
            "sequences": self.sequences,
            "sequence_length": self.sequence_length,
            "counts": {f"{layer}.{space}": site.moments.count for (layer, space), site in self.sites.items()},
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
                sites = {key: _read_site(file, *key, count) for key, count in _counts(header).items()}
        except FileNotFoundError as error:
            raise InputError(f"no calibration statistics at '{path}'") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{path}' holds no calibration statistics; calibrate again") from error
        return cls(
            header["model"], header["source"], header["sequences"], header["sequence_length"], sites, header["digests"]
        )


def _counts(header: dict[str, dict[str, int]]) -> dict[tuple[int, CutSpace], int]:
    counts: dict[tuple[int, CutSpace], int] = {}
    for key, count in header["counts"].items():
        layer, space = key.split(".")
        counts[int(layer), "query" if space == "query" else "ffn"] = count
    return counts


def _read_site(file: Any, layer: int, space: CutSpace, count: int) -> SiteStatistics:
    prefix = f"layers.{layer}.{space}"
    moments = Moments(count, file.get_tensor(f"{prefix}.mean"), file.get_tensor(f"{prefix}.square_sum"))
    return SiteStatistics(
        moments, file.get_tensor(f"{prefix}.weight_square_norm"), file.get_tensor(f"{prefix}.weight_absolute_mean")
    )
