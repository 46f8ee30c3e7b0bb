"""Measured losses against transformers alone: one module of the dense model cut and refitted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refitting import inputs_of, kl, log_probabilities, refit, site
from tiny import PLAIN_FAMILIES, plain_model, save_tokens, tiny_checkpoint, tokens_of
from torch import Tensor

from flap_export.allocation.ladders import HeadUnits
from flap_export.calibration.statistics import CUT_SPACES, CutSpace
from flap_export.errors import InputError, ModelError
from flap_export.evidence.elimination import RIDGE
from flap_export.evidence.measuring import measure
from flap_export.evidence.sensitivity import Sensitivity
from flap_export.models.opening import open_checkpoint


def channels_of(elements: Tensor, space: CutSpace, head_dim: int) -> list[int]:
    if space == "ffn":
        return sorted(elements.tolist())
    return sorted((elements.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten().tolist())


def check_levels(
    path: Path, family: str, tokens: Tensor, found: Sensitivity, steps_of: dict[CutSpace, list[int]]
) -> None:
    dense = plain_model(path)
    expected_dense = log_probabilities(dense, tokens)
    head_dim = open_checkpoint(path).shape.head_dim
    for (layer, space), module in found.modules.items():
        inputs = inputs_of(dense, site(dense, family, layer, space), tokens)
        highest = 0.0
        for steps in steps_of[space]:
            cut = plain_model(path)
            kept = channels_of(module.order[int(module.gone[steps - 1]) :], space, head_dim)
            refit(site(cut, family, layer, space), inputs, kept, RIDGE)
            highest = max(highest, kl(expected_dense, log_probabilities(cut, tokens)))
            assert float(module.losses[steps - 1]) == pytest.approx(highest, rel=2e-3, abs=1e-6), (layer, space, steps)
        assert bool((module.losses.diff() >= 0).all())
        assert highest > 1e-3


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_losses_are_those_of_the_whole_model_with_one_module_cut(family: str, tmp_path: Path) -> None:
    path, tokens = tiny_checkpoint(family, tmp_path / "dense"), tokens_of(9, 8)
    found = measure(path, save_tokens(tmp_path / "ids.npy", tokens), levels=(0.3, 0.8), chunk_sequences=4)
    layer = open_checkpoint(path).shape.layers[0]
    heads, channels = (
        sorted({max(round(0.3 * units), 1), max(round(0.8 * units), 1), units})
        for units in (layer.kv_heads, layer.ffn_channels)
    )
    check_levels(path, family, tokens, found, {"query": heads, "ffn": channels})
    assert (found.sequences, found.sequence_length, found.head_units) == (9, 8, "groups")
    assert set(found.digests) == {"weights", "calibration"}


def test_query_heads_leave_in_rounds(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", num_attention_heads=8)
    tokens = tokens_of(9, 8)
    found = measure(path, save_tokens(tmp_path / "ids.npy", tokens), levels=(0.5,), head_units="queries")
    check_levels(path, "llama", tokens, found, {"query": [2, 4], "ffn": [20, 40]})
    for layer in range(2):
        module = found.modules[layer, "query"]
        assert module.gone.tolist() == [2, 4, 6, 8]
        for heads in module.order.view(4, 2):
            assert sorted((heads // 4).tolist()) == [0, 1]


def test_a_group_leaves_with_all_its_query_heads(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", num_attention_heads=8)
    found = measure(path, save_tokens(tmp_path / "ids.npy", tokens_of(3, 8)))
    module = found.modules[1, "query"]
    assert module.gone.tolist() == [4, 8]
    assert sorted(module.order[:4].tolist()) in ([0, 1, 2, 3], [4, 5, 6, 7])


@pytest.mark.parametrize("family", ["gemma2", "mistral", "opt", "phi3"])
@pytest.mark.parametrize("chunk", [2, 4, 7])
def test_branches_may_be_shorter_than_the_calibration_set(
    chunk: int, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is of all sequences, losses of the first whole chunks."""
    monkeypatch.setattr("flap_export.evidence.measuring.BRANCH_SEQUENCES", 3)
    path, tokens = tiny_checkpoint(family, tmp_path / "dense"), tokens_of(7, 9)
    found = measure(path, save_tokens(tmp_path / "ids.npy", tokens), levels=(0.5,), chunk_sequences=chunk)
    carried = {2: 4, 4: 4, 7: 7}[chunk]
    dense = plain_model(path)
    module = found.modules[0, "ffn"]
    inputs = inputs_of(dense, site(dense, family, 0, "ffn"), tokens)
    expected = log_probabilities(dense, tokens[:carried])
    refit(site(dense, family, 0, "ffn"), inputs, sorted(module.order[20:].tolist()), RIDGE)
    assert float(module.losses[19]) == pytest.approx(kl(expected, log_probabilities(dense, tokens[:carried])), rel=2e-3)


def test_chunks_change_no_digit_that_counts(tmp_path: Path) -> None:
    path, source = tiny_checkpoint("llama", tmp_path / "dense"), save_tokens(tmp_path / "ids.npy", tokens_of(5, 8))
    whole, parts = (measure(path, source, chunk_sequences=size) for size in (5, 1))
    for key, module in whole.modules.items():
        torch.testing.assert_close(parts.modules[key].losses, module.losses, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("sequences", "length"), [(1, 9), (2, 3), (3, 1)])
def test_fewer_tokens_than_channels(sequences: int, length: int, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    found = measure(path, save_tokens(tmp_path / "ids.npy", tokens_of(sequences, length)))
    for (_, space), module in found.modules.items():
        assert sorted(module.order.tolist()) == list(range(40 if space == "ffn" else 4))
        assert bool(module.losses.isfinite().all())


def test_overflow_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", seed=3)
    checkpoint = plain_model(path)
    layer = checkpoint.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight.data *= 3e4
    checkpoint.save_pretrained(path)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(3, 8))
    with pytest.raises(ModelError, match=r"layer 1: what enters mlp\.down_proj is NaN or infinite.*--dtype float32"):
        measure(path, source, dtype="float16")


def test_unknown_head_units(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="head units must be one of groups, queries, got 'pairs'"):
        measure(tmp_path, "no text", head_units="pairs")  # type: ignore[arg-type]


@pytest.mark.parametrize("head_units", ["groups", "queries"])
def test_the_module_keeps_its_weights(head_units: HeadUnits, tmp_path: Path) -> None:
    """Of every step count measured only one cut is in place at a time: two runs agree, with other levels too."""
    path, source = tiny_checkpoint("opt", tmp_path / "dense"), save_tokens(tmp_path / "ids.npy", tokens_of(4, 8))
    few = measure(path, source, levels=(1.0,), head_units=head_units)
    many = measure(path, source, levels=(0.2, 0.4, 0.6, 1.0), head_units=head_units)
    for layer in range(2):
        for space in CUT_SPACES:
            one, other = few.modules[layer, space], many.modules[layer, space]
            assert one.order.tolist() == other.order.tolist()
            assert float(one.losses[-1]) == pytest.approx(float(other.losses[-1]), rel=1e-6)
