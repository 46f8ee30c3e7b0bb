"""Multi-head latent attention on this CPU: the exported graph, which attends to latents, against two others.

    transformers   the family's own class, which caches latents too, but makes all keys and values of them at every step
    pruned         our graph of the model pruned by random scores

All take turns in one run. What that costs grows with the context, so decode steps are measured at several.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any, Final

import common
from experts import COLUMNS, OURS, PRUNED, PRUNED_TORCH, TORCH, measured_against_ours, processes, rows

from flap_export.artifact import load_artifact
from flap_export.benchmarking.workload import Workload

SIZES: Final[dict[str, dict[str, int]]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "vocab_size": 256,
    },
    "250m": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 8000,
    },
}  # fmt: skip
"""Youtu-LLM configurations by their rough number of parameters; the larger one has the layers of the published 2 B."""


def main() -> None:
    """Measure, print a table for every shape, write JSON."""
    arguments = parsed_arguments()
    conditions = common.Conditions()
    with common.work_directory(arguments) as work:
        result = compared(arguments, work)
    for phase in result["phases"]:
        title = f"{arguments.model} Youtu-LLM, float32, {phase['phase']} at {phase['length']} tokens"
        common.show(title, COLUMNS, rows({"phases": [phase]}))
    print(f"written to {common.save_result(arguments, conditions, result)}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "latents")
    made.add_argument("--model", choices=sorted(SIZES), default="250m")
    made.add_argument("--ratio", type=float, default=0.3)
    made.add_argument("--contexts", type=int, nargs="+", default=[128, 1024], help="tokens before a decode step")
    made.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 1024])
    made.add_argument("--max-length", type=int, default=2048)
    made.add_argument("--repeats", type=int, default=30)
    made.add_argument("--budget", type=float, default=60.0, help="seconds per phase and shape")
    made.add_argument("--threads", type=int, help="of every candidate (default: its own choice)")
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.model, arguments.repeats, arguments.budget = "tiny", 3, 2.0
        arguments.contexts, arguments.prompt_lengths = [64], [16]
    return arguments


def compared(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All candidates in every phase and shape."""
    from transformers import YoutuConfig

    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = YoutuConfig(max_position_embeddings=arguments.max_length, **tokens, **SIZES[arguments.model])
    dense = common.random_checkpoint(work / "dense", config, arguments.seed)
    pruned = common.random_pruned_checkpoint(work / "pruned", dense, arguments.ratio, seed=arguments.seed)
    artifacts = {
        OURS: common.exported(work / "dense-onnx", dense, arguments.max_length),
        PRUNED: common.exported(work / "pruned-onnx", pruned, arguments.max_length),
    }
    shapes = [load_artifact(path) for path in artifacts.values()]
    workloads = [Workload("prefill", 1, length) for length in arguments.prompt_lengths]
    workloads += [Workload("decode", 1, context) for context in arguments.contexts]
    with contextlib.ExitStack() as stack:
        candidates = processes(arguments, stack, artifacts, {TORCH: dense, PRUNED_TORCH: pruned})
        return {"phases": [measured_against_ours(arguments, candidates, workload, *shapes) for workload in workloads]}


if __name__ == "__main__":
    main()
