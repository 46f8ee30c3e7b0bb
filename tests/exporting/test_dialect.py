"""What the trace replaces, against what transformers would have computed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import ALL_FAMILIES, ROPES, plain_model, tiny_checkpoint
from transformers.activations import ACT2CLS
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from flap_export.exporting.dialect import ScatterCache, rotary_tables, speaking_onnx
from flap_export.exporting.dialect.activations import xielu
from flap_export.models.attention import plain_attention
from flap_export.models.loading import build_model
from flap_export.models.opening import open_checkpoint

LENGTH = 40


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotary_tables_hold_what_the_model_computes(family: str, rope: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path / "dense", rope_parameters=ROPES[rope])
    tables = rotary_tables(open_checkpoint(path), LENGTH)
    assert list(tables) == ["model.rotary_emb.cosine", "model.rotary_emb.sine"]
    model = plain_model(path)
    expected = model.model.rotary_emb(torch.zeros(1), torch.arange(LENGTH)[None])
    half = open_checkpoint(path).shape.head_dim // 2
    for table, whole in zip(tables.values(), expected, strict=True):
        assert table.shape == (LENGTH, half)
        assert torch.equal(table, whole[0, :, :half])
        assert torch.equal(table, whole[0, :, half:])


def test_kinds_of_layers_have_tables_of_their_own(tmp_path: Path) -> None:
    """Gemma 3, against the formula: slow and stretched angles in full layers, fast ones in sliding layers."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 15.0},
    }
    tables = rotary_tables(
        open_checkpoint(tiny_checkpoint("gemma3_text", tmp_path / "dense", rope_parameters=rope)), LENGTH
    )
    assert len(tables) == 4
    exponents, positions = torch.arange(0, 12, 2).float() / 12, torch.arange(LENGTH).float()[:, None]
    for name, table in tables.items():
        is_sliding = "sliding" in name or "local" in name
        angles = positions / 15.0**exponents if is_sliding else positions / 8 / 700.0**exponents
        expected = angles.cos() if name.endswith("cosine") else angles.sin()
        torch.testing.assert_close(table, expected, atol=1e-5, rtol=1e-5, msg=name)


def rotary_graph(width: int, turned: int, *, interleaved: bool) -> onnx.ModelProto:
    """One operator: heads [B, 3, n, width] at positions [B, n], of each of which the first channels turn."""
    attributes = {"interleaved": int(interleaved)} | ({"rotary_embedding_dim": turned} if turned < width else {})
    node = onnx.helper.make_node("RotaryEmbedding", ["heads", "cosine", "sine", "positions"], ["out"], **attributes)
    values = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(table.numpy()), name)
        for name, table in zip(("cosine", "sine"), angles_of(turned), strict=True)
    ]
    info = onnx.helper.make_tensor_value_info
    heads, floats = ["b", 3, "n", width], onnx.TensorProto.FLOAT
    inputs = [info("heads", floats, heads), info("positions", onnx.TensorProto.INT64, ["b", "n"])]
    graph = onnx.helper.make_graph([node], "rotary", inputs, [info("out", floats, heads)], values)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)


def angles_of(turned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [L, R / 2]."""
    angles = torch.arange(LENGTH).float()[:, None] * 0.3 ** torch.arange(turned // 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("width", "turned"), [(8, 8), (12, 6), (10, 4)])
@pytest.mark.parametrize("name", ["llama", "cohere", "glm"])
def test_the_rotary_operator_turns_pairs_as_transformers_does(name: str, width: int, turned: int) -> None:
    """Halves of what turns in Llama, neighbours in Cohere and GLM, whose embeddings lay the angles out differently."""
    graph = rotary_graph(width, turned, interleaved=name != "llama")
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    heads, positions = torch.randn(2, 3, 5, width), torch.tensor([range(5), range(30, 35)])
    found = torch.from_numpy(session.run(None, {"heads": heads.numpy(), "positions": positions.numpy()})[0])
    apply = {"llama": llama_rotary, "cohere": cohere_rotary, "glm": glm_rotary}[name]
    tables = (table[positions] for table in angles_of(turned))
    laid_out = [table.repeat_interleave(2, -1) if name == "cohere" else torch.cat([table] * 2, -1) for table in tables]
    expected, _ = apply(heads[..., :turned], heads[..., :turned], *laid_out)
    torch.testing.assert_close(found[..., :turned], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[..., turned:], heads[..., turned:])


@pytest.mark.tensorrt
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "turned"), [(8, 8), (12, 6)])
def test_tensorrt_reads_the_rotary_operator(interleaved: bool, width: int, turned: int) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'flap-export[tensorrt-rtx]'")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(rotary_graph(width, turned, interleaved=interleaved).SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    (rotary,) = [layer for layer in layers if layer.type == trt.LayerType.ROTARY_EMBEDDING]
    rotary.__class__ = trt.IRotaryEmbeddingLayer
    assert rotary.interleaved is interleaved
    # Zero is the whole head.
    assert rotary.rotary_embedding_dim == (turned if turned < width else 0)


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_softcapped_attention_is_transformers_own(heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 5, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 7, 8, generator=generator)
    mask = torch.where(torch.rand(3, 1, 5, 7, generator=generator) < 0.3, torch.finfo(torch.float32).min, 0.0)
    module = SimpleNamespace(num_key_value_groups=heads // 2, training=False)
    expected, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.7, softcap=1.5)
    found = plain_attention(query * 0.7, key, value, mask, softcap=1.5)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [0.3, 30.0, -30.0], ids=["as the scores", "above", "below"])
@pytest.mark.parametrize("heads", [2, 4, 6])
def test_attention_with_sinks_is_transformers_own(heads: int, size: float) -> None:
    """A sink takes next to nothing, or nearly all, of what the keys get."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 5, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 7, 8, generator=generator)
    mask = torch.where(torch.rand(3, 1, 5, 7, generator=generator) < 0.3, torch.finfo(torch.float32).min, 0.0)
    sinks = size * (1 + torch.rand(heads, generator=generator))
    module = SimpleNamespace(num_key_value_groups=heads // 2, training=False, sinks=sinks)
    expected, _ = gpt_oss.eager_attention_forward(module, query, key, value, mask, scaling=0.7)
    found = plain_attention(query * 0.7, key, value, mask, sinks=sinks)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_window_mask_shows_the_last_keys_only(window: int, dtype: torch.dtype) -> None:
    """Two sequences at different rows of the cache: query p sees keys p - window < j <= p."""
    cache = ScatterCache({}, torch.tensor([0, 4]), 3, 8)
    mask = cache.mask(window, dtype)
    assert mask.shape == (2, 1, 3, 8)
    assert mask.dtype == dtype
    for sequence, start in enumerate((0, 4)):
        for query in range(3):
            position = start + query
            visible = {key for key in range(8) if mask[sequence, 0, query, key] == 0}
            assert visible == {key for key in range(8) if position - window < key <= position}
    assert set(mask.unique().tolist()) == {torch.finfo(dtype).min, 0.0}
    assert cache.mask(window, dtype) is mask


def test_positions_and_valid_keys_follow_from_the_write_indices() -> None:
    cache = ScatterCache({}, torch.tensor([0, 4]), 3, 8)
    assert cache.position_ids.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert cache.valid_keys.tolist() == [3, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_xielu_is_no_worse_than_transformers_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near zero, where it is a difference of nearly equal numbers, too; the reference is the formula in float64."""
    monkeypatch.setattr("flap_export.exporting.dialect.activations.softplus", torch.nn.functional.softplus)
    activation = ACT2CLS["xielu"](alpha_p_init=0.3, alpha_n_init=1.1, dtype=dtype)
    values = torch.cat([sign * torch.logspace(-5, 1, 200) for sign in (-1, 1)]).to(dtype)
    with torch.no_grad():
        own, found = activation(values), xielu(activation, values)
        expected = activation.double()(values.double())
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= (own - expected).abs().max()
    near = values.abs() < 0.01
    allowed = 2 * torch.finfo(dtype).eps * expected.abs() + torch.finfo(torch.float32).eps
    assert ((found - expected).abs() <= allowed)[near].all()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_transformers_is_put_back_even_after_an_error(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(family, tmp_path / "dense"))
    model = build_model(checkpoint, torch.float32)
    modeling = importlib.import_module(type(model).__module__)
    before = getattr(modeling, "apply_rotary_pos_emb", None)

    def fail() -> None:
        with speaking_onnx(model, checkpoint, rotary_tables(checkpoint, 8)):
            assert modeling.apply_rotary_pos_emb is not before
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert getattr(modeling, "apply_rotary_pos_emb", None) is before
