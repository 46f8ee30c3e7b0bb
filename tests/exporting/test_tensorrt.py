"""Every family's graphs through TensorRT-RTX, which builds engines for a GPU that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_FAMILIES, tiny_checkpoint, tiny_pruned

from flap_export.exporting import export

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
pytestmark = pytest.mark.tensorrt

MAX_LENGTH = 32
# Heads of 32 channels and four query heads, for which there are fused kernels.
SIZES: dict[str, Any] = {"hidden_size": 128, "dtype": torch.float16}
HEAD_DIM = {family: {"head_dim": 32} for family in ("gemma2", "gemma3_text", "qwen3")}


class Log(trt.ILogger):  # type: ignore[misc]
    """Errors, to say why there is no engine."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)


def engine_bytes(graph: Path, *, decomposable: bool) -> int:
    """Size of the engine for an A100, with a profile for decode and one for prefill."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(graph)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    if decomposable:
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    for new_tokens in ((1, 1, 1), (1, 8, MAX_LENGTH)):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shapes = [
                [batch, *(new if size < 0 else size for size in tuple(tensor.shape)[1:])]
                for batch, new in zip((1, 1, 4), new_tokens, strict=True)
            ]
            profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, log.errors
    return int(engine.nbytes)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_dense(family: str, tmp_path: Path) -> None:
    """On fused attention kernels alone."""
    dense = tiny_checkpoint(family, tmp_path / "dense", **SIZES, **HEAD_DIM.get(family, {}))
    artifact = export(dense, tmp_path / "onnx", dtype="float16", max_length=MAX_LENGTH)
    for graph in artifact.graphs.values():
        assert engine_bytes(tmp_path / "onnx" / graph, decomposable=False) > 0


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_uneven(family: str, tmp_path: Path) -> None:
    """Layers that kept fewer than four query heads, for which there is no fused kernel, must be decomposable."""
    pruned = tiny_pruned(family, tmp_path, **SIZES, **HEAD_DIM.get(family, {}))
    export(pruned, tmp_path / "onnx", dtype="float16", max_length=MAX_LENGTH)
    assert engine_bytes(tmp_path / "onnx" / "model.onnx", decomposable=True) > 0
