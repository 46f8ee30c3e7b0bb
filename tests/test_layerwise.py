"""Streaming layer by layer against one plain forward pass."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_FAMILIES, plain_model, tiny_checkpoint, tokens_of
from torch import Tensor, nn

from flap_export import layerwise
from flap_export.errors import OutputError
from flap_export.layerwise import run_layers
from flap_export.loading import Checkpoint, meta_model, open_checkpoint


def streamed_outputs(
    checkpoint: Checkpoint, tokens: Tensor, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """Outputs of every layer, [sequences, length, H] each, put together from the chunks."""
    outputs: list[list[Tensor]] = []

    @contextmanager
    def visit(index: int, layer: nn.Module) -> Iterator[None]:
        assert index == len(outputs)
        outputs.append([])

        def note(_: nn.Module, __: Any, output: Any) -> None:
            outputs[index].append((output[0] if isinstance(output, tuple) else output).clone())

        hook = layer.register_forward_hook(note)
        yield
        hook.remove()

    run_layers(checkpoint, tokens, visit, dtype=dtype, device="cpu", **options)
    return [torch.cat(chunks) for chunks in outputs]


@torch.no_grad()
def plain_outputs(path: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model = plain_model(path, dtype)
    outputs: list[Tensor] = []
    for layer in model.get_submodule(open_checkpoint(path).family.layers):
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

    @contextmanager
    def visit(index: int, layer: nn.Module) -> Iterator[None]:
        names = {name for name, parameter in models[0].named_parameters() if not parameter.is_meta}
        present.append({name.split(".")[2] if ".layers." in name else name for name in names})
        assert all(not parameter.is_meta for parameter in layer.parameters())
        yield

    steps: list[tuple[str, int, int]] = []
    run_layers(
        open_checkpoint(path),
        tokens_of(2, 5),
        visit,
        dtype=torch.float32,
        device="cpu",
        progress=lambda what, done, total: steps.append((what, done, total)),
    )
    assert len(models) == 1
    assert present == [{"0"}, {"1"}, {"2"}]
    assert all(parameter.is_meta for parameter in models[0].parameters())
    assert steps == [("layers", 1, 3), ("layers", 2, 3), ("layers", 3, 3)]


def test_hidden_states_lie_in_a_file_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = tiny_checkpoint("llama", tmp_path / "dense")
    sizes: list[int] = []

    def visit(index: int, layer: nn.Module) -> Any:
        sizes.extend(file.stat().st_size for file in (tmp_path / "temporary").rglob("hidden_states"))
        return nullcontext()

    run_layers(open_checkpoint(path), tokens_of(3, 5), visit, dtype=torch.float32, device="cpu")
    assert sizes == [3 * 5 * 32 * 4] * 2
    assert not list((tmp_path / "temporary").iterdir())


def test_a_temporary_folder_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    path = tiny_checkpoint("llama", tmp_path / "dense")
    with pytest.raises(OutputError, match="the disk is full while writing"):
        run_layers(open_checkpoint(path), tokens_of(1, 3), lambda *_: nullcontext(), dtype=torch.float32, device="cpu")
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]
