"""What decides which units go: the pruning methods as data, and the evidence that each of them gathers."""

from __future__ import annotations

from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import CalibrationText

__all__ = ["CalibrationText", "PruneOptions"]
