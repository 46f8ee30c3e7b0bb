"""The exported artifact on ONNX Runtime against PyTorch, and what the graph and its files are made of."""

from __future__ import annotations

import errno
import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tiny import (
    ALL_FAMILIES,
    LONGROPE,
    OLD_FALCON,
    ROPES,
    layer_plan,
    plan_of,
    save_pruned,
    tiny_checkpoint,
    tiny_pruned,
    tiny_statistics,
    tokens_of,
)
from torch import Tensor

from flap_export.artifact import ARTIFACT_NAME, Artifact, load_artifact
from flap_export.errors import InputError, ModelError, OutputError
from flap_export.exporting import export
from flap_export.exporting.dialect import rotary_tables
from flap_export.models.alibi import slope_tables
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.models.weights import Weights

MAX_LENGTH = 20
PROMPT = 9
STEPS = 3
NODES = {
    "apertus": (34, 11),
    "bloom": (24, 18),
    "arcee": (20, 11),
    "codegen": (23, 12),
    "cohere": (29, 12),
    "cohere2": (20, 19),
    "cwm": (22, 18),
    "deepseek_v2": (76, 18),
    "deepseek_v3": (83, 20),
    "dots1": (69, 27),
    "ernie4_5": (22, 11),
    "ernie4_5_moe": (53, 20),
    "exaone": (22, 11),
    "exaone4": (24, 16),
    "exaone_moe": (54, 27),
    "falcon": (22, 11),
    "flex_olmo": (50, 20),
    "gemma": (21, 12),
    "gemma2": (34, 24),
    "gemma3_text": (25, 19),
    "glm": (23, 11),
    "glm4": (25, 11),
    "glm4_moe": (52, 20),
    "glm4_moe_lite": (68, 20),
    "gpt2": (21, 15),
    "gpt_bigcode": (22, 13),
    "gpt_neo": (20, 21),
    "gpt_neox": (22, 13),
    "gpt_oss": (67, 30),
    "granitemoe": (41, 22),
    "gptj": (20, 12),
    "granite": (24, 13),
    "granite_swa": (42, 22),
    "helium": (22, 11),
    "hunyuan_v1_dense": (24, 11),
    "hyperclovax": (26, 13),
    "iquestcoder": (22, 11),
    "jais2": (24, 11),
    "internlm3": (22, 11),
    "llama": (22, 11),
    "minicpm3": (40, 14),
    "ministral": (22, 18),
    "ministral3": (23, 20),
    "mistral": (22, 17),
    "hunyuan_v1_moe": (52, 20),
    "hy_v3": (55, 20),
    "mellum": (45, 27),
    "minimax_m2": (51, 20),
    "mixtral": (42, 26),
    "mpt": (18, 17),
    "nanochat": (22, 15),
    "nemotron": (20, 11),
    "olmo": (30, 11),
    "olmo2": (29, 11),
    "olmo3": (29, 18),
    "olmoe": (51, 20),
    "opt": (21, 20),
    "persimmon": (30, 11),
    "phi": (22, 12),
    "phi3": (22, 17),
    "qwen2": (23, 11),
    "qwen2_moe": (52, 20),
    "qwen3": (24, 11),
    "qwen3_moe": (45, 20),
    "seed_oss": (23, 11),
    "smollm3": (22, 17),
    "solar_open": (52, 20),
    "stablelm": (22, 11),
    "starcoder2": (23, 17),
    "vaultgemma": (32, 24),
    "youtu": (38, 11),
}
"""Nodes of a dense layer and around the layers, those of loops among them: what the passes reach, to be lowered when
they reach more.

Around the layers are positions, embedding, last norm, head, the last token's Slice, and a mask per window size.
"""
PLAIN_NODES = {
    "deepseek_v2": 38,
    "deepseek_v3": 38,
    "dots1": 24,
    "ernie4_5_moe": 22,
    "exaone_moe": 24,
    "glm4_moe": 25,
    "glm4_moe_lite": 38,
    "hy_v3": 24,
    "mellum": 24,
    "qwen2_moe": 23,
}
"""Nodes of a plain layer among mixtures."""
NORM_VECTORS = {
    "bloom": 2, "codegen": 2, "falcon": 2, "gpt2": 2, "gpt_bigcode": 2, "gpt_neo": 2, "gpt_neox": 2, "gptj": 2,
    "jais2": 2, "nanochat": 0, "nemotron": 2, "olmo": 0, "opt": 2, "persimmon": 2, "phi": 2, "stablelm": 2,
    "starcoder2": 2,
}  # fmt: skip
"""Weights and biases of one norm, where it is not one vector."""
NORMS_BEHIND = ("exaone4", "flex_olmo", "olmo2", "olmo3")
ALIGNMENT_BYTES = 1 << 16
DTYPES = {"float32": np.float32, "float16": np.float16}


def for_family(family: str, options: dict[str, Any]) -> Any:
    """A variant that this version of transformers may be too old for."""
    return pytest.param(family, options, marks=pytest.mark.skipif(family not in ALL_FAMILIES, reason="too old"))


NEEDS_TRANSFORMERS_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="4.57 cannot build it itself")


def session_of(directory: Path, graph: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(directory / graph, options, providers=["CPUExecutionProvider"])


def run_onnx(directory: Path, tokens: Tensor, prompt: int, graph: str = "model.onnx") -> list[NDArray[Any]]:
    """Logits of the prompt and of every further token; `present` is fed back as `past` by hand."""
    artifact, session = load_artifact(directory), session_of(directory, graph)
    batch = len(tokens)
    caches = {cache.past: np.full(cache.shape, 7, DTYPES[artifact.dtype]) for cache in artifact.caches(batch)}
    logits, position = [], 0
    for new in (prompt, *[1] * (tokens.shape[1] - prompt)):
        ids = tokens[:, position : position + new].numpy()
        feeds = {"input_ids": ids, "write_indices": np.full(batch, position, np.int64), **caches}
        accepted = {value.name for value in session.get_inputs()}
        outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
        assert accepted == set(feeds)
        logits.append(outputs["logits"])
        caches = {cache.past: outputs[cache.present] for cache in artifact.caches(batch)}
        position += new
    return logits


@torch.no_grad()
def torch_logits(checkpoint: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> NDArray[Any]:
    return load_model(checkpoint, dtype=dtype)(input_ids=tokens, use_cache=False).logits.float().numpy()


def check_parity(directory: Path, checkpoint: Path, tolerance: float = 1e-4, prompt: int = PROMPT) -> None:
    """Prefill and decode: caches start full of rubbish, so that reading beyond the valid keys shows."""
    tokens = tokens_of(2, prompt + STEPS)
    expected = torch_logits(checkpoint, tokens)
    assert expected.std() > 0.5
    found = run_onnx(directory, tokens, prompt)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=tolerance, rtol=tolerance)
    last = run_onnx(directory, tokens, prompt, "model-last.onnx")
    assert last[0].shape[1] == 1
    np.testing.assert_allclose(last[0][:, 0], expected[:, prompt - 1], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(last[-1][:, 0], expected[:, -1], atol=tolerance, rtol=tolerance)


def check_graphs(directory: Path, artifact: Artifact) -> None:
    for graph in artifact.graphs.values():
        onnx.checker.check_model(str(directory / graph), full_check=True)
        proto = onnx.load(directory / graph, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 24)]
        nodes = list(every_node(proto.graph))
        assert {node.domain for node in nodes} == {""}
        assert not proto.functions
        mixtures = sum(bool(layer.experts and layer.ffn_channels) for layer in artifact.shape.layers)
        assert Counter(node.op_type for node in nodes if bodies_of(node)) == Counter({"Scan": mixtures})
        check_node_count(proto, artifact)
        check_interface(proto, artifact, graph)
        read = {name for node in nodes for name in node.input}
        assert [value.name for value in proto.graph.initializer if value.name not in read] == []
        assert data_files(proto) == {"model.onnx.data"}
    assert external_entries(directory, artifact.graphs["all"]) == external_entries(directory, artifact.graphs["last"])


def bodies_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in bodies_of(node):
            yield from every_node(body)


def check_node_count(proto: onnx.ModelProto, artifact: Artifact) -> None:
    of_a_layer, around = NODES[artifact.family]
    of_a_plain_one = PLAIN_NODES.get(artifact.family, of_a_layer)
    allowed = around + sum(of_a_layer if layer.experts else of_a_plain_one for layer in artifact.shape.layers)
    nodes = list(every_node(proto.graph))
    assert len(nodes) <= allowed, Counter(node.op_type for node in nodes)


def check_interface(proto: onnx.ModelProto, artifact: Artifact, graph: str) -> None:
    caches, shape = artifact.caches(1), artifact.shape
    inputs = ["input_ids", "write_indices", *[cache.past for cache in caches]]
    outputs = ["logits", *[cache.present for cache in caches]]
    assert [value.name for value in proto.graph.input] == inputs
    assert [value.name for value in proto.graph.output] == outputs
    dims = {value.name: dims_of(value) for value in [*proto.graph.input, *proto.graph.output]}
    assert dims["input_ids"] == ["batch", "new_tokens"]
    assert dims["write_indices"] == ["batch"]
    tokens = 1 if graph == artifact.graphs["last"] else "new_tokens"
    assert dims["logits"] == ["batch", tokens, shape.vocabulary_size]
    for cache in caches:
        for name in (cache.past, cache.present):
            assert dims[name] == ["batch", *cache.shape[1:]], name
    element = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}[artifact.dtype]
    floats = {value.type.tensor_type.elem_type for value in [*proto.graph.input[2:], *proto.graph.output]}
    assert floats == {element}


def dims_of(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def external_entries(directory: Path, graph: str) -> dict[str, dict[str, str]]:
    proto = onnx.load(directory / graph, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.external_data
    }


def data_files(proto: onnx.ModelProto) -> set[str]:
    return {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}


def float_bytes(directory: Path) -> int:
    """Bytes of all float tensors but scalars; in the data file they lie without gaps beyond their alignment."""
    proto = onnx.load(directory / "model.onnx", load_external_data=False)
    external = {
        name: (int(entry["offset"]), int(entry["length"]))
        for name, entry in external_entries(directory, "model.onnx").items()
    }
    end = 0
    for offset, length in sorted(external.values()):
        assert end <= offset < end + ALIGNMENT_BYTES
        end = offset + length
    assert end == (directory / "model.onnx.data").stat().st_size
    floats = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims]
    inside = [t for t in floats if t.name not in external]
    return sum(length for _, length in external.values()) + sum(4 * int(np.prod(t.dims)) for t in inside)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_dense(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(family, tmp_path / "dense")
    artifact = export(dense, tmp_path / "onnx", max_length=MAX_LENGTH)
    assert load_artifact(tmp_path / "onnx") == artifact
    assert artifact.shape == open_checkpoint(dense).shape
    check_graphs(tmp_path / "onnx", artifact)
    check_parity(tmp_path / "onnx", dense)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_uneven_and_tied(family: str, tmp_path: Path) -> None:
    """Layers without heads, without channels and without either; the embedding is stored once."""
    pruned = tiny_pruned(family, tmp_path, tie_word_embeddings=True)
    artifact = export(pruned, tmp_path / "onnx", max_length=MAX_LENGTH)
    assert artifact.cache_layers == (1, 2)
    check_graphs(tmp_path / "onnx", artifact)
    check_parity(tmp_path / "onnx", pruned)
    weights = Weights(pruned)
    assert "lm_head.weight" not in weights
    # Granite SWA has tables for every layer, and two of them have no heads to turn.
    read = {
        tensor.name
        for tensor in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.initializer
    }
    every_table = rotary_tables(open_checkpoint(pruned), MAX_LENGTH)
    tables = sum(table.nbytes for name, table in every_table.items() if name in read)
    assert family == "granite_swa" or read >= every_table.keys()
    # Nothing reads the norms in front of the two emptied attentions and the two emptied FFNs, unless there is a router;
    # that of parallel blocks is read unless both are empty, as in the last layer; some families' are behind.
    plain = sum(not layer.experts and not layer.ffn_channels for layer in artifact.shape.layers)
    norms = 1 if artifact.shape.parallel_blocks else 0 if family in NORMS_BEHIND else 2 + plain
    unread = norms * NORM_VECTORS.get(family, 1) * artifact.shape.hidden_size * 4
    # A norm without weights, or with a row of them for every head, has ones in their place.
    hidden, head = artifact.shape.hidden_size, artifact.shape.head_dim
    ones = {"cohere": head, "nanochat": hidden + head, "olmo": hidden}.get(family, 0) * 4
    stored = sum(weights[name].nbytes for name in weights if weights.shape(name))
    # Layers with the same heads share their slopes.
    slopes = {id(table): table.nbytes for table in slope_tables(open_checkpoint(pruned)).values()}
    assert float_bytes(tmp_path / "onnx") == stored - unread + tables + ones + sum(slopes.values())
    assert (tmp_path / "onnx" / "plan.json").read_bytes() == (pruned / "plan.json").read_bytes()


@pytest.mark.parametrize("family", [family for family in ("olmo2", "olmoe") if family in ALL_FAMILIES])
def test_a_norm_over_all_heads_is_cut_once(family: str, tmp_path: Path) -> None:
    """A Slice of queries and one of keys in the two layers that lost heads and kept some; none where all stay."""
    pruned = tiny_pruned(family, tmp_path)
    slices = {}
    for name in ("dense", "pruned"):
        export(tmp_path / name, tmp_path / f"{name}-onnx", max_length=MAX_LENGTH)
        graph = onnx.load(tmp_path / f"{name}-onnx" / "model.onnx", load_external_data=False).graph
        made_by = {output: node.op_type for node in graph.node for output in node.output}
        slices[name] = [made_by[node.input[0]] for node in graph.node if node.op_type == "Slice"]
        assert not {node.op_type for node in graph.node} & {"Split", "ScatterND"}
    assert slices == {"dense": [], "pruned": ["RMSNormalization"] * 4}
    norms = [pruned_shape for pruned_shape in open_checkpoint(pruned).shape.layers if pruned_shape.query_heads]
    assert [(layer.joint_query_heads, layer.joint_key_heads) for layer in norms] == [(4, 2)] * 2


def test_every_initializer_is_the_checkpoints_weight(tmp_path: Path) -> None:
    """Bit for bit, transposed or joined as its name says; nothing is stored twice or left out."""
    dense = tiny_checkpoint("qwen2", tmp_path / "dense", dtype=torch.bfloat16)
    export(dense, tmp_path / "onnx", dtype="bfloat16", max_length=MAX_LENGTH)
    weights, seen = Weights(dense), set()
    proto = onnx.load(tmp_path / "onnx" / "model.onnx")
    for tensor in proto.graph.initializer:
        names = tensor.name.split("+")
        if names[0] not in weights:
            continue
        parts = [weights[name] for name in names]
        is_read_by_matmul = parts[0].ndim == 2 and "embed_tokens" not in tensor.name
        expected = torch.cat([part.T if is_read_by_matmul else part for part in parts], dim=-1)
        found = onnx.numpy_helper.to_array(tensor)
        assert found.dtype == ml_dtypes.bfloat16
        assert np.array_equal(found.view(np.uint16), expected.contiguous().view(torch.uint16).numpy()), tensor.name
        assert seen.isdisjoint(names)
        seen.update(names)
    assert seen == set(weights)


@pytest.mark.parametrize(
    "family", [family for family in ("gemma2", "gemma3_text", "nemotron") if family in ALL_FAMILIES]
)
def test_what_norms_add_to_their_weights_is_stored_with_them(family: str, tmp_path: Path) -> None:
    """1 + weight, added in float32 and rounded once."""
    dense = tiny_checkpoint(family, tmp_path / "dense", dtype=torch.bfloat16)
    export(dense, tmp_path / "onnx", dtype="float16", max_length=MAX_LENGTH)
    weights = Weights(dense)
    norms = {name: 1 + weights[name].double() for name in weights if name.endswith("norm.weight")}
    proto = onnx.load(tmp_path / "onnx" / "model.onnx")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert norms.keys().isdisjoint(found)
    for name, expected in norms.items():
        stored = found[f"{name.removesuffix('.weight')}.scale"]
        assert np.array_equal(stored, expected.to(torch.float16).numpy()), name


def test_float16(tmp_path: Path) -> None:
    """Mistral, whose window mask holds the lowest number of the dtype."""
    dense = tiny_checkpoint("mistral", tmp_path / "dense", dtype=torch.float16)
    artifact = export(dense, tmp_path / "onnx", dtype="float16", max_length=MAX_LENGTH)
    check_graphs(tmp_path / "onnx", artifact)
    check_parity(tmp_path / "onnx", dense, tolerance=0.05)


def test_a_window_as_long_as_the_cache_needs_no_mask(tmp_path: Path) -> None:
    dense = tiny_checkpoint("mistral", tmp_path / "dense", sliding_window=MAX_LENGTH)
    export(dense, tmp_path / "onnx", max_length=MAX_LENGTH)
    check_parity(tmp_path / "onnx", dense, prompt=MAX_LENGTH - STEPS)
    proto = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert "Where" not in {node.op_type for node in proto.graph.node}


# The attention of Qwen2-MoE names its window to no attention function.
@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen2_moe", marks=NEEDS_TRANSFORMERS_5)])
def test_windows_in_some_layers_only(family: str, tmp_path: Path) -> None:
    windows = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
    dense = tiny_checkpoint(family, tmp_path / "dense", use_sliding_window=True, **windows)
    artifact = export(dense, tmp_path / "onnx")
    assert artifact.max_length == 64, "all of the model's positions, where they are few"
    check_parity(tmp_path / "onnx", dense)
    proto = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    masked = [len(node.input) == 4 for node in proto.graph.node if node.op_type == "Attention"]
    assert masked == [False, True]


def test_scaled_rotary_embedding(tmp_path: Path) -> None:
    """One kind all the way; the tables of the others are checked in test_dialect.py."""
    dense = tiny_checkpoint("llama", tmp_path / "dense", rope_parameters=ROPES["llama3"])
    plain = tiny_checkpoint("llama", tmp_path / "plain")
    tokens = tokens_of(2, 12)
    assert np.abs(torch_logits(dense, tokens) - torch_logits(plain, tokens)).max() > 0.05
    export(dense, tmp_path / "onnx", max_length=MAX_LENGTH)
    check_parity(tmp_path / "onnx", dense)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {"do_layer_norm_before": False, "enable_bias": False}),
        pytest.param("opt", {"layer_norm_elementwise_affine": False}, marks=NEEDS_TRANSFORMERS_5),
        for_family("bloom", {"apply_residual_connection_post_layernorm": True}),
        for_family("bloom", {"hidden_size": 48, "num_attention_heads": 6}),
        ("falcon", {**OLD_FALCON, "bias": True}),
        ("falcon", {**OLD_FALCON, "multi_query": False, "parallel_attn": False, "activation": "relu"}),
        ("falcon", {"num_attention_heads": 8, "num_ln_in_parallel_attn": 1, "rope_parameters": ROPES["linear"]}),
        for_family(
            "gpt2", {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "activation_function": "relu"}
        ),
        for_family("gpt_bigcode", {"multi_query": False, "activation_function": "relu"}),
        for_family("gpt_bigcode", {"scale_attn_weights": False, "attention_softmax_in_fp32": False}),
        for_family("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"}),
        for_family("gpt_neox", {"attention_bias": False, "rope_parameters": ROPES["linear"]}),
        for_family("codegen", {"num_attention_heads": 8}),
        for_family(
            "gpt_neo", {"attention_types": lambda layers: [[["global"], layers]], "activation_function": "relu"}
        ),
        for_family("mpt", {"attn_config": {}, "hidden_size": 48, "num_attention_heads": 6}),
        for_family("gptj", {"rotary_dim": 8, "activation_function": "relu"}),
        ("gemma2", {"attention_bias": True, "final_logit_softcapping": None, "num_key_value_heads": 4}),
        ("gemma2", {"attn_logit_softcapping": None, "num_key_value_heads": 1}),
        ("gemma3_text", {"final_logit_softcapping": 3.0, "attention_bias": True}),
        ("phi3", {"partial_rotary_factor": 1.0, "num_key_value_heads": 4}),
        for_family("ernie4_5", {"use_bias": True}),
        for_family("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
        for_family("helium", {"attention_bias": True, "num_key_value_heads": 4}),
        pytest.param("ministral3", {"sliding_window": 6}, marks=NEEDS_TRANSFORMERS_5),
        for_family("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
        for_family("smollm3", {"use_sliding_window": False, "attention_bias": True}),
        ("cohere", {"use_qk_norm": False, "attention_bias": True}),
        for_family("cohere2", {"attention_bias": True, "num_key_value_heads": 4}),
        ("glm", {"partial_rotary_factor": 1.0, "attention_bias": False}),
        for_family("nemotron", {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0}),
        ("olmo", {"clip_qkv": None, "attention_bias": True}),
        ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
        for_family("olmoe", {"clip_qkv": None, "attention_bias": True}),
        ("phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
        for_family("stablelm", {"use_parallel_residual": False, "use_qkv_bias": False}),
        for_family("stablelm", {"partial_rotary_factor": 1.0, "num_key_value_heads": 4}),
        ("starcoder2", {"use_bias": False, "sliding_window": None}),
    ],
    ids=[
        "opt-norms-after",
        "opt-plain-norms",
        "bloom-normed-residuals",
        "bloom-six-heads",
        "falcon-mqa",
        "falcon-mha",
        "falcon-one-norm",
        "gpt2-unscaled",
        "gpt_bigcode-mha",
        "gpt_bigcode-unscaled",
        "gpt_neox-one-by-one",
        "gpt_neox-scaled",
        "codegen-two-heads-in-a-block",
        "gpt_neo-without-windows",
        "mpt-six-heads",
        "gptj-whole-heads-turn",
        "gemma2-biases",
        "gemma2-uncapped",
        "gemma3-capped",
        "phi3-mha",
        "ernie-biases",
        "exaone-turning-everywhere",
        "helium-mha-biases",
        "ministral3-window",
        "seed-output-biases",
        "smollm3-without-windows",
        "cohere-plain-heads",
        "cohere2-biases",
        "glm-whole-heads-turn",
        "nemotron-biases",
        "olmo-unclipped",
        "olmo2-mha-biases",
        "olmoe-unclipped-biases",
        "phi-norms",
        "stablelm-in-turn",
        "stablelm-whole-heads-turn",
        "starcoder2-plain",
    ],
)
def test_what_a_configuration_switches(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    pruned = tiny_pruned(family, tmp_path, **options)
    export(pruned, tmp_path / "onnx", max_length=MAX_LENGTH)
    check_parity(tmp_path / "onnx", pruned)


def test_longrope_up_to_its_original_length(tmp_path: Path) -> None:
    dense = tiny_checkpoint("phi3", tmp_path / "dense", **LONGROPE)
    with pytest.raises(InputError, match=r"max_length 17 is beyond the 16 positions.*longrope.*lower it to 16"):
        export(dense, tmp_path / "onnx", max_length=17)
    assert export(dense, tmp_path / "onnx").max_length == 16
    check_parity(tmp_path / "onnx", dense, prompt=16 - STEPS)


def test_nothing_left_of_attention_at_all(tmp_path: Path) -> None:
    """No cache is left; the interface still asks for `write_indices`."""
    dense = tiny_checkpoint("llama", tmp_path / "dense")
    checkpoint = open_checkpoint(dense)
    plan = plan_of(checkpoint, [layer_plan(checkpoint, 0, [], range(5)), layer_plan(checkpoint, 1, [], [])])
    pruned = save_pruned(dense, plan, tmp_path / "pruned", tiny_statistics(dense, tmp_path))
    artifact = export(pruned, tmp_path / "onnx", max_length=MAX_LENGTH)
    check_graphs(tmp_path / "onnx", artifact)
    check_parity(tmp_path / "onnx", pruned)


@pytest.fixture(scope="module")
def dense_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama") / "dense")


def test_the_working_directory_and_globals_are_left_alone(dense_llama: Path, tmp_path: Path) -> None:
    """A second export gives the same bytes, and transformers computes as before in the same process."""
    from transformers.models.llama import modeling_llama

    before, rotary = torch_logits(dense_llama, tokens_of(1, 5)), modeling_llama.apply_rotary_pos_emb
    first = export(dense_llama, tmp_path / "a", max_length=MAX_LENGTH)
    second = export(dense_llama, tmp_path / "b", max_length=MAX_LENGTH)
    assert first == second
    for name in ("model.onnx", "model-last.onnx", "model.onnx.data", ARTIFACT_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert np.array_equal(torch_logits(dense_llama, tokens_of(1, 5)), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, "max_length 65 is beyond the model's 64 positions"),
        ({"max_length": 1}, "max_length must be at least 2"),
    ],
)
def test_wrong_requests(dense_llama: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(dense_llama, tmp_path / "onnx", **{"max_length": MAX_LENGTH, **options})
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_run_without_being_installed_exports(
    dense_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.version

    def version(package: str) -> str:
        if package == "flap-export":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    exported = export(dense_llama, tmp_path / "onnx", max_length=8)
    assert set(exported.versions) == {"torch", "transformers", "onnx", "onnx-ir", "onnxscript"}


def test_an_output_directory_with_other_files_is_not_touched(dense_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(OutputError, match=r"photos.*holds something else.*no artifact\.json"):
        export(dense_llama, tmp_path / "photos", max_length=MAX_LENGTH)
    with pytest.raises(OutputError, match=r"is a file; name a directory"):
        export(dense_llama, tmp_path / "photos" / "cat.jpg", max_length=MAX_LENGTH)
    assert [(path.name, path.read_text()) for path in (tmp_path / "photos").iterdir()] == [("cat.jpg", "meow")]
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second tensor finds the disk full; NumPy's `tofile` then raises an error without a number."""
    import onnx_ir

    write, calls = onnx_ir.Tensor.tofile, []

    def refuse(self: Any, file: Any) -> None:
        calls.append(self)
        if len(calls) > 1:
            raise OSError("1024 requested and 0 written")
        write(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(onnx_ir.Tensor, "tofile", refuse)
        yield
    assert len(calls) > 1


def test_a_full_disk_leaves_nothing_new_behind(dense_llama: Path, tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(OutputError, match=r"the disk is full.*nothing was left behind.*--output"):
        export(dense_llama, tmp_path / "onnx", max_length=MAX_LENGTH)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_artifact(
    dense_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "onnx"
    old.mkdir()
    (old / ARTIFACT_NAME).write_text("the old one")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flap_export.exporting.streaming.ir.save", refuse)
    with pytest.raises(OutputError, match="the disk is full"):
        export(dense_llama, old, max_length=MAX_LENGTH)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert (old / ARTIFACT_NAME).read_text() == "the old one"


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_damaged_weight_stops_the_export(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    dense = tiny_checkpoint("llama", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors[name].view(-1)[3] = float("inf")
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name}.*1 values that are NaN or infinite"):
        export(dense, tmp_path / "onnx", max_length=MAX_LENGTH)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_weight_beyond_float16_stops_the_export(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense, name = tiny_checkpoint("llama", tmp_path / "dense"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(dense / "model.safetensors")
    tensors[name].view(-1)[3] = 7e4
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name}.*beyond 65504.*export in bfloat16 or float32"):
        export(dense, tmp_path / "onnx", dtype="float16", max_length=MAX_LENGTH)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
