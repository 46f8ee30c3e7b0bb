from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    ALL_FAMILIES,
    VOCABULARY,
    plain_model,
    save_tokens,
    tiny_checkpoint,
    tiny_pruned,
    tiny_statistics,
    tokens_of,
)
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from flap_export.calibration.stage import calibrate, compute_dtype, open_dense
from flap_export.calibration.statistics import CalibrationStatistics, cut_spaces
from flap_export.errors import InputError, MissingRequirementError, ModelError, TextError
from flap_export.families import FAMILIES
from flap_export.models.opening import open_checkpoint


@torch.no_grad()
def site_inputs(path: Path, family: str, tokens: Tensor) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Inputs [tokens, C] and weights of all restoring projections, from one pass through the whole model."""
    model, shape = plain_model(path), open_checkpoint(path).shape
    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(model.get_submodule(FAMILIES[family].modules.layers)):
        for space in cut_spaces(shape.layers[index]):
            if space == "ffn" and shape.layers[index].experts:
                continue

            def note(module: Any, inputs: tuple[Tensor, ...], key: tuple[int, str] = (index, space)) -> None:
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                found[key] = (inputs[0].flatten(0, -2).double(), weight.double())

            path = FAMILIES[family].restoring(space, shape.layers[index]).path
            layer.get_submodule(path).register_forward_pre_hook(note)
    model(input_ids=tokens, use_cache=False)
    return found


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_statistics_equal_a_direct_computation(family: str, tmp_path: Path) -> None:
    path, tokens = tiny_checkpoint(family, tmp_path / "dense"), tokens_of(7, 12)
    statistics = calibrate(path, save_tokens(tmp_path / "ids.npy", tokens), chunk_sequences=3)
    expected = site_inputs(path, family, tokens)
    layers = open_checkpoint(path).shape.layers
    assert set(statistics.sites) == {(index, space) for index in range(2) for space in cut_spaces(layers[index])}
    assert set(expected) == {key for key in statistics.sites if not (layers[key[0]].experts and key[1] == "ffn")}
    for key, (inputs, weight) in expected.items():
        site = statistics.sites[key]
        torch.testing.assert_close(site.mean, inputs.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(site.variance, inputs.var(0, unbiased=False), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(site.weight_square_norm, weight.square().sum(0))
        torch.testing.assert_close(site.weight_absolute_mean, weight.abs().mean(0))
    assert (statistics.sequences, statistics.sequence_length) == (7, 12)
    assert statistics.digests["weights"] == open_checkpoint(path).weights.digest


def test_chunks_do_not_change_the_statistics(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(5, 9))
    one, many = (calibrate(path, source, chunk_sequences=size) for size in (1, 8))
    for key, site in one.sites.items():
        torch.testing.assert_close(site.variance, many.sites[key].variance, rtol=1e-5, atol=1e-7)


def test_saved_statistics_are_the_same(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    statistics = tiny_statistics(path, tmp_path)
    statistics.save(tmp_path / "deep" / "statistics.safetensors")
    again = CalibrationStatistics.load(tmp_path / "deep" / "statistics.safetensors")
    for name in ("model", "source", "sequences", "sequence_length", "digests"):
        assert getattr(again, name) == getattr(statistics, name)
    assert set(again.sites) == set(statistics.sites)
    for key, site in statistics.sites.items():
        other = again.sites[key]
        for one, two in (
            (site.mean, other.mean),
            (site.square_norm, other.square_norm),
            (site.weight_square_norm, other.weight_square_norm),
            (site.weight_absolute_mean, other.weight_absolute_mean),
        ):
            assert two.dtype == torch.float64
            assert torch.equal(one, two)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["statistics.safetensors"]


def test_files_that_hold_no_statistics(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    with pytest.raises(InputError, match="no calibration statistics at"):
        CalibrationStatistics.load(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds no calibration statistics .*calibrate again"):
        CalibrationStatistics.load(path / "model.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="holds no calibration statistics"):
        CalibrationStatistics.load(tmp_path / "text")
    tiny_statistics(path, tmp_path).save(tmp_path / "now")
    with safe_open(tmp_path / "now", framework="pt") as file:
        header = {**json.loads(file.metadata()["calibration statistics"]), "schema_version": 99}
    save_file(load_file(tmp_path / "now"), tmp_path / "future", metadata={"calibration statistics": json.dumps(header)})
    with pytest.raises(InputError, match="holds no calibration statistics"):
        CalibrationStatistics.load(tmp_path / "future")


@pytest.mark.parametrize(
    ("projection", "site"), [("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")]
)
def test_activations_that_overflow(projection: str, site: str, tmp_path: Path) -> None:
    """Finite weights, infinite products in float16; float32 holds them."""
    path = tiny_checkpoint("llama", tmp_path / "dense")
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.layers.1.{projection}.weight"] *= 60000
    save_file(tensors, path / "model.safetensors")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(2, 5))
    with pytest.raises(ModelError, match=rf"layer 1: what enters {site} is NaN or infinite.*--dtype float32"):
        calibrate(path, source, dtype="float16")
    calibrate(path, source, dtype="float32")


def test_the_device_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRequirementError, match="sees no CUDA device"):
        calibrate("no-model", "no-such-text.txt", device="cuda")
    with pytest.raises(InputError, match="device must be cpu, cuda or cuda:N, got 'gpu'"):
        calibrate("no-model", "no-such-text.txt", device="gpu")


def test_a_pruned_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is pruned already; prune the dense model at a higher ratio"):
        tiny_statistics(tiny_pruned("llama", tmp_path), tmp_path)


def test_damaged_weights_are_found_before_the_text_is_read(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack 'model\.norm\.weight'"):
        calibrate(path, "no-such-text.txt")


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    with pytest.raises(TextError):
        calibrate(path, save_tokens(tmp_path / "ids.npy", torch.full((2, 4), VOCABULARY)))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_sequences_beyond_the_models_positions(family: str, tmp_path: Path) -> None:
    """Learned positions have no further row, and rotary ones were never trained there."""
    path = tiny_checkpoint(family, tmp_path / "dense", max_position_embeddings=12)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(3, 13))
    with pytest.raises(TextError, match=r"sequences of 13 tokens, the model has 12 positions; .* at most 12"):
        calibrate(path, source)
    assert calibrate(path, source, sequence_length=12).sequence_length == 12


def test_precision_follows_the_device(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama", tmp_path / "dense", dtype=torch.bfloat16))
    assert compute_dtype(checkpoint, None, "cpu") == torch.float32
    assert compute_dtype(checkpoint, None, "cuda") == torch.bfloat16
    assert compute_dtype(checkpoint, "float16", "cuda") == torch.float16
    checked = open_dense(checkpoint.directory)
    assert compute_dtype(checked, None, "cuda") == torch.bfloat16
