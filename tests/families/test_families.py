"""The table against transformers: every row's paths exist, and nothing in a layer is left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import ALL_FAMILIES, MIXTURES, experts_path, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from flap_export.errors import ModelError
from flap_export.families import EVERY_EXPERT, FAMILIES, check_config, family_of, shape_from_config
from flap_export.models.loading import pruned_section
from flap_export.models.modeling_pruned import resize_decoder
from flap_export.models.opening import open_checkpoint
from flap_export.shapes import LayerShape


def dense_model(family: str, **overrides: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    return model


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_linear_module_of_a_layer_has_a_row(family: str) -> None:
    model = dense_model(family)
    row = FAMILIES[family].of(model.config)
    layers = model.get_submodule(row.modules.layers)
    assert isinstance(layers, nn.ModuleList)
    shape = shape_from_config(model.config, row)
    for kind, layer in zip(shape.layers, layers, strict=True):
        linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        own = row.projections_of(kind)
        plain = {projection.path for projection in own if EVERY_EXPERT not in projection.path}
        # Routers, gates of shared experts, and what makes latents are never cut.
        uncut = ("gate.wg", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa")
        assert plain == {name for name in linears if not name.endswith(uncut)}
        assert bool(kind.experts) == (len(plain) < len(own))
    for path in (row.modules.decoder, row.modules.embedding, row.modules.head):
        model.get_submodule(path)
    assert type(model).__name__ == row.class_name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_spaces_are_the_sizes_of_the_weights(family: str) -> None:
    model = dense_model(family)
    row = FAMILIES[family].of(model.config)
    shape = shape_from_config(model.config, row)
    for index, layer in enumerate(shape.layers):
        query, kv = layer.query_heads * shape.head_dim, layer.kv_heads * shape.head_dim
        widths = {"hidden": shape.hidden_size, "query": query, "kv": kv, "ffn": layer.ffn_channels}
        widths |= {"shared": layer.shared_channels, "joint_query": query, "joint_key": kv}
        # Ranks 20 and 14; queries of 10 + 6 channels, of which 6 turn, and values of 12.
        widths |= {"query_latent": 20, "kv_latent": 14, "score": 4 * 16, "key_value": 4 * (10 + 12)}
        for projection in row.projections_of(layer):
            if EVERY_EXPERT in projection.path:
                continue
            linear = model.get_submodule(f"{row.modules.layers}.{index}.{projection.path}")
            found = linear.weight.shape[::-1] if isinstance(linear, Conv1D) else linear.weight.shape
            assert found == (sum(widths[s] for s in projection.outputs), widths[projection.inputs])
            assert isinstance(linear, Conv1D) == row.stored.transposed
    assert shape.vocabulary_size == model.get_submodule(row.modules.embedding).weight.shape[0]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_output_biases_are_where_the_shape_says(family: str, biased: bool) -> None:
    row = FAMILIES[family]
    model = dense_model(family, **{flag: biased for flag in row.bias_flags.values() if flag is not None})
    layer = shape_from_config(model.config, row).layers[0]
    for space, stated in (("query", layer.attention_bias), ("ffn", layer.ffn_bias)):
        if space == "ffn" and layer.experts:
            experts = model.get_submodule(f"{row.modules.layers}.0.{experts_path(family)}")
            assert stated == row.can_hold_bias("ffn") == hasattr(experts, "down_proj_bias")
            continue
        bias = model.get_submodule(f"{row.modules.layers}.0.{row.restoring(space, layer).path}").bias
        always = row.bias_flags.get(space, "never") is None
        assert (bias is not None) == stated == (always or (biased and space in row.bias_flags))


@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts_are_as_the_shape_says(family: str) -> None:
    """Gate and up rows one below the other, or in turns, in every expert."""
    row, model = FAMILIES[family], dense_model(family)
    shape = shape_from_config(model.config, row)
    layer, experts = shape.layers[1], model.get_submodule(f"{row.modules.layers}.1.{experts_path(family)}")
    assert layer.experts == {
        "mixtral": 3, "flex_olmo": 3, "olmoe": 4, "dots1": 6, "deepseek_v2": 6, "deepseek_v3": 6,
    }.get(family, 5)  # fmt: skip
    model.get_submodule(f"{row.modules.layers}.1.{row.mixture.router}")
    gate_up, down = (experts.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
    if any(stack.transposed for stack in row.stored.stacks):
        gate_up, down = gate_up.mT, down.mT
    assert gate_up.shape == (layer.experts, 2 * layer.ffn_channels, shape.hidden_size)
    assert down.shape == (layer.experts, shape.hidden_size, layer.ffn_channels)


def test_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(
        ModelError, match=r"'mamba' is not in the family table; supported are .*llama, .*families/table\.py"
    ):
        family_of("mamba")


def test_a_multimodal_model_is_told_where_its_text_model_is() -> None:
    with pytest.raises(
        ModelError, match=r"'gemma3' models see images too; only their text models, gemma3_text, .*; save"
    ):
        family_of("gemma3")


def test_head_counts_that_do_not_divide() -> None:
    config = tiny_config("llama")
    for kv_heads in (3, 0, 8):
        config.num_key_value_heads = kv_heads
        with pytest.raises(ModelError, match=f"got 4 and {kv_heads}"):
            shape_from_config(config, FAMILIES["llama"])


@pytest.mark.parametrize("family", [family for family in ("helium", "olmoe") if family in ALL_FAMILIES])
def test_heads_that_do_not_fill_the_hidden_size(family: str) -> None:
    """Helium's o_proj is [H, H] and OLMoE's norm of queries [H] whatever the heads are, and their classes fail."""
    config = tiny_config(family)
    assert shape_from_config(config, FAMILIES[family]).head_dim == 8
    config.head_dim = 12
    with pytest.raises(
        ModelError, match=rf"the heads of {family} must fill its hidden size: .* hidden_size \(32\), got 4 times 12"
    ):
        shape_from_config(config, FAMILIES[family])


def test_older_configurations_without_kv_heads_and_head_size() -> None:
    config = tiny_config("llama")
    config.num_key_value_heads = config.head_dim = None
    shape = shape_from_config(config, FAMILIES["llama"])
    assert shape.head_dim == 8
    assert shape.layers == (LayerShape(query_heads=4, kv_heads=4, ffn_channels=40),) * 2


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_plain_configurations_are_accepted(family: str) -> None:
    check_config(tiny_config(family), FAMILIES[family])


@pytest.mark.parametrize("family", sorted(family for family, row in FAMILIES.items() if row.since != "4.57"))
def test_a_family_that_needs_a_newer_transformers_says_so(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, and in the file that pruned checkpoints carry."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    shape, since = (
        shape_from_config(tiny_config("llama"), FAMILIES["llama"]),
        FAMILIES[family].since.replace(".", r"\."),
    )
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    monkeypatch.setattr("flap_export.models.modeling_pruned.transformers.__version__", "4.57.6")
    with pytest.raises(
        ModelError, match=rf"{family} is supported from transformers {since} on, found 4\.57\.6; pip install"
    ):
        open_checkpoint(tmp_path)
    model = SimpleNamespace(config=SimpleNamespace(model_type=f"flap_{family}"))
    with pytest.raises(ImportError, match=rf"{family} needs transformers {since}, this is 4\.57\.6; install it"):
        resize_decoder(model, "layers", pruned_section(FAMILIES[family], shape), 8)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"quantization_config": {"quant_method": "awq"}}, r"quantised.*full-precision"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
            r"quantised \(quantization_config\); save them in bfloat16 by `.*Mxfp4Config\(dequantize=True\)",
        ),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, r"\['chunked_attention'\]; supported are"),
        ("ernie4_5_moe", {"use_bias": True}, r"ernie4_5_moe is supported with use_bias equal to False only, got True"),
        ("opt", {"word_embed_proj_dim": 16}, r"opt is supported with word_embed_proj_dim equal to hidden_size \(32\)"),
        ("falcon", {"alibi": True}, r"falcon is supported with alibi equal to False only, got True"),
        (
            "falcon",
            {"parallel_attn": False},
            r"new_decoder_architecture=True and parallel_attn=False together",
        ),
        ("bloom", {"slow_but_exact": True}, r"bloom is supported with slow_but_exact equal to False only, got True"),
        (
            "mpt",
            {"attn_config": SimpleNamespace(alibi=False)},
            r"mpt is supported with attn_config.alibi equal to True",
        ),
        (
            "mpt",
            {"attn_config": SimpleNamespace(alibi_bias_max=16)},
            r"attn_config.alibi_bias_max equal to 8 only, got 16",
        ),
        ("mpt", {"no_bias": False}, r"mpt is supported with no_bias equal to True only, got False"),
        ("gptj", {"rotary_dim": None}, r"transformers' gptj cannot compute rotary_dim=False$"),
        ("gptj", {"rotary_dim": 5}, r"rotary_dim must be even and at most the 8 channels of a head, got 5; .* correct"),
        ("codegen", {"rotary_dim": 10}, r"rotary_dim must be .* at most the 8 channels of a head, got 10"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, r"num_experts_per_tok must lie in 1\.\.5 \(num_experts\), got 6"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 0]}, r"num_experts_per_tok must lie in 1\.\.5 .*, got \[2, 0\]"),
        ("glm4_moe", {"n_group": 2}, r"n_group must divide n_routed_experts \(5\) into groups of at least 2, got 2"),
        ("dots1", {"n_group": 6}, r"n_group must divide n_routed_experts \(6\) into groups of at least 2, got 6"),
        ("dots1", {"n_shared_experts": 0}, r"n_shared_experts must be at least 1, got 0"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, r"shared_expert_intermediate_size must be at least 1"),
        ("dots1", {"topk_group": 4}, r"topk_group must lie in 1\.\.3 \(n_group\), got 4"),
        ("gpt2", {"add_cross_attention": True}, r"gpt2 is supported with add_cross_attention equal to False only, got"),
        (
            "gpt_bigcode",
            {"add_cross_attention": True},
            r"gpt_bigcode is .*add_cross_attention equal to False only, got",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, r"gemma2 is .*use_bidirectional_attention.*False.*got True"),
        ("gemma", {"use_bidirectional_attention": True}, r"gemma is .*use_bidirectional_attention.*False.*got True"),
        ("internlm3", {"attention_bias": True}, r"internlm3 is supported with attention_bias equal to False only"),
        ("ministral", {"sliding_window": None}, r"layer_types holds sliding_attention, but sliding_window is None; .*"),
        ("ministral3", {"layer_types": ["full_attention"] * 2}, r"ministral3 is .* layer_types equal to None only"),
        (
            "smollm3",
            {"use_sliding_window": False},
            r"sliding_attention, but sliding_window is 6 and use_sliding_window is false; .* correct the fields",
        ),
        (
            "cohere2",
            {"sliding_window": None},
            r"layer_types holds sliding_attention, but sliding_window is None; .*",
        ),
        ("granite_swa", {"layer_rope_theta": [50.0]}, r"layer_rope_theta must hold 2 numbers, a layer each, got 1"),
        ("deepseek_v3", {"n_group": None}, r"transformers' deepseek_v3 cannot compute n_group=False"),
        ("deepseek_v3", {"scoring_func": "softmax"}, r"deepseek_v3 is .* scoring_func equal to sigmoid only, got soft"),
        ("deepseek_v3", {"rope_interleave": False}, r"deepseek_v3 is .* rope_interleave equal to True only, got False"),
        ("deepseek_v2", {"n_group": None}, r"cannot compute topk_method=group_limited_greedy and n_group=False"),
        ("deepseek_v2", {"norm_topk_prob": True}, r"deepseek_v2 is .* norm_topk_prob equal to False only, got True"),
        (
            "deepseek_v2",
            {"num_key_value_heads": 2},
            r"num_key_value_heads equal to num_attention_heads \(4\) only, got",
        ),
        ("stablelm", {"qk_layernorm": True}, r"stablelm is supported with qk_layernorm equal to False only, got True"),
    ],
)
def test_configurations_that_ask_for_something_else(family: str, fields: dict[str, Any], message: str) -> None:
    if family not in ALL_FAMILIES:
        pytest.skip("this version of transformers does not know the family")
    config = tiny_config(family)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ModelError, match=message):
        check_config(config, FAMILIES[family])


@pytest.mark.skipif("youtu" not in ALL_FAMILIES, reason="needs a newer transformers")
def test_latents_have_channels() -> None:
    config = tiny_config("youtu")
    object.__setattr__(config, "q_lora_rank", 0)
    with pytest.raises(ModelError, match=r"q_lora_rank must be at least 1, or null where .*, got 0"):
        shape_from_config(config, FAMILIES["youtu"].of(config))
