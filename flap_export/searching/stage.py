"""`search`: find one pruning rate per layer under an exact budget, resumable at any point."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from flap_export.allocation.rates import RATES_NAME, Rates, rates_of_steps
from flap_export.calibration.stage import open_dense
from flap_export.errors import DamagedSearchError, InputError, OtherSearchError, check_choice, check_seed
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import CalibrationText, Evidence
from flap_export.manifest import write_manifest
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.prediction import GPUS
from flap_export.progress import Progress, no_progress
from flap_export.pruning.choosing import make_plan
from flap_export.searching.language.opening import check_proposer
from flap_export.searching.preparing import FITS_FOLDER, Prepared, prepared, stage_sequences
from flap_export.searching.record import REQUEST_NAME, SEARCH_NAME, SearchOptions, SearchReport, SearchRequest
from flap_export.searching.runs import Setting
from flap_export.searching.sources import opened_losses, workers_of
from flap_export.searching.space import Candidate
from flap_export.searching.strategies import StrategyName
from flap_export.storage import check_output, locked

RUNS_FOLDER: Final = "runs"
BASELINES: Final[tuple[StrategyName, ...]] = ("random", "evolutionary")
"""What a search is compared with under the same number of evaluations."""


def search(
    model: str | Path,
    output: str | Path,
    *,
    calibration: CalibrationText,
    prune: PruneOptions,
    options: SearchOptions | None = None,
    seeds: Sequence[int] = (0,),
    baselines: bool = False,
    workers: str = "local",
    replay: bool = False,
    evidence: Evidence | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> SearchReport:
    """Search pruning rates per layer (Self-Pruner, arXiv 2502.14413), and write them, the plan and a report.

    Args:
        model: a dense model directory or hub name.
        output: directory of the search; an interrupted one with the same settings goes on where it stopped, a finished
            one with more evaluations.
        calibration: what units are ranked by and fitness is measured on.
        prune: the method that ranks units and restores what goes, and the budget.
        options: how to search.
        seeds: one run from each; the best of all is taken.
        baselines: run random and conventional search beside it, and tell what uniform rates and FLAP's come to.
        workers: where candidates are evaluated: `local`, `ray` with as many workers as its cluster has room for, or
            `ray:N` with N.
        replay: take a language model's answers from the journals, and ask nobody.
        evidence: what the method goes by, gathered from this model and text; None gathers it.
        device: where to compute.
        progress: told what is being done.

    Raises:
        OtherSearchError: `output` holds a search with other settings, or of other weights or text.
        DamagedSearchError: `output` holds a search that cannot be continued.
        InputError: one of its kinds, for an unusable model, text, budget, option or output directory.
        MissingRequirementError: a package or the proposer is not there; the same command goes on.
    """
    chosen, prune, directory = options or SearchOptions(), resolved(prune), Path(output)
    check_search(chosen, prune, seeds)
    workers_of(workers)
    check_output(directory, REQUEST_NAME, in_place=True)
    # Before there is a directory: an unusable model leaves none.
    open_dense(model)
    with locked(directory):
        _begin(directory, SearchRequest(model=str(model), calibration=calibration, prune=prune, options=chosen))
        started = time.monotonic()
        ready = prepared(
            model,
            directory,
            calibration,
            prune,
            chosen,
            compares=baselines,
            device=device,
            progress=progress,
            evidence=evidence,
            fits=False,
        )
        with opened_losses(ready, workers, progress) as losses:
            setting = Setting(ready, losses, chosen, prune, calibration, directory / RUNS_FOLDER, progress, replay)
            references = setting.references()
            prepare_s = time.monotonic() - started
            wanted = [(chosen.strategy, chosen.proposer)]
            if baselines:
                wanted += [(name, None) for name in BASELINES if (name, None) not in wanted]
            runs = [setting.run(strategy, proposer, seed) for strategy, proposer in wanted for seed in seeds]
        best, candidate = min(runs[: len(seeds)], key=lambda run: run[0].best.fitness)
        plan = _write_plan(ready, directory, prune, candidate)
        asked = prune.ratio or plan.ratio.requested
        report = SearchReport(
            model=ready.dense.name,
            ratio=plan.ratio.model_copy(update={"requested": asked}),
            options=chosen,
            prune=prune,
            calibration=calibration,
            fitness_sequences=len(ready.problem.tokens),
            fitness_shares_calibration=ready.shares_calibration,
            references=references,
            runs=tuple(run for run, _ in runs),
            chosen=best.name,
            prepare_s=round(prepare_s, 1),
            digests=dict(ready.evidence.digests),
        )
        report.save(directory / SEARCH_NAME)
        # As large as the projections' covariances, and soon made again where the search goes on.
        shutil.rmtree(directory / FITS_FOLDER, ignore_errors=True)
        write_manifest(directory, digests=plan.digests)
        return report


def check_search(options: SearchOptions, prune: PruneOptions, seeds: Sequence[int]) -> None:
    """Whether the options of a search go together.

    Raises:
        InputError: they do not; the message says which and why.
    """
    if prune.ratio is None or prune.rates is not None:
        raise InputError("a search finds the rates of a --ratio; leave out --rates")
    if prune.layout != "uneven":
        raise InputError("--layout stock leaves no rates to search: all layers have the same counts")
    if prune.row.propagates_pruned:
        raise InputError(
            f"the method {prune.method} ranks a layer by what the pruned layers before it give, which a search would "
            "have to repeat for every candidate; choose flap with --metric wifn instead"
        )
    if prune.sequential:
        raise InputError("a search fits to the dense model's inputs; leave out --sequential, and prune with it after")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"a search takes one or more different seeds, got {list(seeds)}")
    for seed in seeds:
        check_seed(seed)
    if options.proposer is not None:
        check_proposer(options.proposer, options.proposer_model)
        if options.strategy != "population":
            raise InputError(f"a language model breeds a population, not the strategy {options.strategy}")
    stage_sequences(options.stages, 1, 1)
    if options.mutations + options.crossovers < 1:
        raise InputError("a population needs children: set --mutations or --crossovers")
    if options.latency is not None:
        check_choice("--latency", options.latency, GPUS)
        if options.strategy != "population":
            raise InputError(f"a second objective needs a population, not the strategy {options.strategy}")


def _begin(directory: Path, request: SearchRequest) -> None:
    """Note what is asked, so that the directory is known for a search's from the start.

    Where nothing was made yet of an earlier request, it was refused, or found wrong, and this one takes its place.

    Raises:
        OtherSearchError: the directory holds a search that was asked otherwise.
        DamagedSearchError: what was asked cannot be read.
    """
    path = directory / REQUEST_NAME
    if path.is_file() and any((directory / made).exists() for made in (FITS_FOLDER, RUNS_FOLDER)):
        there, here = (one.settings() for one in (_read_request(path), request))
        if changed := sorted(name for name in here if here[name] != there.get(name)):
            raise OtherSearchError(
                f"the search in '{directory}' was begun with other settings ({', '.join(changed)}); name a new output "
                "directory, or the settings it was begun with"
            )
    request.save(path)


def _read_request(path: Path) -> SearchRequest:
    try:
        return SearchRequest.load(path)
    except InputError as error:
        raise DamagedSearchError(f"{error}; begin a new search in another directory") from error


def _write_plan(ready: Prepared, directory: Path, prune: PruneOptions, candidate: Candidate) -> PruningPlan:
    """Write the rates, and the plan that `prune --rates` makes of them."""
    rates = rates_of_steps(ready.ladders, ready.problem.space.settled(candidate))
    Rates(model=ready.dense.name, layers=rates, digests=dict(ready.evidence.digests)).save(directory / RATES_NAME)
    plan = make_plan(ready.dense, ready.evidence, prune.model_copy(update={"rates": rates, "ratio": None}))
    plan.save(directory / PLAN_NAME)
    return plan
