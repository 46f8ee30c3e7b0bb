"""ALiBi against transformers' own: slopes, the heads a pruned layer keeps them of, and what half precision leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_FAMILIES, plain_model, tiny_checkpoint, tiny_pruned, tokens_of
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from flap_export.exporting import export
from flap_export.models.alibi import alibi_slopes, slope_tables
from flap_export.models.attention import StepCache
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.runners import open_runner

NEEDS_BLOOM = pytest.mark.skipif("bloom" not in ALL_FAMILIES, reason="transformers is too old")


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 24, 25, 32, 56, 71, 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    biases = build_alibi_tensor(torch.ones(1, 3, dtype=torch.int64), heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(heads), biases[:, 0, 1], rtol=3e-6, atol=0)
    # Of the last key, no bias, and of the one before one distance of it.
    before = build_mpt_alibi_tensor(heads, 3)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), -before, rtol=3e-6, atol=0)


@NEEDS_BLOOM
def test_a_layer_keeps_the_slopes_of_its_heads(tmp_path: Path) -> None:
    """Layers 0 and 3 keep none; the others the last, which falls off slowest."""
    pruned = open_checkpoint(tiny_pruned("bloom", tmp_path))
    assert [layer.head_numbers for layer in pruned.shape.layers] == [(), (3,), (3,), ()]
    tables = slope_tables(pruned)
    assert {name: table.tolist() for name, table in tables.items()} == {
        f"transformer.h.{index}.self_attention.slopes": [[[2.0**-8]]] for index in (1, 2)
    }
    raw = json.loads((pruned.directory / "config.json").read_text())["pruned"]
    assert raw["alibi"] == "alibi"
    assert [layer.get("head_numbers") for layer in raw["layers"]] == [None, [3], [3], None]


def test_another_familys_checkpoint_numbers_no_heads(tmp_path: Path) -> None:
    pruned = open_checkpoint(tiny_pruned("opt", tmp_path))
    raw = json.loads((pruned.directory / "config.json").read_text())["pruned"]
    assert "alibi" not in raw
    assert all("head_numbers" not in layer for layer in raw["layers"])
    assert slope_tables(pruned) == {}


class Masks(StepCache):
    def update(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_mask_falls_off_with_distance_and_hides_what_comes(dtype: torch.dtype) -> None:
    cache = Masks(torch.tensor([0, 1900]), 3, 2048)
    slopes = alibi_slopes(3).view(-1, 1, 1).to(dtype)
    mask = cache.mask(None, dtype, slopes)
    assert mask.shape == (2, 3, 3, 2048)
    assert mask.dtype == dtype
    for sequence, first in enumerate((0, 1900)):
        for query in range(3):
            seen = first + query
            expected = slopes.double() * (torch.arange(seen + 1) - seen).double()
            # Of the keys nearby, which count, no digit is lost; slopes times positions would have lost all of them.
            assert bool((mask[sequence, :, query, seen + 1 :] == torch.finfo(dtype).min).all())
            found = mask[sequence, :, query, : seen + 1].double()
            assert bool(((found - expected[:, 0]).abs() <= 2 * torch.finfo(dtype).eps * expected[:, 0].abs()).all())
    assert cache.mask(None, dtype, slopes) is mask
    assert cache.mask(None, dtype) is not mask


@NEEDS_BLOOM
def test_a_model_without_a_limit_of_positions(tmp_path: Path) -> None:
    """Runners and the export end somewhere where nobody says where, and take whatever is asked."""
    dense = tiny_checkpoint("bloom", tmp_path / "dense")
    assert open_checkpoint(dense).positions is None
    for backend in ("torch", "torch-static"):
        with open_runner(dense, backend=backend, threads=1) as runner:  # type: ignore[arg-type]
            assert runner.max_length == 2048
    assert export(dense, tmp_path / "onnx").max_length == 2048
    assert export(dense, tmp_path / "longer", max_length=5000).max_length == 5000


@NEEDS_BLOOM
def test_normed_residuals_pass_emptied_blocks(tmp_path: Path) -> None:
    """Blocks that add the residual themselves still do when nothing else is left of them."""
    pruned = tiny_pruned("bloom", tmp_path, apply_residual_connection_post_layernorm=True)
    model: Any = load_model(pruned, dtype=torch.float32)
    layer, hidden = model.transformer.h[3], torch.randn(1, 5, 32)
    with torch.no_grad():
        found = layer(hidden, alibi=torch.zeros(4, 1, 5), attention_mask=None)[0]
        attended = layer.input_layernorm(hidden) + layer.self_attention.dense.bias
        expected = layer.post_attention_layernorm(attended) + layer.mlp.dense_4h_to_h.bias
    torch.testing.assert_close(found, expected)


@NEEDS_BLOOM
def test_the_artifact_is_closer_than_positions_allow(tmp_path: Path) -> None:
    """In half precision, far into a sequence: transformers rounds slope times position, the artifact distances."""
    dense, tokens = tiny_checkpoint("bloom", tmp_path / "dense"), tokens_of(1, 300).tolist()
    export(dense, tmp_path / "onnx", dtype="float16", max_length=320)
    with torch.no_grad():
        exact, rounded = (
            plain_model(dense, dtype)(torch.tensor(tokens)).logits[0, -1].float()
            for dtype in (torch.float32, torch.float16)
        )
    with open_runner(tmp_path / "onnx", threads=1) as runner:
        found = torch.from_numpy(runner.prefill(tokens))[0].float()
    assert (found - exact).abs().max() < (rounded - exact).abs().max()
