"""Measures a checkpoint on transformers' own classes, as its users run them; see `foreign_worker`."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from foreign_worker import Timed, serve, timed_calls
from transformers import AutoModelForCausalLM

from flap_export.models.attention import cache_argument


@final
class TransformersModel:
    """One model and the cache it was given last."""

    def __init__(self, directory: str, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        self.cache_argument = cache_argument(self.model)
        self.vocabulary_size = self.model.config.vocab_size

    def _called(self, tokens: torch.Tensor, past: Any = None) -> Any:
        with torch.inference_mode():
            return self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self.cache_argument: past})

    def prefill(self, tokens: np.ndarray) -> Timed:
        """A function that times a number of prefills, in ms each."""
        ids = torch.from_numpy(tokens.astype(np.int64))
        return timed_calls(lambda: self._called(ids))

    def decode(self, context: np.ndarray) -> Timed:
        """A function that times a number of steps, each of other tokens, in ms each; the cache grows by one a step."""
        ids = torch.from_numpy(context.astype(np.int64))
        past, draw = self._called(ids)[self.cache_argument], torch.Generator().manual_seed(0)

        def step() -> None:
            self._called(torch.randint(3, self.vocabulary_size, (len(ids), 1), generator=draw), past)

        return timed_calls(step)

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Greedy tokens after `prompt`."""
        found = self.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens
        )
        return [int(token) for token in found[0, len(prompt) :]]


if __name__ == "__main__":
    serve(TransformersModel)
