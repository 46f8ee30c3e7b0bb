"""Stage `report`: one self-contained HTML page about a run, for a person to read."""

from __future__ import annotations

from flap_export.reporting.stage import REPORT_NAME, report

__all__ = ["REPORT_NAME", "report"]
