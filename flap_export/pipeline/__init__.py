"""`run`: every stage of a recipe in order, resumed where it stopped."""

from __future__ import annotations

from flap_export.pipeline.running import RunResult, run

__all__ = ["RunResult", "run"]
