"""The one interface of every backend: start a batch, prefill its prompts, decode token by token, exit.

Notation: B sequences, n new tokens, L rows of cache (`max_length`), V vocabulary size.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from flap_export.artifact import LogitsKind
from flap_export.errors import ArtifactError, TextError
from flap_export.runners.sampling import Sampling

Logits = NDArray[np.floating[Any]]
TokenIds = NDArray[np.int64]


@dataclass(frozen=True)
class RunnerOptions:
    """How a backend shall open a model; what an option means is said at `flap_export.runners.open_runner`."""

    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    logits: LogitsKind = "all"
    max_length: int | None = None


class Runner(abc.ABC):
    """A model open on one backend, with the KV cache of one batch.

    A backend supplies `_allocate`, `_forward` and `close`; everything it is fed has been checked before.

    Attributes:
        name: the backend, as reports name it.
        max_length: L, prompt and generated tokens together.
        vocabulary_size: V.
        logits: whether `forward` gives the logits of all new tokens or of the last only.
    """

    name: str

    def __init__(self, *, max_length: int, vocabulary_size: int, logits: LogitsKind) -> None:
        self.max_length = max_length
        self.vocabulary_size = vocabulary_size
        self.logits = logits
        self._lengths: TokenIds | None = None

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lengths = None
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """Free the model and its cache."""

    @abc.abstractmethod
    def _allocate(self, batch_size: int) -> None:
        """Provide an empty cache for `batch_size` sequences."""

    @abc.abstractmethod
    def _forward(self, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        """See `forward`."""

    @property
    @final
    def lengths(self) -> TokenIds:
        """Tokens each sequence holds in the cache, int64 [B].

        Raises:
            ArtifactError: no batch was started.
        """
        if self._lengths is None:
            raise ArtifactError("the runner holds no batch; call start(batch_size) or prefill(prompts) first")
        return self._lengths

    @final
    def start(self, batch_size: int) -> None:
        """Begin a new batch with an empty cache.

        Raises:
            ArtifactError: `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ArtifactError(f"a batch must hold at least one sequence, got batch_size={batch_size}")
        self._allocate(batch_size)
        self._lengths = np.zeros(batch_size, np.int64)

    @final
    def forward(self, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        """Feed new tokens and write their keys and values to the cache, replacing what stood there.

        Args:
            input_ids: int64 [B, n].
            write_indices: int64 [B], the cache row of each sequence's first new token; not beyond its length.

        Returns:
            Logits float32 or float64: [B, n, V], or [B, 1, V] where the runner was opened with `logits="last"`.

        Raises:
            ArtifactError: shapes or dtypes are wrong, or the tokens do not fit the cache.
            TextError: a token id lies outside the vocabulary.
        """
        self._check(input_ids, write_indices)
        logits = self._forward(np.ascontiguousarray(input_ids), np.ascontiguousarray(write_indices))
        self._lengths = write_indices + input_ids.shape[1]
        return logits

    @final
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Start a batch with prompts of any lengths.

        Returns:
            Logits [B, V] at each prompt's own last token.

        Raises:
            ArtifactError: a prompt is longer than the cache, or there is none.
            TextError: a prompt is empty or holds an id outside the vocabulary.
        """
        lengths = _prompt_lengths(prompts)
        self.start(len(prompts))
        logits = self.forward(padded(prompts), np.zeros(len(prompts), np.int64))
        self._lengths = lengths
        if (lengths == lengths.max()).all():
            return logits[:, -1]
        if self.logits == "all":
            return logits[np.arange(len(prompts)), lengths - 1]
        # The graph gave the last column only, which is padding in all rows but the longest. Feeding each row's own
        # last token once more, to the cache row it already occupies, writes the same keys and values again (they
        # depend on nothing but the tokens before) and yields the logits that were skipped.
        last_tokens = np.array([[prompt[-1]] for prompt in prompts], np.int64)
        return self.forward(last_tokens, lengths - 1)[:, -1]

    @final
    def decode(self, tokens: TokenIds) -> Logits:
        """Append one token int64 [B] to every sequence; logits [B, V] of the next.

        Raises:
            ArtifactError: the cache is full, or no batch was started.
            TextError: a token id lies outside the vocabulary.
        """
        return self.forward(tokens[:, None], self.lengths)[:, -1]

    @final
    def decode_sampled(self, tokens: TokenIds, sampling: Sampling) -> TokenIds | None:
        """Append one token int64 [B] to every sequence and choose the next, where the logits are.

        Returns:
            Token ids int64 [B]; None, and nothing done, where this backend leaves choosing to the host.

        Raises:
            ArtifactError: as `decode`, or a logit is NaN or infinite.
            TextError: a token id lies outside the vocabulary.
        """
        input_ids, write_indices = tokens[:, None], self.lengths
        self._check(input_ids, write_indices)
        chosen = self._sampled(np.ascontiguousarray(input_ids), np.ascontiguousarray(write_indices), sampling)
        if chosen is not None:
            self._lengths = write_indices + 1
        return chosen

    def _sampled(self, input_ids: TokenIds, write_indices: TokenIds, sampling: Sampling) -> TokenIds | None:
        """See `decode_sampled`; a backend whose logits are on a device overrides this."""
        return None

    def _check(self, input_ids: TokenIds, write_indices: TokenIds) -> None:
        self._check_arrays(input_ids, write_indices)
        new_tokens = input_ids.shape[1]
        for row, (start, length) in enumerate(zip(write_indices.tolist(), self.lengths.tolist(), strict=True)):
            if start < 0 or start > length:
                raise ArtifactError(
                    f"sequence {row}: write_indices must lie in 0..{length} (the tokens it holds), got {start}"
                )
            if start + new_tokens > self.max_length:
                raise ArtifactError(
                    f"sequence {row}: write_indices + new tokens must not exceed the cache's {self.max_length} rows, "
                    f"got {start} + {new_tokens}; shorten the prompt, or export with a larger --max-length"
                )
        if input_ids.min() < 0 or input_ids.max() >= self.vocabulary_size:
            raise TextError(
                f"token ids must lie in 0..{self.vocabulary_size - 1}, got {input_ids.min()}..{input_ids.max()}; "
                "use the tokenizer of this model"
            )

    def _check_arrays(self, input_ids: TokenIds, write_indices: TokenIds) -> None:
        batch_size = len(self.lengths)
        if input_ids.ndim != 2 or input_ids.shape[0] != batch_size or input_ids.shape[1] == 0:
            raise ArtifactError(f"input_ids must be [{batch_size}, n] with n >= 1, got {list(input_ids.shape)}")
        if write_indices.shape != (batch_size,):
            raise ArtifactError(f"write_indices must be [{batch_size}], got {list(write_indices.shape)}")
        if input_ids.dtype != np.int64 or write_indices.dtype != np.int64:
            raise ArtifactError(
                f"input_ids and write_indices must be int64, got {input_ids.dtype} and {write_indices.dtype}"
            )


def padded(prompts: Sequence[Sequence[int]]) -> TokenIds:
    """Prompts as int64 [B, longest], zeros on the right."""
    ids = np.zeros((len(prompts), max(len(prompt) for prompt in prompts)), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids


def _prompt_lengths(prompts: Sequence[Sequence[int]]) -> TokenIds:
    if not len(prompts):
        raise ArtifactError("a batch must hold at least one prompt, got none")
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    if (lengths == 0).any():
        raise TextError(f"prompt {int(lengths.argmin())} is empty; every prompt must hold at least one token")
    return lengths
