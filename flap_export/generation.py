"""Text from a runner: choosing tokens one by one, and turning them into text as they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flap_export.errors import ArtifactError, InputError, check_seed
from flap_export.runners import Logits, Runner
from flap_export.runners.sampling import Sampling

REPLACEMENT_CHARACTER: Final = "\ufffd"


def generate(
    runner: Runner,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Continue a prompt token by token, until a stop token (not yielded), `max_new_tokens`, or the cache is full.

    Args:
        runner: best opened with `logits="last"`.
        prompt_ids: the prompt's tokens.
        max_new_tokens: at most so many.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled from.
        top_k: sample among the k most likely tokens only; 0 means all.
        top_p: sample among the fewest most likely tokens whose probabilities reach this sum.
        seed: of the sampling.
        stop_ids: tokens that end the text.

    Raises:
        InputError: an option is out of its range.
        ArtifactError: the prompt is longer than the cache.
        TextError: the prompt is empty or holds an id outside the vocabulary.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    check_seed(seed)
    if len(prompt_ids) > runner.max_length:
        raise ArtifactError(
            f"the prompt must fit the cache of {runner.max_length} rows, got {len(prompt_ids)} tokens; "
            "shorten it, or export with a larger --max-length"
        )
    generator = np.random.default_rng(seed)
    pick = partial(pick_token, generator=generator, temperature=temperature, top_k=top_k, top_p=top_p)
    # The last token needs no cache row: nothing is computed from it.
    budget = min(max_new_tokens, runner.max_length - len(prompt_ids) + 1)
    sampling = Sampling(temperature, top_k, top_p, seed)
    return _generated(runner, prompt_ids, budget, pick, sampling, frozenset(stop_ids))


def _generated(
    runner: Runner,
    prompt_ids: Sequence[int],
    budget: int,
    pick: Callable[[Logits], int],
    sampling: Sampling,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    """The tokens of `generate`; apart from it so that `generate` refuses bad input when called, not when iterated."""
    token = pick(runner.prefill([prompt_ids])[0])
    for remaining in reversed(range(budget)):
        if token in stop_ids:
            return
        yield token
        if remaining:
            fed = np.array([token], np.int64)
            chosen = runner.decode_sampled(fed, sampling)
            token = pick(runner.decode(fed)[0]) if chosen is None else int(chosen[0])


def pick_token(
    logits: Logits, *, generator: np.random.Generator, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> int:
    """One token id for logits [V]; the options are those of `generate`.

    Raises:
        ArtifactError: a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise ArtifactError("the model gave logits that are NaN or infinite; check it with `flap-export validate`")
    if temperature == 0.0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    probabilities = _softmax(logits[order].astype(np.float64), temperature)
    # A token is kept while what precedes it is short of top_p; nothing precedes the first.
    kept = np.cumsum(probabilities) - probabilities < top_p
    chances = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(order[kept], p=chances))


def stream_text(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """Text of tokens as they come, in pieces that never split a character.

    A character's bytes may be spread over several tokens, and a token's text may depend on the one before it. So each
    piece is what a token adds to the text of the few before it, held back while it ends in an incomplete character.
    Bytes that never become a character are dropped at the end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: token ids, for instance from `generate`.
    """
    context: list[int] = []
    pending: list[int] = []
    for token in ids:
        pending.append(int(token))
        piece = _added_text(tokenizer, context, pending)
        if piece and not piece.endswith(REPLACEMENT_CHARACTER):
            yield piece
            context, pending = pending, []
    rest = _added_text(tokenizer, context, pending).rstrip(REPLACEMENT_CHARACTER)
    if rest:
        yield rest


def _added_text(tokenizer: Any, context: list[int], pending: list[int]) -> str:
    """What `pending` adds to the text of `context`, which ends with a whole character."""
    return _decoded(tokenizer, context + pending)[len(_decoded(tokenizer, context)) :]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _softmax(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    # Divided last: by a very low temperature the largest would become infinite, and so only the others do.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / temperature)
    return np.asarray(weights / weights.sum())


def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    rules = (
        (max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}"),
        (0.0 <= temperature < np.inf, f"temperature must be 0 (greedy) or positive, got {temperature}"),
        (top_k >= 0, f"top_k must be 0 (all tokens) or positive, got {top_k}"),
        (0.0 < top_p <= 1.0, f"top_p must lie above 0 and at most at 1, got {top_p}"),
    )
    for holds, message in rules:
        if not holds:
            raise InputError(message)
