"""Our artifact against onnxruntime-genai, optimum and PyTorch on the same dense random Llama, on the CPU.

Every candidate runs in a process of its own; they take turns. onnxruntime-genai and optimum may live in environments of
their own (`--genai-python`, `--optimum-python`; optimum needs one, made with `pip install -e ".[optimum]"`). What is
not there is left out, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

import common

from flap_export.benchmarking.rounds import Measured, take_rounds
from flap_export.benchmarking.statistics import median, median_interval, ratio_interval, ratio_of_medians
from flap_export.benchmarking.worker import Sample, Worker, WorkerOptions
from flap_export.benchmarking.workload import Workload

OURS: Final = "flap_export"
GENAI: Final = "onnxruntime-genai"
OPTIMUM: Final = "optimum"
TORCH: Final = "torch"
AIMS: Final = {"decode": 1.0, "prefill": 1.3}
"""Our speed over onnxruntime-genai's."""
GENAI_WORKER: Final = Path(__file__).with_name("genai_worker.py")
OPTIMUM_WORKER: Final = Path(__file__).with_name("optimum_worker.py")
OPTIMUM_EXPORT: Final = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past")
"""


def main() -> None:
    """Measure, compare greedy tokens, print a table, write JSON."""
    arguments = parsed_arguments()
    conditions = common.Conditions()
    with common.work_directory(arguments) as work:
        result = compared(arguments, work)
    common.show(f"{arguments.model} Llama, float32, batch {arguments.batch_size}", COLUMNS, rows(result))
    print(f"greedy tokens equal: {result['greedy_tokens_equal']}")
    for name, reason in result["skipped"].items():
        print(f"{name} left out: {reason}")
    print(f"written to {common.save_result(arguments, conditions, result)}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "onnxruntime_cpu")
    made.add_argument("--model", choices=sorted(common.LLAMAS), default="52m")
    made.add_argument("--genai-python", default=sys.executable, help="Python that has onnxruntime-genai")
    made.add_argument("--optimum-python", default=sys.executable, help="Python that has optimum-onnx")
    made.add_argument("--prune-genai-head", action="store_true", help="build it with prune_lm_head=true as well")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--prompt-length", type=int, default=128)
    made.add_argument("--max-length", type=int, default=256)
    made.add_argument("--new-tokens", type=int, default=32, help="greedy tokens to compare")
    made.add_argument("--repeats", type=int, default=40)
    made.add_argument("--budget", type=float, default=60.0, help="seconds per phase")
    made.add_argument("--threads", type=int, help="of every candidate (default: its own choice)")
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.model, arguments.repeats, arguments.budget = "tiny", 3, 2.0
    return arguments


def found_package(python: str, module: str) -> Path | None:
    """The folder of a package, or None where an environment lacks it."""
    command = f"import {module}, pathlib; print(pathlib.Path({module}.__file__).parent)"
    try:
        done = subprocess.run([python, "-c", command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(done.stdout.strip().splitlines()[-1])


def foreign_candidates(
    arguments: argparse.Namespace, work: Path, checkpoint: Path
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Commands of the other packages' workers by what they measure, and why the rest is left out."""
    commands: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    threads = str(arguments.threads or 0)
    genai = found_package(arguments.genai_python, "onnxruntime_genai")
    if genai is None:
        skipped[GENAI] = f"{arguments.genai_python} does not have it; name one that has with --genai-python"
    else:
        for label, model in built_genai(arguments, work, checkpoint, genai).items():
            commands[label] = [arguments.genai_python, str(GENAI_WORKER), str(model), threads]
    if found_package(arguments.optimum_python, "optimum.onnxruntime") is None:
        skipped[OPTIMUM] = f"{arguments.optimum_python} does not have it; name one that has with --optimum-python"
    else:
        model = exported_by_optimum(arguments, work, checkpoint)
        commands[OPTIMUM] = [arguments.optimum_python, str(OPTIMUM_WORKER), str(model), threads]
    return commands, skipped


def compared(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All candidates in both phases, and what they generate."""
    name, max_length = arguments.model, arguments.max_length
    checkpoint = common.random_checkpoint(work / name, common.llama_config(name, max_length))
    artifact = common.exported(work / f"{name}-onnx", checkpoint, max_length)
    prompt = list(range(3, 3 + 16))
    tokens = {
        OURS: greedy_tokens(artifact, prompt, arguments.new_tokens),
        TORCH: greedy_tokens(checkpoint, prompt, arguments.new_tokens),
    }
    commands, skipped = foreign_candidates(arguments, work, checkpoint)
    with contextlib.ExitStack() as stack:
        options = WorkerOptions(device="cpu", threads=arguments.threads, seed=arguments.seed)
        candidates: dict[str, Any] = {
            OURS: stack.enter_context(opened(artifact, options)),
            TORCH: stack.enter_context(opened(checkpoint, options)),
        }
        for label, command in commands.items():
            foreign = stack.enter_context(ForeignProcess(label, command, arguments.seed))
            candidates[label] = foreign
            tokens[label] = foreign.generate(prompt, arguments.new_tokens)
        phases = {phase: measured(arguments, candidates, phase) for phase in ("prefill", "decode")}
    return {
        "aims": AIMS,
        "skipped": skipped,
        "others": {
            GENAI: versions(arguments.genai_python, "onnxruntime-genai", "onnxruntime"),
            OPTIMUM: versions(arguments.optimum_python, "optimum-onnx", "onnxruntime", "transformers"),
        },
        "greedy_tokens_equal": len({tuple(found) for found in tokens.values()}) == 1,
        "greedy_tokens": tokens,
        "phases": phases,
    }


@contextlib.contextmanager
def opened(path: Path, options: WorkerOptions) -> Iterator[Worker]:
    with Worker(path, options) as worker:
        worker.backend()
        yield worker


def measured(arguments: argparse.Namespace, candidates: dict[str, Measured], phase: Any) -> dict[str, Any]:
    """One phase: every candidate's samples, summarised, and our speedup over it."""
    workload = Workload(phase, arguments.batch_size, arguments.prompt_length)
    samples = take_rounds(
        list(candidates.values()),
        workload,
        repeats=arguments.repeats,
        budget_s=arguments.budget,
        draw=random.Random(arguments.seed),
    )
    times = {name: [s.call_ms for s in taken] for name, taken in zip(candidates, samples, strict=True)}
    memory = {name: taken[-1].peak_memory_bytes for name, taken in zip(candidates, samples, strict=True)}
    return {name: summarised(times[name], times[OURS], memory[name], arguments.seed) for name in candidates}


def summarised(call_ms: Sequence[float], ours_ms: Sequence[float], memory: int | None, seed: int) -> dict[str, Any]:
    return {
        "median_ms": median(call_ms),
        "interval_ms": median_interval(call_ms),
        "minimum_ms": min(call_ms),
        "peak_memory_bytes": memory,
        "rounds": len(call_ms),
        "our_speedup": ratio_of_medians(call_ms, ours_ms),
        "our_speedup_interval": ratio_interval(call_ms, ours_ms, seed=seed),
    }


def greedy_tokens(path: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """What our own runners generate."""
    import numpy as np

    from flap_export.runners import open_runner

    with open_runner(path, logits="last") as runner:
        logits, tokens = runner.prefill([prompt]), []
        for _ in range(new_tokens):
            tokens.append(int(logits[0].argmax()))
            logits = runner.decode(np.array(tokens[-1:], np.int64))
    return tokens


def built_genai(arguments: argparse.Namespace, work: Path, checkpoint: Path, package: Path) -> dict[str, Path]:
    """onnxruntime-genai's own export of the checkpoint, made unless it is there."""
    add_tokenizer(checkpoint, common.LLAMAS[arguments.model]["vocab_size"])
    variants: dict[str, list[str]] = {GENAI: []}
    if arguments.prune_genai_head:
        variants[f"{GENAI}, last logits"] = ["--extra_options", "prune_lm_head=true"]
    built = {}
    for index, (label, options) in enumerate(variants.items()):
        built[label] = work / f"{arguments.model}-genai-{index}"
        if not (built[label] / "genai_config.json").is_file():
            command = [sys.executable, str(package / "models" / "builder.py"), "-m", "unused", "-i", str(checkpoint)]
            command += ["-o", str(built[label]), "-p", "fp32", "-e", "cpu", "-c", str(work / "cache"), *options]
            subprocess.run(command, check=True, capture_output=True)
    return built


def add_tokenizer(checkpoint: Path, vocabulary_size: int) -> None:
    """The builder wants a tokenizer; any will do."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{index}": index for index in range(vocabulary_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token="t2")
    made.save_pretrained(checkpoint)


def exported_by_optimum(arguments: argparse.Namespace, work: Path, checkpoint: Path) -> Path:
    """The export that optimum makes of the checkpoint, unless it is there."""
    directory = work / f"{arguments.model}-optimum"
    if not (directory / "model.onnx").is_file():
        command = [arguments.optimum_python, "-c", OPTIMUM_EXPORT, str(checkpoint), str(directory)]
        subprocess.run(command, check=True, capture_output=True)
    return directory


def versions(python: str, *packages: str) -> dict[str, str] | None:
    """What another environment has installed; None where it lacks one."""
    command = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {packages!r}}}))"
    try:
        done = subprocess.run([python, "-c", command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found: dict[str, str] = json.loads(done.stdout)
    return found


@final
class ForeignProcess:
    """The parent's end of a worker around another package (`foreign_worker.py`); can be measured like a `Worker`."""

    def __init__(self, name: str, command: Sequence[str], seed: int) -> None:
        self.name, self.seed = name, seed
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> ForeignProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def prepare(self, workload: Workload) -> Sample:
        size = {"phase": workload.phase, "batch_size": workload.batch_size, "length": workload.length}
        return Sample(**self._ask({"prepare": {**size, "seed": self.seed}}))

    def measure(self, calls: int) -> Sample:
        return Sample(**self._ask({"measure": calls}))

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        tokens: list[int] = self._ask({"generate": prompt, "new_tokens": new_tokens})["tokens"]
        return tokens

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} died; its message stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


COLUMNS: Final = (
    "phase", "candidate", "median ms", "95 % interval", "minimum ms", "memory MB", "ours is", "95 % interval", "aim"
)  # fmt: skip


def rows(result: dict[str, Any]) -> list[list[str]]:
    drawn = []
    for phase, candidates in result["phases"].items():
        for name, found in candidates.items():
            low, high = found["interval_ms"]
            ratio_low, ratio_high = found["our_speedup_interval"]
            memory = found["peak_memory_bytes"]
            times = [f"{found['median_ms']:.2f}", f"{low:.2f}-{high:.2f}", f"{found['minimum_ms']:.2f}"]
            ratios = [f"{found['our_speedup']:.2f}x", f"{ratio_low:.2f}-{ratio_high:.2f}"]
            aim = f">= {AIMS[phase]:g}x" if name == GENAI else ""
            drawn.append([phase, name, *times, f"{(memory or 0) / 1e6:.0f}", *ratios, aim])
    return drawn


if __name__ == "__main__":
    main()
