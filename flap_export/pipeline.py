"""`run`: every stage of a recipe in order, resumed where it stopped; see `flap_export.running`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

from flap_export.alignment import ALIGNMENT_NAME, compare_alignment
from flap_export.benchmarking import LATENCY_NAME, LatencyReport, bench, planned_workloads
from flap_export.building import BuildOptions, build
from flap_export.building.profiles import profiles_of
from flap_export.errors import GateBreachedError, InputError, OtherSearchError, RecipeError
from flap_export.evaluation import QUALITY_NAME, QualityReport, evaluate_both
from flap_export.evidence import Evidence
from flap_export.exporting import cache_length, export
from flap_export.gathering import evidence_options, gather
from flap_export.ideal import Phase
from flap_export.layerwise import Progress, no_progress
from flap_export.loading import open_checkpoint
from flap_export.manifest import write_manifest
from flap_export.methods import PruneOptions, resolved
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.pruning import prune_with
from flap_export.rates import RATES_NAME, Rates
from flap_export.recipe import Recipe
from flap_export.reporting import REPORT_NAME, report
from flap_export.reporting.engines import ENGINES
from flap_export.reporting.records import CHECKPOINT, DENSE_ARTIFACT, PRUNED_ARTIFACT, SEARCH
from flap_export.running import RUN_NAME, Run, Stage, begin, perform
from flap_export.searching import SEARCH_NAME, SearchReport, search
from flap_export.searching.stage import check_search
from flap_export.storage import MANIFEST_NAME, check_output, digest_of_json, locked
from flap_export.text import digest_of_source
from flap_export.validation import PARITY_NAME, ParityReport, validate
from flap_export.validation.cases import build_cases

CALIBRATION_FOLDER: Final = "calibration"


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
    _check_lengths(recipe)
    directory = Path(output)
    check_output(directory, RUN_NAME, in_place=True)
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


def _check_lengths(recipe: Recipe) -> None:
    """Whether what later stages put into the caches fits them: said before hours of pruning, not after.

    Raises:
        InputError: the model cannot be used.
        RecipeError: a section asks for more than the caches hold.
    """
    dense = open_checkpoint(recipe.model)
    with _of_section("export"):
        max_length = cache_length(dense, recipe.export.max_length)
    with _of_section("build"):
        if _builds_engines(recipe):
            profiles_of(
                max_length,
                batch_size=recipe.build.batch_size,
                max_batch=recipe.build.max_batch,
                prompt=recipe.build.prompt_length,
                max_prompt=recipe.build.max_prompt,
            )
    with _of_section("validate"):
        build_cases(
            max_length=max_length,
            vocabulary_size=dense.shape.vocabulary_size,
            decode_steps=recipe.validate_.decode_steps,
            prompt_length=recipe.validate_.prompt_length,
            batch_size=recipe.validate_.batch_size,
            seed=recipe.validate_.seed,
            prompts=None,
        )
    with _of_section("bench"):
        planned_workloads(
            batch_sizes=recipe.bench.batch_sizes, prompt_lengths=recipe.bench.prompt_lengths, max_length=max_length
        )


@contextmanager
def _of_section(name: str) -> Iterator[None]:
    """Whatever is wrong within is a section's of the recipe."""
    try:
        yield
    except InputError as error:
        raise RecipeError(f"section '{name}' of the recipe: {error}") from error


def _input_digests(recipe: Recipe) -> dict[str, str]:
    """Digests of what the run starts from: the dense model and the texts."""
    dense = open_checkpoint(recipe.model)
    texts = {source: digest_of_source(source) for source in (recipe.calibrate.source, *recipe.evaluate.sources)}
    configuration = {"config": (dense.directory / "config.json").read_text(encoding="utf-8")}
    return {
        "model": digest_of_json([dense.weights.digest, configuration]),
        "calibration text": texts[recipe.calibrate.source],
        "evaluation texts": digest_of_json([texts[source] for source in recipe.evaluate.sources]),
    }


def _calibrate(current: Run) -> None:
    recipe, folder = current.recipe, current.directory / CALIBRATION_FOLDER
    options = resolved(recipe.prune)
    evidence = gather(recipe.model, recipe.calibrate, options, device=recipe.device, progress=current.progress)
    shutil.rmtree(folder, ignore_errors=True)
    evidence.save(folder)


def _search(current: Run) -> None:
    """Search, or go on with a search of the same settings."""
    recipe, folder = current.recipe, current.directory / SEARCH
    section = recipe.search
    assert section is not None
    searched = partial(
        search,
        recipe.model,
        folder,
        calibration=recipe.calibrate,
        prune=recipe.prune,
        options=section.options,
        seeds=section.seeds,
        baselines=section.baselines,
        workers=section.workers,
        evidence=Evidence.load(current.directory / CALIBRATION_FOLDER),
        device=recipe.device,
        progress=current.progress,
    )
    try:
        searched()
    except OtherSearchError:
        shutil.rmtree(folder)
        searched()


def _prune_options(current: Run) -> PruneOptions:
    """What is asked of `prune`: the rates that were searched in place of the ratio, where there are some."""
    prune = current.recipe.prune
    if current.recipe.search is None:
        return prune
    rates = Rates.read(current.directory / SEARCH / RATES_NAME)
    return prune.model_copy(update={"rates": rates.layers, "ratio": None})


def _prune(current: Run) -> None:
    recipe = current.recipe
    plan = prune_with(
        recipe.model,
        current.directory / CHECKPOINT,
        Evidence.load(current.directory / CALIBRATION_FOLDER),
        _prune_options(current),
        device=recipe.device,
        dtype=recipe.calibrate.dtype,
        progress=current.progress,
    )
    plan.save(current.directory / PLAN_NAME)


def _export_dense(current: Run) -> None:
    section = current.recipe.export
    export(current.recipe.model, current.directory / DENSE_ARTIFACT, dtype=section.dtype, max_length=section.max_length)


def _export_pruned(current: Run) -> None:
    section, directory = current.recipe.export, current.directory
    export(directory / CHECKPOINT, directory / PRUNED_ARTIFACT, dtype=section.dtype, max_length=section.max_length)


def _build(model: str, source: str, current: Run) -> None:
    """Engines of one model."""
    section, output = current.recipe.build, current.directory / ENGINES[model]
    assert section.backend is not None
    build(
        current.directory / source,
        output,
        backend=section.backend,
        targets=section.targets,
        logits=section.logits,
        batch_size=section.batch_size,
        max_batch=section.max_batch,
        prompt=section.prompt_length,
        max_prompt=section.max_prompt,
        options=BuildOptions(
            optimization_level=section.optimization_level,
            weight_stripped=section.weight_stripped,
            limit_keys=section.limit_keys,
            tf32=section.tf32,
            timing_cache=None if section.timing_cache is None else Path(section.timing_cache),
        ),
    )


def _benched(current: Run) -> tuple[Path, Path]:
    """Dense and pruned, as they are measured: engines where there are some and a GPU to run them."""
    has_engines = current.recipe.build.backend is not None and current.recipe.device == "cuda"
    names = (ENGINES["dense"], ENGINES["pruned"]) if has_engines else (DENSE_ARTIFACT, PRUNED_ARTIFACT)
    return current.directory / names[0], current.directory / names[1]


def _evaluate(current: Run) -> None:
    section = current.recipe.evaluate
    quality = evaluate_both(
        current.recipe.model,
        current.directory / CHECKPOINT,
        section.sources,
        samples=section.samples,
        sequence_length=section.sequence_length,
        device=current.recipe.device,
    )
    quality.save(current.directory / QUALITY_NAME)


def _validate(current: Run) -> None:
    section, directory = current.recipe.validate_, current.directory
    parity = validate(
        directory / PRUNED_ARTIFACT,
        reference=directory / CHECKPOINT,
        engine=None if current.recipe.build.backend is None else directory / ENGINES["pruned"],
        prompt_length=section.prompt_length,
        decode_steps=section.decode_steps,
        batch_size=section.batch_size,
        seed=section.seed,
        device=current.recipe.device,
    )
    parity.save(directory / PARITY_NAME)


def _bench(current: Run) -> None:
    section, directory = current.recipe.bench, current.directory
    dense, pruned = _benched(current)
    latency = bench(
        pruned,
        baseline=dense,
        batch_sizes=section.batch_sizes,
        prompt_lengths=section.prompt_lengths,
        repeats=section.repeats,
        budget_s=section.budget_s,
        threads=section.threads,
        device=current.recipe.device,
    )
    latency.save(directory / LATENCY_NAME)


def _align(current: Run) -> None:
    """What alignment costs and gains."""
    recipe, path = current.recipe, current.directory / ALIGNMENT_NAME
    found = compare_alignment(
        recipe.model,
        current.directory / PRUNED_ARTIFACT,
        Evidence.load(current.directory / CALIBRATION_FOLDER),
        _prune_options(current),
        sources=recipe.evaluate.sources,
        samples=recipe.evaluate.samples,
        sequence_length=recipe.evaluate.sequence_length,
        batch_sizes=recipe.bench.batch_sizes,
        prompt_lengths=recipe.bench.prompt_lengths,
        repeats=recipe.bench.repeats,
        budget_s=recipe.bench.budget_s,
        threads=recipe.bench.threads,
        device=recipe.device,
        dtype=recipe.calibrate.dtype,
        progress=current.progress,
    )
    found.save(path)


def _dump(section: str, *more: str) -> Callable[[Recipe], Any]:
    """The options of a stage: one section of the recipe, and further keys of its top level."""

    def options(recipe: Recipe) -> Mapping[str, Any]:
        values = recipe.model_dump(mode="json", by_alias=True)
        return {key: values[key] for key in (section, *more)}

    return options


def _builds_engines(recipe: Recipe) -> bool:
    return recipe.build.backend is not None


def _calibration_options(recipe: Recipe) -> Any:
    """What evidence depends on: not the ratio, unless the method prunes while it calibrates."""
    return {**_dump("calibrate", "device")(recipe), "method": evidence_options(recipe.prune).model_dump(mode="json")}


STAGES: Final = (
    Stage("calibrate", ("model", "calibration text"), (CALIBRATION_FOLDER,), _calibration_options, _calibrate),
    Stage(
        "search",
        ("model", "calibrate"),
        (SEARCH,),
        _dump("search", "prune", "calibrate", "device"),
        _search,
        lambda recipe: recipe.search is not None,
    ),
    Stage("prune", ("model", "calibrate", "search"), (CHECKPOINT, PLAN_NAME), _dump("prune", "device"), _prune),
    Stage("export-dense", ("model",), (DENSE_ARTIFACT,), _dump("export"), _export_dense),
    Stage("export", ("prune",), (PRUNED_ARTIFACT,), _dump("export"), _export_pruned),
    Stage(
        "build-dense",
        ("export-dense",),
        (ENGINES["dense"],),
        _dump("build"),
        partial(_build, "dense", DENSE_ARTIFACT),
        _builds_engines,
    ),
    Stage(
        "build",
        ("export",),
        (ENGINES["pruned"],),
        _dump("build"),
        partial(_build, "pruned", PRUNED_ARTIFACT),
        _builds_engines,
    ),
    Stage(
        "evaluate",
        ("model", "prune", "evaluation texts"),
        (QUALITY_NAME,),
        _dump("evaluate", "device"),
        _evaluate,
        lambda recipe: bool(recipe.evaluate.sources),
    ),
    Stage("validate", ("prune", "export", "build"), (PARITY_NAME,), _dump("validate", "device"), _validate),
    Stage(
        "bench",
        ("export-dense", "export", "build-dense", "build"),
        (LATENCY_NAME,),
        _dump("bench", "device"),
        _bench,
    ),
    Stage(
        "align",
        ("model", "calibrate", "search", "export", "evaluation texts"),
        (ALIGNMENT_NAME,),
        _dump("prune", "evaluate", "bench", "device"),
        _align,
        lambda recipe: recipe.prune.align_channels > 1,
    ),
)
"""In the order they run; the report is made afresh every time."""


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
