"""Text sources, for calibration and evaluation alike: what a user names, turned into windows of token ids.

A source is one of

    FILE.txt, .txt.xz, .txt.gz            UTF-8 text
    FILE.jsonl, .jsonl.xz, .jsonl.gz      one JSON object a line, its field `text`
    hf:NAME[:CONFIG]:SPLIT[:COLUMN]       a Hugging Face dataset, column `text` unless named
    FILE.npy, .safetensors                token ids as they are, [sequences, length] or one-dimensional

Documents (lines of a JSONL file, rows of a dataset) are joined by an empty line, as is usual for WikiText. Text is
tokenized without special tokens, as one stream; a stream of ids is cut into consecutive windows, its tail dropped.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from flap_export.errors import InputError, MissingRequirementError, ModelError, TextError
from flap_export.storage import digest_of_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEQUENCE_LENGTH: Final = 128
"""Tokens of a window: FLAP's, for calibration and perplexity alike."""

_HUB_PREFIX: Final = "hf:"
_HUB_FORM: Final = "hf:NAME[:CONFIG]:SPLIT[:COLUMN]"
_COMMON_SPLITS: Final = frozenset({"train", "validation", "test"})
_TEXT_FIELD: Final = "text"
_IDS_TENSOR: Final = "input_ids"
_DOCUMENT_SEPARATOR: Final = "\n\n"
_SUFFIXES: Final = (
    ".txt",
    ".txt.xz",
    ".txt.gz",
    ".jsonl",
    ".jsonl.xz",
    ".jsonl.gz",
    ".npy",
    ".safetensors",
)
_OTHER_VOCABULARY_FILES: Final = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of token ids, and what they were read from."""

    source: str
    """As the user named it."""
    digest: str
    """SHA-256 of the source's content: the file's bytes, or the joined text of a dataset."""
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
) -> TokenWindows:
    """Read a source as windows of token ids.

    A shortage is an error only where the caller asked for a number. Without `sequence_length` and `samples`, a stream
    shorter than `DEFAULT_SEQUENCE_LENGTH` becomes one window of its own length.

    Args:
        source: the source, as the module's docstring lists them.
        tokenizer_directory: directory of the model's tokenizer; read only when the source is text.
        vocabulary_size: every id must be below it.
        sequence_length: tokens of a window; None means `DEFAULT_SEQUENCE_LENGTH` for a stream, and rows as shaped for
            ids [sequences, length]. Of rows longer than it, the first `sequence_length` tokens are kept.
        samples: number of windows; None means all of them.
        seed: of the permutation that chooses `samples` windows among more; those chosen keep their order.
        default_samples: applies where `samples` is None, as a cap: fewer windows are no error.

    Raises:
        TextError: the source is missing, unreadable, empty or too short, or holds an id outside the vocabulary.
        ModelError: the source is text and the directory has no tokenizer that fits the vocabulary.
        MissingRequirementError: the source is a dataset and the package `datasets` is not installed.
        InputError: a number is out of its range.
    """
    for name, value, least in (("sequence_length", sequence_length, 1), ("samples", samples, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    ids, digest = _read_ids(source, tokenizer_directory, vocabulary_size)
    _check_ids(ids, vocabulary_size, source)
    ids = ids.astype(np.int64)
    if ids.ndim == 2:
        windows = _windows_from_rows(ids, sequence_length, source)
    else:
        windows = _windows_from_stream(ids, sequence_length, source, may_be_short=samples is None)
    return TokenWindows(source, digest, _choose(windows, samples, default_samples, seed, source))


def digest_of_source(source: str) -> str:
    """SHA-256 of a source's content, as `TokenWindows.digest`, without tokenizing it.

    Raises:
        TextError: the source is missing, unreadable or of no known kind.
        MissingRequirementError: the source is a dataset and the package `datasets` is not installed.
    """
    if source.startswith(_HUB_PREFIX):
        return digest_of_bytes(_text_from_dataset(source).encode())
    _suffix_of(source)
    return digest_of_bytes(_read_bytes(source))


def load_tokenizer(directory: Path, vocabulary_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, from local files only.

    `tokenizer.json` is taken as it stands: `AutoTokenizer` picks the class by the `model_type` in `config.json` and may
    rebuild the pre-tokenizer after it, so that a pruned checkpoint, whose `model_type` is our own, would tokenize the
    same text otherwise than its dense model.

    Raises:
        ModelError: there is no tokenizer, it cannot be read, or it knows ids outside the vocabulary.
    """
    tokenizer = _open_tokenizer(directory)
    ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if ids > vocabulary_size:
        raise ModelError(
            f"the tokenizer in '{directory}' does not match its model: it needs a vocabulary of {ids} ids, the model "
            f"has {vocabulary_size}; copy the tokenizer files of the model the weights came from"
        )
    return tokenizer


def _open_tokenizer(directory: Path) -> Any:
    has_serialized = (directory / "tokenizer.json").is_file()
    # Without a vocabulary file, transformers builds an empty tokenizer from the configuration instead of failing.
    if not has_serialized and not any((directory / name).is_file() for name in _OTHER_VOCABULARY_FILES):
        raise ModelError(
            f"no tokenizer in '{directory}': expected tokenizer.json; copy the model's tokenizer files there, "
            "or name token ids (.npy, .safetensors) instead of text"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = PreTrainedTokenizerFast if has_serialized else AutoTokenizer
    try:
        # False, not absent: a checkpoint with a modelling file of its own would make transformers ask on the terminal.
        tokenizer = loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # A setting of a wrong type, such as a `model_max_length` that is no number, shows only in use.
        tokenizer.encode("a")
        return tokenizer
    # tokenizers raises bare Exception on a damaged file, transformers exceptions of many libraries.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in '{directory}' cannot be read ({_first_line(error)}); fetch the tokenizer files again"
        ) from error


def _read_ids(source: str, tokenizer_directory: Path, vocabulary_size: int) -> tuple[NDArray[Any], str]:
    """The source's ids, a stream or [sequences, length], and the digest of its content."""
    if source.startswith(_HUB_PREFIX):
        text = _text_from_dataset(source)
        return _ids_from_text(text, tokenizer_directory, vocabulary_size, source), digest_of_bytes(text.encode())
    suffix = _suffix_of(source)
    data = _read_bytes(source)
    digest = digest_of_bytes(data)
    if suffix in (".npy", ".safetensors"):
        array = _array_from_npy(data, source) if suffix == ".npy" else _array_from_safetensors(data, source)
        return array, digest
    text = _decode(_decompress(data, suffix, source), source)
    if suffix.startswith(".jsonl"):
        text = _DOCUMENT_SEPARATOR.join(_documents_from_jsonl(text, source))
    return _ids_from_text(text, tokenizer_directory, vocabulary_size, source), digest


def _suffix_of(source: str) -> str:
    name = Path(source).name.lower()
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise TextError(
            f"text source '{source}' is of no known kind; known are files {', '.join(_SUFFIXES)} and {_HUB_FORM}"
        )
    return suffix


def _read_bytes(source: str) -> bytes:
    try:
        return Path(source).read_bytes()
    except FileNotFoundError as error:
        raise TextError(f"no text source at '{source}'; check the path") from error
    except OSError as error:
        raise TextError(f"text source '{source}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        # A null byte, which a file of arguments or a recipe may hold.
        raise TextError(f"text source {source!r} is no file name: {error}") from error


def _decompress(data: bytes, suffix: str, source: str) -> bytes:
    try:
        if suffix.endswith(".xz"):
            return lzma.decompress(data)
        return gzip.decompress(data) if suffix.endswith(".gz") else data
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TextError(f"text source '{source}' is truncated or damaged ({error}); fetch it again") from error


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TextError(
            f"text source '{source}' must be UTF-8, byte {error.start} is not ({error.reason}); convert it first"
        ) from error


def _documents_from_jsonl(text: str, source: str) -> Iterable[str]:
    # Not splitlines(): a JSON string may hold the other line separators of Unicode as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document_from_line(line, f"'{source}', line {number}")


def _document_from_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: must be a JSON object, found no valid JSON ({error})") from error
    document = value.get(_TEXT_FIELD) if isinstance(value, dict) else None
    if not isinstance(document, str):
        found = f"fields {sorted(value)}" if isinstance(value, dict) else type(value).__name__
        raise TextError(f"{where}: must be a JSON object whose field '{_TEXT_FIELD}' is a string, found {found}")
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{where}: field '{_TEXT_FIELD}' holds half a surrogate pair, which is no text") from error
    return document


def _text_from_dataset(source: str) -> str:
    name, config, split, column = _parse_dataset(source)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingRequirementError(
            f"text source '{source}' needs the package 'datasets'", "pip install datasets"
        ) from error
    try:
        dataset = load_dataset(name, config, split=split)
    # datasets passes on what its readers, the hub's client and the network raise.
    except Exception as error:
        raise TextError(
            f"text source '{source}' cannot be loaded as dataset '{name}', configuration {config}, split '{split}' "
            f"({type(error).__name__}: {_first_line(error)}); the form is {_HUB_FORM}"
        ) from error
    if column not in dataset.column_names:
        raise TextError(f"text source '{source}' has no column '{column}', it has {', '.join(dataset.column_names)}")
    rows = list(dataset[column])
    if not all(isinstance(row, str) for row in rows):
        raise TextError(f"text source '{source}': column '{column}' must hold strings; name another, as in {_HUB_FORM}")
    return _DOCUMENT_SEPARATOR.join(rows)


def _parse_dataset(source: str) -> tuple[str, str | None, str, str]:
    """Name, configuration, split and column.

    Of three parts, the second is the configuration unless it is a usual split; `NAME::SPLIT:COLUMN` leaves no doubt.
    """
    # Colons inside the brackets of a slice, as in train[:1000], separate nothing.
    parts = re.split(r":(?![^\[\]]*\])", source.removeprefix(_HUB_PREFIX))
    if len(parts) == 2 or (len(parts) == 3 and parts[1].partition("[")[0] in _COMMON_SPLITS):
        parts.insert(1, "")
    name, config, split, column = (*parts, _TEXT_FIELD)[:4] if len(parts) in (3, 4) else ("", "", "", "")
    if not (name and split and column):
        raise TextError(f"text source '{source}' must have the form {_HUB_FORM}")
    return name, config or None, split, column


def _ids_from_text(text: str, tokenizer_directory: Path, vocabulary_size: int, source: str) -> NDArray[np.int64]:
    if not text.strip():
        raise TextError(f"text source '{source}' is empty; name one with text in it")
    tokenizer = load_tokenizer(tokenizer_directory, vocabulary_size)
    # One call for the whole stream, since cutting text first would change tokens at the cuts; not verbose, since it
    # would warn of texts longer than the model's context.
    encoding = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return np.asarray(encoding["input_ids"], dtype=np.int64)


def _array_from_npy(data: bytes, source: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    # A damaged header is parsed as a Python literal, with all that this may raise.
    except (ValueError, EOFError, SyntaxError, TypeError, OSError, MemoryError) as error:
        raise TextError(f"text source '{source}' is not a valid .npy file ({_first_line(error)})") from error
    return array


def _array_from_safetensors(data: bytes, source: str) -> NDArray[Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors: dict[str, NDArray[Any]] = load(data)
    except SafetensorError as error:
        raise TextError(f"text source '{source}' is not a valid .safetensors file ({error})") from error
    except KeyError as error:
        raise TextError(f"text source '{source}' must hold integers, found dtype {error.args[0]}") from error
    name = _IDS_TENSOR if _IDS_TENSOR in tensors else next(iter(tensors), None)
    if name is None or (len(tensors) > 1 and name != _IDS_TENSOR):
        raise TextError(
            f"text source '{source}' must hold one tensor, or one named '{_IDS_TENSOR}' among others; "
            f"found {sorted(tensors)}"
        )
    return tensors[name]


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
    ids: NDArray[np.int64], sequence_length: int | None, source: str, *, may_be_short: bool
) -> NDArray[np.int64]:
    """Consecutive windows [sequences, length] of a stream; the tail is dropped."""
    length = sequence_length or DEFAULT_SEQUENCE_LENGTH
    if ids.size < length:
        if sequence_length is not None or not may_be_short:
            raise TextError(
                f"text source '{source}' holds {ids.size} tokens, a window needs {length}; name a longer text or a "
                "smaller sequence_length"
            )
        _logger.warning("'%s' holds %d tokens, less than a window of %d; used as one window", source, ids.size, length)
        length = ids.size
    count = ids.size // length
    return ids[: count * length].reshape(count, length)


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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
