"""`run`: every stage of a recipe in order, resumed where it stopped; see `flap_export.pipeline.resuming`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from flap_export.benchmarking import LATENCY_NAME, LatencyReport
from flap_export.benchmarking.alignment import ALIGNMENT_NAME
from flap_export.errors import GateBreachedError
from flap_export.evaluation import QUALITY_NAME, QualityReport
from flap_export.evidence.methods import resolved
from flap_export.ideal import Phase
from flap_export.manifest import write_manifest
from flap_export.models.opening import open_checkpoint
from flap_export.pipeline.checking import check_recipe
from flap_export.pipeline.resuming import RUN_NAME, Run, begin, perform
from flap_export.pipeline.stages import STAGES
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.progress import Progress, no_progress
from flap_export.recipe import Recipe
from flap_export.reporting import REPORT_NAME, report
from flap_export.reporting.records import SEARCH
from flap_export.rewriting.checkpoint import GENERATION_SETTINGS, companions
from flap_export.searching import SEARCH_NAME, SearchReport
from flap_export.searching.stage import check_search
from flap_export.storage import MANIFEST_NAME, check_output, digest_of_file, digest_of_json, locked
from flap_export.text.sources import digest_of_source
from flap_export.validation import PARITY_NAME, ParityReport


@final
@dataclass(frozen=True)
class RunResult:
    """What a run found; `breaches` is empty when every gate held."""

    report: Path
    plan: PruningPlan
    search: SearchReport | None
    quality: QualityReport | None
    parity: ParityReport
    latency: LatencyReport | None
    breaches: tuple[GateBreachedError, ...]

    def as_json(self) -> dict[str, Any]:
        """What a CI job reads: the verdict, and every record of the run."""
        records = {"search": self.search, "quality": self.quality, "parity": self.parity, "latency": self.latency}
        return {
            "passed": not self.breaches,
            "breaches": [{"gate": breach.gate, "message": str(breach)} for breach in self.breaches],
            "report": str(self.report),
            "ratio": self.plan.ratio.model_dump(mode="json"),
            **{name: record and record.model_dump(mode="json") for name, record in records.items()},
        }


def run(recipe: Recipe, output: str | Path, *, progress: Progress = no_progress) -> RunResult:
    """Prune, export, validate, measure and report as a recipe says; resumes.

    Args:
        recipe: see `flap_export.recipe.load_recipe`.
        output: the run's directory; an interrupted run of the same directory goes on.
        progress: told what is being done.

    Raises:
        InputError: the recipe's model, texts or budget cannot be used, or `output` holds something else.
        MissingRequirementError: a package or device is not there.
    """
    prune = resolved(recipe.prune)
    if recipe.search is not None:
        check_search(recipe.search.options, prune, recipe.search.seeds)
    directory = Path(output)
    check_output(directory, RUN_NAME, in_place=True)
    check_recipe(recipe)
    current = Run(recipe, directory, progress)
    with locked(directory):
        begin(current)
        known = _input_digests(recipe)
        for stage in STAGES:
            perform(stage, current, known)
            if stage.name == "validate" and _parity(directory).worst is not None:
                # What was measured on a wrong artifact says nothing: older results must not stand beside the breach.
                for name in (LATENCY_NAME, ALIGNMENT_NAME):
                    (directory / name).unlink(missing_ok=True)
                break
        result = _result(current)
        values = recipe.model_dump(mode="json", by_alias=True)
        # Of an earlier recipe, or damaged: what it says is nothing for this run's page.
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
        report(directory, recipe=values)
        write_manifest(directory, digests=known, recipe=values)
    return result


def _input_digests(recipe: Recipe) -> dict[str, str]:
    """Digests of what the run starts from: the dense model, what lies beside its weights, and the texts."""
    dense = open_checkpoint(recipe.model)
    beside = {name: digest_of_file(dense.directory / name) for name in companions(dense.directory)}
    tokenizer = {name: digest for name, digest in beside.items() if name != GENERATION_SETTINGS}
    texts = {source: digest_of_source(source) for source in (recipe.calibrate.source, *recipe.evaluate.sources)}
    configuration = {"config": (dense.directory / "config.json").read_text(encoding="utf-8")}
    return {
        "model": digest_of_json([dense.weights.digest, configuration]),
        "tokenizer": digest_of_json(tokenizer),
        "companions": digest_of_json(beside),
        "calibration text": texts[recipe.calibrate.source],
        "evaluation texts": digest_of_json([texts[source] for source in recipe.evaluate.sources]),
    }


def _parity(directory: Path) -> ParityReport:
    return ParityReport.load(directory / PARITY_NAME)


def _result(current: Run) -> RunResult:
    directory = current.directory
    found = SearchReport.load(directory / SEARCH / SEARCH_NAME) if current.recipe.search is not None else None
    quality = QualityReport.load(directory / QUALITY_NAME) if (directory / QUALITY_NAME).is_file() else None
    latency = LatencyReport.load(directory / LATENCY_NAME) if (directory / LATENCY_NAME).is_file() else None
    parity = _parity(directory)
    return RunResult(
        report=directory / REPORT_NAME,
        plan=PruningPlan.load(directory / PLAN_NAME),
        search=found,
        quality=quality,
        parity=parity,
        latency=latency,
        breaches=tuple(_breaches(current.recipe, quality, parity, latency)),
    )


def _breaches(
    recipe: Recipe, quality: QualityReport | None, parity: ParityReport, latency: LatencyReport | None
) -> Iterator[GateBreachedError]:
    checks: list[Callable[[], None]] = [parity.raise_if_breached]
    limit = recipe.gates.maximum_perplexity_ratio
    if quality is not None and limit is not None:
        checks.append(partial(quality.raise_if_worse, limit))
    minima: dict[Phase, float | None] = {
        "decode": recipe.gates.minimum_decode_speedup,
        "prefill": recipe.gates.minimum_prefill_speedup,
    }
    for phase, minimum in minima.items():
        if latency is not None and minimum is not None:
            checks.append(partial(latency.raise_if_slower, minimum, phase=phase))
    for check in checks:
        try:
            check()
        except GateBreachedError as breach:
            yield breach
