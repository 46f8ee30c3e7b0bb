"""What a candidate loses against the dense model on calibration text, with whatever candidates share computed once.

Sequences go through in chunks of one size, so that what is computed for a candidate does not depend, to the last bit,
on which others it is computed beside. Of every chunk the hidden states after each prefix of layers are kept while
memory allows: candidates are walked through in the order of their layers' cut points, neighbours share the longest
prefixes, and the offspring of a parent start where they differ from it. On a CPU every core takes a chunk and some
candidates by itself, which keeps it busier than a share of every product does.

    KL = mean over tokens of sum_v p(v) (log p(v) - log q(v))     p the dense model's, q the candidate's

    perplexity = exp(mean over predicted tokens of -log q(token))
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final, Literal, Protocol, final

import torch
from torch import Tensor

from flap_export.errors import InputError
from flap_export.layerwise import LayerStream, Progress, no_progress, streamed
from flap_export.loading import Checkpoint
from flap_export.searching.space import Candidate, Space
from flap_export.searching.supernet import Supernet

FitnessName = Literal["kl", "perplexity"]
STATE_BYTES: Final = 1 << 30
"""Memory for hidden states after prefixes of layers."""
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
    """Losses on one chunk of sequences; several threads may ask."""

    def __init__(
        self, stream: LayerStream, number: int, embedded: Tensor, targets: Tensor | None, supernet: Supernet
    ) -> None:
        """Nothing is computed yet.

        Args:
            stream: of the dense model, walked through.
            number: of the chunk.
            embedded: its hidden states before the first layer [B, n, H].
            targets: its tokens [B, n], for perplexity; None for the divergence from the dense model.
            supernet: the candidates' layers.
        """
        self._chunk = stream.chunks[number]
        self.rows = self._chunk.rows
        self._stream, self._number, self._embedded, self._targets = stream, number, embedded, targets
        self._supernet = supernet
        self._states: OrderedDict[_Path, Tensor] = OrderedDict()
        """After prefixes of layers, what is needed least first."""
        self._most_states = max(STATE_BYTES // (len(stream.chunks) * embedded.nbytes), 1)
        self._kept_reference: _Reference | None = None
        self._lock = threading.Lock()

    @torch.no_grad()
    def losses(self, paths: Sequence[_Path]) -> list[float]:
        """Loss of every candidate, summed over the chunk's tokens; those that share prefixes stand side by side."""
        with self._lock:
            reference = self._reference() if self._targets is None else None
        return [self._loss(self._logits(self._after(path)), reference) for path in paths]

    def forget_states(self) -> None:
        """Let go of the hidden states that are kept for candidates to come."""
        self._states.clear()

    def _after(self, path: _Path) -> Tensor:
        """Hidden states after all layers, from the longest prefix that is known."""
        depth, state = self._known(path)
        for index in range(depth, len(path)):
            state = self._chunk.through(index, self._supernet.layer(index, *path[index]), state)
            self._keep(path[: index + 1], state)
        with self._lock:
            self._touch(path)
        return state

    def _known(self, path: _Path) -> tuple[int, Tensor]:
        """The longest prefix that is known, and the hidden states after it."""
        with self._lock:
            depth = next((d for d in range(len(path), 0, -1) if path[:d] in self._states), 0)
            self._touch(path[:depth])
            return depth, self._states[path[:depth]] if depth else self._embedded

    def _keep(self, prefix: _Path, state: Tensor) -> None:
        with self._lock:
            self._states[prefix] = state
            if len(self._states) > self._most_states:
                self._states.popitem(last=False)

    def _touch(self, path: _Path) -> None:
        """Note that a path is in use: the shorter a prefix, the more candidates share it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._states:
                self._states.move_to_end(path[:length])

    def _logits(self, states: Tensor) -> Tensor:
        """In single precision at least, [B, n, V]."""
        logits = self._stream.chunk_logits(self._chunk, states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _loss(self, logits: Tensor, reference: _Reference | None) -> float:
        if reference is not None:
            return _cross_entropy(reference.probabilities, logits) - reference.entropy
        assert self._targets is not None
        chosen = logits[:, :-1].gather(-1, self._targets[:, 1:, None]).squeeze(-1)
        return float((logits[:, :-1].logsumexp(-1) - chosen).sum(dtype=torch.float64))

    def _reference(self) -> _Reference:
        if self._kept_reference is not None:
            return self._kept_reference
        logits = self._logits(self._stream.hidden[self.rows])
        probabilities = logits.softmax(-1)
        found = _Reference(probabilities, _cross_entropy(probabilities, logits))
        if (self._number + 1) * probabilities.nbytes <= REFERENCE_BYTES:
            self._kept_reference = found
        return found


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
        threads: int,
    ) -> None:
        """Run the dense model; arguments as `open_losses` has them, and how many threads may compute at a time."""
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
                supernet,
            )
            for number, chunk in enumerate(stream.chunks)
        ]
        self._cores, self._threads = torch.get_num_threads(), threads
        self._pool = ThreadPoolExecutor(threads)

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        """Loss of every candidate, summed over the tokens of sequences first..last-1, in nats.

        Raises:
            InputError: a candidate's logits are not finite.
        """
        chunks = [chunk for chunk in self._chunks if first <= chunk.rows.start < last]
        assert chunks[0].rows.start == first, "a look begins where a chunk does"
        assert chunks[-1].rows.stop == last, "a look ends where a chunk does"
        paths = {candidate: tuple(self._space.steps(candidate)) for candidate in candidates}
        ordered = sorted(paths, key=paths.__getitem__)
        # Of one chunk only neighbours stay together, and no more of them than leave work for every thread.
        groups = -(-self._threads // len(chunks))
        size = -(-len(ordered) // groups)
        tasks = [(chunk, ordered[start : start + size]) for chunk in chunks for start in range(0, len(ordered), size)]
        cores = max(self._cores // min(self._threads, len(tasks)), 1)

        def done(task: tuple[_ChunkLosses, Sequence[Candidate]]) -> list[float]:
            chunk, group = task
            torch.set_num_threads(cores)
            return chunk.losses([paths[candidate] for candidate in group])

        self._make_blocks(paths.values())
        totals = dict.fromkeys(ordered, 0.0)
        try:
            for (_, group), found in zip(tasks, self._pool.map(done, tasks), strict=True):
                for candidate, loss in zip(group, found, strict=True):
                    totals[candidate] += loss
        finally:
            # Part of the setting is the process's: the caller computes with all cores again.
            torch.set_num_threads(self._cores)
        for candidate, total in totals.items():
            if not math.isfinite(total):
                raise InputError(
                    f"the logits at rates {[round(rate, 3) for rate in self._space.rates(candidate)]} are not finite; "
                    "the model overflows in this precision, set --dtype float32"
                )
        return [totals[candidate] for candidate in candidates]

    @torch.no_grad()
    def _make_blocks(self, paths: Iterable[_Path]) -> None:
        """Make what is missing with all cores, rather than with one while the others wait for it."""
        for index, taken in dict.fromkeys(step for path in paths for step in enumerate(path)):
            self._supernet.layer(index, *taken)

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
            LocalLosses(
                stream, tokens, space, supernet, fitness, device, _threads(dense, tokens, chunk_sequences, device)
            )
        ) as losses,
    ):
        yield losses


def _threads(dense: Checkpoint, tokens: Tensor, chunk_sequences: int, device: str) -> int:
    """How many chunks may be at work at a time."""
    if device != "cpu":
        # Work for a GPU stands in one queue, whichever thread gives it.
        return 1
    chunk_tokens = min(chunk_sequences, len(tokens)) * tokens.shape[1]
    logits_bytes = chunk_tokens * dense.shape.vocabulary_size * torch.float32.itemsize
    return min(torch.get_num_threads(), max(LOGITS_BYTES // logits_bytes, 1))


def tokens_counted(fitness: FitnessName, sequences: int, length: int) -> int:
    """Tokens that a loss over so many sequences is summed over: of a perplexity the first ones are not predicted."""
    return sequences * (length if fitness == "kl" else length - 1)


def fitness_value(fitness: FitnessName, loss: float, tokens: int) -> float:
    """KL in nats per token, or perplexity, from a summed loss."""
    mean = loss / tokens
    if fitness == "kl":
        return max(mean, 0.0)
    return math.exp(mean) if mean < math.log(1e300) else math.inf
