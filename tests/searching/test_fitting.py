"""Factors for any cut point against NumPy on what enters every projection of a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from refitting import inputs_of, site
from tiny import MIXTURES, PLAIN_FAMILIES, plain_model, save_tokens, tiny_checkpoint, tokens_of

from flap_export.allocation.ladders import LayerLadders, layer_plan
from flap_export.calibration.stage import calibrate
from flap_export.calibration.statistics import Site
from flap_export.errors import ModelError
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import Evidence
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.pruning.choosing import ladders_of
from flap_export.rewriting.compensation import DEFAULT_RIDGE, RIDGES
from flap_export.rewriting.cutting import kept_channels, of_expert, path_of, sites_of
from flap_export.rewriting.restoring import HELD_OUT_EVERY
from flap_export.searching import fitting
from flap_export.searching.fitting import RIDGE_SHARE, NestedFits, fit_rankings, staying_order

LENGTH = 8


def ranked(family: str, folder: Path, *, head_units: Any = "groups", **overrides: Any) -> tuple[Checkpoint, Any]:
    path = tiny_checkpoint(family, folder / "dense", **overrides)
    statistics = calibrate(path, save_tokens(folder / "ids.npy", tokens_of(18, LENGTH)))
    dense = open_checkpoint(path)
    options = resolved(PruneOptions(ratio=0.5, head_units=head_units))
    return dense, ladders_of(dense, Evidence.of(statistics), options)


def covariance(inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.cov(inputs.T, bias=True)


def best_ridge_by_hand(weight: NDArray[np.float64], inputs: NDArray[np.float64], order: list[int]) -> float:
    """Downhill from the default, by what the cut at `RIDGE_SHARE` of the ranking gives on every eighth sequence."""
    sequences = inputs.reshape(-1, LENGTH, inputs.shape[1])
    held_out = np.arange(len(sequences)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    held, others = (sequences[mask].reshape(-1, inputs.shape[1]) for mask in (held_out, ~held_out))
    count = max(round(RIDGE_SHARE * len(order)), 1)
    kept, removed = order[:count], order[count:]
    c = covariance(others)

    def error(ridge: float) -> float:
        within = c[np.ix_(kept, kept)] + ridge * np.diag(np.diag(c)[kept])
        new = weight[:, kept] + weight[:, removed] @ np.linalg.solve(within, c[np.ix_(kept, removed)]).T
        missing = held @ weight.T - held[:, kept] @ new.T
        mean = others.mean(axis=0)
        return float(np.square(missing - (weight @ mean - new @ mean[kept])).sum())

    errors = [error(ridge) for ridge in RIDGES]
    best = RIDGES.index(DEFAULT_RIDGE)
    for step in (1, -1):
        while 0 <= best + step < len(RIDGES) and errors[best + step] < errors[best]:
            best += step
    return RIDGES[best]


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_factors_by_hand(family: str, tmp_path: Path) -> None:
    """L L^T is the correlation of all tokens' inputs in the order in which they stay, with the chosen ridge."""
    dense, ladders = ranked(family, tmp_path)
    tokens = tokens_of(18, LENGTH)
    fits = fit_rankings(dense, ladders, tokens, tmp_path / "fits", chunk_sequences=5)
    model = plain_model(dense.directory)
    for index in range(2):
        for where in sites_of(dense, index):
            module = site(model, family, index, where.space)
            inputs = inputs_of(model, module, tokens)
            order = staying_order(ladders[index], where, dense.shape).tolist()
            weight = module.weight.detach().double().numpy()
            ridge = best_ridge_by_hand(weight, inputs, order)
            c = covariance(inputs)[np.ix_(order, order)]
            scale = np.sqrt(np.diag(c))
            fit = fits.load(where)
            assert fit.order.tolist() == order
            factor = fit.factor.numpy()
            assert not np.triu(factor, 1).any()
            expected = c / np.outer(scale, scale) + ridge * np.eye(len(order))
            np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-5)
            found = fit.scale.numpy()
            np.testing.assert_allclose(found / found[0], scale / scale[0], rtol=1e-4)
            np.testing.assert_allclose(fit.mean.numpy(), inputs.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("family", [*MIXTURES, "llama"])
def test_the_bias_makes_up_for_what_was_rounded(family: str, tmp_path: Path) -> None:
    """The mean output stays that of the dense projection, with the weight as it is saved."""
    dense, ladders = ranked(family, tmp_path, dtype=torch.bfloat16)
    fits = fit_rankings(dense, ladders, tokens_of(18, LENGTH), tmp_path / "fits")
    for where in sites_of(dense, 1):
        weight = dense.weights[f"model.layers.1.{path_of(dense, where)}.weight"]
        order, mean = staying_order(ladders[1], where, dense.shape), fits.load(where).mean
        for count in (0, len(order) // 2, len(order)):
            kept = order[:count].sort().values
            restored, bias = fits.restored(where, weight, kept)
            assert restored.dtype == weight.dtype == torch.bfloat16
            assert bias is not None
            torch.testing.assert_close(restored.double() @ mean[kept] + bias, weight.double() @ mean)


def test_channels_that_are_no_cut_point(tmp_path: Path) -> None:
    dense, ladders = ranked("llama", tmp_path)
    fits = fit_rankings(dense, ladders, tokens_of(9, LENGTH), tmp_path / "fits")
    where = Site(0, "ffn", None)
    last = staying_order(ladders[0], where, dense.shape)[-3:].sort().values
    with pytest.raises(AssertionError, match="no cut point of the ranking"):
        fits.restored(where, torch.ones(32, 40), last)


def test_an_interrupted_pass_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole one is not."""
    dense, ladders = ranked("llama", tmp_path)
    tokens, folder = tokens_of(9, LENGTH), tmp_path / "fits"
    fit_rankings(dense, ladders, tokens, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == [f"{layer}.{space}.None.safetensors" for layer in (0, 1) for space in ("ffn", "query")]
    passes: list[Any] = []
    real = fitting.streamed
    monkeypatch.setattr(fitting, "streamed", lambda *given, **more: passes.append(given) or real(*given, **more))
    fit_rankings(dense, ladders, tokens, folder)
    assert not passes
    (folder / "1.ffn.None.safetensors").unlink()
    assert not NestedFits(folder).holds([Site(1, "query", None), Site(1, "ffn", None)])
    assert NestedFits(folder).holds([Site(1, "query", None)])
    fit_rankings(dense, ladders, tokens, folder)
    assert len(passes) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_kill_while_a_factor_is_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, ladders = ranked("llama", tmp_path)
    saved = fitting.save_file

    def killed(tensors: Any, path: Path) -> None:
        if path.name.startswith(".1.query"):
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        saved(tensors, path)

    monkeypatch.setattr(fitting, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_rankings(dense, ladders, tokens_of(9, LENGTH), tmp_path / "fits")
    assert sorted(path.name for path in (tmp_path / "fits").iterdir()) == [
        "0.ffn.None.safetensors",
        "0.query.None.safetensors",
    ]


def cut_points(dense: Checkpoint, ladders: LayerLadders, where: Site) -> list[list[int]]:
    """What stays of a projection's inputs at every cut point, as plans have it."""
    found = []
    ladder = ladders.attention if where.space == "query" else ladders.ffn
    for steps in range(len(ladder.gone) + 1):
        attention, ffn = (steps, 0) if where.space == "query" else (0, steps)
        plan = layer_plan(where.layer, dense.shape, ladders, attention, ffn)
        kept = of_expert(kept_channels(plan, dense.shape)[where.space], where.expert)
        if kept is not None:
            found.append(kept.tolist())
    return found


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {"head_units": "groups", "num_attention_heads": 8}),
        ("llama", {"head_units": "queries", "num_attention_heads": 8}),
        ("qwen3", {"head_units": "groups"}),
        ("opt", {}),
        *[(family, {}) for family in MIXTURES],
    ],
)
def test_every_cut_point_is_a_beginning_of_the_order(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    dense, ladders = ranked(family, tmp_path, **given)
    for index in range(2):
        for where in sites_of(dense, index):
            order = staying_order(ladders[index], where, dense.shape).tolist()
            points = cut_points(dense, ladders[index], where)
            assert points[-1] == []
            assert len(points) >= 2
            for kept in points:
                assert sorted(order[: len(kept)]) == kept
            assert sorted(order) == list(range(len(order)))


def test_overflow_is_refused(tmp_path: Path) -> None:
    dense, ladders = ranked("llama", tmp_path)
    model = plain_model(dense.directory)
    model.model.layers[1].mlp.up_proj.weight.data *= 3e4
    model.save_pretrained(tmp_path / "loud")
    with pytest.raises(ModelError, match=r"layer 1: what enters mlp\.down_proj is NaN or infinite.*--dtype float32"):
        fit_rankings(
            open_checkpoint(tmp_path / "loud"), ladders, tokens_of(9, 8), tmp_path / "fits", dtype=torch.float16
        )
