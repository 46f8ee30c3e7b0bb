"""Every run of the official code that is on record, against `--statistics reference`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tokens, tiny_checkpoint, tokens_of

from flap_export.calibration.reference import ReferenceMoments
from flap_export.calibration.stage import calibrate
from flap_export.calibration.statistics import CalibrationStatistics
from flap_export.errors import BudgetError
from flap_export.evaluation import evaluate
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import Evidence
from flap_export.models.opening import open_checkpoint
from flap_export.models.weights import Weights
from flap_export.pruning.choosing import make_plan
from flap_export.pruning.stage import prune, prune_with

DATA = Path(__file__).parent / "flap_reference"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())


def named(run: dict[str, Any]) -> str:
    return f"{run['metric']}-{run['structure']}-{run['ratio']}"


@pytest.fixture(scope="module")
def statistics() -> CalibrationStatistics:
    return calibrate(DATA / "model", str(DATA / "calibration_tokens.npy"), statistics="reference")


def options(run: dict[str, Any]) -> PruneOptions:
    return PruneOptions(
        ratio=run["ratio"],
        metric=run["metric"].lower(),
        structure=run["structure"].lower(),
        remove_heads=run["remove_heads"],
    )


def test_there_are_24_runs() -> None:
    assert len({named(run) for run in EXPECTED["runs"]}) == 24


@pytest.mark.parametrize("run", EXPECTED["runs"], ids=named)
def test_the_same_units_are_kept(run: dict[str, Any], statistics: CalibrationStatistics) -> None:
    plan = make_plan(open_checkpoint(DATA / "model"), Evidence.of(statistics), options(run))
    assert [list(layer.kv_heads) for layer in plan.layers] == run["kept_heads"]
    assert [list(layer.query_heads) for layer in plan.layers] == run["kept_heads"]
    assert [list(layer.ffn_channels) for layer in plan.layers] == run["kept_channels"]


@pytest.mark.parametrize("run", EXPECTED["runs"], ids=named)
def test_the_same_perplexity_is_reached(run: dict[str, Any], statistics: CalibrationStatistics, tmp_path: Path) -> None:
    prune_with(DATA / "model", tmp_path / "pruned", Evidence.of(statistics), options(run))
    np.save(tmp_path / "windows.npy", np.load(DATA / "evaluation_tokens.npy").reshape(-1, 128))
    quality = evaluate(tmp_path / "pruned", [str(tmp_path / "windows.npy")], batch_size=64)
    assert math.isclose(quality.sources[0].perplexity, run["perplexity"], rel_tol=1e-3)


def test_the_same_biases_compensate(statistics: CalibrationStatistics, tmp_path: Path) -> None:
    expected = load_file(DATA / "expected_bias.safetensors")
    for run in [run for run in EXPECTED["runs"] if run["structure"] == "AL-AM"]:
        prune_with(DATA / "model", tmp_path / named(run), Evidence.of(statistics), options(run))
        weights, prefix = Weights(tmp_path / named(run)), f"{run['metric']}_AL-AM_{run['ratio']}/"
        biases = {name.removeprefix(prefix): bias for name, bias in expected.items() if name.startswith(prefix)}
        assert biases
        for name, bias in biases.items():
            found = weights[name] if name in weights else torch.zeros_like(bias)
            torch.testing.assert_close(found, bias.float(), rtol=1e-4, atol=1e-6)


def test_the_running_mean_is_the_mean_and_the_first_fluctuation_is_dropped() -> None:
    sequences = torch.randn(3, 5, 4)
    running = ReferenceMoments(4)
    running.update(sequences[:1])
    assert running.fluctuation.tolist() == [0.0] * 4
    running.update(sequences[1:])
    torch.testing.assert_close(running.mean, sequences.mean(dim=(0, 1)))
    torch.testing.assert_close(running.square_norm, sequences.square().sum(dim=1).mean(dim=0))


def test_grouped_queries_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(4, 9))
    gathered = calibrate(path, source, statistics="reference")
    with pytest.raises(BudgetError, match="no grouped queries"):
        prune_with(path, tmp_path / "out", Evidence.of(gathered), PruneOptions(ratio=0.2))
    steps: list[str] = []
    with pytest.raises(BudgetError, match="no grouped queries"):
        prune(
            path,
            tmp_path / "out",
            ratio=0.2,
            calibration=source,
            statistics="reference",
            progress=lambda what, *_: steps.append(what),
        )
    assert not steps, "calibrated first"
