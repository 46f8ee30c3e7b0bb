"""Commands that make a model smaller: run, prune, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flap_export.cli import console
from flap_export.cli.options import Device, Json, Output, Samples, Seed, SequenceLength, Verbose, finite, one_of


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see pipelines/*.yaml.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run directory (runs/RECIPE).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as prune.ratio=0.3.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Every stage of a recipe; resumes where it stopped."""
    console.configure_logging(verbose)
    from flap_export.cli import summaries
    from flap_export.pipeline.running import run as run_recipe
    from flap_export.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with console.progress_bars() as progress:
        result = run_recipe(loaded, output or Path("runs") / recipe.stem, progress=progress)
    console.show(result.as_json(), summaries.of_run(result), json)
    for breach in result.breaches:
        console.side().print(f"[bold red]breached:[/] {escape(str(breach))}")
    if result.breaches:
        raise typer.Exit(result.breaches[0].exit_code)


def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name of a dense model.")],
    output: Output,
    ratio: Annotated[
        float | None,
        typer.Option(help="Share of the attention and FFN weights that goes; or give --rates."),
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
    remove_heads: Annotated[int, typer.Option(min=0, help="Query heads that go, for al-mm and ul-mm only.")] = 0,
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
    from flap_export.allocation.ladders import HEAD_UNITS
    from flap_export.allocation.stage import STRUCTURES
    from flap_export.calibration.stage import ACCUMULATORS
    from flap_export.cli import summaries
    from flap_export.evidence.methods import METHODS
    from flap_export.precision import COMPUTE_DTYPES
    from flap_export.pruning.stage import prune as prune_model
    from flap_export.rewriting.compensation import COMPENSATIONS
    from flap_export.rewriting.stock import LAYOUTS
    from flap_export.scoring import METRICS

    with console.progress_bars() as progress:
        plan = prune_model(
            model,
            output,
            ratio=ratio,
            rates=rates,
            calibration=calibration,
            method=one_of("method", method, METHODS),
            metric=one_of("metric", metric, METRICS),
            structure=one_of("structure", structure, STRUCTURES),
            square_attention=square_attention,
            compensation=one_of("compensation", compensation, COMPENSATIONS),
            sequential=sequential,
            remove_heads=remove_heads,
            head_units=one_of("head-units", head_units, HEAD_UNITS),
            align_channels=align_channels,
            layout=one_of("layout", layout, LAYOUTS),
            statistics=one_of("statistics", statistics, ACCUMULATORS),
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            device=device,
            dtype=one_of("dtype", dtype, COMPUTE_DTYPES),
            progress=progress,
        )
    console.show(plan, [*summaries.of_plan(plan), escape(f"checkpoint: {output}")], json)


def compare(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name of a dense model.")],
    output: Output,
    calibration: Annotated[str, typer.Option(help="Text source all methods calibrate on.")],
    text: Annotated[list[str], typer.Option(help="Text source to evaluate on; repeat for several.")],
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD[,KEY=VALUE]...", help="What to compare, such as flap,metric=ifv; repeat."),
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Share that goes; repeat (0.1, 0.2, 0.3, 0.5).", callback=finite)
    ] = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    evaluation_samples: Annotated[int | None, typer.Option(min=1, help="Windows evaluated per text (all).")] = None,
    seed: Seed = 0,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")] = False,
    device: Device = "cpu",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Pruning methods side by side on one model. A table and a plot of perplexity against ratio."""
    console.configure_logging(verbose)
    from flap_export.cli import summaries
    from flap_export.comparison import compare as compare_methods
    from flap_export.evidence.methods import METHODS
    from flap_export.evidence.record import CalibrationText

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
    console.show(report, [*summaries.of_comparison(report, variants, ratios), escape(f"comparison: {output}")], json)
