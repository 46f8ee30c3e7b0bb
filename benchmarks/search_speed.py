"""Candidates a second of a search on the demo model, against running every candidate as a checkpoint.

Candidates assembled from cached blocks with shared prefixes, against rewriting every candidate to a checkpoint, loading
it and running it in full: in one and the same search, and on all of its text. The rewritten ones get the very same
restored weights, from the search's own factors or fitted anew to the kept channels; `prune --rates`, which fits them to
a compressed model, comes last.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import common
import torch
from demo_search import DEMO, METHOD, parser, rates_of, shortened, text_of

from flap_export.allocation.rates import LayerRate, rates_of_steps
from flap_export.calibration.statistics import Site
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.models.loading import load_model
from flap_export.plan import PruningPlan
from flap_export.progress import no_progress
from flap_export.pruning.choosing import make_plan
from flap_export.pruning.stage import prune_with
from flap_export.rewriting.checkpoint import write_checkpoint
from flap_export.rewriting.cutting import Restore, rewrite
from flap_export.searching import SearchOptions
from flap_export.searching.fitness import LocalLosses, Losses
from flap_export.searching.fitting import NestedFits
from flap_export.searching.journal import JOURNAL_NAME, Journal
from flap_export.searching.judging import Judge
from flap_export.searching.operators import Conventional, Scored
from flap_export.searching.preparing import Prepared, prepared, stage_sequences
from flap_export.searching.space import Candidate
from flap_export.searching.strategies import OFFSPRING, Task, evolutionary, seeded
from flap_export.storage import digest_of_json


def main() -> None:
    """Time candidates; print a table, write a JSON file."""
    arguments, conditions = parsed_arguments(), common.Conditions()
    with common.work_directory(arguments) as work:
        found = speed(arguments, work)
    print(f"written to {common.save_result(arguments, conditions, {'speed': found})}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, "search_speed")
    made.add_argument("--candidates", type=int, default=OFFSPRING, help="candidates that are timed in both ways")
    made.add_argument("--rounds", type=int, default=3, help="of timing them")
    made.add_argument("--timed-evaluations", type=float, default=430, help="of the search that is timed")
    made.add_argument("--rewritten-evaluations", type=float, default=40, help="of the search that rewrites candidates")
    made.add_argument("--pruned-candidates", type=int, default=4, help="candidates that are pruned anew")
    arguments = made.parse_args(command_line)
    if arguments.quick:
        shortened(arguments)
        arguments.candidates, arguments.pruned_candidates, arguments.rounds = 2, 1, 1
        arguments.timed_evaluations = arguments.rewritten_evaluations = 6
    return arguments


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
