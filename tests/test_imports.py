"""The shape of the package: imports run one way, and nothing heavy comes in before it is needed."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import flap_export

ROOT = Path(flap_export.__file__).parent

# From earlier to later: a module imports from what stands above it only.
STAGES = (
    "errors",
    "cgroups",
    "devices",
    "precision",
    "storage",
    "progress",
    "shapes",
    "families",
    "plan",
    "manifest",
    "artifact",
    "text",
    "models",
    "calibration",
    "scoring",
    "allocation",
    "rewriting",
    "evidence",
    "pruning",
    "exporting",
    "building",
    "runners",
    "generation",
    "evaluation",
    "comparison",
    "validation",
    "ideal",
    "prediction",
    "searching",
    "benchmarking",
    "recipe",
    "reporting",
    "pipeline",
    "cli",
    "__main__",
)
# The same inside packages that hold more than one step.
WITHIN = {
    "text": ("sources", "tokenization", "windows"),
    "families": ("rope", "family", "sparsity", "configuration", "table"),
    "models": (
        "weights", "modeling_pruned", "opening", "alibi", "rebinding", "double_precision", "loading", "own_attention",
        "attention", "fewer_kernels",
    ),
    "calibration": ("products", "moments", "statistics", "reference", "layerwise", "stage"),
    "allocation": ("ladders", "budgets", "ratios", "reference", "stage", "rates"),
    "rewriting": ("compensation", "cutting", "restoring", "checkpoint", "stock"),
    "evidence": ("methods", "elimination", "sensitivity", "measuring", "coupled", "record", "stage"),
    "pruning": ("choosing", "stage"),
    "pipeline": ("resuming", "stages", "checking", "running"),
}  # fmt: skip
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "datasets",
    "openai",
    "ray",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"}


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules of this package that `path` imports anywhere, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("flap_export.") for alias in node.names if "flap_export." in alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            module = node.module or ""
            if module.partition(".")[0] == "flap_export":
                package = module.removeprefix("flap_export").removeprefix(".")
                for alias in node.names:
                    below = f"{package}.{alias.name}".removeprefix(".")
                    yield below if below in MODULES else package


GRAPH = {name: {module for module in imported(name, path) if module} for name, path in MODULES.items()}


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted({name.partition(".")[0] for name in MODULES}) == sorted(STAGES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_from_later_stages_to_earlier_ones(name: str) -> None:
    stage = name.partition(".")[0]
    for other in GRAPH[name]:
        earlier = other.partition(".")[0]
        assert STAGES.index(earlier) <= STAGES.index(stage), f"{name} imports {other}, a later stage"


@pytest.mark.parametrize("package", WITHIN)
def test_imports_inside_a_package_go_one_way_too(package: str) -> None:
    order = [f"{package}.{name}" for name in WITHIN[package]]
    assert sorted(order) == sorted(name for name in MODULES if name.startswith(f"{package}."))
    for index, name in enumerate(order):
        later = GRAPH[name] & set(order[index:])
        assert not later, f"{name} imports {', '.join(sorted(later))}, later modules of {package}"


def test_no_module_imports_itself_through_others() -> None:
    """Within a package too; a package's `__init__` only hands out what its modules make."""
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    inner = {
        name: {other for other in others if other not in packages or not name.startswith(f"{other}.")}
        for name, others in GRAPH.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(inner).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"modules import in a circle: {' <- '.join(error.args[1])}")


def test_the_carried_modelling_file_imports_nothing_of_ours() -> None:
    assert GRAPH["models.modeling_pruned"] == set()


def test_the_pure_part_imports_no_input_or_output() -> None:
    """Moments, scores, allocation, compensation and budget arithmetic: no files, no logging, no models."""
    pure = (
        "shapes",
        "calibration.moments",
        "scoring",
        "allocation.ladders",
        "allocation.budgets",
        "allocation.ratios",
        "allocation.stage",
        "rewriting.compensation",
        "evidence.elimination",
        "validation.errormetrics",
        "ideal",
        "prediction",
    )
    for name in pure:
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        modules = {
            module.partition(".")[0]
            for node in ast.walk(tree)
            for module in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert modules.isdisjoint({"logging", "pathlib", "os", "safetensors", "transformers", "subprocess"}), name
        assert GRAPH[name].isdisjoint(
            {"models.loading", "models.weights", "calibration.layerwise", "calibration.stage"}
        ), name


def heavy_modules_after(code: str) -> list[str]:
    script = f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(answer.stdout.splitlines()[-1])
    return found


HELP = """
import contextlib, io, sys
from flap_export.cli import main
sys.argv = ["flap-export", {arguments}]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main()
assert "{expected}" in out.getvalue(), out.getvalue()
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import flap_export; flap_export.__version__; dir(flap_export)", id="import"),
        pytest.param(HELP.format(arguments='"--help"', expected="prune"), id="help"),
        pytest.param(HELP.format(arguments='"--version"', expected=flap_export.__version__), id="version"),
        pytest.param("import flap_export.building, flap_export.runners", id="engines and runners"),
        pytest.param(
            "import flap_export.errors, flap_export.storage, flap_export.plan, flap_export.text.windows", id="records"
        ),
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert heavy_modules_after(code) == []


def test_every_stage_imports_on_its_own() -> None:
    """Each in a fresh copy of a process that holds no module of this package, so that order hides nothing."""
    script = """
import importlib, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
# What the modules import from elsewhere stays, so that the copies are quick.
for loaded in [name for name in sys.modules if name.partition(".")[0] == "flap_export"]:
    del sys.modules[loaded]
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    names = [f"flap_export.{name}" for name in STAGES if name != "__main__"]
    answer = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True)
    assert answer.stdout == ""


@pytest.mark.parametrize("name", flap_export.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(flap_export, name)
    assert value is not None
    assert name in dir(flap_export)
    if name != "__version__":
        assert value.__module__.startswith("flap_export.")


def test_what_public_functions_take_and_return_is_public() -> None:
    functions = [value for name in flap_export.__all__ if inspect.isfunction(value := getattr(flap_export, name))]
    hints = [hint for function in functions for hint in typing.get_type_hints(function).values()]
    kinds = [kind for hint in hints for kind in (hint, *typing.get_args(hint)) if inspect.isclass(kind)]
    ours = {kind.__name__ for kind in kinds if kind.__module__.startswith("flap_export.")}
    assert {"PruneOptions", "PruningPlan"} <= ours
    of_stages = {"Evidence"}  # gathered by one stage for the next, never by a caller
    assert ours - of_stages <= set(flap_export.__all__)


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'flap_export' has no attribute 'purne'"):
        flap_export.purne  # noqa: B018
    assert importlib.import_module("flap_export.pruning.stage").prune is flap_export.prune


def test_the_public_names_are_sorted_and_typed() -> None:
    """`__all__`, the lazy table and the names type checkers see are the same."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: (node.module or "").removeprefix("flap_export.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flap_export.")
        for alias in node.names
    }
    assert sorted(seen) == sorted(set(flap_export.__all__) - {"__version__"})
    assert seen == flap_export._MODULES
