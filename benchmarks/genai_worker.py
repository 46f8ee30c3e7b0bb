"""Measures one onnxruntime-genai model, in an environment of its own if need be; see `foreign_worker`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, final

import numpy as np
import onnxruntime_genai
from foreign_worker import Timed, serve


@final
class GenaiModel:
    """One model and the generator of its current batch."""

    def __init__(self, directory: str, threads: int) -> None:
        config = onnxruntime_genai.Config(directory)
        if threads:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        stated = json.loads((Path(directory) / "genai_config.json").read_text())
        self.max_length, self.vocabulary_size = stated["search"]["max_length"], stated["model"]["vocab_size"]

    def generator(self, batch_size: int) -> Any:
        """Greedy; its cache has all rows from the start, of which its attention reads the valid ones."""
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(max_length=self.max_length, min_length=self.max_length, batch_size=batch_size)
        return onnxruntime_genai.Generator(self.model, params)

    def prefill(self, tokens: np.ndarray) -> Timed:
        """A function that runs one prefill untimed and then times a number of them, in ms each."""
        generator, ids = self.generator(len(tokens)), tokens.astype(np.int32)

        def timed(calls: int) -> float:
            total = 0.0
            for call in range(calls + 1):
                begin = time.perf_counter()
                generator.append_tokens(ids)
                total += time.perf_counter() - begin if call else 0.0
                generator.rewind_to(0)
            return total * 1000 / calls

        return timed

    def decode(self, context: np.ndarray) -> Timed:
        """A function that runs one step behind `context` untimed and then times a number of greedy ones, in ms each."""
        generator, length, ids = self.generator(len(context)), context.shape[1], context.astype(np.int32)
        generator.append_tokens(ids)

        def timed(calls: int) -> float:
            generator.rewind_to(length - 1)
            generator.append_tokens(ids[:, -1:])
            # The first token comes from logits that are there; each of the others takes one run of the graph.
            generator.generate_next_token()
            begin = time.perf_counter()
            for _ in range(calls):
                generator.generate_next_token()
            return (time.perf_counter() - begin) * 1000 / calls

        return timed

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Greedy tokens after `prompt`."""
        generator = self.generator(1)
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


if __name__ == "__main__":
    serve(GenaiModel)
