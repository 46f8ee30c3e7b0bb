"""What is timed: one call of a runner in one phase and shape, repeatable without changing what it does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from flap_export.ideal import Phase

if TYPE_CHECKING:
    from flap_export.runners import Runner

Call = Callable[[], object]

_FILL_CHUNK_TOKENS: Final = 64


@dataclass(frozen=True)
class Workload:
    """One phase and shape."""

    phase: Phase
    batch_size: int
    length: int
    """Prompt tokens of a prefill; tokens in the cache before a decode step."""

    @property
    def new_tokens(self) -> int:
        """Of each sequence in one call."""
        return self.length if self.phase == "prefill" else 1

    @property
    def context_length(self) -> int:
        """Tokens in the cache of each sequence before a call."""
        return 0 if self.phase == "prefill" else self.length

    @property
    def described(self) -> str:
        """Phase and shape in words."""
        length = "prompt" if self.phase == "prefill" else "context"
        return f"{self.phase}, batch {self.batch_size}, {length} {self.length}"


def prepared_call(runner: Runner, workload: Workload, seed: int) -> Call:
    """Start a batch and fill its cache with a random context; the result runs the workload once.

    Every call writes the rows right behind the context, so that all calls have the same context.
    """
    batch_size, context_length = workload.batch_size, workload.context_length
    size = (batch_size, context_length + workload.new_tokens)
    tokens = np.random.default_rng(seed).integers(0, runner.vocabulary_size, size, dtype=np.int64)
    runner.start(batch_size)
    # In chunks, lest the context's own prefill decides about the peak memory of decoding.
    for start in range(0, context_length, _FILL_CHUNK_TOKENS):
        end = min(start + _FILL_CHUNK_TOKENS, context_length)
        runner.forward(tokens[:, start:end], np.full(batch_size, start, np.int64))
    new, write_indices = tokens[:, context_length:], np.full(batch_size, context_length, np.int64)
    return lambda: runner.forward(new, write_indices)


def timed_ms(call: Call, calls: int) -> float:
    """Mean time of one of `calls` calls in a row, in ms."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) * 1000 / calls
