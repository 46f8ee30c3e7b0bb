"""What a candidate loses against the dense model on calibration text, with whatever candidates share computed once.

Sequences go through in chunks of one size, so that what is computed for a candidate does not depend, to the last bit,
on which others it is computed beside. Of every chunk the hidden states after each prefix of layers are kept while
memory allows: candidates are walked through in the order of their layers' cut points, neighbours share the longest
prefixes, and the offspring of a parent start where they differ from it.

    KL = mean over tokens of sum_v p(v) (log p(v) - log q(v))     p the dense model's, q the candidate's

    perplexity = exp(mean over predicted tokens of -log q(token))
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, Protocol, final

import torch
from torch import Tensor

from flap_export.allocation import Steps
from flap_export.errors import InputError
from flap_export.layerwise import Chunk, LayerStream, Progress, no_progress, streamed
from flap_export.loading import Checkpoint
from flap_export.searching.space import Candidate, Space
from flap_export.searching.supernet import Supernet

FitnessName = Literal["kl", "perplexity"]
STATE_BYTES: Final = 1 << 30
"""Memory for hidden states after prefixes of layers."""
REFERENCE_BYTES: Final = 1 << 30
"""Memory for the dense model's probabilities; beyond it they are computed again for every batch of candidates."""


class Losses(Protocol):
    """Where the losses of candidates come from: this process, or others."""

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        """Loss of every candidate, summed over the tokens of sequences first..last-1, in nats.

        Both are where a chunk of sequences begins or the last one ends.
        """
        ...


@final
@dataclass(frozen=True)
class _Reference:
    """What the dense model says of one chunk."""

    probabilities: Tensor
    """[B, n, V]"""
    negative_entropy: float
    """Sum over tokens of sum_v p(v) log p(v)."""


@final
class LocalLosses:
    """Losses computed in this process; see the module and `open_losses`."""

    def __init__(
        self, stream: LayerStream, tokens: Tensor, space: Space, supernet: Supernet, fitness: FitnessName, device: str
    ) -> None:
        self._stream, self._tokens, self._space, self._supernet = stream, tokens, space, supernet
        self._fitness, self._device = fitness, device
        self._embedded = stream.hidden.clone()
        for visited in stream:
            visited.propagate()
        stream.materialize_head()
        self._states: OrderedDict[tuple[int, Steps], Tensor] = OrderedDict()
        self._state_bytes = 0
        self._references: dict[int, _Reference] = {}

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        """Loss of every candidate, summed over the tokens of sequences first..last-1, in nats.

        Raises:
            InputError: a candidate's logits are not finite.
        """
        chunks = [(n, chunk) for n, chunk in enumerate(self._stream.chunks) if first <= chunk.rows.start < last]
        assert chunks[0][1].rows.start == first, "a look begins where a chunk does"
        assert chunks[-1][1].rows.stop == last, "a look ends where a chunk does"
        totals = dict.fromkeys(candidates, 0.0)
        steps = {candidate: tuple(self._space.steps(candidate)) for candidate in totals}
        for number, chunk in chunks:
            reference = self._reference(number, chunk) if self._fitness == "kl" else None
            for candidate in sorted(totals, key=steps.__getitem__):
                logits = self._logits(chunk, self._state(number, chunk, steps[candidate]))
                totals[candidate] += self._loss(chunk, logits, reference)
        for candidate, total in totals.items():
            if not math.isfinite(total):
                raise InputError(
                    f"the logits at rates {[round(rate, 3) for rate in self._space.rates(candidate)]} are not finite; "
                    "the model overflows in this precision, set --dtype float32"
                )
        return [totals[candidate] for candidate in candidates]

    def forget_states(self) -> None:
        """Let go of the hidden states that are kept for candidates to come."""
        self._states.clear()
        self._state_bytes = 0

    def _state(self, number: int, chunk: Chunk, steps: Steps) -> Tensor:
        """Hidden states after all layers, from the longest prefix that is known."""
        depth = next((d for d in range(len(steps), 0, -1) if (number, steps[:d]) in self._states), 0)
        if depth:
            self._states.move_to_end((number, steps[:depth]))
            state = self._states[number, steps[:depth]]
        else:
            state = self._embedded[chunk.rows].to(self._device)
        for index in range(depth, len(steps)):
            state = chunk.through(index, self._supernet.layer(index, *steps[index]), state)
            self._states[number, steps[: index + 1]] = state
            self._state_bytes += state.nbytes
            while self._state_bytes > STATE_BYTES and len(self._states) > 1:
                self._state_bytes -= self._states.popitem(last=False)[1].nbytes
        return state

    def _logits(self, chunk: Chunk, states: Tensor) -> Tensor:
        """In single precision at least."""
        logits = self._stream.chunk_logits(chunk, states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _loss(self, chunk: Chunk, logits: Tensor, reference: _Reference | None) -> float:
        if reference is None:
            tokens = self._tokens[chunk.rows].to(logits.device)
            targets = logits[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
            return float((logits[:, :-1].logsumexp(-1) - targets).sum(dtype=torch.float64))
        expected = torch.linalg.vecdot(reference.probabilities, logits)
        return reference.negative_entropy + float((logits.logsumexp(-1) - expected).sum(dtype=torch.float64))

    def _reference(self, number: int, chunk: Chunk) -> _Reference:
        if number in self._references:
            return self._references[number]
        logits = self._logits(chunk, self._stream.hidden[chunk.rows])
        probabilities = logits.softmax(-1)
        expected = torch.linalg.vecdot(probabilities, logits)
        found = _Reference(probabilities, float((expected - logits.logsumexp(-1)).sum(dtype=torch.float64)))
        if (len(self._references) + 1) * probabilities.nbytes <= REFERENCE_BYTES:
            self._references[number] = found
        return found


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
    with streamed(
        dense, tokens, dtype=dtype, device=device, chunk_sequences=chunk_sequences, progress=progress
    ) as stream:
        yield LocalLosses(stream, tokens, space, supernet, fitness, device)


def tokens_counted(fitness: FitnessName, sequences: int, length: int) -> int:
    """Tokens that a loss over so many sequences is summed over: of a perplexity the first ones are not predicted."""
    return sequences * (length if fitness == "kl" else length - 1)


def fitness_value(fitness: FitnessName, loss: float, tokens: int) -> float:
    """KL in nats per token, or perplexity, from a summed loss."""
    mean = loss / tokens
    if fitness == "kl":
        return max(mean, 0.0)
    return math.exp(mean) if mean < math.log(1e300) else math.inf
