"""A language model in this process: a Hugging Face directory or hub name, or the very model that is pruned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch

from flap_export.errors import ModelError
from flap_export.searching.language.proposers import Answer, Message

MAX_NEW_TOKENS: Final = 2048
"""Of an answer: thirty candidates of eighty layers do not fit, ten do."""


@final
class LocalModel:
    """Answers with a model that stays loaded; see `flap_export.searching.language.proposers.Proposer`."""

    def __init__(self, model: str, *, device: str = "cpu", max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        """Load model and tokenizer, in the dtype the checkpoint states.

        Args:
            model: a directory or hub name; code of its own is not run.
            device: where it computes.
            max_new_tokens: of an answer, at most.

        Raises:
            ModelError: it cannot be loaded.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            with _without_bars():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
                loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False)
        # transformers and the hub's client raise exceptions of many libraries.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(
                f"'{model}' cannot answer prompts: its weights or its tokenizer cannot be loaded ({reason}); name a "
                "Hugging Face directory or hub name of a causal language model"
            ) from error
        self._model: Any = loaded.to(device).eval()
        self._device, self._max_new_tokens = device, max_new_tokens

    @property
    def max_positions(self) -> int | None:
        """Tokens of prompt and answer together; None where the configuration sets no limit."""
        stated = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return int(stated) if stated else None

    def answer(self, messages: Sequence[Message], *, temperature: float, seed: int) -> Answer:
        """Sample an answer; the same seed gives the same one on the same machine.

        Of a prompt that is too long the end counts, which has the steps and the form of the answer.
        """
        started = time.monotonic()
        prompt, new = self._fitted(self._prompt_ids(messages))
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids = torch.tensor([prompt], device=self._device)
        devices = [self._device] if self._device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(seed)
            found = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=self._padding, **sampling
            )
        answer = found[0, len(prompt) :].tolist()
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        return Answer(text, len(prompt), len(answer), round(time.monotonic() - started, 3))

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        templated = bool(self._tokenizer.chat_template)
        if templated:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
        # A template writes the special tokens itself.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not templated)
        return ids

    def _fitted(self, prompt: list[int]) -> tuple[list[int], int]:
        """The end of the prompt that fits, and the most tokens of an answer, which may take half of all positions."""
        limit = self.max_positions
        if limit is None:
            return prompt, self._max_new_tokens
        new = max(min(self._max_new_tokens, limit - len(prompt)), min(self._max_new_tokens, limit // 2), 1)
        return prompt[-max(limit - new, 1) :], new

    @property
    def _padding(self) -> int:
        """Nothing is padded in a batch of one; transformers wants an id all the same."""
        stated = self._tokenizer.pad_token_id
        return int(stated) if stated is not None else 0


@contextmanager
def _without_bars() -> Iterator[None]:
    """Only the command line draws bars."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
