"""The stage as users call it: from a model directory to a checkpoint, and what stops it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_FAMILIES, is_routing, save_tokens, tiny_checkpoint, tiny_pruned, tiny_statistics, tokens_of

from flap_export.calibration.statistics import CalibrationStatistics
from flap_export.errors import BudgetError, InputError, ModelError, OutputError
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import Evidence
from flap_export.exporting import export
from flap_export.manifest import verify
from flap_export.models.loading import check_weights, load_model, meta_model
from flap_export.models.opening import open_checkpoint
from flap_export.plan import PruningPlan
from flap_export.pruning.stage import prune, prune_with


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_from_model_to_checkpoint(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(family, tmp_path / "dense", dtype=torch.bfloat16)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(4, 9))
    plan = prune(dense, tmp_path / "pruned", ratio=0.3, calibration=source)
    pruned = open_checkpoint(tmp_path / "pruned")
    check_weights(meta_model(pruned, torch.float32), pruned)
    before = open_checkpoint(dense).shape.decoder_parameters
    assert 1 - pruned.shape.decoder_parameters / before == pytest.approx(plan.ratio.achieved)
    assert plan.ratio.achieved == pytest.approx(0.3, abs=0.01)
    assert PruningPlan.load(tmp_path / "pruned" / "plan.json") == plan
    assert plan.method["calibration"] == source
    assert set(plan.digests) == {"weights", "calibration"}
    stored = open_checkpoint(dense).weights
    for name in pruned.weights:
        # Transformers saves some routers in single precision, and so they stay.
        expected = stored[name].dtype if is_routing(name) else torch.bfloat16
        assert pruned.weights[name].dtype == expected, name
    statistics = CalibrationStatistics.load(tmp_path / "pruned" / "statistics.safetensors")
    assert statistics.digests == plan.digests
    verify(tmp_path / "pruned")
    with torch.no_grad():
        assert load_model(tmp_path / "pruned", dtype=torch.float32)(tokens_of(1, 4)).logits.isfinite().all()


NORMED_TOGETHER = [family for family in ("flex_olmo", "olmo2", "olmo3", "olmoe") if family in ALL_FAMILIES]


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.2},
        {"ratio": 0.6, "head_units": "queries"},
        {"ratio": 0.3, "structure": "ul-um"},
        {"ratio": 0.5, "method": "obs"},
        {"ratio": 0.3, "method": "magnitude"},
        {"rates": [0.9, 0.1, 0.3, 0.0]},
    ],
    ids=lambda options: "-".join(map(str, options.values())).replace(" ", ""),
)
@pytest.mark.parametrize("family", NORMED_TOGETHER)
def test_ratios_of_heads_normed_together_are_those_of_the_files(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Counted over the matrices of the written checkpoints, whatever the shape says, and met but for half a channel."""
    dense = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=4)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 9))
    if rates := options.get("rates"):
        (tmp_path / "rates.json").write_text(json.dumps(rates))
        options = {"rates": tmp_path / "rates.json"}
    plan = prune(dense, tmp_path / "pruned", calibration=source, **options)
    before, after = (matrices_of_layers(tmp_path / name) for name in ("dense", "pruned"))
    assert plan.ratio.achieved == (before - after) / before
    unit = max(open_checkpoint(dense).shape.ffn_unit_parameters(layer) for layer in open_checkpoint(dense).shape.layers)
    uniform = options.get("structure") == "ul-um" or options.get("method") == "magnitude" or "rates" in options
    assert abs(plan.ratio.achieved - plan.ratio.requested) * before <= unit / 2 * (4 if uniform else 1)
    assert plan.ratio.reason is None or uniform
    pruned = open_checkpoint(tmp_path / "pruned")
    check_weights(meta_model(pruned, torch.float32), pruned)


def matrices_of_layers(path: Path) -> int:
    checkpoint = open_checkpoint(path)
    shapes = {name: checkpoint.weights.shape(name) for name in checkpoint.weights if ".layers." in name}
    return sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and ".mlp.gate." not in name)


def test_saved_statistics_give_the_same_checkpoint(tmp_path: Path) -> None:
    """Weights and plan do not depend on when, where and how often one prunes."""
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(4, 9))
    prune(dense, tmp_path / "a", ratio=0.3, calibration=source)
    prune_with(dense, tmp_path / "b", Evidence.load(tmp_path / "a"), PruneOptions(ratio=0.3))
    for name in ("model.safetensors", "plan.json", "config.json", "modeling_pruned.py"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(("method", "expected"), [("flap", 5), ("random", 5), ("magnitude", None)])
def test_the_plan_states_the_seed_of_what_was_drawn(method: Any, expected: int | None, tmp_path: Path) -> None:
    """Of the sequences that were calibrated on, or of the units that chance chose."""
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(8, 9)) if method == "flap" else None
    samples = 4 if source else None
    plan = prune(dense, tmp_path / "out", ratio=0.3, calibration=source, samples=samples, method=method, seed=5)
    assert plan.method["seed"] == expected


def test_an_older_checkpoint_is_replaced(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    statistics = tiny_statistics(dense, tmp_path)
    for ratio in (0.5, 0.2):
        prune_with(dense, tmp_path / "out", Evidence.of(statistics), PruneOptions(ratio=ratio))
    assert PruningPlan.load(tmp_path / "out" / "plan.json").ratio.requested == 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.npy", "dense", "out"]


@pytest.mark.parametrize("ratio", [0, 1, -0.2, 20, math.nan])
def test_ratios_are_checked_before_anything_is_read(ratio: float, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"strictly between 0 and 1, got .*; 0\.2 removes 20 %"):
        prune(tmp_path / "no model", tmp_path / "out", ratio=ratio, calibration="no text")


def test_the_output_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(OutputError, match="holds something else"):
        prune(tmp_path / "no model", tmp_path / "photos", ratio=0.2, calibration="no text")


def test_the_dense_model_is_never_the_output(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    before = (dense / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="holds something else"):
        prune_with(dense, dense, Evidence.of(tiny_statistics(dense, tmp_path)), PruneOptions(ratio=0.2))
    assert (dense / "model.safetensors").read_bytes() == before


def test_statistics_of_other_weights_are_refused(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    other = tiny_checkpoint("llama", tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"gathered is of other weights than .*other.*calibrate again"):
        prune_with(other, tmp_path / "out", Evidence.of(tiny_statistics(dense, tmp_path)), PruneOptions(ratio=0.2))
    assert not (tmp_path / "out").exists()


def test_a_pruned_model_is_not_pruned_again(tmp_path: Path) -> None:
    pruned = tiny_pruned("llama", tmp_path)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(2, 4))
    with pytest.raises(ModelError, match="pruned already"):
        prune(pruned, tmp_path / "out", ratio=0.2, calibration=source)


def test_a_failure_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    statistics = tiny_statistics(dense, tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("flap_export.rewriting.checkpoint.save_file", refuse)
    with pytest.raises(OutputError, match="the disk is full"):
        prune_with(dense, tmp_path / "out", Evidence.of(statistics), PruneOptions(ratio=0.2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.npy", "dense"]


@pytest.mark.parametrize(
    "option", ["method", "metric", "structure", "compensation", "head_units", "statistics", "dtype"]
)
def test_unknown_names_are_refused_with_the_known_ones(option: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(4, 9))
    names: dict[str, Any] = {option: "imaginary"}
    with pytest.raises(InputError, match=rf"{option} must be one of .*, got 'imaginary'"):
        prune(path, tmp_path / "out", ratio=0.3, calibration=source, **names)
    assert not (tmp_path / "out").exists()


def test_exporting_in_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    with pytest.raises(InputError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        export(path, tmp_path / "out", dtype="int8")  # type: ignore[arg-type]
