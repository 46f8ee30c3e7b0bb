"""What a candidate loses against the dense model on calibration text, with whatever candidates share computed once.

Candidates go through the layers together: those that begin alike are one candidate until they differ, and the blocks
of a layer are made for all of them before the next layer's are. Hidden states after prefixes of layers are kept while
memory allows, so that the offspring of a parent start where they differ from it. On a CPU every core takes a chunk of
sequences and a candidate by itself, which keeps it busier than a share of every product does. Chunks have one size, so
that what is computed for a candidate does not depend, to the last bit, on which others it is computed beside.

    KL = mean over tokens of sum_v p(v) (log p(v) - log q(v))     p the dense model's, q the candidate's

    perplexity = exp(mean over predicted tokens of -log q(token))
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from flap_export.calibration.layerwise import LayerStream, streamed
from flap_export.errors import InputError
from flap_export.models.opening import Checkpoint
from flap_export.progress import Progress, no_progress
from flap_export.searching.space import Candidate, Space
from flap_export.searching.supernet import Supernet

FitnessName = Literal["kl", "perplexity"]
Result = TypeVar("Result")
STATE_BYTES: Final = 1 << 30
"""Memory for hidden states after prefixes of layers that are kept, and for those of candidates on their way."""
REFERENCE_BYTES: Final = 1 << 30
"""Memory for the dense model's probabilities; beyond it they are computed again for every batch of candidates."""
LOGITS_BYTES: Final = 2 << 30
"""Memory for the logits of all threads together."""
_BLOCK_ELEMENTS: Final = 1 << 18
"""Logits that are reduced at once: as many as stay in a core's cache."""


class Losses(Protocol):
    """Where the losses of candidates come from: this process, or others."""

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        """Loss of every candidate, summed over the tokens of sequences first..last-1, in nats.

        Both are where a chunk of sequences begins or the last one ends.
        """
        ...


_Path = tuple[tuple[int, int], ...]
"""A candidate's cut points, layer by layer."""


@final
@dataclass(frozen=True)
class _Reference:
    """What the dense model says of one chunk."""

    probabilities: Tensor
    """[B, n, V]"""
    entropy: float
    """Summed over tokens, computed as cross entropies are."""


@final
class _ChunkLosses:
    """One chunk of sequences: hidden states that are kept, and what a candidate's last ones lose."""

    def __init__(
        self, stream: LayerStream, number: int, embedded: Tensor, targets: Tensor | None, most_states: int
    ) -> None:
        """Nothing is computed yet.

        Args:
            stream: of the dense model, walked through.
            number: of the chunk.
            embedded: its hidden states before the first layer [B, n, H].
            targets: its tokens [B, n], for perplexity; None for the divergence from the dense model.
            most_states: how many hidden states after prefixes of layers are kept.
        """
        self._chunk = stream.chunks[number]
        self.rows, self.state_bytes = self._chunk.rows, embedded.nbytes
        self._stream, self._embedded, self._targets, self._most_states = stream, embedded, targets, most_states
        self._states: OrderedDict[_Path, Tensor] = OrderedDict()
        """After prefixes of layers, what is needed least first."""
        self._reference: _Reference | None = None

    def known(self, path: _Path) -> tuple[int, Tensor]:
        """Length of the longest prefix that is known, and the hidden states after it."""
        depth = next((depth for depth in range(len(path), 0, -1) if path[:depth] in self._states), 0)
        return depth, self._states[path[:depth]] if depth else self._embedded

    def keep(self, prefix: _Path, state: Tensor) -> None:
        """Keep hidden states for candidates to come; what is needed least goes where there are too many."""
        self._states[prefix] = state
        if len(self._states) > self._most_states:
            self._states.popitem(last=False)

    def touch(self, path: _Path) -> None:
        """Note that a path is in use: the shorter a prefix, the more candidates share it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._states:
                self._states.move_to_end(path[:length])

    def forget_states(self) -> None:
        """Let go of the hidden states that are kept for candidates to come."""
        self._states.clear()

    def through(self, index: int, layer: nn.Module, state: Tensor) -> Tensor:
        """Hidden states after layer `index`; in any thread."""
        return self._chunk.through(index, layer, state)

    def loss(self, state: Tensor) -> float:
        """Summed over the chunk's tokens, of hidden states after all layers; in any thread."""
        logits = self._logits(state)
        if self._targets is None:
            assert self._reference is not None, "open_reference comes first"
            return _cross_entropy(self._reference.probabilities, logits) - self._reference.entropy
        chosen = logits[:, :-1].gather(-1, self._targets[:, 1:, None]).squeeze(-1)
        return float((logits[:, :-1].logsumexp(-1) - chosen).sum(dtype=torch.float64))

    def open_reference(self) -> None:
        """Have what candidates are compared with in memory."""
        if self._targets is None and self._reference is None:
            logits = self._logits(self._stream.hidden[self.rows])
            probabilities = logits.softmax(-1)
            self._reference = _Reference(probabilities, _cross_entropy(probabilities, logits))

    def close_reference(self) -> None:
        """Let go of it."""
        self._reference = None

    def _logits(self, states: Tensor) -> Tensor:
        """In single precision at least, [B, n, V]."""
        logits = self._stream.chunk_logits(self._chunk, states)
        return logits.to(_logits_dtype(logits.dtype))


def _logits_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_States = dict[tuple[_ChunkLosses, _Path], Tensor]
"""Hidden states of chunks after prefixes of layers."""


def _cross_entropy(probabilities: Tensor, logits: Tensor) -> float:
    """Sum over tokens of -sum_v p(v) log q(v); both [B, n, V]."""
    size = logits.shape[-1]
    rows = max(_BLOCK_ELEMENTS // size, 1) if logits.device.type == "cpu" else logits.numel() // size
    ours, theirs = (torch.split(tensor.reshape(-1, size), rows) for tensor in (probabilities, logits))
    blocks = zip(ours, theirs, strict=True)
    return float(torch.cat([q.logsumexp(-1) - torch.linalg.vecdot(p, q) for p, q in blocks]).sum(dtype=torch.float64))


@final
class LocalLosses:
    """Losses computed in this process; see the module and `open_losses`."""

    def __init__(
        self,
        stream: LayerStream,
        tokens: Tensor,
        space: Space,
        supernet: Supernet,
        fitness: FitnessName,
        device: str,
        logits_bytes: int,
    ) -> None:
        """Run the dense model; arguments as `open_losses` has them, and the size of one chunk's logits."""
        self._space, self._supernet = space, supernet
        embedded = stream.hidden.clone()
        for visited in stream:
            visited.propagate()
        stream.open_head()
        self._chunks = [
            _ChunkLosses(
                stream,
                number,
                embedded[chunk.rows].to(device),
                tokens[chunk.rows].to(device) if fitness == "perplexity" else None,
                max(STATE_BYTES // embedded.nbytes, 1),
            )
            for number, chunk in enumerate(stream.chunks)
        ]
        self._kept_references = frozenset(self._chunks[: REFERENCE_BYTES // logits_bytes])
        self._cores = torch.get_num_threads()
        # Work for a GPU stands in one queue, whichever thread gives it.
        self._threads = 1 if device != "cpu" else min(self._cores, max(LOGITS_BYTES // logits_bytes, 1))
        self._pool = ThreadPoolExecutor(self._threads)

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        """Loss of every candidate, summed over the tokens of sequences first..last-1, in nats.

        Raises:
            InputError: a candidate's logits are not finite.
        """
        chunks = [chunk for chunk in self._chunks if first <= chunk.rows.start < last]
        assert chunks[0].rows.start == first, "a look begins where a chunk does"
        assert chunks[-1].rows.stop == last, "a look ends where a chunk does"
        paths = {candidate: tuple(self._space.steps(candidate)) for candidate in candidates}
        ordered = sorted(set(paths.values()))
        together = max(STATE_BYTES // sum(chunk.state_bytes for chunk in chunks), 1)
        found: dict[_Path, float] = {}
        for start in range(0, len(ordered), together):
            batch = ordered[start : start + together]
            found |= self._lost(self._walked(chunks, batch), chunks, batch)
        for candidate, path in paths.items():
            if not math.isfinite(found[path]):
                raise InputError(
                    f"the logits at rates {[round(rate, 3) for rate in self._space.rates(candidate)]} are not finite; "
                    "the model overflows in this precision, set --dtype float32"
                )
        return [found[paths[candidate]] for candidate in candidates]

    def _walked(self, chunks: Sequence[_ChunkLosses], paths: Sequence[_Path]) -> _States:
        """Hidden states of all paths after all layers, from the longest prefixes that are known.

        All of them go through a layer before any goes through the next: its blocks serve everybody while they are in
        memory.
        """
        states, depths = _States(), dict[tuple[_ChunkLosses, _Path], int]()
        for chunk in chunks:
            for path in paths:
                depth, state = chunk.known(path)
                depths[chunk, path], states[chunk, path[:depth]] = depth, state
        for index in range(len(self._space.layers)):
            wanted = dict.fromkeys(
                (chunk, path[: index + 1]) for (chunk, path), depth in depths.items() if depth <= index
            )
            found = self._through(index, list(wanted), states)
            for (chunk, prefix), state in found.items():
                chunk.keep(prefix, state)
            states = {place: state for place, state in states.items() if len(place[1]) > index} | found
        for chunk, path in depths:
            chunk.touch(path)
        return states

    def _through(self, index: int, wanted: Sequence[tuple[_ChunkLosses, _Path]], states: _States) -> _States:
        """Hidden states after layer `index`, from those before it."""
        found = _States()
        ends = sorted({prefix[-1] for _, prefix in wanted})
        at_once = self._supernet.layers_at_once(self._space.layers[index].total)
        for start in range(0, len(ends), at_once):
            layers = {end: self._supernet.layer(index, *end) for end in ends[start : start + at_once]}
            # Side by side where they multiply by the same weights.
            places = sorted((place for place in wanted if place[1][-1] in layers), key=lambda place: place[1][-1])
            outputs = self._in_threads(
                partial(chunk.through, index, layers[path[-1]], states[chunk, path[:-1]]) for chunk, path in places
            )
            found |= zip(places, outputs, strict=True)
        return found

    def _lost(self, states: _States, chunks: Sequence[_ChunkLosses], paths: Sequence[_Path]) -> dict[_Path, float]:
        """Losses of hidden states after all layers, summed over chunks."""
        found = dict.fromkeys(paths, 0.0)
        kept = [chunk for chunk in chunks if chunk in self._kept_references]
        for group in filter(None, (kept, *([chunk] for chunk in chunks if chunk not in self._kept_references))):
            self._in_threads(chunk.open_reference for chunk in group)
            places = [(chunk, path) for path in paths for chunk in group]
            lost = self._in_threads(partial(chunk.loss, states[chunk, path]) for chunk, path in places)
            for (_, path), loss in zip(places, lost, strict=True):
                found[path] += loss
            if group is not kept:
                group[0].close_reference()
        return found

    def _in_threads(self, calls: Iterable[Callable[[], Result]]) -> list[Result]:
        """Results of calls, each by a thread with its share of the cores."""
        tasks = list(calls)
        cores = max(self._cores // max(min(self._threads, len(tasks)), 1), 1)

        @torch.no_grad()
        def done(call: Callable[[], Result]) -> Result:
            torch.set_num_threads(cores)
            return call()

        try:
            return list(self._pool.map(done, tasks))
        finally:
            # Part of the setting is the process's: the caller computes with all cores again.
            torch.set_num_threads(self._cores)

    def forget_states(self) -> None:
        """Let go of the hidden states that are kept for candidates to come."""
        for chunk in self._chunks:
            chunk.forget_states()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def open_losses(
    dense: Checkpoint,
    tokens: Tensor,
    space: Space,
    supernet: Supernet,
    *,
    fitness: FitnessName = "kl",
    chunk_sequences: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Iterator[LocalLosses]:
    """Run the dense model once over the text of the search, and be ready for candidates.

    Args:
        dense: the dense model.
        tokens: what fitness is measured on, int64 [sequences, length].
        space: the candidates'.
        supernet: their layers.
        fitness: see the module.
        chunk_sequences: sequences that go through a layer at once.
        dtype: precision to compute in, the supernet's.
        device: where, as the supernet.
        progress: told after every layer.

    Raises:
        ModelError: weights are missing or hold NaN.
    """
    logits = min(chunk_sequences, len(tokens)) * tokens.shape[1] * dense.shape.vocabulary_size
    with (
        streamed(
            dense,
            tokens,
            dtype=dtype,
            device=device,
            chunk_sequences=chunk_sequences,
            fast_linears=True,
            progress=progress,
        ) as stream,
        closing(
            LocalLosses(stream, tokens, space, supernet, fitness, device, logits * _logits_dtype(dtype).itemsize)
        ) as losses,
    ):
        yield losses


def tokens_counted(fitness: FitnessName, sequences: int, length: int) -> int:
    """Tokens that a loss over so many sequences is summed over: of a perplexity the first ones are not predicted."""
    return sequences * (length if fitness == "kl" else length - 1)


def fitness_value(fitness: FitnessName, loss: float, tokens: int) -> float:
    """KL in nats per token, or perplexity, from a summed loss."""
    mean = loss / tokens
    if fitness == "kl":
        return max(mean, 0.0)
    return math.exp(mean) if mean < math.log(1e300) else math.inf
