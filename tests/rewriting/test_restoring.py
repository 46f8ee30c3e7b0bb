"""Restored weights against least squares by hand, on what enters every projection of a model of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from refitting import fitted, inputs_of, kl, log_probabilities, replace, site
from tiny import (
    PLAIN_FAMILIES,
    keep_all_plan,
    layer_plan,
    plain_model,
    plan_of,
    save_tokens,
    tiny_checkpoint,
    tokens_of,
    uneven_plan,
)
from torch import Tensor

from flap_export.calibration.stage import calibrate
from flap_export.calibration.statistics import CUT_SPACES, Site
from flap_export.errors import ModelError
from flap_export.families import FAMILIES
from flap_export.models.loading import load_model
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.plan import PruningPlan
from flap_export.pruning.stage import prune
from flap_export.rewriting.compensation import DEFAULT_RIDGE, RIDGES
from flap_export.rewriting.cutting import kept_channels, rewrite
from flap_export.rewriting.restoring import (
    HELD_OUT_EVERY,
    SiteInputs,
    cut_only,
    fitted_restorer,
    mean_restorer,
    restore,
)

LENGTH = 10
HELD_OUT = HELD_OUT_EVERY - 1


def chosen_fit(
    weight: NDArray[np.float64], inputs: NDArray[np.float64], kept: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The fit to all tokens, with the ridge that is best on every eighth sequence for a fit to the others."""
    sequences = inputs.reshape(-1, LENGTH, inputs.shape[1])
    turns = np.arange(len(sequences)) % HELD_OUT_EVERY
    held, others = (sequences[mask].reshape(-1, inputs.shape[1]) for mask in (turns == HELD_OUT, turns != HELD_OUT))

    def error(ridge: float) -> float:
        new, bias = fitted(weight, others, kept, ridge)
        return float(np.square(held @ (weight - new).T - bias).sum())

    ridge = min(RIDGES, key=error) if len(held) and kept else DEFAULT_RIDGE
    return fitted(weight, inputs, kept, ridge)


def by_hand(path: Path, checkpoint: Checkpoint, plan: PruningPlan, tokens: Tensor, *, sequential: bool) -> Any:
    """The dense model with every pruned projection refitted, in order."""
    model, dense = plain_model(path), plain_model(path)
    for layer in plan.layers:
        for space in CUT_SPACES:
            kept = kept_channels(layer, checkpoint.shape)[space]
            if kept is None:
                continue
            module = site(model, checkpoint.family.model_type, layer.layer, space)
            seen_by = model if sequential else dense
            observed = site(seen_by, checkpoint.family.model_type, layer.layer, space)
            inputs = inputs_of(seen_by, observed, tokens)
            replace(module, *chosen_fit(module.weight.detach().double().numpy(), inputs, kept.tolist()))
    return model


def restored_tensors(
    checkpoint: Checkpoint, plan: PruningPlan, tokens: Tensor, folder: Path, **options: Any
) -> dict[str, Tensor]:
    folder.mkdir()
    return dict(rewrite(checkpoint, plan, fitted_restorer(restore(checkpoint, plan, tokens, folder, **options))))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_restored_weights_are_least_squares_by_hand(family: str, sequential: bool, tmp_path: Path) -> None:
    """Biases that are there are added to; a projection without inputs leaves its mean in the bias."""
    path, tokens = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=4), tokens_of(9, LENGTH)
    checkpoint = open_checkpoint(path)
    plan = uneven_plan(checkpoint)
    found = restored_tensors(checkpoint, plan, tokens, tmp_path / "r", sequential=sequential, chunk_sequences=4)
    model = by_hand(path, checkpoint, plan, tokens, sequential=sequential)
    for layer in plan.layers:
        for space in CUT_SPACES:
            kept = kept_channels(layer, checkpoint.shape)[space]
            name = f"{FAMILIES[family].modules.layers}.{layer.layer}.{FAMILIES[family].restoring(space).path}"
            module = site(model, family, layer.layer, space)
            if kept is None or len(kept):
                expected = module.weight if kept is None else module.weight[:, kept]
                torch.testing.assert_close(found[f"{name}.weight"], expected.data, atol=2e-3, rtol=2e-3)
            else:
                assert f"{name}.weight" not in found
            if module.bias is not None:
                torch.testing.assert_close(found[f"{name}.bias"], module.bias.data, atol=2e-3, rtol=2e-3)
            assert (f"{name}.bias" in found) == (module.bias is not None)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_on_its_tokens_it_is_never_worse_than_the_bias(family: str, tmp_path: Path) -> None:
    """Of every projection's output, and no worse than the plain cut either."""
    path, tokens = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=4), tokens_of(9, LENGTH)
    checkpoint, dense = open_checkpoint(path), plain_model(path)
    plan = uneven_plan(checkpoint)
    statistics = calibrate(path, save_tokens(tmp_path / "ids.npy", tokens))
    tensors = {
        "none": dict(rewrite(checkpoint, plan, cut_only)),
        "bias": dict(rewrite(checkpoint, plan, mean_restorer(statistics))),
        "least-squares": restored_tensors(checkpoint, plan, tokens, tmp_path / "r"),
    }
    for layer in plan.layers:
        for space in CUT_SPACES:
            kept = kept_channels(layer, checkpoint.shape)[space]
            module = site(dense, family, layer.layer, space)
            inputs = torch.from_numpy(inputs_of(dense, module, tokens)).float()
            expected = torch.nn.functional.linear(inputs, module.weight.data, module.bias)
            name = f"{FAMILIES[family].modules.layers}.{layer.layer}.{FAMILIES[family].restoring(space).path}"
            errors = {}
            for compensation, found in tensors.items():
                seen = inputs if kept is None else inputs[:, kept]
                output = torch.zeros_like(expected)
                if f"{name}.weight" in found:
                    output = seen @ found[f"{name}.weight"].T
                errors[compensation] = float(
                    (output + found.get(f"{name}.bias", torch.zeros(1)) - expected).square().mean().detach()
                )
            assert errors["least-squares"] <= errors["bias"] * (1 + 1e-5) + 1e-10
            assert errors["bias"] <= errors["none"] * (1 + 1e-5) + 1e-10


def test_an_existing_bias_keeps_its_part(tmp_path: Path) -> None:
    """Two models that differ in the biases of the restoring projections only differ by them after pruning."""
    path = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    tokens = tokens_of(9, LENGTH)
    checkpoint = open_checkpoint(path)
    plan = plan_of(checkpoint, [layer_plan(checkpoint, 0, [1], range(0, 40, 2))])
    before = restored_tensors(checkpoint, plan, tokens, tmp_path / "before")
    model = plain_model(path)
    model.model.layers[0].mlp.down_proj.bias.data += 5
    model.save_pretrained(tmp_path / "shifted")
    after = restored_tensors(open_checkpoint(tmp_path / "shifted"), plan, tokens, tmp_path / "after")
    name = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(after[f"{name}.bias"], before[f"{name}.bias"] + 5)
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"])


@pytest.mark.parametrize("stated", ["bfloat16", "float32", None])
def test_weights_are_rounded_as_saved_before_the_bias_makes_up_for_the_mean(stated: str | None, tmp_path: Path) -> None:
    """In the dtype that the weights have on the disk, whatever the pass computes in and the configuration states."""
    path = tiny_checkpoint("llama", tmp_path / "dense", dtype=torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": stated}))
    tokens, dense = tokens_of(9, LENGTH), open_checkpoint(path)
    plan = plan_of(dense, [layer_plan(dense, index, [1], range(0, 40, 2)) for index in range(2)])
    restored = restore(dense, plan, tokens, tmp_path)
    for space in CUT_SPACES:
        assert restored.load(Site(0, space, None)).weight.dtype == torch.bfloat16
    model = plain_model(path)
    module = site(model, "llama", 0, "ffn")
    inputs = torch.from_numpy(inputs_of(model, module, tokens))
    found = restored.load(Site(0, "ffn", None))
    missing = inputs @ module.weight.double().T - inputs[:, ::2] @ found.weight.double().T - found.bias
    assert float(missing.detach().mean(dim=0).abs().max()) < 1e-5


def test_nothing_pruned_is_left_as_it_is(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    checkpoint = open_checkpoint(path)
    for sequential in (False, True):
        folder = tmp_path / str(sequential)
        found = restored_tensors(checkpoint, keep_all_plan(checkpoint), tokens_of(2, 5), folder, sequential=sequential)
        assert not list(folder.iterdir())
        assert all(torch.equal(found[name], checkpoint.weights[name]) for name in checkpoint.weights)


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_every_eighth_sequence_is_held_out(chunk: int) -> None:
    site_inputs = SiteInputs(2, 3, "cpu")
    inputs = torch.arange(20 * 3 * 2.0).view(20, 3, 2)
    for part in inputs.split(chunk):
        site_inputs.update(part.flatten(0, 1))
    assert site_inputs.moments.count == 18 * 3
    held = site_inputs.take_held_out()
    torch.testing.assert_close(held, inputs[[7, 15]].flatten(0, 1).double())
    assert len(site_inputs.take_held_out()) == 0
    site_inputs.moments.update(held)
    torch.testing.assert_close(site_inputs.moments.mean, inputs.flatten(0, 1).double().mean(dim=0))


def test_so_many_are_held_out_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flap_export.rewriting.restoring.HELD_OUT_SEQUENCES", 2)
    site_inputs = SiteInputs(2, 1, "cpu")
    for part in torch.arange(80.0).view(40, 1, 2).split(20):
        site_inputs.update(part)
    assert site_inputs.moments.count == 38
    assert len(site_inputs.take_held_out()) == 2


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(("sequences", "length"), [(1, 12), (3, 2), (8, 4)])
def test_few_tokens(sequences: int, length: int, sequential: bool, tmp_path: Path) -> None:
    """Without held-out sequences, and with fewer tokens than channels."""
    path = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(sequences, length))
    prune(
        path,
        tmp_path / "out",
        ratio=0.4,
        calibration=source,
        compensation="least-squares",
        sequential=sequential,
    )
    assert bool(log_probabilities(load_model(tmp_path / "out", dtype=torch.float32), tokens_of(2, 5)).isfinite().all())


def test_the_whole_model_is_nearer_to_the_dense_one(tmp_path: Path) -> None:
    """On other text of the same kind."""
    path = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(40, 16))
    expected = log_probabilities(plain_model(path), tokens_of(8, 16, seed=5))
    found = {}
    for compensation in ("none", "bias", "least-squares"):
        prune(path, tmp_path / compensation, ratio=0.3, calibration=source, compensation=compensation)  # type: ignore[arg-type]
        pruned = load_model(tmp_path / compensation, dtype=torch.float32)
        found[compensation] = kl(expected, log_probabilities(pruned, tokens_of(8, 16, seed=5)))
    assert found["least-squares"] < found["bias"]


@pytest.mark.parametrize("sequential", [False, True])
def test_overflow_is_refused(sequential: bool, tmp_path: Path) -> None:
    """Where nothing before it looked at activations."""
    path = tiny_checkpoint("llama", tmp_path / "dense")
    model = plain_model(path)
    model.model.layers[1].mlp.up_proj.weight.data *= 3e4
    model.save_pretrained(path)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(9, 8))
    with pytest.raises(ModelError, match=r"layer 1: what enters mlp\.down_proj is NaN or infinite.*--dtype float32"):
        prune(
            path,
            tmp_path / "out",
            ratio=0.4,
            method="magnitude",
            calibration=source,
            compensation="least-squares",
            sequential=sequential,
            dtype="float16",
        )
    assert not (tmp_path / "out").exists()
