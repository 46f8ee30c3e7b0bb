"""What can be known of a recipe before anything is computed: said at once, and not after hours of pruning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flap_export.benchmarking import planned_workloads
from flap_export.building.profiles import profiles_of
from flap_export.building.stage import check_build
from flap_export.devices import check_device, check_threads
from flap_export.errors import InputError, RecipeError, TextError
from flap_export.evaluation import read_texts
from flap_export.exporting import cache_length
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.pipeline.stages import build_options, builds_engines
from flap_export.recipe import Recipe
from flap_export.runners.onnxruntime_runner import check_runs
from flap_export.validation.cases import build_cases


def check_recipe(recipe: Recipe) -> None:
    """Whether the stages of a recipe can do what it asks of them, on this model and this machine.

    Raises:
        InputError: the model or a text cannot be used.
        RecipeError: a gate that nothing measures, a section that asks for more than the caches hold, or targets that
            do not exist.
        MissingRequirementError: a package or device is not there.
    """
    _check_gates(recipe)
    dense = open_checkpoint(recipe.model)
    _check_lengths(recipe, dense)
    _check_machine(recipe)
    with _of_section("evaluate"):
        read_texts(
            recipe.evaluate.sources,
            dense.directory,
            dense.shape.vocabulary_size,
            dense.longest_sequence,
            sequence_length=recipe.evaluate.sequence_length,
            samples=recipe.evaluate.samples,
            with_bos=dense.family.needs_bos,
        )


def _check_gates(recipe: Recipe) -> None:
    """Whether what every gate holds is measured; one that cannot be breached says nothing."""
    gates, bench = recipe.gates, recipe.bench
    rules = (
        ("maximum_perplexity_ratio", recipe.evaluate.sources, "evaluate.sources"),
        ("minimum_prefill_speedup", bench.batch_sizes and bench.prompt_lengths, "bench.prompt_lengths"),
        ("minimum_decode_speedup", bench.batch_sizes, "bench.batch_sizes"),
    )
    for gate, measured, key in rules:
        if getattr(gates, gate) is not None and not measured:
            raise RecipeError(f"gates.{gate} needs {key}, which name nothing; name some, or leave the gate out")


def _check_lengths(recipe: Recipe, dense: Checkpoint) -> None:
    """Whether what later stages put into the caches fits them."""
    with _of_section("export"):
        max_length = cache_length(dense, recipe.export.max_length)
    with _of_section("build"):
        if builds_engines(recipe):
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


def _check_machine(recipe: Recipe) -> None:
    """Whether what the recipe exports can be built, run and measured here."""
    check_device(recipe.device)
    with _of_section("build"):
        if recipe.build.backend is not None:
            check_build(recipe.build.backend, recipe.build.targets, build_options(recipe.build))
    # Engines on a GPU are validated and measured without ONNX Runtime.
    if not (builds_engines(recipe) and recipe.device == "cuda"):
        check_runs(recipe.device, recipe.export.dtype)
    with _of_section("bench"):
        check_threads(recipe.bench.threads)


@contextmanager
def _of_section(name: str) -> Iterator[None]:
    """Whatever is wrong within is a section's of the recipe."""
    try:
        yield
    except InputError as error:
        kind = TextError if isinstance(error, TextError) else RecipeError
        raise kind(f"section '{name}' of the recipe: {error}") from error
