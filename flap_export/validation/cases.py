"""Token inputs of a parity check, and what a runner answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from flap_export.devices import available_memory_bytes
from flap_export.errors import InputError, check_seed
from flap_export.runners import Logits, Runner, TokenIds, padded
from flap_export.shapes import DecoderShape

DEFAULT_PROMPT_LENGTH: Final = 64
MOST_SEQUENCES: Final = 1024
"""Of a batch of random prompts; the reference feeds sequences of different lengths one after the other."""
KEPT_POSITIONS: Final = 512
"""Logit vectors kept of one forward pass; longer passes are compared at evenly spaced positions."""

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """Prompts (equally long, or padded on the right) and the pieces in which they are prefilled."""

    name: Literal["single", "chunked", "ragged"]
    prompts: tuple[Prompt, ...]
    chunk_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """Logits a runner gave over one case, with B sequences, N kept prompt positions and T decode steps."""

    prefill: Logits
    """[N, V], no padding among them."""
    last: Logits
    """[B, V], at each prompt's last token."""
    decode: Logits
    """[T B, V], in the same order for every runner."""
    tokens: TokenIds
    """[T, B], what was fed."""


def build_cases(
    *,
    max_length: int,
    vocabulary_size: int,
    decode_steps: int,
    prompt_length: int | None,
    batch_size: int,
    seed: int,
    prompts: Sequence[Sequence[int]] | None,
) -> tuple[Case, Case, Case]:
    """A single prompt; one that fills the cache up to the last decode step, in chunks; a ragged batch.

    Without `prompts`, uniformly random tokens: lengths from 1 to `prompt_length`, `batch_size` of them.

    Raises:
        InputError: the cache is too short for the prompts and the decode steps, the batch cannot be ragged, or the
            seed is negative.
    """
    check_seed(seed)
    room = max_length - decode_steps
    if decode_steps < 1 or room < 2:
        raise InputError(
            f"decode_steps must lie in 1..{max_length - 2} for a cache of {max_length} rows, got {decode_steps}"
        )
    if prompts is None and batch_size > MOST_SEQUENCES:
        raise InputError(
            f"batch_size must be at most {MOST_SEQUENCES}, got {batch_size}: of a longer batch parity would only show "
            "the same again"
        )
    if prompts is None:
        length = min(DEFAULT_PROMPT_LENGTH, room) if prompt_length is None else prompt_length
        prompts = _random_prompts(length, batch_size, vocabulary_size, seed)
    ragged = tuple(tuple(int(token) for token in prompt) for prompt in prompts)
    longest = _checked_longest(ragged, room)
    filling = tuple(np.resize(longest, room).tolist())
    return (
        Case("single", (longest,), (len(longest),)),
        Case("chunked", (filling,), _chunk_sizes(room)),
        Case("ragged", ragged, (len(longest),)),
    )


def check_memory(sequences: int, length: int, piece: int, shape: DecoderShape, dtype: str, device: str) -> None:
    """Whether caches and logits of a case fit into this machine's memory; what else is needed comes on top.

    Args:
        sequences: of the batch.
        length: rows of each one's cache.
        piece: tokens that are fed at once.
        shape: the decoder, pruned or not.
        dtype: the precision of the reference, the widest there is.
        device: caches on another device than the CPU are not counted.

    Raises:
        InputError: they do not.
    """
    available = available_memory_bytes()
    cached = shape.cached_channels * length if device == "cpu" else 0
    needed = sequences * (4 if dtype == "float32" else 8) * (cached + piece * shape.vocabulary_size)
    if available is not None and needed > available:
        raise InputError(
            f"parity of {sequences} sequences of {length} tokens needs {needed / 1e9:.1f} GB for caches and logits, "
            f"and {available / 1e9:.1f} GB are left here; ask for a smaller batch_size or prompt_length, or "
            "export with a smaller --max-length"
        )


def run_case(runner: Runner, case: Case, *, decode_steps: int, forced: TokenIds | None) -> Trace:
    """Prefill, then decode: greedily, or along `forced` int64 [T, B] so that every runner sees the same tokens.

    Args:
        runner: opened with `logits="all"`.
        case: what to feed.
        decode_steps: T.
        forced: the reference's greedy tokens; None for the reference itself.
    """
    prefill, last = _prefilled(runner, case)
    logits, decoded, fed = last, [], []
    for step in range(decode_steps):
        tokens = np.argmax(logits, axis=-1) if forced is None else forced[step]
        logits = runner.forward(tokens[:, None], _lengths(case) + step)[:, -1]
        decoded.append(logits)
        fed.append(tokens)
    return Trace(prefill, last, np.concatenate(decoded), np.stack(fed))


def run_last_case(runner: Runner, case: Case, *, forced: TokenIds) -> Trace:
    """The same with a runner opened with `logits="last"`, through `prefill` and `decode` as generation uses them."""
    last = runner.prefill(case.prompts)
    decoded = [runner.decode(tokens) for tokens in forced]
    return Trace(last, last, np.concatenate(decoded), forced)


def _prefilled(runner: Runner, case: Case) -> tuple[Logits, Logits]:
    """Logits [N, V] at kept positions and [B, V] at the last token of each prompt."""
    lengths, ids = _lengths(case), padded(case.prompts)
    runner.start(len(ids))
    kept, last = [], np.zeros((len(ids), runner.vocabulary_size))
    offset = 0
    for size in case.chunk_sizes:
        logits = runner.forward(ids[:, offset : offset + size], np.full(len(ids), offset, np.int64))
        is_real = np.arange(offset, offset + size) < lengths[:, None]
        kept.append(_thinned(logits[is_real]))
        ends_here = (offset < lengths) & (lengths <= offset + size)
        last[ends_here] = logits[ends_here, lengths[ends_here] - 1 - offset]
        offset += size
    return np.concatenate(kept), last


def _thinned(logits: Logits) -> Logits:
    """At most `KEPT_POSITIONS` of logits [N, V], evenly spaced, first and last included."""
    if len(logits) <= KEPT_POSITIONS:
        return logits
    return logits[np.linspace(0, len(logits) - 1, KEPT_POSITIONS).astype(np.int64)]


def _random_prompts(prompt_length: int, batch_size: int, vocabulary_size: int, seed: int) -> list[Prompt]:
    generator = np.random.default_rng(seed)
    lengths = np.linspace(1, max(prompt_length, 1), max(batch_size, 0)).astype(np.int64)
    return [tuple(generator.integers(0, vocabulary_size, length).tolist()) for length in lengths]


def _checked_longest(prompts: tuple[Prompt, ...], room: int) -> Prompt:
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) < 2 or 0 in lengths:
        raise InputError(
            f"parity needs at least two prompts of different lengths, none of them empty, got lengths "
            f"{sorted(len(prompt) for prompt in prompts)}; raise batch_size or prompt_length"
        )
    longest = max(prompts, key=len)
    if len(longest) > room:
        raise InputError(
            f"the longest prompt must leave room for the decode steps, {room} tokens, got {len(longest)}; "
            "shorten the prompts, take fewer decode steps, or export with a larger --max-length"
        )
    return longest


def _chunk_sizes(length: int) -> tuple[int, ...]:
    """Pieces of unequal size, a single token among them: half, one, the rest."""
    sizes = (length // 2, 1, length - length // 2 - 1)
    return tuple(size for size in sizes if size)


def _lengths(case: Case) -> TokenIds:
    return np.array([len(prompt) for prompt in case.prompts], np.int64)
