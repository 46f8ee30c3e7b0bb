"""Stage `bench`: a pruned artifact against its dense baseline, beside the speedup the arithmetic allows."""

from __future__ import annotations

from flap_export.benchmarking.report import LATENCY_NAME, LatencyReport, Measurement, PhaseLatency
from flap_export.benchmarking.stage import bench, planned_workloads

__all__ = ["LATENCY_NAME", "LatencyReport", "Measurement", "PhaseLatency", "bench", "planned_workloads"]
