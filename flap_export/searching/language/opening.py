"""Who answers, from what a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from flap_export.errors import InputError
from flap_export.searching.language.proposers import Proposer

FORMS: Final = "openai:URL (with the name of its model), local:PATH or self"


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
    check_proposer(text, model_name)
    kind, _, place = text.partition(":")
    if kind == "openai":
        from flap_export.searching.language.openai_server import OpenAIServer

        assert model_name
        return OpenAIServer(place, model_name, timeout_s=timeout_s, max_retries=max_retries)
    from flap_export.searching.language.local_model import LocalModel

    return LocalModel(place or str(pruned_model), device=device)


def check_proposer(text: str, model_name: str | None) -> None:
    """Whether a proposer can be meant by this.

    Raises:
        InputError: it has none of the forms, or the model's name is missing, or too much.
    """
    kind, _, place = text.partition(":")
    if not (text == "self" or (place and kind in ("openai", "local"))):
        raise InputError(f"a proposer reads {FORMS}, got '{text}'")
    if kind == "openai" and not model_name:
        raise InputError(f"{text} needs the name of a model at the server; add --model NAME")
    if kind != "openai" and model_name:
        raise InputError(f"{text} names its model itself, got the name '{model_name}' too; leave it out")
