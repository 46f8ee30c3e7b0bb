"""Streaming layer by layer against one plain forward pass."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ALL_FAMILIES, plain_model, tiny_checkpoint, tokens_of
from torch import Tensor, nn

from flap_export.calibration import layerwise
from flap_export.calibration.layerwise import streamed
from flap_export.errors import ModelError, OutputError
from flap_export.models.loading import meta_model
from flap_export.models.opening import Checkpoint, open_checkpoint


def streamed_outputs(
    checkpoint: Checkpoint, tokens: Tensor, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """Outputs of every layer, [sequences, length, H] each."""
    outputs: list[Tensor] = []
    with streamed(checkpoint, tokens, dtype=dtype, device="cpu", **options) as stream:
        for index, visited in enumerate(stream):
            assert visited.index == index
            visited.propagate()
            outputs.append(stream.hidden.clone())
    return outputs


@torch.no_grad()
def plain_outputs(path: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model = plain_model(path, dtype)
    outputs: list[Tensor] = []
    for layer in model.get_submodule(open_checkpoint(path).family.modules.layers):
        layer.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    model(input_ids=tokens, use_cache=False)
    return outputs


@pytest.mark.parametrize("chunk_sequences", [1, 2, 5, 8])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_streaming_equals_a_plain_forward(family: str, chunk_sequences: int, tmp_path: Path) -> None:
    """Five sequences: chunks that divide them, that do not, and one larger than all. Mistral's window bites too."""
    path = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=3)
    tokens = tokens_of(5, 11)
    found = streamed_outputs(open_checkpoint(path), tokens, chunk_sequences=chunk_sequences)
    expected = plain_outputs(path, tokens)
    assert len(found) == 3
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=f"layer {layer}")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_models_have_as_many_layers_as_they_like(family: str, tmp_path: Path) -> None:
    """What stands in for a layer hands on what the class takes from it, layer after layer."""
    checkpoint = open_checkpoint(tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=6))
    with streamed(checkpoint, tokens_of(3, 5), dtype=torch.float32, device="cpu") as stream:
        assert [len(chunk.arguments) for chunk in stream.chunks] == [6]


def test_layers_with_and_without_a_window_get_their_own_masks(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen2", tmp_path / "dense", use_sliding_window=True, sliding_window=3, max_window_layers=1)
    tokens = tokens_of(2, 11)
    for one, other in zip(streamed_outputs(open_checkpoint(path), tokens), plain_outputs(path, tokens), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    tokens = tokens_of(3, 7)
    found = streamed_outputs(open_checkpoint(path), tokens, dtype, chunk_sequences=2)
    assert found[0].dtype == dtype
    for one, other in zip(found, plain_outputs(path, tokens, dtype), strict=True):
        # Float64 differs by transformers' norms, which pass through float32.
        torch.testing.assert_close(one, other, atol=1e-5 if dtype == torch.float64 else 0.05, rtol=0.02)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_layer_is_in_memory_at_a_time(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While layer i runs, its parameters and no others are off the meta device; at the end none is."""
    models: list[nn.Module] = []

    def remember(*arguments: Any) -> nn.Module:
        models.append(meta_model(*arguments))
        return models[-1]

    monkeypatch.setattr(layerwise, "meta_model", remember)
    path = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=3, tie_word_embeddings=tied)
    present: list[set[str]] = []
    steps: list[tuple[str, int, int]] = []
    with streamed(
        open_checkpoint(path),
        tokens_of(2, 5),
        dtype=torch.float32,
        device="cpu",
        progress=lambda what, done, total: steps.append((what, done, total)),
    ) as stream:
        for visited in stream:
            names = {name for name, parameter in models[0].named_parameters() if not parameter.is_meta}
            present.append({name.split(".")[2] if ".layers." in name else name for name in names})
            assert all(not parameter.is_meta for parameter in visited.layer.parameters())
            visited.propagate()
    assert len(models) == 1
    assert present == [{"0"}, {"1"}, {"2"}]
    assert all(parameter.is_meta for parameter in models[0].parameters())
    assert steps == [("layers", 1, 3), ("layers", 2, 3), ("layers", 3, 3)]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_models_own_head_gives_the_logits(family: str, tmp_path: Path) -> None:
    """Norms, caps and factors around the layers included; tied or not."""
    for tied in (False, True):
        path = tiny_checkpoint(family, tmp_path / str(tied), tie_word_embeddings=tied)
        tokens = tokens_of(5, 9)
        with streamed(open_checkpoint(path), tokens, dtype=torch.float32, device="cpu", chunk_sequences=2) as stream:
            for visited in stream:
                visited.propagate()
            found = torch.cat(list(stream.logits(stream.hidden)))
            first = torch.cat(list(stream.logits(stream.hidden[:2])))
            expected = plain_model(path, torch.float32)(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(first, expected[:2], atol=2e-5, rtol=1e-5)


def test_other_inputs_take_the_same_way(tmp_path: Path) -> None:
    """States that branched off before are carried on beside the model's own."""
    path = tiny_checkpoint("llama", tmp_path / "dense")
    tokens = tokens_of(5, 7)
    with streamed(open_checkpoint(path), tokens, dtype=torch.float32, device="cpu", chunk_sequences=2) as stream:
        branch = stream.new_states(4)
        branch.copy_(stream.hidden[:4])
        for visited in stream:
            visited.propagate()
            visited.propagate(branch)
        torch.testing.assert_close(branch, stream.hidden[:4], atol=0, rtol=0)


def test_weights_may_be_read_while_a_layer_computes(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=4)
    checkpoint, tokens = open_checkpoint(path), tokens_of(2, 5)
    for one, other in zip(
        streamed_outputs(checkpoint, tokens, prefetch=True), streamed_outputs(checkpoint, tokens), strict=True
    ):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_damaged_weights_are_an_error_of_the_reading_thread_too(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        streamed_outputs(open_checkpoint(path), tokens_of(1, 3), prefetch=True)


def test_hidden_states_lie_in_a_file_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = tiny_checkpoint("llama", tmp_path / "dense")
    sizes: list[int] = []
    with streamed(open_checkpoint(path), tokens_of(3, 5), dtype=torch.float32, device="cpu") as stream:
        for visited in stream:
            sizes.extend(file.stat().st_size for file in (tmp_path / "temporary").rglob("hidden_states*"))
            visited.propagate()
    assert sizes == [3 * 5 * 32 * 4] * 2
    assert not list((tmp_path / "temporary").iterdir())


def test_a_temporary_folder_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    path = tiny_checkpoint("llama", tmp_path / "dense")
    with pytest.raises(
        OutputError,
        match=r"the disk is full while writing .*Free some space or set TMPDIR to a folder on a larger disk",
    ):
        streamed_outputs(open_checkpoint(path), tokens_of(1, 3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]
