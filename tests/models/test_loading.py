"""Models as transformers loads them, and every way a model directory can be unusable."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
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
from transformers import AutoModelForImageTextToText, Gemma3Config, Mistral3Config

from flap_export.errors import ModelError
from flap_export.models.loading import MetaLayers, check_weights, load_model, meta_model
from flap_export.models.opening import open_checkpoint
from flap_export.models.weights import INDEX_FILE, SINGLE_FILE, Weights

NEEDS_TRANSFORMERS_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="4.57 knows no Ministral")


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


HALF_TURNED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0, "partial_rotary_factor": 0.5}
BESIDE = ("llama_4_scaling_beta", "original_max_position_embeddings")
"""What the class of Ministral 3 cannot do without."""
WITH_ROPE_PARAMETERS = [family for family in ALL_FAMILIES if getattr(tiny_config(family), "rope_parameters", None)]


@pytest.mark.parametrize("family", WITH_ROPE_PARAMETERS)
def test_heads_turn_in_part_where_the_class_can(family: str, tmp_path: Path) -> None:
    """With linear scaling, whose frequencies are as many as a configuration says whatever the class makes of them."""
    stated = tiny_config(family).rope_parameters
    if "full_attention" in stated:
        parameters = dict.fromkeys(stated, HALF_TURNED)
    else:
        parameters = {**{name: value for name, value in stated.items() if name.startswith(BESIDE)}, **HALF_TURNED}
    # Its longrope is the only scaling that Phi-3 takes.
    parameters |= {"rope_type": "default"} if family == "phi3" else {}
    path = tiny_checkpoint(family, tmp_path / "dense", rope_parameters=parameters)
    expected, tokens = plain_model(path), tokens_of(2, 7)
    try:
        logits = logits_of(expected, tokens)
    except RuntimeError:
        with pytest.raises(ModelError, match=r"channels of a head turn \(partial_rotary_factor, head_dim\)"):
            load_model(path, dtype=torch.float32)
    else:
        assert_same_logits(logits_of(load_model(path, dtype=torch.float32), tokens), logits, family)


@pytest.mark.parametrize("channels", [4, 12])
@pytest.mark.parametrize("family", sorted({"persimmon", "phi", "stablelm"} & set(ALL_FAMILIES)))
def test_heads_that_turn_an_odd_number_of_channels(family: str, channels: int, tmp_path: Path) -> None:
    """Transformers fails with three, and makes wider heads of those of which one turns."""
    sizes = {"hidden_size": 4 * channels, "num_key_value_heads": 4, "partial_rotary_factor": 0.25}
    path = tiny_checkpoint(family, tmp_path / "dense", **sizes)
    checkpoint = open_checkpoint(path)
    with pytest.raises(ModelError, match=rf"makes {channels // 4} channels of a head turn.* in pairs"):
        meta_model(checkpoint, torch.float32)


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
    # Transformers 4 keeps it beside the parameters.
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    frequencies = 1 / theta ** (torch.arange(0, size, 2).float() / size)
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


def test_heads_of_ernie_turn_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers turns ERNIE's in float32; here by products of complex numbers, two neighbouring channels each."""
    path, tokens = tiny_checkpoint("ernie4_5", tmp_path / "dense"), tokens_of(2, 12)
    found = logits_of(load_model(path, dtype=torch.float64), tokens)
    same: Any = load_model(path, dtype=torch.float64)
    for layer in same.model.layers:
        layer.self_attn.__dict__.pop("forward")

    def turned(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *_: Any) -> Any:
        half = cosine.shape[-1] // 2
        factors = torch.complex(cosine[..., :half].double(), sine[..., :half].double()).unsqueeze(1)
        pairs = (torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous()) for heads in (query, key))
        return tuple(torch.view_as_real(pair * factors).flatten(-2) for pair in pairs)

    assert (logits_of(same, tokens) - found).abs().max() > 1e-9
    monkeypatch.setattr(importlib.import_module(type(same).__module__), "apply_rotary_pos_emb", turned)
    assert (logits_of(same, tokens) - found).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["cohere", "cohere2"])
def test_heads_turn_in_float64(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As complex numbers, by hand; transformers brings them to float32 before."""
    path, tokens = tiny_pruned(family, tmp_path), tokens_of(2, 12)
    model = load_model(path, dtype=torch.float64)
    found = logits_of(model, tokens)
    # Transformers' own attention, in which another rotation can be put.
    for module in [module for module in model.modules() if "forward" in vars(module) and hasattr(module, "q_proj")]:
        del module.forward
    assert (logits_of(model, tokens) - found).abs().max() > 1e-9

    def turned(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        angles = torch.complex(cosine, sine)[:, None, :, ::2]
        pairs = [torch.view_as_complex(heads.unflatten(-1, (-1, 2))) for heads in (query, key)]
        return tuple(torch.view_as_real(pair * angles).flatten(-2) for pair in pairs)

    monkeypatch.setattr(f"transformers.models.{family}.modeling_{family}.apply_rotary_pos_emb", turned)
    assert (logits_of(model, tokens) - found).abs().max() < 1e-12


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
        base = f"{open_checkpoint(path).family.modules.decoder.partition('.')[0]}."
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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", sorted({"ministral3", "mistral"} & set(ALL_FAMILIES)))
def test_a_text_model_whose_head_is_beside_it(family: str, tied: bool, tmp_path: Path) -> None:
    """Saved as the message for such models says, to the letter."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config=tiny_config(family, tie_word_embeddings=tied),
        vision_config={**vision, "model_type": "pixtral", "image_size": 8, "patch_size": 4},
        image_token_index=VOCABULARY - 1,
        tie_word_embeddings=tied,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match=r"'mistral3' models see images too; .* ministral3 and mistral, are") as caught:
        open_checkpoint(tmp_path / "whole")
    code = str(caught.value).split("`")[1]
    code = code.replace("...", "source", 1).replace("...", "target", 1)
    names = {"AutoModelForImageTextToText": AutoModelForImageTextToText}
    exec(code, {**names, "source": tmp_path / "whole", "target": tmp_path / "text"})
    tokens = torch.arange(9).unsqueeze(0)
    assert torch.equal(logits_of(load(tmp_path / "text"), tokens), logits_of(model, tokens))


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


@pytest.mark.parametrize("stated", [None, "bfloat16"])
def test_the_dtype_is_asked_for_by_its_name(dense: Path, stated: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one is deprecated, and told of to whoever runs a command."""
    path = dense / "config.json"
    others = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps({**others, **({"torch_dtype": stated} if stated else {})}))
    checkpoint = open_checkpoint(dense)
    monkeypatch.setattr(type(checkpoint.config), "torch_dtype", property(lambda config: pytest.fail("asked")))
    assert checkpoint.dtype == getattr(torch, stated or "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number(dense: Path, value: float, dtype: torch.dtype) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(dtype)
        tensors[name][2, 3:5] = value

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


def test_two_sets_of_weights(dense: Path) -> None:
    other = dense / "other.safetensors"
    other.write_bytes((dense / SINGLE_FILE).read_bytes())
    names = dict.fromkeys(Weights(dense), other.name)
    (dense / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"must hold one set of weights, and holds two: .*; remove the one"):
        load(dense)
    # One file that the index lists is the same as without it.
    (dense / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE_FILE)}))
    load(dense)


def test_an_index_that_names_a_tensor_its_shard_lacks(dense: Path) -> None:
    names = dict.fromkeys(Weights(dense), SINGLE_FILE)
    edit_weights(dense, lambda tensors: tensors.pop("model.norm.weight"))
    (dense / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"lacks 1 tensors that the index .* such as 'model\.norm\.weight'"):
        load(dense)


def test_pickled_weights_only(dense: Path) -> None:
    (dense / SINGLE_FILE).rename(dense / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights only; .*\.save_pretrained\(\.\.\.\)`$"):
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
        pytest.param(
            {"model_type": "ministral3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            r"rope_parameters lack llama_4_scaling_beta, original_max_position_embeddings, which ministral3 cannot",
            marks=NEEDS_TRANSFORMERS_5,
        ),
        (
            {"model_type": "smollm3", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
            r"layer_types holds sliding_attention, but sliding_window is 4 and use_sliding_window is false",
        ),
        ({"model_type": "flap_llama"}, r"is a pruned model's but lacks valid pruned\.layers"),
        ({"model_type": "flap_llama", "pruned": {"layers": [{"heads": 1}]}}, r"lacks valid pruned\.layers"),
    ],
)
def test_configurations_that_do_not_fit(dense: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(dense, **changes)
    with pytest.raises(ModelError, match=message):
        load(dense)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 0}),
        ("ernie4_5_moe", {"moe_layer_interval": 0}),
        ("hy_v3", {"mlp_layer_types": []}),
        ("qwen2_moe", {"num_attention_heads": 0, "head_dim": None}),
    ],
)
def test_zeros_and_short_lists(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Transformers takes such configurations, and fails when it makes the model."""
    if family not in ALL_FAMILIES:
        pytest.skip("this version of transformers does not know the family")
    path = tiny_checkpoint(family, tmp_path / "dense")
    edit_config(path, **changes)
    with pytest.raises(ModelError, match=rf"config\.json' is not a valid {family} configuration: \w+"):
        open_checkpoint(path)


@NEEDS_TRANSFORMERS_5
def test_a_mistral_of_several_windows_is_a_ministral(tmp_path: Path) -> None:
    """As transformers takes it; without layer_types, or with none, it stays what it says."""
    path = tiny_checkpoint("ministral", tmp_path / "dense")
    tokens = tokens_of(2, 12)
    expected = logits_of(plain_model(path), tokens)
    edit_config(path, model_type="mistral")
    assert open_checkpoint(path).family.model_type == "ministral"
    assert torch.equal(logits_of(load(path), tokens), expected)
    assert torch.equal(logits_of(plain_model(path), tokens), expected)
    for layer_types in (None, ...):
        edit_config(path, layer_types=layer_types)
        assert open_checkpoint(path).family.model_type == "mistral"
        assert (logits_of(load(path), tokens) - expected).abs().max() > 0.1


def test_a_family_that_this_transformers_does_not_know_yet(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {"llama": None})
    edit_config(dense, model_type="qwen3")
    with pytest.raises(ModelError, match=r"transformers \d.* does not know qwen3 yet; pip install --upgrade transf"):
        open_checkpoint(dense)


@pytest.mark.skipif("apertus" not in ALL_FAMILIES, reason="4.57 cannot make an Apertus without weights")
@pytest.mark.parametrize("constant", ["beta", "eps"])
def test_constants_of_an_activation_are_the_checkpoints(constant: str, tmp_path: Path) -> None:
    path, tokens = tiny_checkpoint("apertus", tmp_path / "dense"), tokens_of(2, 12)
    before = logits_of(load(path), tokens)
    name = f"model.layers.1.mlp.act_fn.{constant}"
    edit_weights(path, lambda tensors: tensors.update({name: tensors[name] - 0.5}))
    found = logits_of(load(path), tokens)
    assert (found - before).abs().max() > 0.1
    assert torch.equal(found, logits_of(plain_model(path), tokens))
    edit_weights(path, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"lack 'model\.layers\.1\.mlp\.act_fn\.{constant}'; they are incomplete"):
        load(path)


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
    [
        {"hidden_act": "nope"},
        {"intermediate_size": -5},
        {"head_dim": 0},
        {"rope_parameters": {"rope_type": "zzz", "rope_theta": 5.0}},
    ],
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
    for nowhere in (tmp_path / "nowhere", "./models/none"):
        with pytest.raises(ModelError, match=r"no model directory at '.*(none|where)'$"):
            load(nowhere)
    with pytest.raises(ModelError, match=r"no model directory at 'none'; a name on the hub reads OWNER/NAME"):
        load("none")


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


@pytest.mark.parametrize(
    "fields", [{"return_dict": False}, {"output_attentions": True}, {"torch_dtype": "auto"}, {"dtype": "auto"}]
)
def test_settings_of_how_a_model_is_called_are_not_the_models(fields: dict[str, Any], tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    expected = load_model(path, dtype=torch.float32)(input_ids=tokens_of(1, 5)).logits
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | fields))
    output = load_model(path, dtype=torch.float32)(input_ids=tokens_of(1, 5))
    assert torch.equal(output.logits, expected)
    assert output.attentions is None
