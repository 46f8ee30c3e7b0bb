"""Commands that run a model or look at what is there: evaluate, generate, inspect, verify, report, predict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flap_export.cli import console
from flap_export.cli.options import Device, Json, Samples, Seed, SequenceLength, Threads, Verbose, finite

Share = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Share of the datasheet's rate, assumed.", callback=finite)
]


def evaluate(
    target: Annotated[str, typer.Argument(help="Checkpoint or artifact.")],
    text: Annotated[list[str], typer.Option(help="Text source; may repeat.")],
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows run at once.")] = 8,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Precision of a checkpoint.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Perplexity of a checkpoint or an artifact on text."""
    console.configure_logging(verbose)
    from flap_export.cli import summaries
    from flap_export.evaluation import evaluate as evaluate_target

    quality = evaluate_target(
        target,
        text,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    console.show(quality, summaries.of_quality(quality), json)


def generate(
    target: Annotated[str, typer.Argument(help="Checkpoint or artifact.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.", callback=finite)] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, callback=finite)] = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt, streaming to the terminal."""
    console.configure_logging(verbose)
    from flap_export.cli.generating import generated_text

    pieces = []
    for piece in generated_text(
        target,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=device,
        threads=threads,
    ):
        pieces.append(piece)
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if json:
        console.emit_json({"prompt": prompt, "text": "".join(pieces)})
    else:
        sys.stdout.write("\n")


def inspect(path: Annotated[str, typer.Argument(help="Model, checkpoint or artifact.")], json: Json = False) -> None:
    """What is this, layer by layer."""
    console.configure_logging(False)
    from flap_export.cli.inspecting import described

    value, parts = described(path)
    console.show(value, parts, json)


def verify(
    directory: Annotated[Path, typer.Argument(help="Directory with a manifest.json.")], json: Json = False
) -> None:
    """Check every file of a directory against its manifest."""
    console.configure_logging(False)
    from flap_export.manifest import verify as verify_directory

    manifest = verify_directory(directory)
    console.show({"verified": len(manifest.files)}, [f"{len(manifest.files)} files are as they were written"], json)


def report(run_directory: Annotated[Path, typer.Argument(help="Directory of a run.")], json: Json = False) -> None:
    """Write the report.html of a run or a search."""
    console.configure_logging(False)
    from flap_export.reporting import report as write_report

    path = write_report(run_directory)
    console.show({"report": str(path)}, [escape(f"report: {path}")], json)


def predict(
    plan: Annotated[str, typer.Argument(help="plan.json, or a directory that holds one.")],
    gpu: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100, h200, l4 or l40s.")],
    model: Annotated[str | None, typer.Option(help="The dense model; the plan's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="May repeat (1, 8, 32).")] = None,
    prompt_length: Annotated[list[int] | None, typer.Option(min=1, help="May repeat (128, 2048).")] = None,
    context_length: Annotated[int, typer.Option(min=1, help="Cached tokens before a decode step.")] = 1024,
    bandwidth_efficiency: Share = 0.85,
    matrix_efficiency: Share = 0.65,
    kernel_gap_us: Annotated[
        float, typer.Option(min=0.0, help="Assumed microseconds between kernels.", callback=finite)
    ] = 2.0,
    json: Json = False,
) -> None:
    """Expected latency and speedup of a plan, from a GPU's datasheet."""
    console.configure_logging(False)
    from flap_export.cli.predicting import of_prediction, predicted
    from flap_export.prediction import Assumptions

    assumptions = Assumptions(
        bandwidth_efficiency=bandwidth_efficiency, matrix_efficiency=matrix_efficiency, kernel_gap_us=kernel_gap_us
    )
    prediction = predicted(
        plan,
        model,
        gpu=gpu,
        dtype=dtype,
        batch_sizes=batch_size or (1, 8, 32),
        prompt_lengths=prompt_length or (128, 2048),
        context_length=context_length,
        assumptions=assumptions,
    )
    console.show(prediction, of_prediction(prediction), json)
