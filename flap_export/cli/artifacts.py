"""Commands about artifacts: export, build, validate, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flap_export.cli import console
from flap_export.cli.options import Device, Json, Output, Seed, Threads, Verbose, finite, one_of
from flap_export.errors import FlapExportError


def export(
    checkpoint: Annotated[str, typer.Argument(help="Dense or pruned checkpoint.")],
    output: Output,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    max_length: Annotated[int | None, typer.Option(help="Rows of the KV cache (2048): prompt and new tokens.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Export a checkpoint to ONNX with its KV cache in place."""
    console.configure_logging(verbose)
    from flap_export.exporting import export as export_checkpoint
    from flap_export.precision import PRECISIONS

    artifact = export_checkpoint(checkpoint, output, dtype=one_of("dtype", dtype, PRECISIONS), max_length=max_length)
    size = sum(file.stat().st_size for file in output.iterdir())
    told = f"exported {checkpoint} in {dtype}, {size / 1e6:.1f} MB: {output}"
    console.show(artifact, [escape(told)], json)


def build(
    artifact: Annotated[Path, typer.Argument(help="Exported artifact.")],
    output: Output,
    backend: Annotated[str, typer.Option(help="tensorrt-rtx or tensorrt.")] = "tensorrt-rtx",
    target: Annotated[
        list[str] | None, typer.Option(help="Compute capability, such as sm80; may repeat; the GPU at hand by default.")
    ] = None,
    logits: Annotated[str, typer.Option(help="last (generating), all (every position) or both.")] = "last",
    batch_size: Annotated[int, typer.Option(min=1, help="The usual batch.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="The largest batch.")] = 4,
    prompt_length: Annotated[int | None, typer.Option(min=1, help="Usual tokens of a prefill (128).")] = None,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="Most tokens of one prefill (the cache).")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="Of the builder, 0 to 5.")] = None,
    weight_stripped: Annotated[bool, typer.Option(help="Leave the weights in the artifact; needs a GPU.")] = False,
    limit_keys: Annotated[bool, typer.Option(help="Let kernels leave out unused rows of the cache.")] = False,
    tf32: Annotated[bool, typer.Option(help="TF32 matrix products in float32 engines.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="File to read and extend (tensorrt).")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Build TensorRT engines from an artifact. For the GPU at hand, or for named ones."""
    console.configure_logging(verbose)
    from flap_export.building import BuildOptions
    from flap_export.building import build as build_engines
    from flap_export.building.flavours import MODULES
    from flap_export.cli import summaries

    record = build_engines(
        artifact,
        output,
        backend=one_of("backend", backend, MODULES),
        targets=target or (),
        logits=one_of("logits", logits, ("last", "all", "both")),
        batch_size=batch_size,
        max_batch=max_batch,
        prompt=prompt_length,
        max_prompt=max_prompt,
        options=BuildOptions(optimization_level, weight_stripped, limit_keys, tf32, timing_cache),
    )
    console.show(record, [*summaries.of_engine(record), escape(f"engines: {output}")], json)


def validate(
    artifact: Annotated[Path, typer.Argument(help="Exported artifact.")],
    reference: Annotated[str, typer.Option(help="The checkpoint it was exported from.")],
    engine: Annotated[Path | None, typer.Option(help="Engines built from the artifact, to check as well.")] = None,
    prompt_length: Annotated[int | None, typer.Option(min=2, help="Tokens of the longest random prompt.")] = None,
    decode_steps: Annotated[int, typer.Option(min=1, help="Greedy steps after each prefill.")] = 32,
    batch_size: Annotated[int, typer.Option(min=2, help="Sequences of the ragged batch.")] = 4,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to save parity.json.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prove that an artifact computes what its checkpoint does. A breach exits 1."""
    console.configure_logging(verbose)
    from flap_export.cli import summaries
    from flap_export.manifest import note
    from flap_export.validation import ParityReport
    from flap_export.validation import validate as validate_artifact

    if output is not None:
        ParityReport.check_output(output)
    parity = validate_artifact(
        artifact,
        reference=reference,
        engine=engine,
        prompt_length=prompt_length,
        decode_steps=decode_steps,
        batch_size=batch_size,
        seed=seed,
        device=device,
        threads=threads,
    )
    if output is not None:
        parity.save(output)
        note(output)
    console.show(parity, summaries.of_parity(parity), json)
    _gate(parity.raise_if_breached)
    if engine is not None:
        _gate(parity.raise_if_incomplete)


def _gate(check: Any) -> None:
    """Hold a result that has been printed already against its gate."""
    try:
        check()
    except FlapExportError as error:
        console.emit_error(error, as_json=False)
        raise typer.Exit(error.exit_code) from error


def bench(
    artifact: Annotated[Path, typer.Argument(help="Pruned artifact.")],
    baseline: Annotated[Path, typer.Option(help="Dense artifact, exported alike.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Sequences of a batch; may repeat (1).")] = None,
    prompt_length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a prefill; may repeat.")] = None,
    context_length: Annotated[int | None, typer.Option(min=1, help="Cached tokens before a decode step.")] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds per phase and shape.")] = 30,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all rounds together.", callback=finite)] = 120.0,
    minimum_speedup: Annotated[
        float | None, typer.Option(help="Exit 1 where a speedup is below this.", callback=finite)
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Set what `predict` expects of this GPU beside it.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to save latency.json.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a pruned artifact against its dense baseline. Beside it stands what the arithmetic allows."""
    console.configure_logging(verbose)
    from flap_export.benchmarking import LatencyReport
    from flap_export.benchmarking import bench as bench_artifacts
    from flap_export.cli import summaries
    from flap_export.manifest import note

    if output is not None:
        LatencyReport.check_output(output)
    with console.progress_bars() as progress:
        latency = bench_artifacts(
            artifact,
            baseline=baseline,
            batch_sizes=batch_size or (1,),
            prompt_lengths=prompt_length or (128,),
            context_length=context_length,
            repeats=repeats,
            budget_s=budget,
            threads=threads,
            device=device,
            seed=seed,
            gpu=gpu,
            progress=progress,
        )
    if output is not None:
        latency.save(output)
        note(output)
    console.show(latency, summaries.of_latency(latency), json)
    if minimum_speedup is not None:
        _gate(lambda: latency.raise_if_slower(minimum_speedup))
