"""`generate`: a prompt and a model in, pieces of text out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flap_export.building.record import is_runnable
from flap_export.errors import ModelError
from flap_export.generation import generate, stream_text
from flap_export.models.opening import Checkpoint, listed_tokens, open_checkpoint
from flap_export.rewriting.checkpoint import GENERATION_SETTINGS
from flap_export.runners import open_runner
from flap_export.text.tokenization import load_tokenizer


def generated_text(target: str, prompt: str, *, device: str, threads: int | None, **sampling: Any) -> Iterator[str]:
    """Continue `prompt` with a checkpoint or an artifact; yields text as it comes.

    Raises:
        InputError: the target, its tokenizer or a sampling option cannot be used.
    """
    path = Path(target)
    checkpoint = None if is_runnable(path) else open_checkpoint(target)
    directory = path if checkpoint is None else checkpoint.directory
    with open_runner(directory, device=device, threads=threads, logits="last") as runner:
        tokenizer: Any = load_tokenizer(directory, runner.vocabulary_size)
        prompt_ids = tokenizer.encode(prompt)
        ids = generate(runner, prompt_ids, stop_ids=_stop_ids(directory, checkpoint), **sampling)
        yield from stream_text(tokenizer, ids)


def _stop_ids(directory: Path, checkpoint: Checkpoint | None) -> set[int]:
    """The tokens that end a text, from the generation settings; without settings from a checkpoint's configuration.

    Raises:
        ModelError: the settings cannot be read.
    """
    path = directory / GENERATION_SETTINGS
    if not path.is_file():
        return set() if checkpoint is None else set(checkpoint.end_tokens)
    try:
        return set(listed_tokens(json.loads(path.read_bytes()).get("eos_token_id")))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"'{path}' is damaged: expected settings with a token id or a list of them as eos_token_id ({error}); "
            "copy it from the model again, or remove it"
        ) from error
