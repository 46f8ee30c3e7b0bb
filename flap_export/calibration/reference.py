"""The statistics that the official FLAP code gathers (CASIA-IVA-Lab/FLAP), for `--statistics reference`.

They depart from the paper's, and published numbers come from them: the mean is updated in place before the fluctuation
is taken, so both factors of the fluctuation use the new mean; the first sequence's fluctuation is dropped; sequences
are counted as if they were tokens; all in float32. What the code does with them is in
`flap_export.allocation.reference`.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor


@final
class ReferenceMoments:
    """The code's running statistics of C channels, one sequence at a time (`lib/layerwrapper.py`, BiasGPT)."""

    def __init__(self, channels: int) -> None:
        self.sequences = 0
        self.mean = torch.zeros(channels)
        self.fluctuation = torch.zeros(channels)
        self.square_norm = torch.zeros(channels)

    def update(self, inputs: Tensor) -> None:
        """Take in sequences [B, n, C], one after another."""
        for sequence in inputs.to("cpu", torch.float32):
            self._update_one(sequence.t())

    def _update_one(self, values: Tensor) -> None:
        before, after = self.sequences, self.sequences + 1
        self.mean = self.mean * (before / after) + values.mean(dim=1) / after
        self.square_norm = self.square_norm * (before / after) + values.norm(p=2, dim=1) ** 2 / after
        if before:
            deviation = values - self.mean.unsqueeze(1)
            self.fluctuation = self.fluctuation * ((before - 1) / before) + (deviation * deviation).sum(dim=1) / after
        self.sequences = after
