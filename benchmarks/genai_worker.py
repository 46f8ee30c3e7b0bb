"""Measures one onnxruntime-genai model; needs no other package, so that it can run in an environment of its own.

    genai_worker.py MODEL_DIRECTORY THREADS        (0 threads: its own choice)

Reads one JSON object per line from standard input and answers each with one on standard output:

    {"prepare": {"phase": ..., "batch_size": ..., "length": ..., "seed": ...}}    -> {"call_ms": ..., ...}
    {"measure": calls}                                                            -> {"call_ms": ..., ...}
    {"generate": [tokens], "new_tokens": n}                                       -> {"tokens": [...]}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import onnxruntime_genai

WARMUP_CALLS = 2


@final
class GenaiModel:
    """One model and the generator of its current batch."""

    def __init__(self, directory: str, threads: int) -> None:
        config = onnxruntime_genai.Config(directory)
        if threads:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        self.config = json.loads((Path(directory) / "genai_config.json").read_text())
        self.max_length = self.config["search"]["max_length"]

    def generator(self, batch_size: int) -> Any:
        """Greedy; its cache has all rows from the start, of which its attention reads the valid ones."""
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(max_length=self.max_length, min_length=self.max_length, batch_size=batch_size)
        return onnxruntime_genai.Generator(self.model, params)

    def prefill(self, tokens: np.ndarray) -> Callable[[int], float]:
        """A function that runs one prefill untimed and then times a number of them, in ms each."""
        generator = self.generator(len(tokens))

        def timed(calls: int) -> float:
            total = 0.0
            for call in range(calls + 1):
                begin = time.perf_counter()
                generator.append_tokens(tokens)
                total += time.perf_counter() - begin if call else 0.0
                generator.rewind_to(0)
            return total * 1000 / calls

        return timed

    def decode(self, context: np.ndarray) -> Callable[[int], float]:
        """A function that runs one step behind `context` untimed and then times a number of greedy ones, in ms each."""
        generator, length = self.generator(len(context)), context.shape[1]
        generator.append_tokens(context)

        def timed(calls: int) -> float:
            generator.rewind_to(length - 1)
            generator.append_tokens(context[:, -1:])
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


def prepared(model: GenaiModel, request: dict[str, Any]) -> Callable[[int], float]:
    size = (request["batch_size"], request["length"])
    tokens = np.random.default_rng(request["seed"]).integers(3, model.config["model"]["vocab_size"], size)
    return getattr(model, request["phase"])(tokens.astype(np.int32))


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def answer(model: GenaiModel, request: dict[str, Any], timed: Callable[[int], float] | None) -> dict[str, Any]:
    if "generate" in request:
        return {"tokens": model.generate(request["generate"], request["new_tokens"])}
    assert timed is not None, "prepare comes first"
    return {"call_ms": timed(request.get("measure", 1)), "peak_memory_bytes": peak_memory_bytes()}


def main() -> None:
    model = GenaiModel(sys.argv[1], int(sys.argv[2]))
    timed: Callable[[int], float] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            timed = prepared(model, request["prepare"])
            timed(WARMUP_CALLS)
            reset_peak_memory()
        print(json.dumps(answer(model, request, timed)), flush=True)


if __name__ == "__main__":
    main()
