"""The tokenizer of a model directory, and what it makes of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from flap_export.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER_VOCABULARY_FILES: Final = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")


def load_tokenizer(directory: Path, vocabulary_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, from local files only.

    `tokenizer.json` is taken as it stands: `AutoTokenizer` picks the class by the `model_type` in `config.json` and may
    rebuild the pre-tokenizer after it, so that a pruned checkpoint, whose `model_type` is our own, would tokenize the
    same text otherwise than its dense model.

    Special tokens outside the vocabulary are no reason to refuse it: text holds none unless it spells one out, which
    whoever takes the ids refuses. Gemma 3's text models share a tokenizer with those that see images, and have no row
    for its image token.

    Raises:
        ModelError: there is no tokenizer, it cannot be read, or it makes ids outside the vocabulary of plain text.
    """
    tokenizer = _open_tokenizer(directory)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {index for index, token in added.items() if token.special}
    ids = max((index for index in tokenizer.get_vocab().values() if index not in special), default=-1) + 1
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
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"the tokenizer in '{directory}' cannot be read ({reason}); fetch the tokenizer files again"
        ) from error


def ids_from_text(text: str, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """The token ids of a text, as one stream without special tokens."""
    # One call for the whole stream, since cutting text first would change tokens at the cuts; not verbose, since it
    # would warn of texts longer than the model's context.
    encoding = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return np.asarray(encoding["input_ids"], dtype=np.int64)
