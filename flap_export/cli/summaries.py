"""Records in words: what people read after a command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from flap_export.cli.console import table

if TYPE_CHECKING:
    from flap_export.benchmarking import LatencyReport
    from flap_export.building import EngineRecord
    from flap_export.comparison import ComparisonReport
    from flap_export.evaluation import QualityReport
    from flap_export.pipeline.running import RunResult
    from flap_export.plan import PruningPlan
    from flap_export.searching import SearchReport
    from flap_export.shapes import DecoderShape
    from flap_export.validation import ParityReport


def of_plan(plan: PruningPlan) -> Iterator[RenderableType]:
    """The achieved ratio and why it is off, if it is."""
    ratio = plan.ratio
    yield f"pruned [bold]{ratio.achieved:.2%}[/] of the attention and FFN weights ({ratio.requested:.2%} asked)"
    if plan.ratio.reason:
        yield f"  [yellow]{escape(plan.ratio.reason)}[/]"


def of_shape(shape: DecoderShape) -> Iterator[RenderableType]:
    """One row per layer, equal neighbours in one."""
    drawn = table("layers", "layer", "query heads", "KV heads", "FFN channels")
    start = 0
    for index, layer in enumerate(shape.layers):
        last = index + 1 == len(shape.layers)
        if last or shape.layers[index + 1] != layer:
            label = str(index) if start == index else f"{start}-{index}"
            experts = f"{layer.experts} x " if layer.experts else ""
            shared = "" if layer.shared_channels is None else f" + {layer.shared_channels}"
            queries = _heads(layer.query_heads, layer.joint_query_heads, "projected")
            keys = _heads(layer.kv_heads, layer.joint_key_heads, "keys projected")
            drawn.add_row(label, queries, keys, f"{experts}{layer.ffn_channels}{shared}")
            start = index + 1
    yield drawn


def _heads(kept: int, joint: int, what: str) -> str:
    """Heads of attention, and how many are computed for a norm that runs over all of them, where those are more."""
    return f"{kept} ({joint} {what})" if joint > kept else str(kept)


def of_engine(record: EngineRecord) -> Iterator[RenderableType]:
    """One row per engine, and the shapes it takes."""
    drawn = table("engines", "file", "MB", "weights MB", "layers", "attentions", "decomposable", "caches")
    for engine in record.engines.values():
        network = engine.network
        counts = (network.layers, network.attentions, network.decomposable_attentions, network.cache_updates)
        drawn.add_row(
            engine.file, f"{engine.size_bytes / 1e6:.1f}", f"{engine.weights_bytes / 1e6:.1f}", *map(str, counts)
        )
    yield drawn
    for profile in record.profiles:
        batches, tokens = (f"{least}..{most}" for least, _, most in (profile.batch_sizes, profile.new_tokens))
        yield f"{profile.phase}: batches of {batches}, {tokens} new tokens"


def of_quality(quality: QualityReport) -> Iterator[RenderableType]:
    """Perplexity per source."""
    drawn = table("quality", "text", "perplexity", "dense", "change", "tokens")
    for source in quality.sources:
        dense = source.dense_perplexity
        mark = " [yellow](also calibrated on)[/]" if source.contaminated else ""
        drawn.add_row(
            escape(source.source) + mark,
            f"{source.perplexity:.2f}",
            "" if dense is None else f"{dense:.2f}",
            "" if dense is None else f"{source.perplexity / dense - 1:+.1%}",
            str(source.tokens),
        )
    yield drawn


def of_comparison(
    report: ComparisonReport, variants: Sequence[str], ratios: Sequence[float]
) -> Iterator[RenderableType]:
    """One table per text: methods down, ratios across."""
    for index, source in enumerate(report.sources):
        drawn = table(escape(f"perplexity on {source}"), "method", *(f"{ratio:.0%}" for ratio in ratios))
        drawn.add_row("dense", *(f"{report.dense_perplexities[index]:.2f}" for _ in ratios))
        for variant in variants:
            rows = [report.find(variant, ratio) for ratio in ratios]
            cells = [f"{row.perplexities[index]:.2f}" if row is not None and row.perplexities else "-" for row in rows]
            drawn.add_row(escape(variant), *cells)
        yield drawn
    for row in report.rows:
        if row.reason is not None:
            yield f"  [yellow]{escape(row.variant)} at {row.ratio:.0%}: {escape(row.reason)}[/]"


def of_parity(parity: ParityReport) -> Iterator[RenderableType]:
    """One row per comparison."""
    drawn = table("parity", "case", "phase", "max error", "allowed", "KL", "same token", "verdict")
    verdicts = {True: "[green]passed[/]", False: "[bold red]breached[/]", None: "[yellow]not run[/]"}
    for found in parity.comparisons:
        drawn.add_row(
            found.case if found.candidate == "onnxruntime" else f"{found.case}, {found.candidate}",
            found.phase,
            *(_number(value) for value in (found.max_abs, found.tolerance_max_abs, found.kl)),
            "" if found.top1_agreement is None else f"{found.top1_agreement:.2%}",
            verdicts[found.passed],
        )
    yield drawn
    skipped = [found for found in parity.comparisons if found.passed is None and found.reason]
    for reason in dict.fromkeys(f"{found.candidate} {found.reason}" for found in skipped):
        yield f"[yellow]{escape(reason)}[/]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def of_latency(latency: LatencyReport) -> Iterator[RenderableType]:
    """Dense beside pruned per phase and shape."""
    drawn = table("latency", "phase", "batch", "tokens", "dense", "pruned", "speedup", "95 %", "ideal", "efficiency")
    for found in latency.phases:
        low, high = found.speedup_interval
        drawn.add_row(
            found.phase,
            str(found.batch_size),
            str(max(found.new_tokens, found.context_length)),
            f"{found.dense.median_ms:.1f} ms",
            f"{found.pruned.median_ms:.1f} ms",
            f"{found.speedup:.2f}x",
            f"{low:.2f}-{high:.2f}",
            f"{found.ideal_speedup:.2f}x",
            f"{found.efficiency:.0%}",
        )
    yield drawn
    for found in latency.phases:
        if found.predicted_ms is not None:
            dense, pruned = found.predicted_ms
            yield f"{found.described}: predicted {dense:.2f} ms and {pruned:.2f} ms, {dense / pruned:.2f}x"


def of_search(report: SearchReport) -> Iterator[RenderableType]:
    """Fitness of every strategy against evaluations, and of the rates known beforehand."""
    from flap_export.searching.table import SHARES, lines_of

    unit = "KL, nats per token" if report.options.fitness == "kl" else "perplexity"
    most = max(run.evaluations for run in report.runs)
    shown = [f"after {share * most:g}" for share in SHARES]
    drawn = table(f"{unit}, mean over seeds", "rates", *shown, "spread", "candidates", "seconds")
    for name, value in report.references.items():
        drawn.add_row(escape(name), *[""] * (len(SHARES) - 1), f"{value:.4g}", "", "", "")
    for line in lines_of(report):
        values = [f"{value:.4g}" for value in line.fitness]
        spread = f"{line.spread:.1g}" if line.seeds > 1 else ""
        drawn.add_row(escape(line.name), *values, spread, f"{line.looks:.0f}", f"{line.seconds:.0f}")
    yield drawn
    for run in report.runs:
        if run.usage is not None:
            used, cost = run.usage, "" if run.cost is None else f", cost {run.cost:.4g}"
            yield (
                f"{escape(run.name)}: {used.questions} questions, {used.valid} proposals taken, {used.invalid} not "
                f"understood, {used.duplicate} known already, {used.missing} missing, {used.filled} filled by chance; "
                f"{used.prompt_tokens} + {used.completion_tokens} tokens{cost}"
            )
    best = next(run for run in report.runs if run.name == report.chosen)
    yield f"best: {escape(report.chosen)}, rates " + " ".join(f"{rate:.2f}" for rate in best.best.rates)
    if report.fitness_shares_calibration:
        yield "[yellow]the text is too short: fitness was measured on sequences that units were ranked by[/]"


def of_run(result: RunResult) -> Iterator[RenderableType]:
    """All of a run."""
    parts: Sequence[Iterator[RenderableType]] = [
        of_search(result.search) if result.search else iter(()),
        of_plan(result.plan),
        of_quality(result.quality) if result.quality else iter(()),
        of_parity(result.parity),
        of_latency(result.latency) if result.latency else iter(()),
    ]
    for part in parts:
        yield from part
        yield ""
    yield f"report: [bold]{escape(str(result.report))}[/]"
