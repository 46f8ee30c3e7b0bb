"""`build`: an exported artifact becomes TensorRT engines for named GPUs, in either flavour of TensorRT."""

from __future__ import annotations

from flap_export.building.record import ENGINE_NAME, EngineRecord, is_engine, load_engine
from flap_export.building.stage import BuildOptions, build

__all__ = ["ENGINE_NAME", "BuildOptions", "EngineRecord", "build", "is_engine", "load_engine"]
