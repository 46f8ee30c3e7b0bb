"""Pruned checkpoints that a family's own classes load, without this package and without remote code."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import ALL_FAMILIES, MIXTURES, save_tokens, tiny_checkpoint, tiny_config, tokens_of
from transformers import AutoModelForCausalLM

from flap_export.calibration.statistics import CUT_SPACES, CutSpace
from flap_export.errors import InputError, PlanError
from flap_export.exporting import export
from flap_export.families import FAMILIES
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.pruning.stage import prune
from flap_export.rewriting.stock import EXPERT_ALIGNMENT, allowed_heads

HOLDING_BIASES = (
    "arcee", "codegen", "ernie4_5", "exaone", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss",
    "gptj", "granite", "granite_swa", "helium", "hyperclovax", "iquestcoder", "jais2", "llama", "minicpm3",
    "nemotron", "opt", "persimmon", "phi", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
"""Families whose own classes have a place for every compensating bias."""
WIDE: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}


def pruned_stock(family: str, folder: Path, *, ratio: float = 0.5, **options: Any) -> tuple[Path, Path, Path]:
    """The same plan in both layouts, and the dense model."""
    dense = tiny_checkpoint(family, folder / "dense")
    source = save_tokens(folder / "ids.npy", tokens_of(6, 11))
    shared = {"ratio": ratio, "calibration": source, **options}
    prune(dense, folder / "stock", layout="stock", **shared)
    prune(dense, folder / "uneven", **shared, **heads(folder))
    return dense, folder / "stock", folder / "uneven"


def heads(folder: Path) -> dict[str, Any]:
    """Options that give the uneven layout the very heads that the stock one kept."""
    kept, dense = open_checkpoint(folder / "stock").shape, open_checkpoint(folder / "dense").shape
    removed = sum(a.query_heads - b.query_heads for a, b in zip(dense.layers, kept.layers, strict=True))
    return {"structure": "ul-mm", "remove_heads": removed}


@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if FAMILIES[family].ffn.width_field])
def test_the_familys_own_class_computes_the_same(family: str, tmp_path: Path) -> None:
    row = FAMILIES[family]
    # Where heads stay, only FFNs are compensated.
    needed: tuple[CutSpace, ...] = ("ffn",) if row.heads.are_fixed else CUT_SPACES
    biased = all(row.can_hold_bias(space) for space in needed)
    assert biased == (family in HOLDING_BIASES)
    ratio = 0.3 if row.heads.are_fixed else 0.5
    compensation = "bias" if biased else "none"
    alignment = EXPERT_ALIGNMENT if family in MIXTURES else 1
    _, stock, uneven = pruned_stock(family, tmp_path, ratio=ratio, compensation=compensation, align_channels=alignment)
    assert not list(stock.glob("*.py"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 4.57 takes sdpa for any of them, which leaves softcaps out.
        model, report = AutoModelForCausalLM.from_pretrained(
            stock, dtype=torch.float32, attn_implementation=row.attention_kernel, output_loading_info=True
        )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = tokens_of(2, 9)
    with torch.no_grad():
        found = model(tokens).logits
        expected = load_model(uneven, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert open_checkpoint(stock).shape.decoder_parameters == open_checkpoint(uneven).shape.decoder_parameters


SIZED_BY_HEAD_DIM = [
    family
    for family in ALL_FAMILIES
    if not FAMILIES[family].heads.are_fixed and not FAMILIES[family].heads.divide_hidden
]


@pytest.mark.parametrize("family", SIZED_BY_HEAD_DIM)
def test_heads_that_do_not_divide_the_hidden_size_compute_the_same(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(family, tmp_path / "dense", num_attention_heads=4, num_key_value_heads=4)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    alignment = EXPERT_ALIGNMENT if family in MIXTURES else 1
    shared: dict[str, Any] = {"calibration": source, "compensation": "none", "align_channels": alignment}
    stock, uneven = tmp_path / "stock", tmp_path / "uneven"
    prune(dense, stock, ratio=0.25, layout="stock", structure="ul-mm", remove_heads=2, **shared)
    prune(dense, uneven, ratio=0.25, structure="ul-mm", remove_heads=2, **shared)
    shape = open_checkpoint(stock).shape
    assert {layer.query_heads for layer in shape.layers} == {3}
    assert shape.hidden_size % 3
    model = AutoModelForCausalLM.from_pretrained(
        stock, dtype=torch.float32, attn_implementation=FAMILIES[family].attention_kernel
    )
    tokens = tokens_of(2, 9)
    with torch.no_grad():
        found, expected = model(tokens).logits, load_model(uneven, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("minicpm3" not in ALL_FAMILIES, reason="needs a newer transformers")
def test_values_keep_their_size_where_the_configuration_leaves_it_to_the_heads(tmp_path: Path) -> None:
    """As MiniCPM3's does: transformers divides the hidden size by the heads, of which there are fewer afterwards."""
    dense = tiny_checkpoint("minicpm3", tmp_path / "dense", v_head_dim=8)
    config = json.loads((dense / "config.json").read_text())
    del config["v_head_dim"]
    (dense / "config.json").write_text(json.dumps(config))
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    prune(dense, tmp_path / "out", ratio=0.5, calibration=source, structure="ul-um", layout="stock")
    shape = open_checkpoint(tmp_path / "out").shape
    assert (shape.head_dim, {layer.query_heads for layer in shape.layers}) == (8, {2})


@pytest.mark.parametrize("method", ["obs", "wanda-sp", "random"])
def test_other_methods_take_the_layout(method: Any, tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    plan = prune(dense, tmp_path / "out", ratio=0.3, calibration=source, method=method, layout="stock")
    assert len({(len(layer.query_heads), len(layer.ffn_channels)) for layer in plan.layers}) == 1
    assert not open_checkpoint(tmp_path / "out").is_pruned
    export(tmp_path / "out", tmp_path / "onnx", max_length=16)


def test_a_family_without_a_place_for_the_bias_says_so(tmp_path: Path) -> None:
    """Before it calibrates."""
    dense = tiny_checkpoint("qwen2", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    steps: list[str] = []
    with pytest.raises(PlanError, match=r"no place for a bias of .*; use --compensation none, or --layout uneven"):
        prune(
            dense,
            tmp_path / "out",
            ratio=0.3,
            calibration=source,
            layout="stock",
            progress=lambda what, *_: steps.append(what),
        )
    assert not steps
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if not FAMILIES[family].ffn.width_field])
def test_a_family_whose_ffns_have_one_width_says_so(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(family, tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    options: dict[str, Any] = {"calibration": source, "layout": "stock", "compensation": "none"}
    with pytest.raises(PlanError, match=rf"stock: {family}'s class makes every FFN 4 times as wide .* --layout uneven"):
        prune(dense, tmp_path / "out", ratio=0.3, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"structure": "al-am"}, {"method": "llm-pruner"}])
def test_uneven_plans_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the same counts in every layer"):
        prune(tmp_path / "none", tmp_path / "out", ratio=0.3, calibration="none", layout="stock", **options)


LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [1.5] * 2},
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(("family", "fields"), [("phi", {"qk_layernorm": True}), ("phi3", LONGROPE)])
def test_heads_stay_where_the_class_would_size_them_anew(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_checkpoint(family, tmp_path / "dense", **fields)
    before = open_checkpoint(dense).shape.layers[0].query_heads
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    options: dict[str, Any] = {"ratio": 0.3, "calibration": source, "compensation": "none", "layout": "stock"}
    plan = prune(dense, tmp_path / "out", **options)
    assert {len(layer.query_heads) for layer in plan.layers} == {before}
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]


def test_the_dense_number_of_heads_is_always_allowed(tmp_path: Path) -> None:
    dense = tiny_checkpoint("qwen3", tmp_path / "dense", num_attention_heads=5, num_key_value_heads=5, head_dim=8)
    assert allowed_heads(open_checkpoint(dense)) == (1, 2, 3, 4, 5)
    llama = open_checkpoint(tiny_checkpoint("llama", tmp_path / "llama", num_attention_heads=4, num_key_value_heads=4))
    assert allowed_heads(llama) == (1, 2, 4)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_number_of_heads_that_is_allowed_is_one_its_class_takes(family: str, tmp_path: Path) -> None:
    """And only classes that check it are held to divisors of the hidden size."""
    row = FAMILIES[family]
    if row.heads.are_fixed:
        return
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
    # Transformers 4.57 checks nothing.
    checks = row.heads.divide_hidden and not transformers.__version__.startswith("4")
    with pytest.raises(Exception, match="not a multiple of") if checks else nullcontext():
        AutoModelForCausalLM.from_config(tiny_config(family, **heads))


def test_what_the_class_cannot_load_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flap_export.rewriting.stock.heads_are_fixed", lambda *_: False)
    dense = tiny_checkpoint("phi", tmp_path / "dense", qk_layernorm=True, num_attention_heads=4, num_key_value_heads=4)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    with pytest.raises(PlanError, match=r"--layout stock: .* PhiForCausalLM cannot .* use --layout uneven") as caught:
        prune(dense, tmp_path / "out", ratio=0.5, calibration=source, compensation="none", layout="stock")
    assert "partial" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "ids.npy"]


def test_heads_that_do_not_divide_the_hidden_size_are_refused(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense", num_key_value_heads=4)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    options: dict[str, Any] = {"calibration": source, "layout": "stock", "structure": "ul-mm", "remove_heads": 2}
    with pytest.raises(PlanError, match=r"takes 1, 2, 4 query heads .* keeps 3; keep one of these"):
        prune(dense, tmp_path / "out", ratio=0.3, **options)
    plan = prune(dense, tmp_path / "chosen", ratio=0.3, calibration=source, layout="stock")
    assert {len(layer.query_heads) for layer in plan.layers} <= {2, 4}
