"""Windows of token ids, for calibration and evaluation alike, from a source that a user names.

Text is tokenized without special tokens, as one stream; a stream of ids is cut into consecutive windows, its tail
dropped. For families that need it, every window of text begins with the tokenizer's BOS token. What a source may be is
listed in `flap_export.text.sources`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flap_export.errors import InputError, ModelError, TextError
from flap_export.storage import digest_of_bytes
from flap_export.text.sources import read_source
from flap_export.text.tokenization import ids_from_text, load_tokenizer

DEFAULT_SEQUENCE_LENGTH: Final = 128
"""Tokens of a window: FLAP's, for calibration and perplexity alike."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of token ids, and what they were read from."""

    source: str
    """As the user named it."""
    digest: str
    """SHA-256 of the source's content: the file's bytes, or the joined text of a dataset. Where windows of text begin
    with BOS, of that and the token."""
    tokens: NDArray[np.int64]
    """[sequences, length]"""


def read_windows(
    source: str,
    tokenizer_directory: Path,
    vocabulary_size: int,
    *,
    sequence_length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    default_samples: int | None = None,
    with_bos: bool = False,
) -> TokenWindows:
    """Read a source as windows of token ids.

    A shortage is an error only where the caller asked for a number. Without `sequence_length` and `samples`, a stream
    shorter than `DEFAULT_SEQUENCE_LENGTH` becomes one window of its own length.

    Args:
        source: the source, as `flap_export.text.sources` lists them.
        tokenizer_directory: directory of the model's tokenizer; read only when the source is text.
        vocabulary_size: every id must be below it.
        sequence_length: tokens of a window; None means `DEFAULT_SEQUENCE_LENGTH` for a stream, and rows as shaped for
            ids [sequences, length]. Of rows longer than it, the first `sequence_length` tokens are kept.
        samples: number of windows; None means all of them.
        seed: of the permutation that chooses `samples` windows among more; those chosen keep their order.
        default_samples: applies where `samples` is None, as a cap: fewer windows are no error.
        with_bos: begin every window of text with the tokenizer's BOS token, if it has one; it counts as one of the
            window's tokens.

    Raises:
        TextError: the source is missing, unreadable, empty or too short, or holds an id outside the vocabulary.
        ModelError: the source is text and the directory has no tokenizer that fits the vocabulary.
        MissingRequirementError: the source is a dataset and the package `datasets` is not installed.
        InputError: a number is out of its range.
    """
    for name, value, least in (("sequence_length", sequence_length, 1), ("samples", samples, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    content, digest = read_source(source)
    bos: int | None = None
    if isinstance(content, str):
        tokenizer = load_tokenizer(tokenizer_directory, vocabulary_size)
        ids, bos = ids_from_text(content, tokenizer), tokenizer.bos_token_id if with_bos else None
        if bos is not None:
            _check_bos(bos, vocabulary_size, tokenizer_directory)
            digest = digest_of_bytes(f"{digest} behind {bos}".encode())
    else:
        ids = content
    _check_ids(ids, vocabulary_size, source)
    ids = ids.astype(np.int64)
    if ids.ndim == 2:
        windows = _windows_from_rows(ids, sequence_length, source)
    else:
        windows = _windows_from_stream(ids, sequence_length, source, may_be_short=samples is None, bos=bos)
    return TokenWindows(source, digest, _choose(windows, samples, default_samples, seed, source))


def _check_bos(bos: int, vocabulary_size: int, directory: Path) -> None:
    if bos >= vocabulary_size:
        raise ModelError(
            f"the tokenizer in '{directory}' does not match its model: BOS is {bos}, the model has a vocabulary of "
            f"{vocabulary_size}; copy the tokenizer files of the model the weights came from"
        )


def _check_ids(ids: NDArray[Any], vocabulary_size: int, source: str) -> None:
    if ids.dtype.kind not in "iu":
        raise TextError(f"text source '{source}' must hold integers (token ids), found {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise TextError(f"text source '{source}' must have shape [sequences, length] or [length], found {ids.shape}")
    if ids.size == 0:
        raise TextError(f"text source '{source}' holds no tokens; name one with text in it")
    outside = (ids < 0) | (ids >= vocabulary_size)
    if outside.any():
        where = tuple(int(index) for index in np.argwhere(outside)[0])
        raise TextError(
            f"text source '{source}': ids must lie in 0..{vocabulary_size - 1}, the model's vocabulary; found "
            f"{ids[where]} at {list(where)}; tokenize it with this model's tokenizer"
        )


def _windows_from_rows(ids: NDArray[np.int64], sequence_length: int | None, source: str) -> NDArray[np.int64]:
    """Rows [sequences, length] as shaped, or their first `sequence_length` tokens."""
    length = ids.shape[1]
    if sequence_length is not None and sequence_length > length:
        raise TextError(
            f"text source '{source}' has sequences of {length} tokens, sequence_length asks for {sequence_length}; "
            f"ask for at most {length}"
        )
    return ids[:, :sequence_length]


def _windows_from_stream(
    ids: NDArray[np.int64], sequence_length: int | None, source: str, *, may_be_short: bool, bos: int | None
) -> NDArray[np.int64]:
    """Consecutive windows [sequences, length] of a stream, each behind `bos` if there is one; the tail is dropped."""
    length = sequence_length or DEFAULT_SEQUENCE_LENGTH
    cut = length if bos is None else length - 1
    if not cut:
        raise TextError(
            f"text source '{source}': windows begin with BOS for this model and need at least 2 tokens, got 1"
        )
    if ids.size < cut:
        if sequence_length is not None or not may_be_short:
            raise TextError(
                f"text source '{source}' holds {ids.size} tokens, a window needs {cut}; name a longer text or a "
                "smaller sequence_length"
            )
        _logger.warning("'%s' holds %d tokens, less than a window of %d; used as one window", source, ids.size, cut)
        cut = ids.size
    count = ids.size // cut
    windows = ids[: count * cut].reshape(count, cut)
    return windows if bos is None else np.insert(windows, 0, bos, axis=1)


def _choose(
    windows: NDArray[np.int64], samples: int | None, default_samples: int | None, seed: int, source: str
) -> NDArray[np.int64]:
    available, length = windows.shape
    if samples is not None and samples > available:
        raise TextError(
            f"text source '{source}' gives {available} windows of {length} tokens, {samples} samples were asked for; "
            f"ask for at most {available}, or name a longer text"
        )
    wanted = default_samples if samples is None else samples
    if wanted is None or wanted >= available:
        return windows
    chosen = np.sort(np.random.default_rng(seed).permutation(available)[:wanted])
    return windows[chosen]
