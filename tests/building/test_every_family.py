"""Engines for an A100 of every family, dense and uneven, in both half precisions, built without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny import ALL_FAMILIES, FAMILY_SIZES, MIXTURES, VOCABULARY, tiny_checkpoint, tiny_pruned

from flap_export.artifact import Artifact
from flap_export.building import EngineRecord, build
from flap_export.building.graphs import tensorrt_graph
from flap_export.exporting import export
from flap_export.precision import DtypeName
from flap_export.shapes import DecoderShape

pytest.importorskip("tensorrt_rtx", reason="pip install 'flap-export[tensorrt-rtx]'")
pytestmark = pytest.mark.tensorrt

MAX_LENGTH = 32
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TYPES = {"float16": "HALF", "bfloat16": "BF16"}
# Heads of 32 channels and four query heads, for which there are fused kernels.
SIZES: dict[str, Any] = {"hidden_size": 128}
HEAD_DIM = {family: {"head_dim": 32} for family, sizes in FAMILY_SIZES.items() if "head_dim" in sizes}
ROUTING = {"TOPK", "SLICE", "SCATTER"}
"""What routers add to that."""
PLAIN_ATTENTION = ("gemma2", "gpt_oss", "granite_swa", "vaultgemma")
"""Families whose attention, capped or with sinks, is in plain operators."""
NORMALIZING = {"CAST", "CONSTANT", "ELEMENTWISE", "REDUCE", "SHUFFLE", "SOFTMAX", "UNARY", "NORMALIZATION"}
"""What may be float32 in a network of half precision: the insides of norms, and the softmax of plain attention."""
ROUTERS_IN_FLOAT32 = {"MATRIX_MULTIPLY", "ACTIVATION", "GATHER"}
ELSE = {
    "apertus": {"ACTIVATION", "SELECT"},
    "deepseek_v2": {*ROUTERS_IN_FLOAT32, "FILL", "SELECT", "UNSQUEEZE"},
    "deepseek_v3": {*ROUTERS_IN_FLOAT32, "FILL", "SELECT", "UNSQUEEZE"},
    "dots1": {*ROUTERS_IN_FLOAT32, "FILL", "SELECT", "UNSQUEEZE"},
    "ernie4_5_moe": {*ROUTERS_IN_FLOAT32, "SQUEEZE"},
    "exaone_moe": ROUTERS_IN_FLOAT32,
    "glm4_moe": ROUTERS_IN_FLOAT32,
    "glm4_moe_lite": ROUTERS_IN_FLOAT32,
    "gpt_oss": {"ACTIVATION"},
    "granite_swa": {"ACTIVATION"},
    "hunyuan_v1_moe": {"MATRIX_MULTIPLY"},
    "hy_v3": ROUTERS_IN_FLOAT32,
    "minimax_m2": {"ACTIVATION", "GATHER"},
    "ministral3": {"UNSQUEEZE"},
    "solar_open": ROUTERS_IN_FLOAT32,
}
"""And what xIELU, the queries' factor by position, sinks, and routers that are kept in single precision add."""


def exported(family: str, kind: str, dtype: DtypeName, folder: Path) -> Artifact:
    sizes = {**SIZES, **HEAD_DIM.get(family, {}), "dtype": DTYPES[dtype]}
    make = tiny_checkpoint if kind == "dense" else tiny_pruned
    checkpoint = make(family, folder / "checkpoint", **sizes)
    return export(checkpoint, folder / "onnx", dtype=dtype, max_length=MAX_LENGTH)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "uneven"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_a100_engine(family: str, kind: str, dtype: Any, tmp_path: Path) -> None:
    artifact = exported(family, kind, dtype, tmp_path)
    if dtype == "float16":
        check_graph_means_the_same(tmp_path / "onnx", artifact)
    record = build(tmp_path / "onnx", tmp_path / "engine", backend="tensorrt-rtx", targets=["sm80"])
    check_network(record, artifact, plain=family in PLAIN_ATTENTION)
    assert bool(set(record.engines["last"].network.float32_layers) & ROUTING) == (family in MIXTURES)
    engine = record.engines["last"]
    assert engine.size_bytes == (tmp_path / "engine" / engine.file).stat().st_size
    assert stored_weights(artifact.shape) * 2 <= engine.weights_bytes < engine.size_bytes


def stored_weights(shape: DecoderShape) -> int:
    head = 0 if shape.tied_embeddings else shape.head_parameters
    return shape.decoder_parameters + shape.head_parameters + head


def check_network(record: EngineRecord, artifact: Artifact, *, plain: bool) -> None:
    network, layers = record.engines["last"].network, artifact.cache_layers
    assert network.caches == {cache.past: cache.shape for cache in artifact.caches(-1)}
    assert network.cache_updates == len(network.caches)
    assert network.attentions == (0 if plain else len(layers))
    # No fused kernel takes rows as narrow as these latents, nor as wide as those of published models.
    unfused = sum(artifact.shape.layers[layer].query_heads < 4 or bool(artifact.shape.latent) for layer in layers)
    assert network.decomposable_attentions == (0 if plain else unfused)
    assert network.types[TYPES[record.dtype]] > 0
    assert set(network.types) <= {TYPES[record.dtype], "FLOAT", "INT64", "INT32", "BOOL"}
    assert set(network.float32_layers) <= NORMALIZING | ROUTING | ELSE.get(artifact.family, set())
    routers = sum(bool(layer.experts) for layer in artifact.shape.layers)
    assert network.float32_layers.get("MATRIX_MULTIPLY", 0) <= routers


def check_graph_means_the_same(folder: Path, artifact: Artifact) -> None:
    """On ONNX Runtime, over a cache that is full of noise: prefill, a chunk and a decode step of a ragged batch."""
    import onnxruntime

    masked = folder / "masked.onnx"
    masked.write_bytes(tensorrt_graph(folder / artifact.graphs["all"], artifact))
    nodes = onnx.load(masked).graph.node
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert all(len(node.input) == 4 and "is_causal" not in {a.name for a in node.attribute} for node in attentions)
    assert all(not attribute.HasField("g") for node in nodes for attribute in node.attribute)
    sessions = [
        onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        for graph in (folder / artifact.graphs["all"], masked)
    ]
    for new_tokens, starts in ((5, [0, 0]), (4, [3, 9]), (1, [7, 30])):
        feeds = noisy_feeds(artifact, new_tokens, starts)
        expected, found = (session.run(["logits"], feeds)[0].astype(np.float64) for session in sessions)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def noisy_feeds(artifact: Artifact, new_tokens: int, starts: list[int]) -> dict[str, Any]:
    draw = np.random.default_rng(new_tokens)
    feeds: dict[str, Any] = {
        "input_ids": draw.integers(0, VOCABULARY, (len(starts), new_tokens)),
        "write_indices": np.array(starts),
    }
    caches = artifact.caches(len(starts))
    return feeds | {cache.past: draw.standard_normal(cache.shape).astype(np.float16) for cache in caches}
