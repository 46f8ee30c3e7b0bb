"""`generate`: a prompt and a model in, pieces of text out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flap_export.building.record import is_runnable
from flap_export.errors import ModelError
from flap_export.generation import generate, stream_text
from flap_export.models.opening import open_checkpoint
from flap_export.runners import open_runner
from flap_export.text.tokenization import load_tokenizer


def generated_text(target: str, prompt: str, *, device: str, threads: int | None, **sampling: Any) -> Iterator[str]:
    """Continue `prompt` with a checkpoint or an artifact; yields text as it comes.

    Raises:
        InputError: the target, its tokenizer or a sampling option cannot be used.
    """
    path = Path(target)
    directory = path if is_runnable(path) else open_checkpoint(target).directory
    with open_runner(directory, device=device, threads=threads, logits="last") as runner:
        tokenizer: Any = load_tokenizer(directory, runner.vocabulary_size)
        prompt_ids = tokenizer.encode(prompt)
        ids = generate(runner, prompt_ids, stop_ids=_stop_ids(directory, tokenizer.eos_token_id), **sampling)
        yield from stream_text(tokenizer, ids)


def _stop_ids(directory: Path, end: int | None) -> set[int]:
    """The tokens that end a text, from the generation settings; where there are none, `end`, which is the tokenizer's.

    Raises:
        ModelError: the settings cannot be read.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return set() if end is None else {end}
    try:
        stated = json.loads(path.read_bytes()).get("eos_token_id")
        listed = [] if stated is None else stated if isinstance(stated, list) else [stated]
        if not all(type(token) is int for token in listed):
            raise ValueError(f"eos_token_id is {stated!r}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"'{path}' is damaged: expected settings with a token id or a list of them as eos_token_id ({error}); "
            "copy it from the model again, or remove it"
        ) from error
    return set(listed)
