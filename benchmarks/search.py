"""Searched pruning rates on the demo model: fitness against evaluations, quality on held-out text, candidates a second.

Quality: at every ratio the conventional search from several seeds, beside rates that need no search. All share ranking
and restoration (`--method obs`); only the rates differ. What is found is pruned and evaluated on other books and on
WikiText-2.

Strategies: random search, the conventional search and a population bred by chance, all from uniform rates and under the
same number of evaluations.

Speed: candidates assembled from cached blocks with shared prefixes, against rewriting every candidate to a checkpoint,
loading it and running it in full: in one and the same search, and on all of its text. The rewritten ones get the very
same restored weights, from the search's own factors or fitted anew to the kept channels; `prune --rates`, which fits
them to a compressed model, comes last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

import common
import torch

from flap_export.allocation.rates import LayerRate, rates_of_steps
from flap_export.calibration.statistics import Site
from flap_export.evaluation import evaluate
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import CalibrationText, Evidence
from flap_export.models.loading import load_model
from flap_export.plan import PruningPlan
from flap_export.progress import no_progress
from flap_export.pruning.choosing import make_plan
from flap_export.pruning.stage import prune_with
from flap_export.rewriting.checkpoint import write_checkpoint
from flap_export.rewriting.cutting import Restore, rewrite
from flap_export.searching import SearchOptions, SearchReport, search
from flap_export.searching.fitness import LocalLosses, Losses
from flap_export.searching.fitting import NestedFits
from flap_export.searching.journal import JOURNAL_NAME, Journal
from flap_export.searching.judging import Judge
from flap_export.searching.operators import Conventional, Scored
from flap_export.searching.preparing import EVIDENCE_FOLDER, Prepared, prepared, stage_sequences
from flap_export.searching.space import Candidate
from flap_export.searching.strategies import OFFSPRING, StrategyName, Task, evolutionary, seeded
from flap_export.searching.table import SHARES, lines_of, strategy_name
from flap_export.storage import digest_of_json, write_text

DEMO: Final = Path(__file__).parent.parent / "pipelines" / "demo"
TEXTS: Final = ("heldout.txt.xz", "wikitext-2.txt.xz")
METHOD: Final = "obs"
PARTS: Final = ("quality", "strategies", "speed")


def main() -> None:
    """Search, prune, evaluate and time; print tables, write a JSON file per part."""
    arguments = parsed_arguments()
    measures = {"quality": quality, "strategies": strategies, "speed": speed}
    asked: Path | None = arguments.output
    with common.work_directory(arguments) as work:
        for part in arguments.parts:
            conditions, arguments.benchmark = common.Conditions(), f"search-{part}"
            arguments.output = asked and asked.with_stem(f"{asked.stem}-{part}")
            found = measures[part](arguments, work)
            print(f"written to {common.save_result(arguments, conditions, {part: found})}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "search")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.2])
    made.add_argument("--compared-ratios", type=float, nargs="*", default=[0.3], help="where strategies are compared")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--evaluations", type=float, default=100)
    made.add_argument("--samples", type=int, default=512, help="calibration sequences of 128 tokens")
    made.add_argument("--fitness-samples", type=int, default=32, help="sequences that fitness is measured on")
    made.add_argument("--windows", type=int, default=256, help="evaluation windows of 128 tokens per text")
    made.add_argument("--candidates", type=int, default=OFFSPRING, help="candidates that are timed in both ways")
    made.add_argument("--rounds", type=int, default=3, help="of timing them")
    made.add_argument("--timed-evaluations", type=float, default=430, help="of the search that is timed")
    made.add_argument("--rewritten-evaluations", type=float, default=40, help="of the search that rewrites candidates")
    made.add_argument("--pruned-candidates", type=int, default=4, help="candidates that are pruned anew")
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.ratios, arguments.seeds, arguments.evaluations = [0.3], [0, 1], 6
        arguments.samples, arguments.fitness_samples, arguments.windows = 16, 16, 8
        arguments.candidates, arguments.pruned_candidates, arguments.rounds = 2, 1, 1
        arguments.timed_evaluations = arguments.rewritten_evaluations = 6
    return arguments


def text_of(arguments: argparse.Namespace) -> CalibrationText:
    return CalibrationText(
        source=str(DEMO / "calibration.txt.xz"), samples=arguments.samples, sequence_length=128, seed=0
    )


def quality(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """One result per ratio: the search, and perplexity on held-out text of what it found."""
    results = []
    for ratio in arguments.ratios:
        folder = work / f"search-{ratio:g}"
        report = searched(arguments, folder, ratio, "evolutionary")
        rows = [*known_rows(arguments, report, folder, work), *found_rows(arguments, report, folder, work)]
        common.show(f"{ratio:.0%}, {arguments.evaluations:g} evaluations", COLUMNS, map(row, rows))
        results.append({"ratio": ratio, "rows": rows, "curves": curves(report), "prepare_s": report.prepare_s})
    return results


def strategies(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """What every strategy makes of uniform rates: at the known ones of `obs` there is little left to find."""
    results = []
    for ratio in arguments.compared_ratios:
        folder = work / f"strategies-{ratio:g}"
        report = searched(arguments, folder, ratio, "population", baselines=True, informed=False)
        lines = [
            {
                "rates": line.name,
                "fitness_after": dict(zip(map(str, SHARES), line.fitness, strict=True)),
                "spread": line.spread,
                "candidates": line.looks,
                "seconds": line.seconds,
            }
            for line in lines_of(report)
        ]
        shown = [
            (line.name, *(f"{value:.4f}" for value in line.fitness), f"{line.spread:.1g}", f"{line.looks:.0f}")
            for line in lines_of(report)
        ]
        shown += [(name, "", "", f"{value:.4f}", "", "") for name, value in report.references.items()]
        after = [f"after {share * arguments.evaluations:g}" for share in SHARES]
        common.show(f"{ratio:.0%}, from uniform rates", ("strategy", *after, "± seeds", "candidates"), shown)
        own = {"ratio": ratio, "references": report.references, "strategies": lines, "curves": curves(report)}
        results.append(own)
    return results


def searched(
    arguments: argparse.Namespace, folder: Path, ratio: float, strategy: StrategyName, **options: bool
) -> SearchReport:
    return search(
        DEMO / "model",
        folder,
        calibration=text_of(arguments),
        prune=PruneOptions(ratio=ratio, method=METHOD),
        options=SearchOptions(
            strategy=strategy,
            evaluations=arguments.evaluations,
            fitness_samples=arguments.fitness_samples,
            informed=options.get("informed", True),
        ),
        seeds=arguments.seeds,
        baselines=options.get("baselines", False),
    )


def known_rows(
    arguments: argparse.Namespace, report: SearchReport, folder: Path, work: Path
) -> Iterator[dict[str, Any]]:
    """Rates that need no search, and FLAP as it is published."""
    ready = ready_of(arguments, report, folder)
    for name, candidate in ready.references.items():
        perplexities = pruned_perplexities(arguments, ready.evidence, rates_of(ready, candidate), work)
        yield {"rates": name, "fitness": report.references.get(name), "perplexities": [perplexities]}
    flap = Evidence.load(folder / "evidence-flap")
    published = perplexities_of(arguments, flap, PruneOptions(ratio=report.prune.ratio, method="flap"), work)
    yield {"rates": "flap, units and bias too", "fitness": None, "perplexities": [published]}


def found_rows(
    arguments: argparse.Namespace, report: SearchReport, folder: Path, work: Path
) -> Iterator[dict[str, Any]]:
    """What every strategy found, from every seed."""
    evidence = Evidence.load(folder / EVIDENCE_FOLDER)
    for line in lines_of(report):
        runs = [run for run in report.runs if strategy_name(run) == line.name]
        found = [
            [
                LayerRate(rate=rate, attention=attention, ffn=ffn)
                for rate, attention, ffn in zip(run.best.rates, run.best.attention, run.best.ffn, strict=True)
            ]
            for run in runs
        ]
        yield {
            "rates": line.name,
            "fitness": line.fitness[-1],
            "fitness_after": dict(zip(map(str, SHARES), line.fitness, strict=True)),
            "fitness_spread": line.spread,
            "candidates": line.looks,
            "seconds": line.seconds,
            "perplexities": [pruned_perplexities(arguments, evidence, rates, work) for rates in found],
        }


def pruned_perplexities(
    arguments: argparse.Namespace, evidence: Evidence, rates: Sequence[LayerRate], work: Path
) -> list[float]:
    """Perplexities of the model pruned at these rates, as `prune --rates` does."""
    return perplexities_of(arguments, evidence, PruneOptions(method=METHOD, rates=tuple(rates)), work)


def perplexities_of(
    arguments: argparse.Namespace, evidence: Evidence, options: PruneOptions, work: Path
) -> list[float]:
    """Perplexities after pruning; kept in the work directory, so that an interrupted benchmark goes on."""
    kept = work / "perplexities" / f"{digest_of_json([options.model_dump(mode='json'), arguments.windows])}.json"
    if not kept.is_file():
        prune_with(DEMO / "model", work / "pruned", evidence, options)
        found = evaluate(work / "pruned", [str(DEMO / text) for text in TEXTS], samples=arguments.windows)
        write_text(kept, json.dumps([source.perplexity for source in found.sources]))
    perplexities: list[float] = json.loads(kept.read_text())
    return perplexities


def curves(report: SearchReport) -> list[dict[str, Any]]:
    """Best fitness against evaluations, a curve per run."""
    return [
        {"rates": strategy_name(run), "seed": run.seed, "curve": [[p.evaluations, p.fitness] for p in run.curve]}
        for run in report.runs
    ]


def ready_of(arguments: argparse.Namespace, report: SearchReport, folder: Path) -> Prepared:
    """The problem of a search, from what it left."""
    return prepared(
        DEMO / "model",
        folder,
        report.calibration,
        report.prune,
        report.options,
        compares=True,
        fits=False,
        device="cpu",
        progress=no_progress,
    )


def rates_of(ready: Prepared, candidate: Candidate) -> tuple[LayerRate, ...]:
    return rates_of_steps(ready.ladders, ready.problem.space.settled(candidate))


COLUMNS: Final = ("rates", "fitness", "± seeds", "candidates", "seconds", "books", "± seeds", "WikiText-2", "± seeds")


def row(found: dict[str, Any]) -> tuple[str, ...]:
    columns = []
    for values in zip(*found["perplexities"], strict=True):
        columns += [f"{statistics.fmean(values):.2f}", f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""]
    searched = (found.get("fitness_spread"), found.get("candidates"), found.get("seconds"))
    shown = ["" if value is None else form.format(value) for value, form in zip(searched, ("{:.1g}", "{:.0f}", "{:.0f}"), strict=True)]  # fmt: skip  # noqa: E501
    fitness = "" if found["fitness"] is None else f"{found['fitness']:.4f}"
    return (found["rates"], fitness, *shown, *columns)


def speed(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Candidates a second, in a search and on all of the text.

    On all of the text candidates are offspring of one parent, a generation of them, which a search sees most, and drawn
    ones, which share the least.
    """
    options = SearchOptions(fitness_samples=arguments.fitness_samples)
    prune = resolved(PruneOptions(ratio=0.3, method=METHOD))
    ready = prepared(
        DEMO / "model", work / "speed", text_of(arguments), prune, options, compares=False, device="cpu",
        progress=no_progress,
    )  # fmt: skip
    chance = Conventional(ready.problem.space, seeded(0, "speed"))
    parent = ready.problem.space.uniform()
    rewritten = Rewritten(ready, work / "rewritten", ready.problem.restore)
    refitted = Rewritten(ready, work / "refitted", refitting(ready))
    found: dict[str, Any] = {"tokens": ready.problem.tokens.numel()}
    with ready.problem.opened() as losses:
        found["search"] = timed_search(arguments.timed_evaluations, ready, losses, work, options)
    few = arguments.rewritten_evaluations
    for name, source in (("search_rewritten", rewritten), ("search_refitted", refitted)):
        found[name] = timed_search(few, ready, source, work, options)
        source.forget()
    # Opened once more: no block is made yet.
    with ready.problem.opened() as losses:
        found["search_assembled"] = timed_search(few, ready, losses, work, options)
        for name, candidates in (
            ("offspring", chance.mutated([Scored(parent, 0.0)] * arguments.candidates, ())),
            ("drawn", chance.initial(arguments.candidates, ())),
        ):
            found[name] = compared(losses, rewritten, parent, candidates, arguments.rounds)
    drawn, expected = chance.initial(arguments.pruned_candidates, ()), dense_log_probabilities(ready)
    started = time.monotonic()
    refitted.losses(drawn, 0, refitted.sequences)
    found["refitted_per_s"] = len(drawn) / (time.monotonic() - started)
    started = time.monotonic()
    for candidate in drawn:
        prune_with(DEMO / "model", work / "full", ready.evidence, options_of(rates_of(ready, candidate)))
        run_checkpoint(ready, work / "full", expected)
    found["pruned_per_s"] = len(drawn) / (time.monotonic() - started)
    common.show("candidates a second", ("looks", "way", "a second", "difference"), speed_rows(found))
    for what, ratio in speedups(found):
        print(f"{what}: {ratio:.1f}x as many candidates a second as rewritten ones")
    return found


def speedups(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Assembled candidates a second over rewritten ones."""
    yield "a search", found["search_assembled"]["per_s"] / found["search_rewritten"]["per_s"]
    for name in ("offspring", "drawn"):
        yield f"all of the text, {name}", found[name]["assembled_per_s"] / found[name]["full_per_s"]


def speed_rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """What was measured, and how far fitness is from that of the rewritten checkpoint."""
    for name, way in (
        ("search", "assembled"),
        ("search_assembled", "assembled"),
        ("search_rewritten", "rewritten with the factors at hand, loaded and run"),
        ("search_refitted", "rewritten with weights fitted anew, loaded and run"),
    ):
        search = found[name]
        seen = f"a search: {search['candidates']} candidates, {search['evaluations']:.0f} evaluations"
        difference = abs(search["fitness"] / found["search_assembled"]["fitness"] - 1)
        yield (seen, way, f"{search['per_s']:.2f}", "" if search is found["search"] else f"{difference:.0e}")
    whole = f"all of the text, {found['tokens']} tokens"
    for name in ("offspring", "drawn"):
        both = found[name]
        yield (whole, f"assembled, {name}", f"{both['assembled_per_s']:.2f}", f"{both['difference']:.0e}")
    yield (whole, "rewritten with the factors at hand, loaded and run", f"{found['drawn']['full_per_s']:.2f}", "")
    yield (whole, "rewritten with weights fitted anew, loaded and run", f"{found['refitted_per_s']:.2f}", "")
    yield (whole, "pruned by `prune --rates`, loaded and run", f"{found['pruned_per_s']:.3f}", "")


@final
class Rewritten:
    """Losses of candidates that are rewritten to checkpoints, loaded and run in full."""

    def __init__(self, ready: Prepared, folder: Path, restore: Restore) -> None:
        """A candidate's checkpoint is kept for its next look.

        Args:
            ready: the search's problem.
            folder: for checkpoints.
            restore: what restoring projections become.
        """
        self._ready, self._folder, self._restore = ready, folder, restore
        self._expected = dense_log_probabilities(ready)
        self.sequences = len(ready.problem.tokens)

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        return [self._loss(candidate, first, last) for candidate in candidates]

    def forget(self) -> None:
        """Let go of the checkpoints."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _loss(self, candidate: Candidate, first: int, last: int) -> float:
        ready = self._ready
        folder = self._folder / digest_of_json([candidate.levels, candidate.attention])[:16]
        if not folder.is_dir():
            plan = plan_of(ready, rates_of_steps(ready.ladders, ready.problem.space.steps(candidate)))
            shape = plan.pruned_shape(ready.dense.shape, compensated=True)
            folder.mkdir(parents=True)
            write_checkpoint(folder, ready.dense, plan, shape, rewrite(ready.dense, plan, self._restore))
        return run_checkpoint(ready, folder, self._expected, first, last)


def refitting(ready: Prepared) -> Restore:
    """Least squares from covariances in memory, as it is without nested factors: a factorisation for every cut."""
    assert ready.problem.fits is not None
    fits, correlations = NestedFits(ready.problem.fits), dict[Site, torch.Tensor]()

    def restore(site: Site, weight: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fit = fits.load(site)
        if site not in correlations:
            correlations[site] = fit.factor @ fit.factor.T
        stay = len(kept)
        own = torch.linalg.cholesky(correlations[site][:stay, :stay])
        exact = weight.to(fit.mean.dtype)
        shared = correlations[site][:stay, stay:] @ (exact[:, fit.order[stay:]] * fit.scale[stay:]).T
        added = torch.cholesky_solve(shared, own).T / fit.scale[:stay]
        restored = (exact[:, fit.order[:stay]] + added)[:, fit.order[:stay].argsort()].to(weight.dtype)
        return restored, exact @ fit.mean - restored.to(exact.dtype) @ fit.mean[kept]

    return restore


def timed_search(
    evaluations: float, ready: Prepared, losses: Losses, work: Path, options: SearchOptions
) -> dict[str, Any]:
    """A conventional search from its beginning to its end."""
    problem = ready.problem
    stages = stage_sequences(options.stages, len(problem.tokens), problem.chunk_sequences)
    path = work / "speed" / JOURNAL_NAME
    path.unlink(missing_ok=True)
    started = time.monotonic()
    with Journal(path, {}) as journal:
        judge = Judge(losses, journal, problem.fitness, problem.tokens.shape[1], stages, evaluations)
        chance = Conventional(problem.space, seeded(0, "timed"))
        evolutionary(Task(judge, chance, chance, ready.start))
    seconds = time.monotonic() - started
    return {
        "evaluations": judge.spent,
        "candidates": judge.looks,
        "seconds": seconds,
        "per_s": judge.looks / seconds,
        "fitness": judge.finished()[0].fitness,
    }


def compared(
    losses: LocalLosses, rewritten: Rewritten, parent: Candidate, candidates: Sequence[Candidate], rounds: int
) -> dict[str, Any]:
    """The same candidates on all of the text in both ways, by turns; medians of the rounds."""
    sequences = rewritten.sequences
    # Blocks that are made for the first time stay for all of a search.
    losses.losses(candidates, 0, sequences)
    times: dict[str, list[float]] = {"assembled": [], "full": []}
    for _ in range(rounds):
        losses.forget_states()
        losses.losses([parent], 0, sequences)
        rewritten.forget()
        found = []
        for name, source in (("assembled", losses), ("full", rewritten)):
            started = time.monotonic()
            found.append(source.losses(candidates, 0, sequences))
            times[name].append(time.monotonic() - started)
    return {
        "candidates": len(candidates),
        "assembled_per_s": len(candidates) / statistics.median(times["assembled"]),
        "full_per_s": len(candidates) / statistics.median(times["full"]),
        "difference": max(abs(one - other) / other for one, other in zip(*found, strict=True)),
    }


@torch.no_grad()
def dense_log_probabilities(ready: Prepared) -> list[torch.Tensor]:
    """What candidates are compared with, chunk by chunk; computed once, in either way."""
    model = load_model(DEMO / "model", dtype=torch.float32)
    chunks = ready.problem.tokens.split(ready.problem.chunk_sequences)
    return [model(input_ids=chunk, use_cache=False).logits.log_softmax(-1) for chunk in chunks]


@torch.no_grad()
def run_checkpoint(
    ready: Prepared, folder: Path, expected: Sequence[torch.Tensor], first: int = 0, last: int | None = None
) -> float:
    """Load a checkpoint, and sum its KL divergence from the dense model over sequences first..last-1."""
    problem, size = ready.problem, ready.problem.chunk_sequences
    model, total = load_model(folder, dtype=torch.float32), 0.0
    chunks = problem.tokens[:last].split(size)
    for chunk, reference in list(zip(chunks, expected, strict=False))[first // size :]:
        given = model(input_ids=chunk, use_cache=False).logits.log_softmax(-1)
        total += float((reference.exp() * (reference - given)).sum(dtype=torch.float64))
    return total


def plan_of(ready: Prepared, rates: Sequence[LayerRate]) -> PruningPlan:
    return make_plan(ready.dense, ready.evidence, options_of(rates))


def options_of(rates: Sequence[LayerRate]) -> PruneOptions:
    return resolved(PruneOptions(method=METHOD, rates=tuple(rates)))


if __name__ == "__main__":
    main()
