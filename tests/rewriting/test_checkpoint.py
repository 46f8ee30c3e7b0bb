from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import SIZES, save_pruned, tiny_checkpoint, tiny_statistics, tokens_of, uneven_plan
from transformers import AutoConfig

from flap_export.families.rope import both_rope_forms
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.models.weights import INDEX_FILE, SINGLE_FILE, Weights
from flap_export.plan import PruningPlan
from flap_export.rewriting.checkpoint import copy_companions, write_shards


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    dense = tiny_checkpoint("qwen2", tmp_path / "dense", num_hidden_layers=4)
    plan, statistics = uneven_plan(open_checkpoint(dense)), tiny_statistics(dense, tmp_path)
    whole = save_pruned(dense, plan, tmp_path / "whole", statistics)
    sharded = save_pruned(dense, plan, tmp_path / "sharded", statistics, max_shard_bytes=6000)
    assert [path.name for path in whole.glob("*.safetensors*")] == [SINGLE_FILE]
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    first, second = Weights(whole), Weights(sharded)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        logits = [load_model(path, dtype=torch.float32)(tokens_of(1, 5)).logits for path in (whole, sharded)]
    assert torch.equal(*logits)


def test_no_shard_exceeds_the_limit_and_the_index_is_exact(tmp_path: Path) -> None:
    tensors = [(f"t{i}", torch.full((size,), float(i))) for i, size in enumerate([10, 10, 30, 1, 10, 25])]
    write_shards(tmp_path, iter(tensors), max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 4 * 86
    assert list(index["weight_map"]) == [name for name, _ in tensors]
    held = {path.name: list(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))}
    # A tensor above the limit has a shard of its own.
    assert list(held.values()) == [["t0", "t1"], ["t2"], ["t3", "t4"], ["t5"]]
    assert {name: file for file, names in held.items() for name in names} == index["weight_map"]


def test_companions_travel_along_and_weights_do_not(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=4)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (dense / name).write_text(f'{{"{name}": 1}}')
    (dense / "README.md").write_text("")
    (dense / "original.bin").write_text("")
    plan, statistics = uneven_plan(open_checkpoint(dense)), tiny_statistics(dense, tmp_path)
    pruned = save_pruned(dense, plan, tmp_path / "pruned", statistics)
    assert sorted(path.name for path in pruned.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_pruned.py",
        "plan.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (pruned / "tokenizer.json").read_text() == '{"tokenizer.json": 1}'
    assert PruningPlan.load(pruned / "plan.json") == plan


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "qwen.tiktoken",
        "tokenization_qwen.py",
        "added_tokens.json",
        "additional_chat_templates/tools.jinja",
    ],
)
def test_tokenizers_of_every_kind_travel_along(name: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source" / name, tmp_path / "target"
    source.parent.mkdir(parents=True)
    source.write_text(name)
    target.mkdir()
    copy_companions(tmp_path / "source", target)
    assert (target / name).read_text() == name


def test_the_configuration_keeps_the_dense_counts_and_a_type_of_its_own(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=4)
    plan, statistics = uneven_plan(open_checkpoint(dense)), tiny_statistics(dense, tmp_path)
    pruned = save_pruned(dense, plan, tmp_path / "pruned", statistics)
    config = json.loads((pruned / "config.json").read_text())
    assert config["model_type"] == "flap_llama"
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 40)
    assert [layer["query_heads"] for layer in config["pruned"]["layers"]] == [0, 1, 2, 0]
    assert [layer["ffn_channels"] for layer in config["pruned"]["layers"]] == [20, 13, 0, 0]
    assert open_checkpoint(pruned).shape == plan.pruned_shape(open_checkpoint(dense).shape, compensated=True)


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, 5.0, None),
        ({"rope_theta": 5.0}, 5.0, None),
        ({"rope_theta": 5.0, "rope_scaling": None}, 5.0, None),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}},
            5.0,
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            5.0,
            {"rope_type": "linear", "factor": 2.0},
        ),
        # The spelling of older checkpoints.
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            5.0,
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_rotary_settings_are_stated_for_transformers_4_and_5(
    config: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    both = both_rope_forms(config, AutoConfig.for_model("llama", **{**SIZES, **config}))
    assert both["rope_theta"] == theta
    assert (both.get("rope_scaling") or None) == scaling
    if transformers.__version__ < "5":
        return
    expected = AutoConfig.for_model("llama", **{**SIZES, **config}).rope_parameters
    assert AutoConfig.for_model("llama", **SIZES, rope_parameters=both["rope_parameters"]).rope_parameters == expected
    # The older spelling goes.
    expected.pop("type", None)
    assert AutoConfig.for_model("llama", **{**SIZES, **both}).rope_parameters == expected


def test_configurations_without_rotary_settings_are_left_alone() -> None:
    assert both_rope_forms({"hidden_size": 3}, SimpleNamespace()) == {"hidden_size": 3}
