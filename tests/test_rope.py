"""Rotary settings that read the same in either spelling, and how far one table of angles holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import ALL_FAMILIES, LONGROPE, SIZES, tiny_checkpoint, tiny_pruned, tokens_of
from transformers import AutoConfig, AutoModelForCausalLM

from flap_export.loading import load_model
from flap_export.opening import open_checkpoint
from flap_export.rope import both_rope_forms, table_positions

PARAMETERS = LONGROPE["rope_parameters"]
OLDER_LONGROPE = {
    "rope_theta": 50.0,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "longrope", "short_factor": [1.1, 1.7], "long_factor": [3.0, 9.0]},
    "original_max_position_embeddings": 16,
}


def test_longrope_is_stated_in_the_three_fields_that_older_phi3_takes() -> None:
    both = both_rope_forms(LONGROPE)
    assert both["rope_parameters"] == PARAMETERS
    assert {name: both[name] for name in OLDER_LONGROPE} == OLDER_LONGROPE


BY_LAYER_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 15.0},
}
OLDER_BY_LAYER_TYPE = {
    "rope_theta": 700.0,
    "rope_local_base_freq": 15.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def test_rotary_settings_by_layer_type() -> None:
    both = both_rope_forms({"rope_parameters": BY_LAYER_TYPE})
    assert both == {"rope_parameters": BY_LAYER_TYPE, **OLDER_BY_LAYER_TYPE}
    assert both_rope_forms(OLDER_BY_LAYER_TYPE) == both
    assert both_rope_forms(both) == both
    plain = both_rope_forms({"rope_theta": 3.0, "rope_local_base_freq": 2.0, "rope_scaling": None})
    assert plain["rope_parameters"]["full_attention"] == {"rope_type": "default", "rope_theta": 3.0}
    assert both_rope_forms({"rope_parameters": plain["rope_parameters"]})["rope_scaling"] is None


NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


@pytest.mark.parametrize(
    ("older", "parameters"),
    [
        (
            {"rotary_emb_base": 700, "rotary_pct": 0.5},
            {"rope_type": "default", "rope_theta": 700, "partial_rotary_factor": 0.5},
        ),
        (
            {"rotary_emb_base": 700, "rotary_pct": 1.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 700, "partial_rotary_factor": 1.0},
        ),
    ],
    ids=["default", "linear"],
)
def test_rotary_settings_under_names_of_their_own(older: dict[str, Any], parameters: dict[str, Any]) -> None:
    """GPT-NeoX of transformers 5 takes scaling from the older form, so that this has to name the rest as well."""
    both = both_rope_forms(older, NEOX_NAMES)
    assert both == {**older, "rope_parameters": parameters}
    newer = both_rope_forms({"rope_parameters": parameters}, NEOX_NAMES)
    assert {name: newer[name] for name in older} == older
    for stated in (older, both, newer):
        config = AutoConfig.for_model("gpt_neox", **stated)
        if "gpt_neox" in ALL_FAMILIES:
            assert {name: config.rope_parameters[name] for name in parameters} == parameters


@pytest.mark.skipif("gpt_neox" not in ALL_FAMILIES, reason="needs transformers 5")
def test_a_pruned_gpt_neox_turns_as_the_dense_one_does(tmp_path: Path) -> None:
    stated = {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0, "partial_rotary_factor": 0.5}
    sizes = {"rope_parameters": stated, "rotary_pct": ..., "rotary_emb_base": ...}
    pruned = tiny_pruned("gpt_neox", tmp_path, **sizes)
    for path in (tmp_path / "dense", pruned):
        assert open_checkpoint(path).config.rope_parameters == stated
    raw = json.loads((pruned / "config.json").read_text())
    assert (
        AutoConfig.for_model("gpt_neox", **{k: v for k, v in raw.items() if k != "model_type"}).rope_parameters
        == stated
    )


@pytest.mark.parametrize("length", [16, 17], ids=["short", "long"])
def test_either_spelling_of_longrope_is_the_same_model(length: int, tmp_path: Path) -> None:
    path = tiny_checkpoint("phi3", tmp_path / "dense", **LONGROPE)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    older = AutoConfig.for_model("phi3", **{**SIZES, **both_rope_forms(OLDER_LONGROPE)})
    other = AutoModelForCausalLM.from_config(older)
    other.load_state_dict(expected.state_dict())
    with torch.no_grad():
        logits = [
            model(input_ids=tokens_of(2, length), use_cache=False).logits
            for model in (expected, other.eval(), load_model(path, dtype=torch.float32))
        ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_longrope_changes_at_its_original_length(tmp_path: Path) -> None:
    """The first tokens' logits depend on how many follow, which is why one table cannot hold both."""
    path = tiny_checkpoint("phi3", tmp_path / "dense", **LONGROPE)
    assert table_positions(open_checkpoint(path).config) == 16
    model, tokens = load_model(path, dtype=torch.float32), tokens_of(1, 17)
    with torch.no_grad():
        within, beyond = (model(input_ids=tokens[:, :n], use_cache=False).logits[:, :9] for n in (16, 17))
        shorter = model(input_ids=tokens[:, :9], use_cache=False).logits
    torch.testing.assert_close(within, shorter, atol=1e-5, rtol=1e-5)
    assert (beyond - within).abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"rope_parameters": None, "rope_scaling": None}, None),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8}}, None),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8}}, 8),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4}, 4),
        ({"rope_scaling": {"type": "longrope"}}, 64),
        ({"rope_parameters": BY_LAYER_TYPE}, None),
        ({"rope_parameters": {**BY_LAYER_TYPE, "full_attention": PARAMETERS}}, 16),
    ],
)
def test_positions_of_one_table(fields: dict[str, Any], expected: int | None) -> None:
    assert table_positions(SimpleNamespace(max_position_embeddings=64, **fields)) == expected
