"""The modelling file that travels with a checkpoint, where flap_export is not installed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    ALL_FAMILIES,
    PLAIN_FAMILIES,
    VOCABULARY,
    keep_all_plan,
    save_pruned,
    tiny_checkpoint,
    tiny_pruned,
    tiny_statistics,
    tokens_of,
)
from transformers import AutoModelForCausalLM

from flap_export.calibration.statistics import cut_spaces
from flap_export.families import EVERY_EXPERT, FAMILIES
from flap_export.models import modeling_pruned
from flap_export.models.attention import cache_argument
from flap_export.models.loading import load_model, pruned_section
from flap_export.models.modeling_pruned import PrunedConfig, PrunedForCausalLM
from flap_export.models.opening import open_checkpoint

ROUTERS = {
    "gpt_oss": "mlp.router.weight",
    "granitemoe": "block_sparse_moe.router.weight",
    "hunyuan_v1_moe": "mlp.gate.wg.weight",
}
FOREIGN_MACHINE = """
import importlib.abc, inspect, json, sys, warnings

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flap_export":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import flap_export
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("flap_export can be imported")

import torch
from transformers import AutoModelForCausalLM

warnings.simplefilter("error")
# By what older versions of transformers compile their GPTBigCode with.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
results = {}
for name, directory in json.load(sys.stdin).items():
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    tokens = torch.load(sys.argv[1])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        # In two pieces, by the cache alone: positions and mask follow from the length it tells.
        start = model(input_ids=tokens[:, :4], use_cache=True)
        argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        rest = model(input_ids=tokens[:, 4:], **{argument: start[argument]})
        pieces = torch.cat([start.logits, rest.logits], dim=1)
    generated = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.save((logits, generated.sequences, torch.stack(generated.logits, dim=1), pieces), f"{directory}/found.pt")
    results[name] = {
        "flap_export": "flap_export" in sys.modules,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }
json.dump(results, sys.stdout)
"""


def test_it_needs_transformers_only(tmp_path: Path) -> None:
    """Same logits, and the same tokens with a cache as without; layer 0 has no attention in every one of them."""
    variants = {
        **{family: {} for family in ALL_FAMILIES},
        **{f"{family}-tied": {"tie_word_embeddings": True} for family in ("llama", "qwen3")},
    }
    directories = {
        name: tiny_pruned(name.removesuffix("-tied"), tmp_path / name, **overrides)
        for name, overrides in variants.items()
    }
    tokens = tokens_of(2, 9)
    torch.save(tokens, tmp_path / "tokens.pt")
    answer = subprocess.run(
        [sys.executable, "-c", FOREIGN_MACHINE, tmp_path / "tokens.pt"],
        input=json.dumps({name: str(directory) for name, directory in directories.items()}),
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    clean = {"flap_export": False, "missing": [], "unexpected": []}
    assert json.loads(answer.stdout) == dict.fromkeys(directories, clean)
    for name, directory in directories.items():
        model = load_model(directory, dtype=torch.float32)
        logits, generated, step_logits, pieces = torch.load(directory / "found.pt")
        with torch.no_grad():
            torch.testing.assert_close(logits, model(input_ids=tokens).logits, atol=1e-5, rtol=1e-5, msg=name)
            torch.testing.assert_close(pieces, logits, atol=1e-4, rtol=1e-4, msg=name)
            # Every step with the cache against all tokens so far without one.
            whole = model(input_ids=generated[:, :-1], use_cache=False).logits[:, tokens.shape[1] - 1 :]
        assert whole.std() > 0.5
        torch.testing.assert_close(step_logits, whole, atol=1e-4, rtol=1e-4, msg=name)
        assert torch.equal(generated[:, tokens.shape[1] :], whole.argmax(-1)), name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_resized_layer_has_the_stated_sizes(family: str, tmp_path: Path) -> None:
    pruned = tiny_pruned(family, tmp_path)
    checkpoint, model = open_checkpoint(pruned), load_model(pruned, dtype=torch.float32)
    size, row = checkpoint.shape.head_dim, checkpoint.family
    for index, shape in enumerate(checkpoint.shape.layers):
        layer = model.get_submodule(f"{row.modules.layers}.{index}")
        query, kv, ffn = shape.query_heads * size, shape.kv_heads * size, shape.ffn_channels
        widths = {"hidden": 32, "query": query, "kv": kv, "ffn": ffn, "shared": shape.shared_width}
        widths |= {"joint_query": 4 * size, "joint_key": 2 * size} if query else {"joint_query": 0, "joint_key": 0}
        widths |= {"query_latent": 20, "kv_latent": 14}
        widths |= {"score": 16 * shape.query_heads, "key_value": 22 * shape.query_heads}
        rows = {"query": shape.query_heads, "kv": shape.kv_heads} if shape.query_heads else {}
        of_heads = {name: rows[space] for name, space in row.heads.parameters.items() if space in rows}
        assert {name: len(layer.get_parameter(name)) for name in of_heads} == of_heads
        head_norms = {name: (count, size) for name, count in of_heads.items() if layer.get_parameter(name).ndim == 2}
        router = {ROUTERS.get(family, "mlp.gate.weight"): (shape.experts, 32)} if shape.experts else {}
        router |= {"mlp.shared_expert_gate.weight": (1, 32)} if shape.experts and family == "qwen2_moe" else {}
        correction = "mlp.gate.moe_statics.e_score_correction_bias"
        router |= {correction: (1, shape.experts)} if shape.experts and family == "ernie4_5_moe" else {}
        found = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.ndim == 2}
        latents = {"self_attn.q_a_proj.weight": (20, 32), "self_attn.kv_a_proj_with_mqa.weight": (14 + 6, 32)}
        router |= {name: rows for name, rows in latents.items() if name in found and query}
        assert found == router | head_norms | {
            f"{p.at(expert)}.weight": (sum(widths[space] for space in p.outputs), widths[p.inputs])
            for p in row.projections_of(shape)
            if widths[p.space]
            for expert in (range(shape.experts) if EVERY_EXPERT in p.path else [None])
        }
        norms = {
            name
            for name, _ in layer.named_parameters()
            if type(layer.get_submodule(name.rpartition(".")[0])).__name__.endswith(("Norm", "LayerNorm1P"))
            and not name.startswith(f"{row.modules.attention}.")
        }
        norms |= {*router, "mlp.router.bias"}
        left = {name for name, _ in layer.named_parameters()} - norms
        if shape.query_heads:
            groups = shape.query_heads // shape.kv_heads
            counts = {
                "num_heads": shape.query_heads,
                "n_heads": shape.query_heads,
                "num_attention_heads": shape.query_heads,
                "num_key_value_heads": shape.kv_heads,
                "num_key_value_groups": groups,
            }
            attention = layer.get_submodule(row.modules.attention)
            stated = {name: getattr(attention, name) for name in counts if hasattr(attention, name)}
            assert stated or family == "gpt_neox", "which reads them off its weights"
            assert stated == {name: counts[name] for name in stated}
        else:
            bias = f"{row.restoring('query', shape).path}.bias"
            assert {name for name in left if name.startswith(f"{row.modules.attention}.")} == {bias}
        if not shape.ffn_channels:
            assert not shape.shared_channels
            biases = {f"{path}.bias" for space in cut_spaces(shape)[1:] for path in row.restoring_paths(space, shape)}
            assert {name for name in left if not name.startswith(f"{row.modules.attention}.")} == biases
        elif hasattr(layer, "mlp"):
            assert getattr(layer.mlp, "intermediate_size", shape.ffn_channels) == shape.ffn_channels


def test_it_saves_and_loads_through_transformers(tmp_path: Path) -> None:
    """`save_pretrained` of the class gives what it was loaded from."""
    pruned = tiny_pruned("llama", tmp_path)
    checkpoint, model = open_checkpoint(pruned), load_model(pruned, dtype=torch.float32)
    raw = checkpoint.config.to_dict()
    config = PrunedConfig(pruned=pruned_section(checkpoint.family, checkpoint.shape), **raw)
    same = PrunedForCausalLM(config).eval()
    same.load_state_dict(model.state_dict(), strict=True)
    same.save_pretrained(tmp_path / "copy")
    again = PrunedForCausalLM.from_pretrained(tmp_path / "copy").eval()
    tokens = tokens_of(2, 9)
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_checkpoints_from_before_there_were_joint_norms_are_read(tmp_path: Path) -> None:
    pruned = tiny_pruned("llama", tmp_path)
    tokens, shape = tokens_of(2, 9), open_checkpoint(pruned).shape
    config = json.loads((pruned / "config.json").read_text())
    for layer in config["pruned"]["layers"]:
        assert (layer.pop("joint_query_heads"), layer.pop("joint_key_heads")) == (0, 0)
    with torch.no_grad():
        expected = load_model(pruned, dtype=torch.float32)(input_ids=tokens).logits
        (pruned / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(pruned).shape == shape
        loaded = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True, dtype=torch.float32)
        torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_copy_names_its_family(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(family, tmp_path / "dense")
    checkpoint = open_checkpoint(dense)
    same = save_pruned(dense, keep_all_plan(checkpoint), tmp_path / "same", tiny_statistics(dense, tmp_path))
    source = (same / "modeling_pruned.py").read_text()
    name, config_name = FAMILIES[family].class_name, type(checkpoint.config).__name__
    assert f"from transformers import {config_name} as BaseConfig" in source
    assert f"from transformers import {name} as BaseForCausalLM" in source
    assert "flap_export" not in source


@pytest.mark.parametrize(
    ("version", "since", "needed"),
    [
        ("4.57.6", "5", True),
        ("5.0.0", "5", False),
        ("5.9.1", "5.14", True),
        ("5.14.0.dev0", "5.14", False),
        ("6.0.0", "5.14", False),
    ],
)
def test_a_transformers_that_is_too_old_says_so(
    version: str, since: str, needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_pruned("llama", tmp_path))
    section = {**pruned_section(checkpoint.family, checkpoint.shape), "since": since}
    config = PrunedConfig(pruned=section, **checkpoint.config.to_dict())
    monkeypatch.setattr(modeling_pruned, "transformers", SimpleNamespace(__version__=version))
    refused = pytest.raises(ImportError, match=f"llama needs transformers {since}, this is {version}; install it")
    with refused if needed else nullcontext():
        PrunedForCausalLM(config)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_resized_projections_are_the_familys_own_modules(family: str, tmp_path: Path) -> None:
    """Falcon's add their bias to a rounded product."""
    checkpoint = open_checkpoint(tiny_pruned(family, tmp_path))
    models = [load_model(tmp_path / name, dtype=torch.float32) for name in ("dense", "pruned")]
    for projection in checkpoint.family.projections:
        path = f"{checkpoint.family.modules.layers}.1.{projection.path}"
        dense, resized = (model.get_submodule(path) for model in models)
        assert type(resized) is type(dense)


@pytest.mark.parametrize("family", ["llama", "falcon", "opt", "gemma3_text", "olmo2"])
def test_every_parameter_has_a_gradient(family: str, tmp_path: Path) -> None:
    """Whoever trains in parallel waits for all of them, also around attentions and FFNs that are empty."""
    model = AutoModelForCausalLM.from_pretrained(tiny_pruned(family, tmp_path), trust_remote_code=True)
    tokens = tokens_of(2, 9)
    evaluated = model(input_ids=tokens).logits
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert torch.equal(model.eval()(input_ids=tokens).logits, evaluated)


# --- what transformers offers around a model


def opened(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attention_weights_are_those_of_every_layer_in_its_place(family: str, tmp_path: Path) -> None:
    """Also of layers without heads, which have weights of no head."""
    directory = tiny_pruned(family, tmp_path)
    heads = [layer.query_heads for layer in open_checkpoint(directory).shape.layers]
    assert 0 in heads
    model, tokens = opened(directory, attn_implementation="eager"), tokens_of(2, 9)
    with torch.no_grad():
        given = model(input_ids=tokens, output_attentions=True, output_hidden_states=True)
        assert [weights.shape for weights in given.attentions] == [(2, count, 9, 9) for count in heads]
        assert len(given.hidden_states) == len(heads) + 1
        start = model(input_ids=tokens[:, :4], use_cache=True)
        cache = {cache_argument(model): start[cache_argument(model)]}
        rest = model(input_ids=tokens[:, 4:], output_attentions=True, **cache)
    assert [weights.shape for weights in rest.attentions] == [(2, count, 5, 9) for count in heads]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_generates_in_every_way(family: str, tmp_path: Path) -> None:
    directory = tiny_pruned(family, tmp_path)
    model, dense, tokens = opened(directory), opened(tmp_path / "dense"), tokens_of(1, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    greedy = model.generate(tokens, **settings)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(tokens, **settings, **static), greedy)
    # Transformers 4.57 compares what an assistant gives with the token that ends a text, whether there is one or not.
    ended = {**settings, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
    for one, assistant in ((model, {"assistant_model": dense}), (dense, {"assistant_model": model})):
        assert torch.equal(one.generate(tokens, **ended, **assistant), one.generate(tokens, **ended))
    beams = model.generate(tokens, **settings, num_beams=3)
    with torch.no_grad():
        likelihoods = [
            model(input_ids=found).logits.log_softmax(-1)[:, 4:-1].gather(-1, found[:, 5:, None]).sum()
            for found in (beams, greedy)
        ]
    assert likelihoods[0] >= likelihoods[1] - 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_that_are_computed_again_give_the_same_gradients(family: str, tmp_path: Path) -> None:
    directory, tokens, gradients = tiny_pruned(family, tmp_path), tokens_of(2, 9), []
    for again in (False, True):
        model = opened(directory).train()
        if again:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_it_compiles_as_one_graph(tmp_path: Path) -> None:
    model, tokens = opened(tiny_pruned("llama", tmp_path)), tokens_of(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, expected = (one(input_ids=tokens, use_cache=False).logits for one in (compiled, model))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_can_be_copied(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model, tokens = load_model(tiny_pruned("llama", tmp_path), dtype=torch.float32), tokens_of(2, 9)
    with torch.no_grad():
        assert torch.equal(copied(model)(input_ids=tokens).logits, model(input_ids=tokens).logits)
