"""Models as transformers loads them, and every way a model directory can be unusable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    ALL_FAMILIES,
    ROPES,
    VOCABULARY,
    assert_same_logits,
    plain_model,
    randomise,
    tiny_checkpoint,
    tiny_config,
    tiny_pruned,
    tokens_of,
)
from torch import Tensor
from transformers import AutoModelForImageTextToText, Gemma3Config

from flap_export.errors import ModelError
from flap_export.loading import MetaLayers, check_weights, load_model, meta_model, open_checkpoint
from flap_export.weights import INDEX_FILE, SINGLE_FILE, Weights


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_dense_model_is_the_one_transformers_loads(family: str, tied: bool, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path / "dense", tie_word_embeddings=tied)
    expected = plain_model(path)
    found = load_model(path, dtype=torch.float32)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert_same_logits(logits_of(found, tokens_of(2, 12)), logits_of(expected, tokens_of(2, 12)), family)
    assert (found.lm_head.weight is found.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_scaling_is_read(rope: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", rope_parameters=ROPES[rope])
    expected = plain_model(path)
    found = load_model(path, dtype=torch.float32)
    assert torch.equal(logits_of(found, tokens_of(2, 12)), logits_of(expected, tokens_of(2, 12)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", dtype=torch.bfloat16)
    assert open_checkpoint(path).dtype == torch.bfloat16
    expected = plain_model(path, dtype)
    assert torch.equal(logits_of(load_model(path, dtype=dtype), tokens_of(2, 5)), logits_of(expected, tokens_of(2, 5)))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_a_checkpoint_states_outlasts_its_models(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(family, tmp_path / "dense", dtype=torch.bfloat16))
    stated = checkpoint.config.to_dict()
    meta_model(checkpoint, torch.float32)
    MetaLayers(checkpoint, torch.float16)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.config.to_dict() == stated


def test_shards_load_the_same(tmp_path: Path) -> None:
    whole = tiny_checkpoint("llama", tmp_path / "whole")
    sharded = tiny_checkpoint("llama", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    tokens = tokens_of(1, 5)
    expected = logits_of(load_model(whole, dtype=torch.float32), tokens)
    assert torch.equal(logits_of(load_model(sharded, dtype=torch.float32), tokens), expected)


def reference_logits(path: Path, tokens: Tensor) -> Tensor:
    """Llama written out in float64, but for rotary tables, which are float32 by definition of the model."""
    checkpoint = open_checkpoint(path)
    weights = {name: checkpoint.weights[name].double() for name in checkpoint.weights}
    config, shape = checkpoint.config, checkpoint.shape
    size, layer_shape = shape.head_dim, shape.layers[0]
    frequencies = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    angles = torch.arange(tokens.shape[1]).float()[:, None] * frequencies
    cosine, sine = (torch.cat([f(angles)] * 2, dim=-1).double() for f in (torch.cos, torch.sin))

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
        return x * cosine + half * sine

    hidden = weights["model.embed_tokens.weight"][tokens]
    causal = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)
    for index in range(len(shape.layers)):
        prefix = f"model.layers.{index}"
        x = norm(hidden, f"{prefix}.input_layernorm")
        q, k, v = (
            (x @ weights[f"{prefix}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(1, 2)
            for name in "qkv"
        )
        repeats = layer_shape.query_heads // layer_shape.kv_heads
        k, v = rotated(k).repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        attention = (rotated(q) @ k.mT / size**0.5 + causal).softmax(-1) @ v
        hidden = hidden + attention.transpose(1, 2).flatten(2) @ weights[f"{prefix}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{prefix}.post_attention_layernorm")
        gate, up = (x @ weights[f"{prefix}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        hidden = hidden + (gate * gate.sigmoid() * up) @ weights[f"{prefix}.mlp.down_proj.weight"].T
    return norm(hidden, "model.norm") @ weights["lm_head.weight"].T


def test_float64_is_float64_throughout(tmp_path: Path) -> None:
    """Transformers' norms alone would bring the error back to that of float32."""
    path = tiny_checkpoint("llama", tmp_path / "dense")
    tokens = tokens_of(2, 12)
    expected = reference_logits(path, tokens)
    found = logits_of(load_model(path, dtype=torch.float64), tokens)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-12
    single = logits_of(load_model(path, dtype=torch.float32), tokens)
    assert (single - expected).abs().max() > 1e-7


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_float64_in_every_family(family: str, tmp_path: Path) -> None:
    """No module falls back: the error against float32 is float32's, and two float64 runs in other shapes agree."""
    path = tiny_pruned(family, tmp_path)
    model, tokens = load_model(path, dtype=torch.float64), tokens_of(2, 12)
    together = logits_of(model, tokens)
    alone = torch.cat([logits_of(model, row[None, :7]) for row in tokens])
    assert (together[:, :7] - alone).abs().max() < 1e-12
    single = logits_of(load_model(path, dtype=torch.float32), tokens)
    assert 1e-9 < (single - together).abs().max() < 1e-3


# What may be wrong with a directory.


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny_checkpoint("llama", tmp_path / "dense")


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, path / SINGLE_FILE)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def load(path: str | Path) -> Any:
    return load_model(path, dtype=torch.float32)


def test_a_missing_tensor(dense: Path) -> None:
    edit_weights(dense, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ModelError, match=r"lack 'model\.layers\.1\.self_attn\.k_proj\.weight'; they are incomplete"):
        load(dense)


def test_many_missing_tensors_are_counted(dense: Path) -> None:
    edit_weights(dense, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name])
    with pytest.raises(ModelError, match=r"down_proj.*and 3 more tensors; they are incomplete"):
        load(dense)


def test_a_tensor_without_a_place(dense: Path) -> None:
    edit_weights(dense, lambda tensors: tensors.update({"model.layers.1.self_attn.o_proj.bias": torch.zeros(32)}))
    with pytest.raises(ModelError, match=r"o_proj\.bias', which a llama of this configuration has no place for"):
        load(dense)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(dense: Path) -> None:
    expected = logits_of(load(dense), tokens_of(1, 4))
    edit_weights(dense, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(logits_of(load(dense), tokens_of(1, 4)), expected)


def test_a_tied_model_may_store_its_head_too(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense", tie_word_embeddings=True)
    expected = logits_of(load(dense), tokens_of(1, 4))
    edit_weights(dense, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits_of(load(dense), tokens_of(1, 4)), expected)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    """Versions of transformers disagree which of the two such a model uses."""
    dense = tiny_checkpoint("llama", tmp_path / "dense", tie_word_embeddings=True)
    edit_weights(dense, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelError, match=r"'lm_head\.weight' that differs .*; set tie_word_embeddings to false"):
        load(dense)


@pytest.mark.parametrize("family", [f for f in ("gpt_neox", "llama", "mixtral", "opt") if f in ALL_FAMILIES])
def test_a_model_that_was_saved_without_its_head(family: str, tmp_path: Path) -> None:
    """Its names begin below `model`; a tied head is there all the same, an untied one may stand beside."""
    for tied in (True, False):
        path = tiny_checkpoint(family, tmp_path / str(tied), tie_word_embeddings=tied)
        expected = load(path).state_dict()
        base = f"{open_checkpoint(path).family.decoder.partition('.')[0]}."
        edit_weights(path, lambda t, base=base: [t.update({n.removeprefix(base): t.pop(n)}) for n in list(t)])
        found = load(path).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_text_model_of_one_that_sees_images(tmp_path: Path) -> None:
    """Saved as the message for such models says."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=tiny_config("gemma3_text", tie_word_embeddings=True),
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match=r"from_pretrained\(\.\.\.\)\.model\.language_model\.save_pretrained"):
        open_checkpoint(tmp_path / "whole")
    model.model.language_model.save_pretrained(tmp_path / "text")
    tokens = torch.arange(9).unsqueeze(0)
    expected = logits_of(model, tokens)
    assert torch.equal(logits_of(load(tmp_path / "text"), tokens), expected)


def test_weights_of_another_class(dense: Path) -> None:
    edit_weights(dense, lambda t: t.update({"score.weight": t.pop("lm_head.weight")[:2]}))
    with pytest.raises(
        ModelError, match=r"lack 'lm_head\.weight' and hold 'score\.weight' instead; .*LlamaForCausalLM"
    ):
        load(dense)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_of_fewer_bits(dtype: torch.dtype, dense: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(dense, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(
        ModelError, match=r"up_proj\.weight' .* holds (F8_E4M3|I8) numbers.*quantised; start from the full"
    ):
        load(dense)


def test_an_untied_model_must_store_its_head(dense: Path) -> None:
    edit_weights(dense, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lack 'lm_head\.weight'"):
        load(dense)


def test_a_tensor_of_another_shape(dense: Path) -> None:
    edit_weights(dense, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(32, 40)}))
    with pytest.raises(ModelError, match=r"up_proj\.weight'.*has shape \[32, 40\], the config.* asks for \[40, 32\]"):
        load(dense)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number(dense: Path, value: float) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][2, 3:5] = value

    edit_weights(dense, damage)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight'.*holds 2 values that are NaN or infinite"):
        load(dense)


@pytest.mark.parametrize("keep", [0, 5, 300, -10])
def test_a_truncated_file(dense: Path, keep: int) -> None:
    data = (dense / SINGLE_FILE).read_bytes()
    (dense / SINGLE_FILE).write_bytes(data[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors' is truncated or damaged.*fetch the checkpoint again"):
        load(dense)


def test_a_missing_shard(tmp_path: Path) -> None:
    dense = tiny_checkpoint("llama", tmp_path / "dense", max_shard_size="20KB")
    gone = sorted(dense.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"lacks the weight files {gone.name}; fetch the checkpoint again"):
        load(dense)


@pytest.mark.parametrize("content", ["{", "{}", "[]", "\0", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_damaged_index(dense: Path, content: str) -> None:
    (dense / INDEX_FILE).write_text(content)
    with pytest.raises(ModelError, match=r"index\.json' is not a safetensors index"):
        load(dense)


def test_an_index_that_names_a_tensor_its_shard_lacks(dense: Path) -> None:
    names = dict.fromkeys(Weights(dense), SINGLE_FILE)
    edit_weights(dense, lambda tensors: tensors.pop("model.norm.weight"))
    (dense / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"lacks 1 tensors that the index .* such as 'model\.norm\.weight'"):
        load(dense)


def test_pickled_weights_only(dense: Path) -> None:
    (dense / SINGLE_FILE).rename(dense / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights only; save them with `model\.save_pretrained"):
        load(dense)


def test_no_weights_at_all(dense: Path) -> None:
    (dense / SINGLE_FILE).unlink()
    with pytest.raises(ModelError, match=r"no safetensors weights.*expected model\.safetensors or"):
        load(dense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"'mamba' is not in the family table; supported are .*llama, .*qwen3"),
        ({"model_type": "flap_mamba"}, r"'mamba' is not in the family table"),
        ({"model_type": ...}, r"states no model_type"),
        ({"model_type": 3}, r"states no model_type"),
        ({"num_key_value_heads": 3}, r"multiple of num_key_value_heads, got 4 and 3"),
        ({"num_key_value_heads": 0}, r"multiple of num_key_value_heads, got 4 and 0"),
        ({"hidden_size": "wide"}, r"config\.json' is not a valid llama configuration"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be at least 1, got 0"),
        ({"num_hidden_layers": 3}, r"lack 'model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"layers\.1\..*which a llama of this configuration has no place for"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"config\.json': its weights are quantised"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            r"config\.json': rope_type is 'spiral'.*yarn",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
            r"mistral is supported with layer_types equal to None only, got \['full",
        ),
        ({"model_type": "flap_llama"}, r"is a pruned model's but lacks valid pruned\.layers"),
        ({"model_type": "flap_llama", "pruned": {"layers": [{"heads": 1}]}}, r"lacks valid pruned\.layers"),
    ],
)
def test_configurations_that_do_not_fit(dense: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(dense, **changes)
    with pytest.raises(ModelError, match=message):
        load(dense)


def test_a_pruned_checkpoint_of_another_depth(tmp_path: Path) -> None:
    pruned = tiny_pruned("llama", tmp_path)
    edit_config(pruned, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lists 4 pruned\.layers but 3 num_hidden_layers; .* prune again"):
        load(pruned)


def test_pruned_weights_that_do_not_fit_their_plan(tmp_path: Path) -> None:
    pruned = tiny_pruned("llama", tmp_path)
    layers = json.loads((pruned / "config.json").read_text())["pruned"]["layers"]
    layers[1]["ffn_channels"] += 1
    edit_config(pruned, pruned={"layers": layers})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\..*the configuration asks for"):
        load(pruned)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("\xff", "is not valid JSON"),
        ("[" * 99999, "is not valid JSON"),
    ],
)
def test_a_configuration_that_is_not_json(dense: Path, content: str, message: str) -> None:
    (dense / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=rf"config\.json' {message}"):
        load(dense)


@pytest.mark.parametrize(
    "values",
    [{"hidden_act": "nope"}, {"intermediate_size": -5}, {"head_dim": 0}, {"rope_parameters": {"rope_type": "zzz"}}],
)
def test_a_configuration_that_makes_no_model(dense: Path, values: dict[str, Any]) -> None:
    edit_config(dense, **values)
    with pytest.raises(ModelError, match=r"config\.json'"):
        load(dense)


def test_places_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match=r"is a file; name the directory that holds config\.json"):
        load(tmp_path / "file")
    with pytest.raises(ModelError, match=r"folder' holds no config\.json; name a Hugging Face model directory"):
        load(tmp_path / "folder")
    for nowhere in (tmp_path / "nowhere", "./models/none", "none"):
        with pytest.raises(ModelError, match="no model directory at"):
            load(nowhere)


def test_a_hub_name_without_a_network() -> None:
    """HF_HUB_OFFLINE is set by conftest.py."""
    with pytest.raises(ModelError, match=r"'no-such-organisation/no-model' is neither a local directory nor could"):
        load("no-such-organisation/no-model")


def test_opening_reads_no_weights(dense: Path) -> None:
    (dense / SINGLE_FILE).unlink()
    checkpoint = open_checkpoint(dense)
    assert checkpoint.shape.layers[0].ffn_channels == 40
    assert all(parameter.is_meta for parameter in meta_model(checkpoint, torch.float32).parameters())
    with pytest.raises(ModelError, match="no safetensors weights"):
        check_weights(meta_model(checkpoint, torch.float32), checkpoint)
