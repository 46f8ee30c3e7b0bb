"""Run a decoder one layer at a time, with weights read from disk and hidden states kept in a file.

Memory holds one layer and one chunk of sequences, whatever the size of the model or the number of samples.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from flap_export.loading import Checkpoint, materialize, meta_model, release
from flap_export.storage import writing_errors

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


class _EmbeddingDone(Exception):
    """Raised by the last recorder: the layers' arguments are known, nothing after them needs to run."""


@final
class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes the arguments it is called with, and the first one the embeddings.

    What it hands on is of no use: some families take a tensor from their layers and some the first of a tuple.
    """

    def __init__(self, layer: nn.Module, calls: list[dict[str, Any]], embedded: list[Tensor], is_last: bool) -> None:
        super().__init__()
        # Not a submodule: the model only asks the layer for attributes such as its attention type.
        object.__setattr__(self, "_layer", layer)
        self._calls, self._embedded, self._is_last = calls, embedded, is_last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not self._calls:
            self._embedded.append(hidden_states)
        self._calls.append(kwargs)
        if self._is_last:
            raise _EmbeddingDone
        return hidden_states


@final
@dataclass(frozen=True)
class _Chunk:
    rows: slice
    arguments: list[dict[str, Any]]
    """Keyword arguments of every layer: masks and rotary embeddings of this chunk's shape."""


def run_layers(
    checkpoint: Checkpoint,
    tokens: Tensor,
    visit: Callable[[int, nn.Module], Any],
    *,
    dtype: torch.dtype,
    device: str,
    chunk_sequences: int = 8,
    progress: Progress = no_progress,
) -> None:
    """Propagate `tokens` through all decoder layers, calling `visit(index, layer)` before each layer runs.

    Args:
        checkpoint: the model; its weights are read layer by layer.
        tokens: int64 [sequences, length].
        visit: a context-manager factory around each layer's run; the layer's weights are in memory there, and hooks
            it sets see every chunk.
        dtype: precision to compute in.
        device: where to compute.
        chunk_sequences: sequences per chunk.
        progress: told after every layer.

    Raises:
        ModelError: weights are missing or hold NaN.
        OutputError: the temporary folder cannot hold the hidden states.
    """
    model = meta_model(checkpoint, dtype)
    layers = model.get_submodule(checkpoint.family.layers)
    assert isinstance(layers, nn.ModuleList)
    with _hidden_states(tokens.shape, checkpoint.shape.hidden_size, dtype) as hidden, torch.no_grad():
        chunks = _embed(model, checkpoint, tokens, hidden, dtype, device, chunk_sequences)
        for index, layer in enumerate(layers):
            materialize(layer, f"{checkpoint.family.layers}.{index}", checkpoint.weights, dtype=dtype, device=device)
            with visit(index, layer):
                for chunk in chunks:
                    output = layer(hidden[chunk.rows].to(device), **chunk.arguments[index])
                    hidden[chunk.rows] = (output[0] if isinstance(output, tuple) else output).to("cpu")
            release(layer)
            progress("layers", index + 1, len(layers))


@contextmanager
def _hidden_states(shape: torch.Size, hidden_size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor [sequences, length, H] that lives in a file, so that its pages can leave memory."""
    elements = shape[0] * shape[1] * hidden_size
    with tempfile.TemporaryDirectory(prefix="flap-export-") as folder:
        path = Path(folder) / "hidden_states"
        with writing_errors(path), path.open("wb") as file:
            # Claimed now: a disk that fills up under a mapped file ends the process without an error.
            os.posix_fallocate(file.fileno(), 0, elements * dtype.itemsize)
        yield torch.from_file(str(path), shared=True, size=elements, dtype=dtype).view(*shape, hidden_size)


def _embed(
    model: nn.Module,
    checkpoint: Checkpoint,
    tokens: Tensor,
    hidden: Tensor,
    dtype: torch.dtype,
    device: str,
    chunk_sequences: int,
) -> list[_Chunk]:
    """Fill `hidden` with the embeddings; returns the chunks with the arguments each layer gets."""
    family = checkpoint.family
    decoder, layers_name = model.get_submodule(family.decoder), family.layers.removeprefix(f"{family.decoder}.")
    layers = decoder.get_submodule(layers_name)
    assert isinstance(layers, nn.ModuleList)
    around = {name: module for name, module in decoder.named_children() if module is not layers}
    for name, module in around.items():
        materialize(module, f"{family.decoder}.{name}", checkpoint.weights, dtype=dtype, device=device)
        module.to(device)
    chunks: list[_Chunk] = []
    arguments_by_size: dict[int, list[dict[str, Any]]] = {}
    for start in range(0, len(tokens), chunk_sequences):
        rows = slice(start, min(start + chunk_sequences, len(tokens)))
        calls: list[dict[str, Any]] = []
        embedded: list[Tensor] = []
        recorders = [_Recorder(layer, calls, embedded, index == len(layers) - 1) for index, layer in enumerate(layers)]
        decoder.set_submodule(layers_name, nn.ModuleList(recorders))
        try:
            decoder(input_ids=tokens[rows].to(device), use_cache=False)
        except _EmbeddingDone:
            hidden[rows] = embedded[0].to("cpu")
        finally:
            decoder.set_submodule(layers_name, layers)
        # All chunks but the last have the same shape, and so the same masks and rotary embeddings.
        chunks.append(_Chunk(rows, arguments_by_size.setdefault(rows.stop - rows.start, calls)))
    for module in around.values():
        release(module)
    return chunks
