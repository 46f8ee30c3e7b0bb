"""Stage `calibrate`: channel statistics of the dense model, gathered one layer at a time."""

from __future__ import annotations

from flap_export.calibration.stage import calibrate
from flap_export.calibration.statistics import CalibrationStatistics

__all__ = ["CalibrationStatistics", "calibrate"]
