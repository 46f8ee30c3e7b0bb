"""The commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flap_export.cli import console
from flap_export.cli.options import Device, Json, Output, Samples, Seed, SequenceLength, Threads, Verbose
from flap_export.cli.searching import search
from flap_export.errors import FlapExportError, check_choice

Share = Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the datasheet's rate, assumed.")]

app = typer.Typer(
    name="flap-export",
    help="Prune a causal language model, export it, prove that the artifact computes the same, measure the speedup.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    as_json = "--json" in sys.argv[1:]
    try:
        app(standalone_mode=True)
    except FlapExportError as error:
        console.emit_error(error, as_json=as_json)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.side().print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import flap_export

        typer.echo(flap_export.__version__)
        raise typer.Exit


app.command()(search)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see pipelines/*.yaml.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run directory (runs/RECIPE).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as prune.ratio=0.3.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Every stage of a recipe; resumes where an interrupted run stopped."""
    console.configure_logging(verbose)
    from flap_export.cli import summaries
    from flap_export.pipeline import run as run_recipe
    from flap_export.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with console.progress_bars() as progress:
        result = run_recipe(loaded, output or Path("runs") / recipe.stem, progress=progress)
    console.show(result.as_json(), summaries.of_run(result), json)
    for breach in result.breaches:
        console.side().print(f"[bold red]breached:[/] {breach}")
    if result.breaches:
        raise typer.Exit(result.breaches[0].exit_code)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name of a dense model.")],
    output: Output,
    ratio: Annotated[
        float | None, typer.Option(help="Share of the attention and FFN weights that goes; or give --rates.")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Every layer's own share: what `search` wrote, or a JSON list.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text source to calibrate on; magnitude and random do without.")
    ] = None,
    method: Annotated[str, typer.Option(help="flap, obs, wanda-sp, llm-pruner, magnitude or random.")] = "flap",
    metric: Annotated[str | None, typer.Option(help="wifv, ifv or wifn; the method's own by default.")] = None,
    structure: Annotated[str | None, typer.Option(help="al-am, al-mm, ul-mm or ul-um; the method's own.")] = None,
    square_attention: Annotated[
        bool | None,
        typer.Option(help="Square attention scores; by default with the statistics `reference`, whose code does."),
    ] = None,
    compensation: Annotated[str | None, typer.Option(help="none, bias or least-squares; the method's own.")] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit least squares to what the already pruned layers give.")
    ] = False,
    remove_heads: Annotated[int, typer.Option(min=0, help="Query heads that go, for al-mm and ul-mm.")] = 0,
    head_units: Annotated[str, typer.Option(help="groups (whole KV groups) or queries (one head of each).")] = "groups",
    align_channels: Annotated[int, typer.Option(min=1, help="FFN widths are multiples of this.")] = 1,
    layout: Annotated[
        str, typer.Option(help="uneven, or stock: the same in every layer, loadable by the family's own classes.")
    ] = "uneven",
    statistics: Annotated[str, typer.Option(help="welford (exact) or reference (the official code's).")] = "welford",
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Precision to calibrate in.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prune a model: a smaller checkpoint and its plan."""
    console.configure_logging(verbose)
    from flap_export.allocation import STRUCTURES
    from flap_export.calibration import ACCUMULATORS, DTYPES
    from flap_export.cli import summaries
    from flap_export.compensation import COMPENSATIONS
    from flap_export.ladders import HEAD_UNITS
    from flap_export.methods import METHODS
    from flap_export.pruning import prune as prune_model
    from flap_export.scoring import METRICS
    from flap_export.stock import LAYOUTS

    with console.progress_bars() as progress:
        plan = prune_model(
            model,
            output,
            ratio=ratio,
            rates=rates,
            calibration=calibration,
            method=_one_of("method", method, METHODS),
            metric=_one_of("metric", metric, METRICS),
            structure=_one_of("structure", structure, STRUCTURES),
            square_attention=square_attention,
            compensation=_one_of("compensation", compensation, COMPENSATIONS),
            sequential=sequential,
            remove_heads=remove_heads,
            head_units=_one_of("head-units", head_units, HEAD_UNITS),
            align_channels=align_channels,
            layout=_one_of("layout", layout, LAYOUTS),
            statistics=_one_of("statistics", statistics, ACCUMULATORS),
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            device=device,
            dtype=_one_of("dtype", dtype, DTYPES),
            progress=progress,
        )
    console.show(plan, [*summaries.of_plan(plan), f"checkpoint: {output}"], json)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name of a dense model.")],
    output: Output,
    calibration: Annotated[str, typer.Option(help="Text source all methods calibrate on.")],
    text: Annotated[list[str], typer.Option(help="Text source to evaluate on; repeat for several.")],
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD[,KEY=VALUE]...", help="What to compare, such as flap,metric=ifv; repeat."),
    ] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Share that goes; repeat (0.1, 0.2, 0.3, 0.5).")] = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    evaluation_samples: Annotated[int | None, typer.Option(min=1, help="Windows evaluated per text (all).")] = None,
    seed: Seed = 0,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")] = False,
    device: Device = "cpu",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Pruning methods side by side on one model: a table and a plot of perplexity against ratio."""
    console.configure_logging(verbose)
    from flap_export.cli import summaries
    from flap_export.comparison import compare as compare_methods
    from flap_export.evidence import CalibrationText
    from flap_export.methods import METHODS

    variants, ratios = method or list(METHODS), ratio or [0.1, 0.2, 0.3, 0.5]
    with console.progress_bars() as progress:
        report = compare_methods(
            model,
            output,
            variants=variants,
            ratios=ratios,
            calibration=CalibrationText(
                source=calibration, samples=samples, sequence_length=sequence_length, seed=seed
            ),
            sources=text,
            samples=evaluation_samples,
            sequence_length=sequence_length,
            plot=not no_plot,
            device=device,
            progress=progress,
        )
    console.show(report, [*summaries.of_comparison(report, variants, ratios), f"comparison: {output}"], json)


def _one_of(option: str, value: str | None, known: Any) -> Any:
    if value is not None:
        check_choice(f"--{option}", value, known)
    return value


@app.command()
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
    from flap_export.exporting import DTYPES
    from flap_export.exporting import export as export_checkpoint

    artifact = export_checkpoint(checkpoint, output, dtype=_one_of("dtype", dtype, DTYPES), max_length=max_length)
    size = sum(file.stat().st_size for file in output.iterdir())
    console.show(artifact, [f"exported {checkpoint} in {dtype}, {size / 1e6:.1f} MB: {output}"], json)


@app.command()
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
    """Build TensorRT engines from an artifact, for the GPU at hand or for named ones."""
    console.configure_logging(verbose)
    from flap_export.building import BuildOptions
    from flap_export.building import build as build_engines
    from flap_export.building.flavours import MODULES
    from flap_export.cli import summaries

    record = build_engines(
        artifact,
        output,
        backend=_one_of("backend", backend, MODULES),
        targets=target or (),
        logits=_one_of("logits", logits, ("last", "all", "both")),
        batch_size=batch_size,
        max_batch=max_batch,
        prompt=prompt_length,
        max_prompt=max_prompt,
        options=BuildOptions(optimization_level, weight_stripped, limit_keys, tf32, timing_cache),
    )
    console.show(record, [*summaries.of_engine(record), f"engines: {output}"], json)


@app.command()
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
    """Prove that an artifact computes what its checkpoint computes; a breach exits 1."""
    console.configure_logging(verbose)
    from flap_export.cli import summaries
    from flap_export.loading import open_checkpoint
    from flap_export.validation import validate as validate_artifact

    parity = validate_artifact(
        artifact,
        reference=open_checkpoint(reference).directory,
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
    console.show(parity, summaries.of_parity(parity), json)
    _gate(parity.raise_if_breached)


def _gate(check: Any) -> None:
    """Hold a result that has been printed already against its gate."""
    try:
        check()
    except FlapExportError as error:
        console.emit_error(error, as_json=False)
        raise typer.Exit(error.exit_code) from error


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(help="Pruned artifact.")],
    baseline: Annotated[Path, typer.Option(help="Dense artifact, exported alike.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Sequences of a batch; may repeat (1).")] = None,
    prompt_length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a prefill; may repeat.")] = None,
    context_length: Annotated[int | None, typer.Option(min=1, help="Cached tokens before a decode step.")] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds per phase and shape.")] = 30,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all rounds together.")] = 120.0,
    minimum_speedup: Annotated[float | None, typer.Option(help="Exit 1 where a speedup is below this.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Set what `predict` expects of this GPU beside it.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to save latency.json.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a pruned artifact against its dense baseline, beside what the arithmetic allows."""
    console.configure_logging(verbose)
    from flap_export.benchmarking import bench as bench_artifacts
    from flap_export.cli import summaries

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
    )
    if output is not None:
        latency.save(output)
    console.show(latency, summaries.of_latency(latency), json)
    if minimum_speedup is not None:
        _gate(lambda: latency.raise_if_slower(minimum_speedup))


@app.command()
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


@app.command()
def generate(
    target: Annotated[str, typer.Argument(help="Checkpoint or artifact.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
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


@app.command()
def inspect(path: Annotated[str, typer.Argument(help="Model, checkpoint or artifact.")], json: Json = False) -> None:
    """What is this, layer by layer."""
    console.configure_logging(False)
    from flap_export.cli.inspecting import described

    value, parts = described(path)
    console.show(value, parts, json)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Directory with a manifest.json.")], json: Json = False
) -> None:
    """Check every file of a directory against its manifest."""
    console.configure_logging(False)
    from flap_export.manifest import verify as verify_directory

    manifest = verify_directory(directory)
    console.show({"verified": len(manifest.files)}, [f"{len(manifest.files)} files are as they were written"], json)


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(help="Directory of a run.")], json: Json = False) -> None:
    """Write a run's report.html."""
    console.configure_logging(False)
    from flap_export.reporting import report as write_report

    path = write_report(run_directory)
    console.show({"report": str(path)}, [f"report: {path}"], json)


@app.command()
def predict(
    plan: Annotated[str, typer.Argument(help="plan.json, or a directory that holds one.")],
    gpu: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100, h200, l4 or l40s.")],
    model: Annotated[str | None, typer.Option(help="The dense model; the plan's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="May repeat (1, 8, 32).")] = None,
    prompt_length: Annotated[list[int] | None, typer.Option(min=1, help="May repeat (128, 2048).")] = None,
    context_length: Annotated[int, typer.Option(min=1, help="Cached tokens before a decode step.")] = 1024,
    bandwidth_efficiency: Annotated[float, Share] = 0.85,
    matrix_efficiency: Share = 0.65,
    kernel_gap_us: Annotated[float, typer.Option(min=0.0, help="Assumed microseconds between kernels.")] = 2.0,
    json: Json = False,
) -> None:
    """Expected latency and speedup of a plan on a GPU, from its datasheet."""
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
