"""Stage `validate`: PyTorch against what runs the artifact, and a verdict by a stated rule."""

from __future__ import annotations

from flap_export.validation.report import PARITY_NAME, Comparison, ParityReport
from flap_export.validation.stage import validate

__all__ = ["PARITY_NAME", "Comparison", "ParityReport", "validate"]
