"""Measures a model that optimum exported, through `ORTModelForCausalLM`, as its users run it; see `foreign_worker`."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import onnxruntime
import torch
from foreign_worker import Timed, serve, timed_calls
from optimum.onnxruntime import ORTModelForCausalLM


@final
class OptimumModel:
    """One session and the cache it was given last."""

    def __init__(self, directory: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
            torch.set_num_threads(threads)
        self.model: Any = ORTModelForCausalLM.from_pretrained(directory, session_options=options)
        self.vocabulary_size = self.model.config.vocab_size

    def _called(self, tokens: torch.Tensor, length: int, past: Any = None) -> Any:
        mask = torch.ones(len(tokens), length, dtype=torch.int64)
        with torch.inference_mode():
            return self.model(input_ids=tokens, attention_mask=mask, past_key_values=past, use_cache=True)

    def prefill(self, tokens: np.ndarray) -> Timed:
        """A function that times a number of prefills, in ms each."""
        ids = torch.from_numpy(tokens.astype(np.int64))
        return timed_calls(lambda: self._called(ids, ids.shape[1]))

    def decode(self, context: np.ndarray) -> Timed:
        """A function that times a number of steps behind `context`, in ms each."""
        ids = torch.from_numpy(context.astype(np.int64))
        past = self._called(ids, ids.shape[1]).past_key_values
        return timed_calls(lambda: self._called(ids[:, -1:], ids.shape[1] + 1, past))

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Greedy tokens after `prompt`."""
        found = self.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens
        )
        return [int(token) for token in found[0, len(prompt) :]]


if __name__ == "__main__":
    serve(OptimumModel)
