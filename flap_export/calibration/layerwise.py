"""Run a decoder one layer at a time, with weights read from disk and hidden states kept in a file.

Memory holds one layer and one chunk of sequences, whatever the size of the model or the number of samples.
"""

from __future__ import annotations

import inspect
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from flap_export.calibration.products import with_fast_linears
from flap_export.models.loading import materialize, meta_model, read_parameters, release
from flap_export.models.opening import Checkpoint
from flap_export.progress import Progress, no_progress
from flap_export.storage import SCRATCH_PREFIX, writing_errors


class _EmbeddingDone(Exception):
    """Raised by the last recorder: the layers' arguments are known, nothing after them needs to run."""


@final
class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes the arguments it is called with, and the first one the embeddings.

    What it hands on is of no use: some families take a tensor from their layers and some the first of a tuple. So it is
    the embeddings from every one: of what a layer is handed, an axis is missing in the latter.
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

    def forward(self, hidden_states: Tensor, *arguments: Any, **kwargs: Any) -> Tensor:
        if not self._calls:
            self._embedded.append(hidden_states)
        # GPT-2 passes some by their position.
        _, *names = inspect.signature(self._layer.forward).parameters
        self._calls.append({**dict(zip(names, arguments, strict=False)), **kwargs})
        if self._is_last:
            raise _EmbeddingDone
        return self._embedded[0]


@final
class _Replayed(threading.local):
    """Hidden states that are replayed, to every thread its own."""

    hidden_states: Tensor


@final
class _Replay(nn.Module):
    """Stands in for a decoder layer: gives hidden states that were computed before, in the form its layer does."""

    def __init__(self, layer: nn.Module, replayed: _Replayed, gives_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._replayed, self._gives_tuple = replayed, gives_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        hidden_states = self._replayed.hidden_states
        return (hidden_states,) if self._gives_tuple else hidden_states


@final
@dataclass(frozen=True)
class Chunk:
    """Sequences that go through a layer at once."""

    rows: slice
    arguments: list[dict[str, Any]]
    """Keyword arguments of every layer: masks and rotary embeddings of this chunk's shape."""

    def through(self, index: int, layer: nn.Module, inputs: Tensor) -> Tensor:
        """What layer `index`, or a smaller one in its place, gives for inputs [B, length, H] on its device."""
        given = layer(inputs, **self.arguments[index])
        output: Tensor = given[0] if isinstance(given, tuple) else given
        return output


@final
@dataclass
class LayerPass:
    """One decoder layer with its weights in memory, and the hidden states that reach it."""

    index: int
    layer: nn.Module
    hidden: Tensor
    """[sequences, length, H]: the layer's inputs, until `propagate` puts its outputs in their place."""
    chunks: list[Chunk]
    device: str
    gives_tuple: bool = False

    def outputs(self, hidden: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Run the layer chunk by chunk; hooks set on it see every chunk.

        Args:
            hidden: other inputs [sequences, length, H] than those that reach the layer, of as many of its first
                sequences as there are; whole chunks, whose sizes the masks have.

        Yields:
            The chunk's sequences, and the layer's outputs for them on the device.
        """
        inputs = self.hidden if hidden is None else hidden
        for chunk in self.chunks:
            if chunk.rows.start >= len(inputs):
                break
            output = self.layer(inputs[chunk.rows].to(self.device), **chunk.arguments[self.index])
            self.gives_tuple = isinstance(output, tuple)
            yield chunk.rows, output[0] if isinstance(output, tuple) else output

    def observe(self) -> None:
        """Run the layer for its hooks; its outputs are dropped."""
        for _ in self.outputs():
            pass

    def propagate(self, hidden: Tensor | None = None) -> None:
        """Run the layer and put its outputs in place of the inputs."""
        target = self.hidden if hidden is None else hidden
        for rows, output in self.outputs(target):
            target[rows] = output.to("cpu")


@final
class LayerStream:
    """A decoder that is walked through once, layer by layer; see `streamed`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor,
        model: nn.Module,
        folder: Path,
        dtype: torch.dtype,
        device: str,
        chunk_sequences: int,
        prefetch: bool,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._tokens, self._model, self._folder = checkpoint, tokens, model, folder
        self._dtype, self._device, self._prefetch, self._progress = dtype, device, prefetch, progress
        self._layers = cast(nn.ModuleList, model.get_submodule(checkpoint.family.modules.layers))
        self._states, self._gives_tuple, self._replayed = 0, False, _Replayed()
        self.hidden = self.new_states(len(tokens))
        """What the layers visited so far gave; before the first, the embeddings."""
        self.chunks = self._embed(chunk_sequences)

    def new_states(self, sequences: int) -> Tensor:
        """A tensor [sequences, length, H] that lives in a file, so that its pages can leave memory.

        Raises:
            OutputError: the temporary folder cannot hold it.
        """
        shape = (sequences, self._tokens.shape[1], self._checkpoint.shape.hidden_size)
        elements = shape[0] * shape[1] * shape[2]
        path = self._folder / f"hidden_states_{self._states}"
        self._states += 1
        with writing_errors(path), path.open("wb") as file:
            # Claimed now: a disk that fills up under a mapped file ends the process without an error.
            os.posix_fallocate(file.fileno(), 0, elements * self._dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=elements, dtype=self._dtype).view(shape)

    def __iter__(self) -> Iterator[LayerPass]:
        """Every layer in turn with its weights in memory; whoever visits it has to propagate the hidden states.

        Raises:
            ModelError: weights are missing or hold NaN.
        """
        layers = self._layers
        with ThreadPoolExecutor(1) if self._prefetch else nullcontext() as executor:
            read = self._reader(executor, 0)
            for index, layer in enumerate(layers):
                parameters = read()
                if index + 1 < len(layers):
                    read = self._reader(executor, index + 1)
                materialize(layer, parameters, dtype=self._dtype, device=self._device)
                del parameters
                visited = LayerPass(index, layer, self.hidden, self.chunks, self._device)
                yield visited
                self._gives_tuple = visited.gives_tuple
                release(layer)
                self._progress("layers", index + 1, len(layers))

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits [B, length, V] of one chunk of sequences after the other, by the model's own last norm and head.

        Args:
            hidden: what the last layer gave, [sequences, length, H].
        """
        for (logits,) in self.joint_logits([hidden]):
            yield logits

    def joint_logits(self, states: Sequence[Tensor]) -> Iterator[Iterator[Tensor]]:
        """For one chunk of sequences after the other the logits of several states, made one at a time.

        Args:
            states: what the last layer gave, or might have given, [sequences, length, H] each.
        """
        self.open_head()
        for chunk in self.chunks:
            if chunk.rows.start >= len(states[0]):
                break
            yield (self.chunk_logits(chunk, hidden[chunk.rows]) for hidden in states)

    def chunk_logits(self, chunk: Chunk, states: Tensor) -> Tensor:
        """Logits of one chunk of sequences; after `open_head`, in any thread.

        Args:
            chunk: of this stream.
            states: what the last layer gave, or might have given, for its sequences [B, length, H].
        """
        self._replayed.hidden_states = states.to(self._device)
        tokens = self._tokens[chunk.rows.start : chunk.rows.start + len(states)].to(self._device)
        logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        del self._replayed.hidden_states
        return logits

    def open_head(self) -> None:
        """Once the stream has been walked through: have the embeddings, the last norm and the head in memory."""
        family = self._checkpoint.family
        replays = (_Replay(layer, self._replayed, self._gives_tuple) for layer in self._layers)
        self._model.set_submodule(family.modules.layers, nn.ModuleList(replays))
        self._around_layers()
        embedding, head = (self._model.get_submodule(path) for path in (family.modules.embedding, family.modules.head))
        if not self._checkpoint.shape.tied_embeddings:
            self._materialize({family.modules.head: head})
            return
        # What is left of a tied head to read is its bias, where it has one.
        head.register_parameter("weight", None)
        self._materialize({family.modules.head: head})
        head.register_parameter("weight", embedding.get_parameter("weight"))

    def _reader(self, executor: Executor | None, index: int) -> Callable[[], Iterable[tuple[str, Tensor]]]:
        """How to get the parameters of one layer: read by another thread meanwhile, or when asked."""
        prefix = f"{self._checkpoint.family.modules.layers}.{index}"
        parameters = read_parameters(self._layers[index], prefix, self._checkpoint.weights)
        return (lambda: parameters) if executor is None else executor.submit(list, parameters).result

    def _around_layers(self) -> dict[str, nn.Module]:
        """The decoder's modules beside its layers, with their weights in memory: embeddings and the last norm."""
        family = self._checkpoint.family
        decoder, layers = (
            self._model.get_submodule(family.modules.decoder),
            self._model.get_submodule(family.modules.layers),
        )
        around = {
            f"{family.modules.decoder}.{name}": module
            for name, module in decoder.named_children()
            if module is not layers
        }
        self._materialize(around)
        return around

    def _materialize(self, modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            parameters = read_parameters(module, path, self._checkpoint.weights)
            materialize(module, parameters, dtype=self._dtype, device=self._device)
            module.to(self._device)

    def _embed(self, chunk_sequences: int) -> list[Chunk]:
        """Fill `hidden` with the embeddings; returns the chunks with the arguments each layer gets."""
        layers, layers_path = self._layers, self._checkpoint.family.modules.layers
        around = self._around_layers()
        decoder = self._model.get_submodule(self._checkpoint.family.modules.decoder)
        chunks: list[Chunk] = []
        arguments_by_size: dict[int, list[dict[str, Any]]] = {}
        for start in range(0, len(self._tokens), chunk_sequences):
            rows = slice(start, min(start + chunk_sequences, len(self._tokens)))
            calls: list[dict[str, Any]] = []
            embedded: list[Tensor] = []
            last = len(layers) - 1
            recorders = [_Recorder(layer, calls, embedded, index == last) for index, layer in enumerate(layers)]
            self._model.set_submodule(layers_path, nn.ModuleList(recorders))
            try:
                decoder(input_ids=self._tokens[rows].to(self._device), use_cache=False)
            except _EmbeddingDone:
                self.hidden[rows] = embedded[0].to("cpu")
            finally:
                self._model.set_submodule(layers_path, layers)
            # All chunks but the last have the same shape, and so the same masks and rotary embeddings.
            chunks.append(Chunk(rows, arguments_by_size.setdefault(rows.stop - rows.start, calls)))
        for module in around.values():
            release(module)
        return chunks


@contextmanager
def streamed(
    checkpoint: Checkpoint,
    tokens: Tensor,
    *,
    dtype: torch.dtype,
    device: str,
    chunk_sequences: int = 8,
    prefetch: bool | None = None,
    fast_linears: bool = False,
    progress: Progress = no_progress,
) -> Iterator[LayerStream]:
    """Walk through all decoder layers, with what each makes of `tokens` handed to the next; without gradients.

    Args:
        checkpoint: the model; its weights are read layer by layer.
        tokens: int64 [sequences, length].
        dtype: precision to compute in.
        device: where to compute.
        chunk_sequences: sequences per chunk.
        prefetch: read the next layer's weights while one computes, at the price of a second layer in memory; None
            does so where the device has a memory of its own.
        fast_linears: multiply as `flap_export.calibration.products` does.
        progress: told after every layer.

    Raises:
        ModelError: weights are missing or hold NaN.
        OutputError: the temporary folder cannot hold the hidden states.
    """
    ahead = device != "cpu" if prefetch is None else prefetch
    model = meta_model(checkpoint, dtype)
    if fast_linears:
        with_fast_linears(model)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX) as folder, torch.no_grad():
        yield LayerStream(checkpoint, tokens, model, Path(folder), dtype, device, chunk_sequences, ahead, progress)
