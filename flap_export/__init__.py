"""Structured pruning of large language models, all the way to a checked and measured inference artifact.

    recipe -> calibrate -> score -> allocate -> rewrite -> export -> build -> validate -> bench -> report

The functions below are the stages; the command line only wraps them. Importing this package imports neither torch
nor any backend: a stage brings in what it needs when it is called for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flap_export.artifact import Artifact
    from flap_export.benchmarking import LatencyReport, bench
    from flap_export.building import BuildOptions, EngineRecord, build
    from flap_export.calibration import CalibrationStatistics, calibrate
    from flap_export.comparison import ComparisonReport, compare
    from flap_export.errors import FlapExportError
    from flap_export.evaluation import QualityReport, evaluate
    from flap_export.evidence import CalibrationText, PruneOptions
    from flap_export.exporting import export
    from flap_export.generation import generate
    from flap_export.ideal import Roofline
    from flap_export.manifest import Manifest, verify
    from flap_export.models.loading import load_model
    from flap_export.pipeline import RunResult, run
    from flap_export.plan import PruningPlan
    from flap_export.prediction import Assumptions, Prediction, predict
    from flap_export.pruning import prune
    from flap_export.recipe import Recipe, load_recipe
    from flap_export.reporting import report
    from flap_export.runners import Runner, open_runner
    from flap_export.searching import SearchOptions, SearchReport, search
    from flap_export.shapes import DecoderShape
    from flap_export.validation import ParityReport, validate

__version__ = "0.1.0"

_MODULES = {
    "Artifact": "artifact",
    "Assumptions": "prediction",
    "BuildOptions": "building",
    "CalibrationStatistics": "calibration",
    "CalibrationText": "evidence",
    "ComparisonReport": "comparison",
    "DecoderShape": "shapes",
    "EngineRecord": "building",
    "FlapExportError": "errors",
    "LatencyReport": "benchmarking",
    "Manifest": "manifest",
    "ParityReport": "validation",
    "Prediction": "prediction",
    "PruneOptions": "evidence",
    "PruningPlan": "plan",
    "QualityReport": "evaluation",
    "Recipe": "recipe",
    "Roofline": "ideal",
    "RunResult": "pipeline",
    "Runner": "runners",
    "SearchOptions": "searching",
    "SearchReport": "searching",
    "bench": "benchmarking",
    "build": "building",
    "calibrate": "calibration",
    "compare": "comparison",
    "evaluate": "evaluation",
    "export": "exporting",
    "generate": "generation",
    "load_model": "models.loading",
    "load_recipe": "recipe",
    "open_runner": "runners",
    "predict": "prediction",
    "prune": "pruning",
    "report": "reporting",
    "run": "pipeline",
    "search": "searching",
    "validate": "validation",
    "verify": "manifest",
}

__all__ = [
    "Artifact",
    "Assumptions",
    "BuildOptions",
    "CalibrationStatistics",
    "CalibrationText",
    "ComparisonReport",
    "DecoderShape",
    "EngineRecord",
    "FlapExportError",
    "LatencyReport",
    "Manifest",
    "ParityReport",
    "Prediction",
    "PruneOptions",
    "PruningPlan",
    "QualityReport",
    "Recipe",
    "Roofline",
    "RunResult",
    "Runner",
    "SearchOptions",
    "SearchReport",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "compare",
    "evaluate",
    "export",
    "generate",
    "load_model",
    "load_recipe",
    "open_runner",
    "predict",
    "prune",
    "report",
    "run",
    "search",
    "validate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'flap_export' has no attribute '{name}'")
    return getattr(importlib.import_module(f"flap_export.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
