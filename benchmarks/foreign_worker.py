"""What workers around other packages share; needs NumPy alone, so that they can run in environments of their own.

    WORKER.py MODEL_DIRECTORY THREADS        (0 threads: the package's own choice)

A worker reads one JSON object per line from standard input and answers each with one on standard output:

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
from typing import Any, Protocol

import numpy as np

WARMUP_CALLS = 2
FIRST_TOKEN = 3
"""Those below it may end a text."""

Timed = Callable[[int], float]
"""Runs a number of calls and gives the mean time of one, in ms."""


class ForeignModel(Protocol):
    """A model of another package."""

    vocabulary_size: int

    def prefill(self, tokens: np.ndarray) -> Timed:
        """Prefills of a batch [B, n], each from an empty cache."""

    def decode(self, context: np.ndarray) -> Timed:
        """Decode steps behind a context [B, n]."""

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Greedy tokens after `prompt`."""


def timed_calls(call: Callable[[], object]) -> Timed:
    """What times a number of calls."""

    def timed(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) * 1000 / calls

    return timed


def serve(open_model: Callable[[str, int], ForeignModel]) -> None:
    """Answer requests until standard input ends."""
    model = open_model(sys.argv[1], int(sys.argv[2]))
    timed: Timed | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            timed = _prepared(model, request["prepare"])
            timed(WARMUP_CALLS)
            Path("/proc/self/clear_refs").write_text("5")
        print(json.dumps(_answer(model, request, timed)), flush=True)


def _prepared(model: ForeignModel, request: dict[str, Any]) -> Timed:
    size = (request["batch_size"], request["length"])
    tokens = np.random.default_rng(request["seed"]).integers(FIRST_TOKEN, model.vocabulary_size, size)
    timed: Timed = getattr(model, request["phase"])(tokens)
    return timed


def _answer(model: ForeignModel, request: dict[str, Any], timed: Timed | None) -> dict[str, Any]:
    if "generate" in request:
        return {"tokens": model.generate(request["generate"], request["new_tokens"])}
    assert timed is not None, "prepare comes first"
    return {"call_ms": timed(request.get("measure", 1)), "peak_memory_bytes": _peak_memory_bytes()}


def _peak_memory_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
