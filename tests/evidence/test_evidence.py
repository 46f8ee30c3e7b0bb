"""What methods go by: gathered, saved, shared, and never another method's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refitting import inputs_of, site
from tiny import plain_model, save_tokens, tiny_checkpoint, tokens_of

from flap_export.calibration.statistics import CUT_SPACES
from flap_export.errors import InputError, TextError
from flap_export.evidence.methods import METHODS, MethodName, PruneOptions, resolved
from flap_export.evidence.record import CalibrationText, Evidence
from flap_export.evidence.stage import evidence_options, gather
from flap_export.models.opening import open_checkpoint
from flap_export.pruning.choosing import make_plan
from flap_export.pruning.stage import prune_with
from flap_export.rewriting.cutting import kept_channels


def options(method: MethodName = "flap", **given: Any) -> PruneOptions:
    return resolved(PruneOptions(**{"ratio": 0.3, "method": method, **given}))


def text_of(folder: Path, sequences: int = 9, length: int = 8, **given: Any) -> CalibrationText:
    return CalibrationText(source=save_tokens(folder / "ids.npy", tokens_of(sequences, length)), **given)


@pytest.mark.parametrize(("method", "name"), [("flap", "statistics"), ("obs", "sensitivity"), ("magnitude", "scores")])
def test_evidence_that_lost_what_its_method_goes_by(method: MethodName, name: str, tmp_path: Path) -> None:
    path, folder = tiny_checkpoint("llama", tmp_path / "dense"), tmp_path / "evidence"
    folder.mkdir()
    gather(path, text_of(tmp_path), options(method)).save(folder)
    (folder / f"{name}.safetensors").unlink()
    with pytest.raises(InputError, match=rf"lacks {name}\.safetensors, which the method {method} goes by; calibrate"):
        Evidence.load(folder)


@pytest.mark.parametrize("compensation", ["none", "bias", "least-squares"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_evidence_gives_the_same_checkpoint(method: MethodName, compensation: Any, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=3)
    wanted = options(method, compensation=compensation)
    evidence = gather(path, text_of(tmp_path), wanted)
    (tmp_path / "evidence").mkdir()
    evidence.save(tmp_path / "evidence")
    loaded = Evidence.load(tmp_path / "evidence")
    assert loaded.text == evidence.text
    assert dict(loaded.digests) == dict(evidence.digests)
    for name, found in (("a", evidence), ("b", loaded)):
        prune_with(path, tmp_path / name, found, wanted)
    for name in ("model.safetensors", "plan.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_text_is_kept_with_what_was_used_of_it(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    used = gather(path, text_of(tmp_path, seed=3), options()).text
    assert used is not None
    assert (used.samples, used.sequence_length, used.seed) == (9, 8, 3)
    assert gather(path, None, options("magnitude")).text is None


def test_sequences_of_one_token_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    with pytest.raises(TextError, match="sequences of one token; calibration needs at least two"):
        gather(path, text_of(tmp_path, length=1), options())


@pytest.mark.parametrize("seen", METHODS)
@pytest.mark.parametrize("wanted", ["flap", "obs", "llm-pruner"])
def test_evidence_of_another_method_is_refused(wanted: MethodName, seen: MethodName, tmp_path: Path) -> None:
    """Nor does it stand in for it, even where the records are of the same kind."""
    path = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=3)
    evidence = gather(path, text_of(tmp_path), options(seen, compensation="bias"))
    if wanted == seen:
        make_plan(open_checkpoint(path), evidence, options(wanted))
        return
    with pytest.raises(InputError, match=rf"gathered serves the method {seen}, not {wanted}; calibrate again"):
        make_plan(open_checkpoint(path), evidence, options(wanted))


def test_means_and_text_must_have_been_gathered(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    without_text = gather(path, None, options("magnitude"))
    for compensation, message in (("bias", "holds no means to compensate by"), ("least-squares", "needs calibration")):
        with pytest.raises(InputError, match=message):
            prune_with(path, tmp_path / "out", without_text, options("magnitude", compensation=compensation))
    assert not (tmp_path / "out").exists()


def test_losses_of_other_head_units_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    evidence = gather(path, text_of(tmp_path), options("obs"))
    with pytest.raises(InputError, match="measured for the head units groups, asked are queries; measure again"):
        make_plan(open_checkpoint(path), evidence, options("obs", head_units="queries"))


def test_a_text_that_changed_is_refused(tmp_path: Path) -> None:
    path, wanted = tiny_checkpoint("llama", tmp_path / "dense"), options(compensation="least-squares")
    evidence = gather(path, text_of(tmp_path), wanted)
    save_tokens(tmp_path / "ids.npy", tokens_of(9, 8, seed=1))
    with pytest.raises(TextError, match="is not what was calibrated on any more; calibrate again"):
        prune_with(path, tmp_path / "out", evidence, wanted)


def test_what_can_share_evidence() -> None:
    def shares(one: PruneOptions, other: PruneOptions) -> bool:
        return evidence_options(one) == evidence_options(other)

    assert shares(options(), options(ratio=0.1, metric="ifv", structure="ul-um", align_channels=8))
    assert shares(options("obs"), options("obs", ratio=0.1, align_channels=8, sequential=True))
    assert shares(options("magnitude"), options("magnitude", compensation="least-squares", seed=4))
    assert shares(options(), options(compensation="least-squares", head_units="queries"))
    assert not shares(options("magnitude"), options("magnitude", compensation="bias"))
    assert not shares(options("obs"), options("obs", head_units="queries"))
    assert not shares(options("random"), options("random", seed=1))
    assert not shares(options("wanda-sp"), options("wanda-sp", ratio=0.1))
    assert not shares(options("flap"), options("magnitude", compensation="bias"))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_wanda_sp_sees_what_the_pruned_layers_give(family: str, tmp_path: Path) -> None:
    """Statistics of a layer are of the model whose earlier layers are masked."""
    path, tokens = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=3), tokens_of(9, 8)
    checkpoint, wanted = open_checkpoint(path), options("wanda-sp")
    evidence = gather(path, text_of(tmp_path), wanted)
    assert evidence.statistics is not None
    plan = make_plan(checkpoint, evidence, wanted)
    masked = plain_model(path)
    for layer in plan.layers:
        observed = {}
        for space in CUT_SPACES:
            module = site(masked, family, layer.layer, space)
            observed[space] = inputs_of(masked, module, tokens)
            statistics = evidence.statistics.sites[layer.layer, space]
            np.testing.assert_allclose(statistics.mean.numpy(), observed[space].mean(axis=0), atol=1e-5, rtol=1e-4)
            np.testing.assert_allclose(statistics.variance.numpy(), observed[space].var(axis=0), atol=1e-5, rtol=1e-4)
        for space in CUT_SPACES:
            kept = kept_channels(layer, checkpoint.shape)[space]
            assert kept is not None
            weight = site(masked, family, layer.layer, space).weight.data
            if len(kept) < len(observed[space].T):
                check_lowest(observed[space], weight, kept.tolist(), checkpoint.shape.head_dim, space)
            mask = torch.zeros(weight.shape[1])
            mask[kept] = 1
            weight *= mask


def check_lowest(inputs: Any, weight: torch.Tensor, kept: list[int], head_dim: int, space: str) -> None:
    """What stays scores higher than what goes: mean |W| ||X||, by heads."""
    scores = np.linalg.norm(inputs, axis=0) * weight.abs().double().mean(dim=0).numpy()
    units = scores.reshape(-1, head_dim if space == "query" else 1).mean(axis=1)
    stays = np.zeros(len(scores), dtype=bool)
    stays[kept] = True
    stays = stays.reshape(len(units), -1).all(axis=1)
    if space == "ffn":
        assert units[stays].min() > units[~stays].max()


@pytest.mark.parametrize(
    ("family", "given", "statistics"),
    [
        ("llama", {}, "welford"),
        ("llama", {"square_attention": True, "metric": "wifv"}, "welford"),
        ("llama", {"head_units": "queries", "align_channels": 4}, "welford"),
        ("llama", {"layout": "stock", "compensation": "none"}, "welford"),
        ("opt", {}, "reference"),
        ("opt", {"square_attention": False}, "reference"),
    ],
)
def test_the_plan_from_the_statistics_is_what_was_masked(
    family: str, given: dict[str, Any], statistics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice layer by layer, and that of the whole model from what was gathered, are one."""
    from flap_export.calibration import stage as calibration

    # Enough heads of their own that another rule chooses others; queries of two groups where they leave one by one.
    groups = 2 if given.get("head_units") == "queries" else 8
    sizes = {
        "num_attention_heads": 8,
        "hidden_size": 64,
        **({} if family == "opt" else {"num_key_value_heads": groups}),
    }
    path = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=3, **sizes)
    zeroed: list[dict[str, list[int]]] = []
    real = calibration._zero_columns

    def noted(checkpoint: Any, layer: Any, removed: Any) -> None:
        zeroed.append({space: sorted(channels.tolist()) for space, channels in removed.items()})
        real(checkpoint, layer, removed)

    monkeypatch.setattr(calibration, "_zero_columns", noted)
    wanted, checkpoint = options("wanda-sp", **given), open_checkpoint(path)
    plan = make_plan(checkpoint, gather(path, text_of(tmp_path, statistics=statistics), wanted), wanted)
    assert len(zeroed) == 3
    for layer, found in zip(plan.layers, zeroed, strict=True):
        for space, kept in kept_channels(layer, checkpoint.shape).items():
            if space in CUT_SPACES:
                width = 40 if space == "ffn" else checkpoint.shape.layers[0].query_heads * checkpoint.shape.head_dim
                expected = [] if kept is None else sorted(set(range(width)) - set(kept.tolist()))
                assert found.get(space, []) == expected
