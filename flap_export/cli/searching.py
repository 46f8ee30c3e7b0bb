"""`search`: options in, rates, a plan and a report out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.markup import escape

from flap_export.cli import console, summaries
from flap_export.cli.options import Device, Json, Output, Samples, SequenceLength, Verbose, finite
from flap_export.errors import LARGEST_SEED, InputError


def search(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name of a dense model.")],
    output: Output,
    ratio: Annotated[float, typer.Option(help="Share of the attention and FFN weights that goes.", callback=finite)],
    calibration: Annotated[str, typer.Option(help="Text source; fitness is measured on sequences of its own.")],
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    method: Annotated[str, typer.Option(help="Ranks units and restores: obs, flap, magnitude, llm-pruner.")] = "obs",
    metric: Annotated[str | None, typer.Option(help="wifv, ifv or wifn; the method's own by default.")] = None,
    compensation: Annotated[str | None, typer.Option(help="none, bias or least-squares; the method's own.")] = None,
    head_units: Annotated[str, typer.Option(help="groups (whole KV groups) or queries (one head of each).")] = "groups",
    align_channels: Annotated[int, typer.Option(min=1, help="FFN widths are multiples of this.")] = 1,
    strategy: Annotated[
        str | None, typer.Option(help="evolutionary, population or random; population with a --proposer.")
    ] = None,
    proposer: Annotated[
        str | None, typer.Option(help="A language model that breeds: openai:URL, local:PATH, or self.")
    ] = None,
    name: Annotated[str | None, typer.Option("--model", help="The model's name at the server.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for the server to answer.", callback=finite)] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="Requests after the first, for one answer.")] = 5,
    prices: Annotated[
        str | None, typer.Option(metavar="PROMPT:ANSWER", help="Of a million tokens, for the cost of a search.")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Take answers from the journals of an earlier search, ask nobody.")
    ] = False,
    evaluations: Annotated[
        float, typer.Option(min=1, help="Looks at a candidate on all of the text.", callback=finite)
    ] = 430,
    population: Annotated[int, typer.Option(min=2, help="Candidates of a population.")] = 30,
    mutations: Annotated[int, typer.Option(min=0, help="Of one generation of a population.")] = 10,
    crossovers: Annotated[int, typer.Option(min=0, help="Of one generation of a population.")] = 10,
    granularity: Annotated[str, typer.Option(help="layers, or modules: attention's part is searched too.")] = "layers",
    step: Annotated[float, typer.Option(help="Of a layer's rate, at most.", callback=finite)] = 0.05,
    min_rate: Annotated[float, typer.Option(help="Of every layer.", callback=finite)] = 0.0,
    max_rate: Annotated[float, typer.Option(help="Of every layer.", callback=finite)] = 0.9,
    bound: Annotated[
        list[str] | None, typer.Option(metavar="LAYER=LEAST:MOST", help="Of one layer; may repeat.")
    ] = None,
    protect_first: Annotated[int, typer.Option(min=0, help="Layers that lose nothing.")] = 0,
    protect_last: Annotated[int, typer.Option(min=0, help="Layers that lose nothing.")] = 0,
    fitness: Annotated[str, typer.Option(help="kl (to the dense logits) or perplexity.")] = "kl",
    fitness_samples: Annotated[
        int | None, typer.Option(min=1, help="Sequences that fitness is measured on (up to 64).")
    ] = None,
    stage: Annotated[
        list[float] | None,
        typer.Option(help="Shares of them to look at in turn, the last 1; repeat (0.125 0.5 1).", callback=finite),
    ] = None,
    uninformed: Annotated[bool, typer.Option("--uninformed", help="Begin with uniform rates only.")] = False,
    latency: Annotated[str | None, typer.Option(help="A GPU of `predict`, as a second objective.")] = None,
    latency_batch: Annotated[int, typer.Option(min=1, help="Sequences of the decode step that is predicted.")] = 1,
    latency_context: Annotated[int, typer.Option(min=1, help="Cached tokens before it.")] = 1024,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, max=LARGEST_SEED, help="One run from each; repeat (0).")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Run random and conventional search beside it, as long.")
    ] = False,
    workers: Annotated[str, typer.Option(help="local, ray or ray:N.")] = "local",
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Precision to calibrate and evaluate in.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Search one pruning rate per layer under an exact budget. Goes on where it was interrupted."""
    console.configure_logging(verbose)
    from flap_export.evidence.methods import PruneOptions
    from flap_export.evidence.record import CalibrationText
    from flap_export.searching import SearchOptions
    from flap_export.searching import search as search_rates
    from flap_export.storage import validated

    options = validated(
        SearchOptions,
        {
            "strategy": strategy or ("population" if proposer else "evolutionary"),
            "proposer": proposer,
            "proposer_model": name,
            "proposer_timeout_s": timeout,
            "proposer_retries": retries,
            "prices": _numbers("--prices", "PROMPT:ANSWER", prices) if prices else None,
            "evaluations": evaluations,
            "population": population,
            "mutations": mutations,
            "crossovers": crossovers,
            "granularity": granularity,
            "step": step,
            "least": min_rate,
            "greatest": max_rate,
            "bounds": _bounds(bound or ()),
            "protect_first": protect_first,
            "protect_last": protect_last,
            "fitness": fitness,
            "fitness_samples": fitness_samples,
            **({"stages": tuple(stage)} if stage else {}),
            "informed": not uninformed,
            "latency": latency,
            "latency_batch": latency_batch,
            "latency_context": latency_context,
        },
    )
    seeds = tuple(seed or (0,))
    text = validated(
        CalibrationText,
        {
            "source": calibration,
            "samples": samples,
            "sequence_length": sequence_length,
            "seed": seeds[0],
            "dtype": dtype,
        },
    )
    prune = validated(
        PruneOptions,
        {
            "ratio": ratio,
            "method": method,
            "metric": metric,
            "compensation": compensation,
            "head_units": head_units,
            "align_channels": align_channels,
        },
    )
    with console.progress_bars() as progress:
        report = search_rates(
            model,
            output,
            calibration=text,
            prune=prune,
            options=options,
            seeds=seeds,
            baselines=baselines,
            workers=workers,
            replay=replay,
            device=device,
            progress=progress,
        )
    where = escape(f"rates: {output}/rates.json; prune with `--rates` of it")
    console.show(report, [*summaries.of_search(report), where], json)


def _bounds(texts: Sequence[str]) -> dict[int, tuple[float, float]]:
    found = {}
    for text in texts:
        layer, _, rates = text.partition("=")
        if not layer.strip().isdecimal():
            raise InputError(f"--bound reads LAYER=LEAST:MOST, such as 3=0.1:0.4; got '{text}'")
        found[int(layer)] = _numbers("--bound", "LAYER=LEAST:MOST", rates)
    return found


def _numbers(option: str, form: str, text: str) -> tuple[float, float]:
    try:
        first, second = map(float, text.split(":"))
    except ValueError as error:
        raise InputError(f"{option} reads {form}, two numbers; got '{text}'") from error
    return first, second
