"""The stages of a run, as data: what each needs, writes and depends on, and what it does with a recipe."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from flap_export.allocation.rates import RATES_NAME, Rates
from flap_export.benchmarking import LATENCY_NAME, bench
from flap_export.benchmarking.alignment import ALIGNMENT_NAME, compare_alignment
from flap_export.building import BuildOptions, build
from flap_export.errors import DamagedSearchError, OtherSearchError
from flap_export.evaluation import QUALITY_NAME, evaluate_both
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import Evidence
from flap_export.evidence.stage import evidence_options, gather
from flap_export.exporting import export
from flap_export.pipeline.resuming import Run, Stage, set_aside
from flap_export.plan import PLAN_NAME
from flap_export.pruning.stage import prune_with
from flap_export.recipe import BuildSection, Recipe
from flap_export.reporting.engines import ENGINES
from flap_export.reporting.records import CHECKPOINT, DENSE_ARTIFACT, PRUNED_ARTIFACT, SEARCH
from flap_export.searching import search
from flap_export.validation import PARITY_NAME, validate

logger = logging.getLogger(__name__)

CALIBRATION_FOLDER: Final = "calibration"


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
    except DamagedSearchError as error:
        # What a search has found is dear, and a person may mend it.
        found, aside = str(error).partition("; ")[0], set_aside(folder)
        logger.warning("stage search is begun anew, and the search that was there is now '%s': %s", aside, found)
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
        asked=recipe.prune.ratio,
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
        options=build_options(section),
    )


def build_options(section: BuildSection) -> BuildOptions:
    """How engines are built, as a recipe says it."""
    return BuildOptions(
        optimization_level=section.optimization_level,
        weight_stripped=section.weight_stripped,
        limit_keys=section.limit_keys,
        tf32=section.tf32,
        timing_cache=None if section.timing_cache is None else Path(section.timing_cache),
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
        progress=current.progress,
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


def builds_engines(recipe: Recipe) -> bool:
    """Whether the recipe asks for TensorRT engines."""
    return recipe.build.backend is not None


def _calibration_options(recipe: Recipe) -> Any:
    """What evidence depends on: not the ratio, unless the method prunes while it calibrates."""
    return {**_dump("calibrate", "device")(recipe), "method": evidence_options(recipe.prune).model_dump(mode="json")}


STAGES: Final = (
    Stage(
        "calibrate",
        ("model", "tokenizer", "calibration text"),
        (CALIBRATION_FOLDER,),
        _calibration_options,
        _calibrate,
    ),
    Stage(
        "search",
        ("model", "tokenizer", "calibrate"),
        (SEARCH,),
        _dump("search", "prune", "calibrate", "device"),
        _search,
        lambda recipe: recipe.search is not None,
    ),
    Stage(
        "prune",
        ("model", "companions", "calibrate", "search"),
        (CHECKPOINT, PLAN_NAME),
        _dump("prune", "device"),
        _prune,
    ),
    Stage("export-dense", ("model", "companions"), (DENSE_ARTIFACT,), _dump("export"), _export_dense),
    Stage("export", ("prune",), (PRUNED_ARTIFACT,), _dump("export"), _export_pruned),
    Stage(
        "build-dense",
        ("export-dense",),
        (ENGINES["dense"],),
        _dump("build"),
        partial(_build, "dense", DENSE_ARTIFACT),
        builds_engines,
    ),
    Stage(
        "build",
        ("export",),
        (ENGINES["pruned"],),
        _dump("build"),
        partial(_build, "pruned", PRUNED_ARTIFACT),
        builds_engines,
    ),
    Stage(
        "evaluate",
        ("model", "tokenizer", "prune", "evaluation texts"),
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
        ("model", "tokenizer", "calibrate", "search", "export", "evaluation texts"),
        (ALIGNMENT_NAME,),
        _dump("prune", "evaluate", "bench", "device"),
        _align,
        lambda recipe: recipe.prune.align_channels > 1,
    ),
)
"""In the order they run; the report is made afresh every time."""
