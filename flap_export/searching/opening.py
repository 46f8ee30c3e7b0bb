"""Who answers, from what a user names."""

from __future__ import annotations

from pathlib import Path

from flap_export.errors import InputError
from flap_export.searching.proposers import Proposer

FORMS = "openai:URL (with the name of its model), local:PATH or self"


def open_proposer(
    text: str,
    model_name: str | None,
    *,
    pruned_model: str | Path,
    device: str = "cpu",
    timeout_s: float = 120.0,
    max_retries: int = 5,
) -> Proposer:
    """The language model behind the operators of a search.

    Args:
        text: `openai:` and a server's address, `local:` and a directory or hub name, or `self`.
        model_name: of a server's model, as the server calls it.
        pruned_model: what `self` means: a dense model's directory or hub name.
        device: where a local model computes.
        timeout_s: for a server to answer.
        max_retries: requests to a server after the first, for one answer.

    Raises:
        InputError: the text has none of these forms, or the model's name is missing.
        ModelError: the local model cannot be loaded.
        MissingRequirementError: the client of servers is not installed.
    """
    kind, _, place = text.partition(":")
    if kind == "openai" and place:
        from flap_export.searching.openai_server import OpenAIServer

        if not model_name:
            raise InputError(f"{text} needs the name of a model at the server; add --model NAME")
        return OpenAIServer(place, model_name, timeout_s=timeout_s, max_retries=max_retries)
    if (kind == "local" and place) or text == "self":
        from flap_export.searching.local_model import LocalModel

        if model_name:
            raise InputError(f"{text} names its model itself, got the name '{model_name}' too; leave it out")
        return LocalModel(place or str(pruned_model), device=device)
    raise InputError(f"a proposer reads {FORMS}, got '{text}'")
