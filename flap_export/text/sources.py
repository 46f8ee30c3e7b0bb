"""Text sources, for calibration and evaluation alike: what a user names, read as text or as token ids.

A source is one of

    FILE.txt, .txt.xz, .txt.gz            UTF-8 text
    FILE.jsonl, .jsonl.xz, .jsonl.gz      one JSON object a line, its field `text`
    hf:NAME[:CONFIG]:SPLIT[:COLUMN]       a Hugging Face dataset, column `text` unless named
    FILE.npy, .safetensors                token ids as they are, [sequences, length] or one-dimensional

Documents (lines of a JSONL file, rows of a dataset) are joined by an empty line, as is usual for WikiText.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flap_export.errors import MissingRequirementError, TextError
from flap_export.storage import digest_of_bytes

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


def read_source(source: str) -> tuple[str | NDArray[Any], str]:
    """The text of a source, or its ids as they are, and the SHA-256 of its content.

    Raises:
        TextError: the source is missing, unreadable, empty or of no known kind.
        MissingRequirementError: the source is a dataset and the package `datasets` is not installed.
    """
    if source.startswith(_HUB_PREFIX):
        text = _text_from_dataset(source)
        return _checked(text, source), digest_of_bytes(text.encode())
    suffix = _suffix_of(source)
    data = _read_bytes(source)
    digest = digest_of_bytes(data)
    if suffix in (".npy", ".safetensors"):
        return (_array_from_npy if suffix == ".npy" else _array_from_safetensors)(data, source), digest
    text = _decode(_decompress(data, suffix, source), source)
    if suffix.startswith(".jsonl"):
        text = _DOCUMENT_SEPARATOR.join(_documents_from_jsonl(text, source))
    return _checked(text, source), digest


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


def _checked(text: str, source: str) -> str:
    if not text.strip():
        raise TextError(f"text source '{source}' is empty; name one with text in it")
    return text


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
