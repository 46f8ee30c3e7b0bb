"""Rotary settings that read the same in either spelling, and how far one table of angles holds."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tiny import (
    ALL_FAMILIES,
    LONGROPE,
    SIZES,
    tiny_checkpoint,
    tiny_pruned,
    tokens_of,
)
from transformers import AutoConfig, AutoModelForCausalLM

from flap_export.errors import ModelError
from flap_export.families import FAMILIES
from flap_export.families.rope import as_read, both_rope_forms, table_positions
from flap_export.models.loading import load_model
from flap_export.models.opening import config_from, open_checkpoint
from flap_export.rewriting.checkpoint import uneven_config

PARAMETERS = LONGROPE["rope_parameters"]
OLDER_LONGROPE = {
    "rope_theta": 50.0,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "longrope", "short_factor": [1.1, 1.7], "long_factor": [3.0, 9.0]},
    "original_max_position_embeddings": 16,
}


def test_longrope_is_stated_in_the_three_fields_that_older_phi3_takes() -> None:
    both = both_rope_forms(LONGROPE, SimpleNamespace(**LONGROPE))
    assert both["rope_parameters"] == PARAMETERS
    assert {name: both[name] for name in OLDER_LONGROPE} == OLDER_LONGROPE


TRANSFORMERS_4 = SimpleNamespace()
"""A configuration that knows nothing of `rope_parameters`."""
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
    newer = {"rope_parameters": BY_LAYER_TYPE}
    both = both_rope_forms(newer, SimpleNamespace(**newer))
    assert both == {**newer, **OLDER_BY_LAYER_TYPE}
    assert as_read(newer, generation=4) == both
    assert as_read(newer, generation=5) == newer
    assert both_rope_forms(OLDER_BY_LAYER_TYPE, TRANSFORMERS_4) == both
    assert both_rope_forms(both, TRANSFORMERS_4) == both
    plain = both_rope_forms({"rope_theta": 3.0, "rope_local_base_freq": 2.0, "rope_scaling": None}, TRANSFORMERS_4)
    assert plain["rope_parameters"]["full_attention"] == {"rope_type": "default", "rope_theta": 3.0}
    assert as_read({"rope_parameters": plain["rope_parameters"]}, generation=4)["rope_scaling"] is None


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
    both = both_rope_forms(older, TRANSFORMERS_4, NEOX_NAMES)
    assert both == {"rope_scaling": None, **older, "rope_parameters": parameters}
    newer = as_read({"rope_parameters": parameters}, NEOX_NAMES, generation=4)
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
    older = config_from({**SIZES, **OLDER_LONGROPE}, FAMILIES["phi3"], path)
    other = AutoModelForCausalLM.from_config(older)
    other.load_state_dict(expected.state_dict())
    with torch.no_grad():
        logits = [
            model(input_ids=tokens_of(2, length), use_cache=False).logits
            for model in (expected, other.eval(), load_model(path, dtype=torch.float32))
        ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_reading_a_configuration_changes_nothing_of_what_it_states(tmp_path: Path) -> None:
    stated = {**SIZES, **OLDER_LONGROPE}
    before = deepcopy(stated)
    assert config_from(stated, FAMILIES["phi3"], tmp_path).original_max_position_embeddings == 16
    assert stated == before


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


LINEAR = {"rope_type": "linear", "factor": 2.0}
FORMS: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 700.0},
    "older": {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "newer": {"rope_parameters": {**LINEAR, "rope_theta": 700.0}},
    # As transformers 5 reads them: what is not among the parameters is beside them.
    "theta-beside": {"rope_theta": 700.0, "rope_parameters": LINEAR},
    "no-theta": {"rope_parameters": LINEAR},
    "scaling-beside": {"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": LINEAR},
    "nothing": {},
}
ROPE_FIELDS = {"rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct"}
ROTARY = sorted(
    set(ALL_FAMILIES)
    - {"bloom", "codegen", "gptj", "gpt_neo", "mpt", "opt", "gpt2", "gpt_bigcode", "ministral3", "mellum"}
)


def read(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, without those that the kind of embedding does not read."""
    if "full_attention" in parameters:
        return {kind: read(below) for kind, below in parameters.items() if isinstance(below, dict)}
    plain = ("rope_type", "rope_theta", "partial_rotary_factor")
    kept = plain if parameters["rope_type"] == "default" else parameters.keys() - {"type"}
    return {name: parameters[name] for name in kept if name in parameters}


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 reads the older form only")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ROTARY)
def test_heads_turn_as_transformers_reads_the_configuration(family: str, form: str, tmp_path: Path) -> None:
    """However it is stated, for the dense model and for whoever reads the pruned one: transformers 5, and 4."""
    pruned = tiny_pruned(family, tmp_path)
    raw = json.loads((tmp_path / "dense" / "config.json").read_text())
    stated = {name: value for name, value in raw.items() if name not in ROPE_FIELDS} | FORMS[form]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(stated))
    try:
        expected = AutoConfig.from_pretrained(tmp_path / "dense")
    except (ValueError, KeyError, TypeError, StrictDataclassError):
        with pytest.raises(ModelError):
            open_checkpoint(tmp_path / "dense")
        return
    dense = open_checkpoint(tmp_path / "dense")
    assert dense.config.rope_parameters == expected.rope_parameters
    written = uneven_config(dense, open_checkpoint(pruned).shape)
    for fields in (written, {name: value for name, value in written.items() if name != "rope_parameters"}):
        values = {name: value for name, value in fields.items() if name != "model_type"}
        assert read(AutoConfig.for_model(family, **values).rope_parameters) == read(expected.rope_parameters)
