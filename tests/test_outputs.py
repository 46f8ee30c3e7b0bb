"""Every stage replaces what is of its own kind and touches nothing else: all kinds of directories x all stages."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest
from tiny import save_tokens, tiny_checkpoint, tokens_of

from flap_export.allocation.rates import RATES_NAME
from flap_export.artifact import ARTIFACT_NAME
from flap_export.building import build
from flap_export.building.record import ENGINE_NAME
from flap_export.comparison import COMPARISON_NAME, compare
from flap_export.errors import FlapExportError, OutputError
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import EVIDENCE_NAME, CalibrationText
from flap_export.exporting import export
from flap_export.pipeline import running
from flap_export.pipeline.resuming import RUN_NAME
from flap_export.plan import PLAN_NAME
from flap_export.pruning.stage import prune
from flap_export.recipe import recipe_from
from flap_export.reporting import REPORT_NAME
from flap_export.searching import search
from flap_export.searching.record import REQUEST_NAME, SEARCH_NAME
from flap_export.storage import MANIFEST_NAME, check_output

# What each kind of directory holds, apart from what tells nothing.
KINDS: Final[dict[str, tuple[str, ...]]] = {
    "checkpoint": (PLAN_NAME, EVIDENCE_NAME, "config.json", MANIFEST_NAME),
    "artifact": (PLAN_NAME, ARTIFACT_NAME, MANIFEST_NAME),
    "engines": (PLAN_NAME, ENGINE_NAME, MANIFEST_NAME),
    "search": (PLAN_NAME, REQUEST_NAME, SEARCH_NAME, RATES_NAME, MANIFEST_NAME),
    "begun search": (REQUEST_NAME,),
    "run": (PLAN_NAME, RUN_NAME, REPORT_NAME, MANIFEST_NAME),
    "comparison": (COMPARISON_NAME,),
    "evidence": (EVIDENCE_NAME, MANIFEST_NAME),
    "plan alone": (PLAN_NAME,),
    "dense model": ("config.json", "model.safetensors"),
    "artifact in a checkpoint": (PLAN_NAME, EVIDENCE_NAME, "config.json", ARTIFACT_NAME),
    "run in a checkpoint": (PLAN_NAME, "config.json", RUN_NAME),
}
# Which kinds take part in a stage's own work, by the marker that the stage names.
MARKERS: Final[dict[str, tuple[str, set[str]]]] = {
    "prune": (PLAN_NAME, {"checkpoint"}),
    "export": (ARTIFACT_NAME, {"artifact", "artifact in a checkpoint"}),
    "build": (ENGINE_NAME, {"engines"}),
    "search": (REQUEST_NAME, {"search", "begun search"}),
    "run": (RUN_NAME, {"run", "run in a checkpoint"}),
    "compare": (COMPARISON_NAME, {"comparison"}),
    "calibrate": (EVIDENCE_NAME, {"evidence"}),
}


def made(kind: str, directory: Path) -> Path:
    directory.mkdir()
    for name in KINDS[kind]:
        (directory / name).write_text(f"{kind}: {name}")
    return directory


@pytest.mark.parametrize("stage", MARKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_takes_its_own_kind_only(kind: str, stage: str, tmp_path: Path) -> None:
    marker, own = MARKERS[stage]
    output = made(kind, tmp_path / "out")
    if kind in own:
        check_output(output, marker)
        return
    with pytest.raises(OutputError, match=r"holds something else \(.* in it\), and nothing was touched"):
        check_output(output, marker)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], Any]]:
    """Every stage with an output, up to where it looks at that."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_checkpoint("llama", folder / "model")
    text = save_tokens(folder / "text.npy", tokens_of(4, 12, seed=1))
    artifact = folder / "artifact"
    export(model, artifact, max_length=16)
    calibration = CalibrationText(source=text)
    recipe = recipe_from(
        {
            "model": str(model),
            "calibrate": {"source": text},
            "prune": {"ratio": 0.3},
            "export": {"max_length": 48},
            "validate": {"decode_steps": 4, "prompt_length": 12},
            "bench": {"prompt_lengths": [8]},
        }
    )
    return {
        "prune": lambda output: prune(model, output, ratio=0.3, calibration=text),
        "export": lambda output: export(model, output, max_length=16),
        "build": lambda output: build(artifact, output, backend="tensorrt-rtx", targets=("sm80",)),
        "search": lambda output: search(model, output, calibration=calibration, prune=PruneOptions(ratio=0.3)),
        "run": lambda output: running.run(recipe, output),
        "compare": lambda output: compare(
            model, output, variants=["flap"], ratios=[0.3], calibration=calibration, sources=[text], plot=False
        ),
    }


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        (kind, stage)
        for kind, stage in product(KINDS, MARKERS)
        if stage != "calibrate" and kind not in MARKERS[stage][1]
    ],
)
def test_no_stage_touches_what_is_not_its_own(
    kind: str, stage: str, stages: dict[str, Callable[[Path], Any]], tmp_path: Path
) -> None:
    output = made(kind, tmp_path / "out")
    before = contents(output)
    with pytest.raises(OutputError, match="holds something else") as caught:
        stages[stage](output)
    assert isinstance(caught.value, FlapExportError)
    assert caught.value.exit_code == 2
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_prune_and_export_replace_their_own(stages: dict[str, Callable[[Path], Any]], tmp_path: Path) -> None:
    for stage in ("prune", "export"):
        for _ in range(2):
            stages[stage](tmp_path / stage)
        assert (tmp_path / stage / MANIFEST_NAME).is_file()
