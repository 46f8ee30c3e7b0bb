"""What is searched on what: all that a process needs to tell the losses of candidates, ready to be sent to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from flap_export.calibration.statistics import CalibrationStatistics
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.progress import Progress, no_progress
from flap_export.rewriting.compensation import CompensationName
from flap_export.rewriting.cutting import Restore
from flap_export.rewriting.restoring import cut_only, mean_restorer
from flap_export.searching.fitness import FitnessName, LocalLosses, open_losses
from flap_export.searching.fitting import NestedFits
from flap_export.searching.space import Space
from flap_export.searching.supernet import Supernet


@final
@dataclass(frozen=True)
class Problem:
    """See the module."""

    model: str
    """Directory of the dense model; every process maps its weights, so that a machine holds them once."""
    space: Space
    tokens: Tensor
    """What fitness is measured on, int64 [sequences, length]."""
    fitness: FitnessName
    compensation: CompensationName
    fits: Path | None
    """Folder of the factors that least squares takes, mapped like the weights."""
    statistics: CalibrationStatistics | None
    """Means for a bias."""
    dtype: torch.dtype
    device: str
    chunk_sequences: int

    @contextmanager
    def opened(self, *, device: str | None = None, progress: Progress = no_progress) -> Iterator[LocalLosses]:
        """Be ready for candidates in this process.

        Args:
            device: another one than the problem's.
            progress: told while the dense model runs.

        Raises:
            ModelError: the model is not there any more, or its weights are damaged.
        """
        dense = open_checkpoint(self.model)
        with open_losses(
            dense,
            self.tokens,
            self.space,
            self.supernet(dense, device),
            fitness=self.fitness,
            chunk_sequences=self.chunk_sequences,
            dtype=self.dtype,
            device=device or self.device,
            progress=progress,
        ) as losses:
            yield losses

    def supernet(self, dense: Checkpoint, device: str | None = None) -> Supernet:
        """All layers at all cut points, on the problem's device or another."""
        return Supernet(
            dense,
            [layer.ladders for layer in self.space.layers],
            self.restorer(device or self.device),
            compensated=self.compensation != "none",
            dtype=self.dtype,
            device=device or self.device,
        )

    @property
    def restore(self) -> Restore:
        """What restoring projections become, solved for on the problem's device."""
        return self.restorer(self.device)

    def restorer(self, device: str) -> Restore:
        """What restoring projections become, solved for on this device."""
        if self.compensation == "least-squares":
            assert self.fits is not None
            return NestedFits(self.fits, device).restored
        if self.compensation == "bias":
            assert self.statistics is not None
            return mean_restorer(self.statistics)
        return cut_only
