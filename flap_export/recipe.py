"""Recipes: one YAML file that says everything a run does. Typed, validated, and helpful about typing mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from flap_export.allocation.rates import Rates
from flap_export.building.flavours import Flavour
from flap_export.errors import InputError, RecipeError
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import CalibrationText
from flap_export.precision import DtypeName
from flap_export.searching import SearchOptions
from flap_export.storage import Seed


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, PyYAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            ConstructorError: a key stands twice; it names both lines.
        """
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key.value}' stands twice, in lines {seen[key.value]} and {line}; leave out one"
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep)


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SearchSection(SearchOptions):
    """Stage `search`: rates per layer for the ratio of `prune`; left out where the recipe has no such section."""

    seeds: tuple[Seed, ...] = (0,)
    """One run from each; the best of all is taken."""
    baselines: bool = False
    """Run random and conventional search beside it."""
    workers: str = "local"
    """Where candidates are evaluated: `local`, `ray` or `ray:N`."""

    @property
    def options(self) -> SearchOptions:
        """How to search."""
        return SearchOptions.model_validate(self.model_dump(include=set(SearchOptions.model_fields)))


class ExportSection(Section):
    """Stage `export`, done alike for the dense and the pruned model."""

    dtype: DtypeName = "float32"
    max_length: int | None = Field(default=None, gt=1)
    """Rows of the cache; None is 2048, or all of a shorter model's positions."""


class BuildSection(Section):
    """Stage `build`, done alike for the dense and the pruned model; left out without a backend."""

    backend: Flavour | None = None
    targets: tuple[str, ...] = ()
    """Compute capabilities such as sm80; empty is the GPU at hand."""
    logits: Literal["last", "all", "both"] = "last"
    batch_size: int = Field(default=1, gt=0)
    max_batch: int = Field(default=4, gt=0)
    prompt_length: int | None = Field(default=None, gt=0)
    """Usual tokens of a prefill; None is 128, or less where `max_prompt` is."""
    max_prompt: int | None = Field(default=None, gt=0)
    """Most tokens of one prefill; None is the cache's length."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    weight_stripped: bool = False
    limit_keys: bool = False
    tf32: bool = False
    timing_cache: str | None = None


class ValidateSection(Section):
    """Stage `validate`."""

    prompt_length: int | None = Field(default=None, gt=1)
    """Tokens of the longest random prompt; None is 64, or less where the cache is short."""
    decode_steps: int = Field(default=32, gt=0)
    batch_size: int = Field(default=4, gt=0)
    seed: Seed = 0


class BenchSection(Section):
    """Stage `bench`."""

    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (128,)
    repeats: int = Field(default=15, gt=2)
    budget_s: float = Field(default=60.0, gt=0)
    """Seconds for all rounds together."""
    threads: int | None = Field(default=None, gt=0)


class EvaluateSection(Section):
    """Stage `evaluate`: perplexity, dense beside pruned."""

    sources: tuple[str, ...] = ()
    samples: int | None = Field(default=None, gt=0)
    sequence_length: int | None = Field(default=None, gt=1)


class GatesSection(Section):
    """What must hold for the run to succeed, besides parity, which always must."""

    # Infinity could not be breached.
    model_config = ConfigDict(allow_inf_nan=False)

    maximum_perplexity_ratio: float | None = Field(default=None, gt=1)
    """Pruned over dense perplexity, on any source."""
    minimum_decode_speedup: float | None = Field(default=None, gt=0)
    minimum_prefill_speedup: float | None = Field(default=None, gt=0)


class Recipe(Section):
    """Everything `flap-export run` does.

    Paths of the model, of texts and of rates are looked up beside the recipe first, then from the working directory; a
    model may also be a hub name.
    `prune.rates` may name a file, whose rates then stand in its place, or list them.
    """

    model: str
    device: Literal["cpu", "cuda"] = "cpu"
    calibrate: CalibrationText
    prune: PruneOptions
    search: SearchSection | None = None
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()
    build: BuildSection = BuildSection()
    validate_: ValidateSection = Field(default=ValidateSection(), alias="validate")
    bench: BenchSection = BenchSection()
    gates: GatesSection = GatesSection()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `KEY=VALUE` overrides with dotted keys and YAML values.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (the nearest known one is named), a wrong value, or a file
            of rates that cannot be used.
    """
    file = Path(path)
    values = _read_yaml(file)
    for override in overrides:
        _apply_override(values, override)
    return recipe_from(_with_rates(_with_paths(values, file.parent), str(file)), where=str(file))


def recipe_from(values: Mapping[str, Any], *, where: str = "the recipe") -> Recipe:
    """Validate the values of a recipe.

    Raises:
        RecipeError: an unknown key or a wrong value.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(_explained(problem, where) for problem in error.errors())) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = _yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe at '{file}'") from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError, RecursionError) as error:
        raise RecipeError(f"'{file}' is not a YAML file: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"'{file}' must hold keys and values, such as `model: ...`; found {type(values).__name__}")
    return values


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # _Loader is a SafeLoader.


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"an override reads KEY=VALUE, such as prune.ratio=0.3; got '{override}'")
    *parents, leaf = key.strip().split(".")
    section: Any = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"the override '{override}' needs a section '{parent}', which is a plain value")
    try:
        section[leaf] = _yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"the value of the override '{override}' is not YAML: {error}") from error


def _with_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Model and text sources that exist beside the recipe become paths from the working directory."""

    def located(name: Any) -> Any:
        return str(folder / name) if isinstance(name, str) and (folder / name).exists() else name

    resolved = {**values, "model": located(values.get("model"))} if "model" in values else dict(values)
    if isinstance(calibrate := resolved.get("calibrate"), dict) and "source" in calibrate:
        resolved["calibrate"] = {**calibrate, "source": located(calibrate["source"])}
    if isinstance(prune := resolved.get("prune"), dict) and "rates" in prune:
        resolved["prune"] = {**prune, "rates": located(prune["rates"])}
    evaluate = resolved.get("evaluate")
    if isinstance(evaluate, dict) and isinstance(evaluate.get("sources"), list):
        resolved["evaluate"] = {**evaluate, "sources": [located(source) for source in evaluate["sources"]]}
    return resolved


def _with_rates(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The rates themselves in place of the file that holds them: what a stage depends on."""
    prune = values.get("prune")
    if not isinstance(prune, dict) or not isinstance(prune.get("rates"), str):
        return values
    try:
        rates = Rates.read(Path(prune["rates"]))
    except InputError as error:
        raise RecipeError(f"{where}: 'prune.rates': {error}") from error
    return {**values, "prune": {**prune, "rates": rates.layers}}


def _explained(problem: Any, where: str) -> str:
    """One validation problem in our words; an unknown key names the nearest known one."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0)
        return f"{where}: unknown key '{key}'; did you mean '{'.'.join([*location[:-1], *nearest])}'?"
    if problem["type"] == "missing":
        return f"{where}: the key '{key}' is missing"
    return f"{where}: '{key}' is {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _known_keys(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        field = next((field for name, field in section.model_fields.items() if part in (name, field.alias)), None)
        sections = [kind for kind in _kinds(field) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return []
        section = sections[0]
    return [field.alias or name for name, field in section.model_fields.items()]


def _kinds(field: FieldInfo | None) -> tuple[Any, ...]:
    """What a field may hold: its type, or those of a union."""
    if field is None:
        return ()
    return get_args(field.annotation) or (field.annotation,)
