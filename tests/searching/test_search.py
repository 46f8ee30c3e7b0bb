"""Whole searches on a tiny model: what they write, that they go on from anywhere, and what they refuse."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refitting import kl, log_probabilities
from tiny import plain_model, save_tokens, tiny_checkpoint, tokens_of

from flap_export.errors import BudgetError, InputError, ModelError, OutputError, TextError
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import CalibrationText
from flap_export.manifest import Manifest, verify
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.plan import PruningPlan
from flap_export.pruning.stage import prune
from flap_export.searching import fitting, preparing, sources
from flap_export.searching.fitness import LocalLosses
from flap_export.searching.record import SearchOptions, SearchReport
from flap_export.searching.stage import check_search, search
from flap_export.searching.strategies import STRATEGIES
from flap_export.storage import Value

LENGTH = 8
FILES = ("rates.json", "plan.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model") / "dense", num_hidden_layers=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    source = save_tokens(tmp_path_factory.mktemp("text") / "ids.npy", tokens_of(24, LENGTH))
    return CalibrationText(source=source, samples=10)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sequences, so that stages are parts of the text."""
    monkeypatch.setattr(preparing, "CHUNK_TOKENS", 2 * LENGTH)


def options_of(**given: Any) -> SearchOptions:
    small = {"evaluations": 10, "fitness_samples": 8, "population": 4, "mutations": 2, "crossovers": 2}
    return SearchOptions(**{**small, **given})


def pruning(**given: Any) -> PruneOptions:
    return PruneOptions(**{"ratio": 0.4, "method": "flap", "compensation": "least-squares", **given})


def found(directory: Path) -> dict[str, Any]:
    """What a search wrote, without what the clock says."""
    report = json.loads((directory / "search.json").read_text())
    del report["prepare_s"]
    for run in report["runs"]:
        del run["seconds"]
    return {"search.json": report, **{name: (directory / name).read_text() for name in FILES}}


@pytest.fixture(scope="module")
def finished(
    model: Path, text: CalibrationText, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """One uninterrupted search of every strategy, the first with baselines."""
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "CHUNK_TOKENS", 2 * LENGTH)
        for strategy in STRATEGIES:
            output = tmp_path_factory.mktemp(strategy) / "out"
            baselines, chosen = strategy == "population", options_of(strategy=strategy)
            search(model, output, calibration=text, prune=pruning(), options=chosen, baselines=baselines)
            results[strategy] = output, found(output)
    return results


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_search_writes(
    strategy: str, finished: dict[str, tuple[Path, dict[str, Any]]], model: Path, text: CalibrationText
) -> None:
    output, _ = finished[strategy]
    report, plan = SearchReport.load(output / "search.json"), PruningPlan.load(output / "plan.json")
    assert report.runs[0].name == report.chosen == f"{strategy}-0"
    assert (report.model, report.fitness_sequences, report.fitness_shares_calibration) == (str(model), 8, False)
    baselines = ["evolutionary-0", "random-0"] if strategy == "population" else []
    assert sorted(run.name for run in report.runs[1:]) == baselines
    assert set(report.references) == {"uniform", "flap"}
    shape = open_checkpoint(model).shape
    weights = [shape.attention_parameters(layer) + shape.ffn_parameters(layer) for layer in shape.layers]
    for run in report.runs:
        assert run.best.fitness <= min(report.references.values())
        assert 9 < run.evaluations <= 10
        assert run.curve[-1].fitness == run.best.fitness
        # Levels meet the budget to half a step; the plan to half an FFN channel.
        assert np.average(run.best.rates, weights=weights) == pytest.approx(0.4, abs=0.02)
    channel = shape.ffn_channel_parameters / sum(weights)
    assert plan.ratio.achieved == report.ratio.achieved == pytest.approx(0.4, abs=channel / 2 + 1e-9)
    assert not (output / "fits").exists()
    listed = set(verify(output).files)
    assert {"request.json", "evidence/evidence.json", f"runs/{strategy}-0/journal.jsonl", *FILES} <= listed
    assert not any(name.startswith("fits") for name in listed)


def test_the_reported_fitness_is_that_of_the_pruned_model(
    finished: dict[str, tuple[Path, dict[str, Any]]], model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    """On sequences that were not calibrated on, with the rates as they were searched."""
    output, _ = finished["evolutionary"]
    report = SearchReport.load(output / "search.json")
    best = report.runs[0].best
    rates = [{"attention": attention, "ffn": ffn} for attention, ffn in zip(best.attention, best.ffn, strict=True)]
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    prune(
        model,
        tmp_path / "pruned",
        rates=tmp_path / "rates.json",
        calibration=text.source,
        samples=10,
        compensation="least-squares",
    )
    dense = open_checkpoint(model)
    calibrated = torch.from_numpy(
        preparing.read_windows(text.source, model, dense.shape.vocabulary_size, samples=10).tokens
    )
    tokens, shares = preparing.fitness_tokens(dense, text, calibrated, 8, 2)
    assert not shares
    assert not {tuple(row) for row in tokens.tolist()} & {tuple(row) for row in calibrated.tolist()}
    pruned = load_model(tmp_path / "pruned", dtype=torch.float32)
    expected = kl(log_probabilities(plain_model(model), tokens), log_probabilities(pruned, tokens))
    # The ridge of a pruned checkpoint is chosen at its own cut point, the search's at one for all.
    assert best.fitness == pytest.approx(expected, rel=0.1)


def test_pruning_with_the_rates_gives_the_plan(
    finished: dict[str, tuple[Path, dict[str, Any]]], model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    output, _ = finished["population"]
    plan = prune(
        model,
        tmp_path / "pruned",
        rates=output / "rates.json",
        calibration=text.source,
        samples=10,
        compensation="least-squares",
    )
    assert plan == PruningPlan.load(output / "plan.json")


class Killed(BaseException):
    """Ends a search as a signal would, as far as a process can end itself and go on."""


def kill_after(patch: pytest.MonkeyPatch, calls: int) -> None:
    real, left = LocalLosses.losses, [calls]

    def losses(self: LocalLosses, *given: Any) -> list[float]:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(self, *given)

    patch.setattr(LocalLosses, "losses", losses)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_that_is_killed_goes_on(
    strategy: Any,
    finished: dict[str, tuple[Path, dict[str, Any]]],
    model: Path,
    text: CalibrationText,
    tmp_path: Path,
) -> None:
    """After every batch of losses that there is, over and over in one directory."""
    chosen, output = options_of(strategy=strategy), tmp_path / "out"
    baselines, kills = strategy == "population", 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, 1)
            try:
                search(model, output, calibration=text, prune=pruning(), options=chosen, baselines=baselines)
                break
            except Killed:
                kills += 1
                assert not (output / "search.json").exists()
    assert kills > 5
    assert found(output) == finished[strategy][1]
    assert not (output / "fits").exists()


@pytest.mark.parametrize("seed", range(6))
def test_a_journal_that_was_cut_short_anywhere(
    seed: int, finished: dict[str, tuple[Path, dict[str, Any]]], model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    """Also in the middle of a line, and before the first one is whole."""
    source, expected = finished["population"]
    output, random = tmp_path / "out", np.random.default_rng(seed)
    shutil.copytree(source, output)
    (output / "search.json").unlink()
    journals = sorted(output.rglob("journal.jsonl"))
    assert len(journals) == 4
    for journal in journals:
        content = journal.read_bytes()
        end = int(random.integers(len(content) + 1)) if seed else int(random.integers(100))
        journal.write_bytes(content[:end])
    search(model, output, calibration=text, prune=pruning(), options=options_of(strategy="population"), baselines=True)
    assert found(output) == expected
    journals_again = [journal.read_text().splitlines() for journal in journals]
    assert all(all(json.loads(line) for line in lines) for lines in journals_again)


@pytest.mark.parametrize("where", ["evidence", "options", "factors", "report"])
def test_killed_before_the_first_candidate_or_after_the_last(
    where: str,
    finished: dict[str, tuple[Path, dict[str, Any]]],
    model: Path,
    text: CalibrationText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    given: Any = {"calibration": text, "prune": pruning(), "options": options_of()}
    with pytest.MonkeyPatch.context() as patch:
        target, name = {
            "evidence": (preparing.Evidence, "save"),
            "options": (preparing, "_described"),
            "factors": (fitting.NestedFits, "save"),
            "report": (SearchReport, "save"),
        }[where]
        patch.setattr(target, name, killed)
        with pytest.raises(Killed):
            search(model, tmp_path / "out", **given)
    search(model, tmp_path / "out", **given)
    assert found(tmp_path / "out") == finished["evolutionary"][1]


@pytest.mark.parametrize("damage", ["deleted", "flipped", "garbage", "folder", "unmarked"])
@pytest.mark.parametrize("name", ["statistics.safetensors", "evidence.json", "options.json"])
def test_damaged_evidence_is_gathered_again(
    damage: str,
    name: str,
    finished: dict[str, tuple[Path, dict[str, Any]]],
    model: Path,
    text: CalibrationText,
    tmp_path: Path,
) -> None:
    output, whole = finished["evolutionary"]
    shutil.copytree(output, tmp_path / "out")
    path = tmp_path / "out" / "evidence" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped":
        content[-9] ^= 0x40
        path.write_bytes(content)
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 100)
    elif damage == "folder":
        path.mkdir()
    elif damage == "unmarked":
        (path.parent / "manifest.json").unlink()
    search(model, tmp_path / "out", calibration=text, prune=pruning(), options=options_of())
    assert found(tmp_path / "out") == whole
    assert (output / "evidence" / name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_process_that_is_really_killed(
    finished: dict[str, tuple[Path, dict[str, Any]]], model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from flap_export.evidence.record import CalibrationText
        from flap_export.evidence.methods import PruneOptions
        from flap_export.searching import preparing
        from flap_export.searching.journal import Journal
        from flap_export.searching.record import SearchOptions
        from flap_export.searching.stage import search

        preparing.CHUNK_TOKENS = int(sys.argv[5])
        append, lines = Journal.append, []

        def counted(self, event):
            append(self, event)
            lines.append(event)
            if len(lines) == 20:
                self._file.write(b'{"event": "loss", "levels": [')
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.append = counted
        search(
            sys.argv[1],
            sys.argv[2],
            calibration=CalibrationText.model_validate_json(sys.argv[3]),
            prune=PruneOptions(ratio=0.4, method="flap", compensation="least-squares"),
            options=SearchOptions.model_validate_json(sys.argv[4]),
        )
        """
    )
    output, chosen = tmp_path / "out", options_of()
    arguments = [str(model), str(output), text.model_dump_json(), chosen.model_dump_json(), str(2 * LENGTH)]
    child = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (output / "search.json").exists()
    search(model, output, calibration=text, prune=pruning(), options=chosen)
    assert found(output) == finished["evolutionary"][1]


@pytest.mark.parametrize("strategy", ["evolutionary", "population"])
def test_a_finished_search_goes_on_with_more_evaluations(
    strategy: Any,
    finished: dict[str, tuple[Path, dict[str, Any]]],
    model: Path,
    text: CalibrationText,
    tmp_path: Path,
) -> None:
    """As if they had been asked for at once; the factors are made again, and go again."""
    longer: Any = {"calibration": text, "prune": pruning(), "options": options_of(strategy=strategy, evaluations=15)}
    shutil.copytree(finished[strategy][0], tmp_path / "out")
    again = search(model, tmp_path / "out", **longer)
    at_once = search(model, tmp_path / "at once", **longer)
    assert found(tmp_path / "out") == found(tmp_path / "at once")
    assert 14 < again.runs[0].evaluations <= 15
    assert again.runs[0].best.fitness == at_once.runs[0].best.fitness
    assert not (tmp_path / "out" / "fits").exists()


def test_a_finished_search_computes_nothing_again(
    finished: dict[str, tuple[Path, dict[str, Any]]],
    model: Path,
    text: CalibrationText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished["evolutionary"][0], tmp_path / "out")

    def computes(*_: Any, **__: Any) -> None:
        raise AssertionError("it computes")

    monkeypatch.setattr(preparing, "gather", computes)
    monkeypatch.setattr(preparing, "fit_rankings", computes)
    monkeypatch.setattr(LocalLosses, "__init__", computes)
    search(model, tmp_path / "out", calibration=text, prune=pruning(), options=options_of())
    assert found(tmp_path / "out") == finished["evolutionary"][1]


def test_baselines_do_not_change_the_search(
    finished: dict[str, tuple[Path, dict[str, Any]]], model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    """FLAP's allocation is compared with; a search by another method does not begin with it."""
    given: Any = {"calibration": text, "prune": pruning(method="magnitude", compensation="none")}
    alone = search(model, tmp_path / "alone", options=options_of(), **given)
    compared = search(model, tmp_path / "compared", options=options_of(), baselines=True, **given)
    assert set(alone.references) == {"uniform", "magnitude"}
    assert set(compared.references) == {"uniform", "magnitude", "flap"}
    assert compared.runs[0].model_copy(update={"seconds": 0}) == alone.runs[0].model_copy(update={"seconds": 0})


def test_several_seeds_and_the_best_of_them(model: Path, text: CalibrationText, tmp_path: Path) -> None:
    report = search(
        model,
        tmp_path / "out",
        calibration=text,
        prune=pruning(compensation="none"),
        options=options_of(informed=False),
        seeds=(3, 4, 5),
        baselines=True,
    )
    assert [run.name for run in report.runs] == [
        f"{strategy}-{seed}" for strategy in ("evolutionary", "random") for seed in (3, 4, 5)
    ]
    best = min(report.runs[:3], key=lambda run: run.best.fitness)
    assert report.chosen == best.name
    assert len({run.best.fitness for run in report.runs[:3]}) == 3


@pytest.mark.parametrize("granularity", ["layers", "modules"])
def test_with_latency_the_front_is_the_trade_off(
    granularity: Any, model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    report = search(
        model,
        tmp_path / "out",
        calibration=text,
        prune=pruning(compensation="bias"),
        options=options_of(
            strategy="population", latency="a100-80gb", granularity=granularity, evaluations=20, greatest=1.0
        ),
    )
    (run,) = report.runs
    assert run.front[0] == run.best
    assert all(found.latency_ms is not None for found in run.front)
    for one, other in zip(run.front, run.front[1:], strict=False):
        assert one.fitness < other.fitness
        assert one.latency_ms > other.latency_ms  # type: ignore[operator]
    assert len(run.front) > 1


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
@pytest.mark.parametrize("method", ["obs", "llm-pruner", "random"])
def test_other_methods_rank(method: Any, fitness: Any, model: Path, text: CalibrationText, tmp_path: Path) -> None:
    report = search(
        model,
        tmp_path / "out",
        calibration=text,
        prune=PruneOptions(ratio=0.3, method=method),
        options=options_of(fitness=fitness, evaluations=3),
    )
    assert method in report.references
    assert report.runs[0].best.fitness <= min(report.references.values())


def test_other_settings_in_the_same_directory_are_refused(
    finished: dict[str, tuple[Path, dict[str, Any]]], model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    output = finished["evolutionary"][0]
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for given, names in (
        ({"options": options_of(population=5, step=0.1)}, r"options\.population, options\.step"),
        ({"prune": pruning(ratio=0.41)}, "prune"),
        ({"calibration": text.model_copy(update={"samples": 9})}, "calibration"),
    ):
        asked: Any = {"calibration": text, "prune": pruning(), "options": options_of(), **given}
        with pytest.raises(InputError, match=rf"begun with other settings \({names}\); name a new output directory"):
            search(model, output, **asked)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_refused_request_is_in_nobodys_way(model: Path, text: CalibrationText, tmp_path: Path) -> None:
    """A wrong model leaves no directory, and a wrong text can be put right in the same one."""
    output = tmp_path / "out"
    given: Any = {"prune": pruning(compensation="none"), "options": options_of(evaluations=2)}
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="not in the family table"):
        search(tmp_path / "foreign", output, calibration=text, **given)
    assert not output.exists()
    with pytest.raises(TextError, match="no text source"):
        search(model, output, calibration=text.model_copy(update={"source": "missing.npy"}), **given)
    assert search(model, output, calibration=text, **given).runs


def test_other_weights_and_another_precision_are_refused(
    model: Path, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old losses are not set beside new ones: of a model that was replaced, or on a device that computes otherwise."""
    output = tmp_path / "out"
    shutil.copytree(model, tmp_path / "model")
    given: Any = {"calibration": text, "prune": pruning(compensation="none")}
    search(tmp_path / "model", output, options=options_of(), **given)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "compute_dtype", lambda *_: torch.bfloat16)
        with pytest.raises(InputError, match=r"a search with other settings \(dtype\)"):
            search(tmp_path / "model", output, options=options_of(), **given)
    tiny_checkpoint("llama", tmp_path / "model", num_hidden_layers=4, seed=1)
    with pytest.raises(InputError, match=r"a search with other settings \(digests\)"):
        search(tmp_path / "model", output, options=options_of(), **given)


@pytest.mark.parametrize("name", ["plan.json", "notes.txt"])
def test_a_directory_that_holds_something_else_is_left_alone(
    name: str, model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match=r"holds something else \(no request\.json in it\), and nothing was touched"):
        search(model, tmp_path / "out", calibration=text, prune=pruning(), options=options_of())
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("prune_options", "options", "seeds", "message"),
    [
        ({"ratio": None, "rates": [0.5, 0.5]}, {}, (0,), "finds the rates of a --ratio; leave out --rates"),
        ({"layout": "stock", "compensation": None}, {}, (0,), "--layout stock leaves no rates to search"),
        ({"method": "wanda-sp"}, {}, (0,), "ranks a layer by what the pruned layers before it give.*--metric wifn"),
        ({"sequential": True}, {}, (0,), "leave out --sequential, and prune with it after"),
        ({}, {}, (), r"one or more different seeds, got \[\]"),
        ({}, {}, (1, 1), r"one or more different seeds, got \[1, 1\]"),
        ({}, {"proposer": "self"}, (0,), "breeds a population, not the strategy evolutionary"),
        ({}, {"mutations": 0, "crossovers": 0}, (0,), "set --mutations or --crossovers"),
        ({}, {"latency": "a100"}, (0,), "--latency must be one of a100-40gb.*got 'a100'"),
        ({}, {"latency": "h100"}, (0,), "a second objective needs a population, not the strategy evolutionary"),
        ({}, {"stages": (0.5, 0.25, 1)}, (0,), r"ascending shares of the text up to 1, got \[0\.5, 0\.25, 1"),
        ({}, {"stages": (0.5,)}, (0,), "ascending shares of the text up to 1"),
        ({}, {"stages": ()}, (0,), "ascending shares of the text up to 1"),
    ],
)
def test_options_that_do_not_go_together(
    prune_options: dict[str, Any], options: dict[str, Any], seeds: Sequence[int], message: str, tmp_path: Path
) -> None:
    """Before anything is computed or written."""
    structure = {"structure": "ul-um"} if prune_options.get("layout") else {}
    wanted = resolved(pruning(**prune_options, **structure))
    with pytest.raises(InputError, match=message):
        check_search(options_of(**options), wanted, seeds)
    with pytest.raises(InputError, match=message):
        search(
            tmp_path / "no model",
            tmp_path / "out",
            calibration=CalibrationText(source="no text"),
            prune=wanted,
            options=options_of(**options),
            seeds=seeds,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["grid", "local:2", "ray:", "ray:0", "ray:two"])
def test_workers_of_no_kind(workers: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--workers must be"):
        search("model", tmp_path / "out", calibration=CalibrationText(source=""), prune=pruning(), workers=workers)
    assert not (tmp_path / "out").exists()


def test_a_budget_out_of_reach(model: Path, text: CalibrationText, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"between 0\.0% and 20\.0% of the weights, not 40\.0%; widen the bounds"):
        search(
            model,
            tmp_path / "out",
            calibration=text,
            prune=pruning(compensation="none"),
            options=options_of(greatest=0.4, protect_first=1, protect_last=1),
        )


def test_a_short_text_is_shared_and_the_report_says_so(model: Path, text: CalibrationText, tmp_path: Path) -> None:
    """24 sequences, of which all but four are calibrated on."""
    shared = text.model_copy(update={"samples": 20})
    report = search(
        model, tmp_path / "out", calibration=shared, prune=pruning(compensation="none"), options=options_of()
    )
    assert report.fitness_shares_calibration
    assert report.fitness_sequences == 8
    with pytest.raises(TextError, match=r"measured on 22 sequences, and '.*' has 20 of this length.*--fitness-samples"):
        search(
            model,
            tmp_path / "more",
            calibration=shared,
            prune=pruning(compensation="none"),
            options=options_of(fitness_samples=22),
        )


def test_text_that_repeats_itself_is_not_taken_for_other_text(model: Path, tmp_path: Path) -> None:
    """A sequence that was calibrated on is no other one for standing elsewhere."""
    tokens = tokens_of(6, LENGTH)
    source = save_tokens(tmp_path / "ids.npy", torch.cat([tokens] * 4))
    own, shares = preparing.fitness_tokens(
        open_checkpoint(model), CalibrationText(source=source), torch.cat([tokens] * 2), 6, 2
    )
    assert shares
    assert own.shape == (6, LENGTH)


def test_without_a_number_fitness_takes_what_the_text_holds(model: Path, tmp_path: Path) -> None:
    """Up to 64 sequences, whole chunks of them; a number that was asked for must be there."""
    tokens = tokens_of(100, LENGTH)
    checkpoint, source = open_checkpoint(model), save_tokens(tmp_path / "ids.npy", tokens)
    text, short = CalibrationText(source=source), CalibrationText(source=save_tokens(tmp_path / "s.npy", tokens[:7]))
    others, shares = preparing.fitness_tokens(checkpoint, text, tokens[:10], None, 5)
    assert (len(others), shares) == (60, False)
    own, shares = preparing.fitness_tokens(checkpoint, short, tokens[:7], None, 5)
    assert (len(own), shares) == (5, True)
    with pytest.raises(TextError, match=r"fitness is measured on 60 sequences, and .* has 7 of this length"):
        preparing.fitness_tokens(checkpoint, short, tokens[:7], 64, 5)


@pytest.mark.parametrize(
    ("shares", "sequences", "chunk", "expected"),
    [
        ((0.25, 1.0), 64, 16, (16, 64)),
        ((0.25, 1.0), 64, 1, (16, 64)),
        ((0.01, 0.02, 1.0), 64, 16, (16, 64)),
        ((0.5, 1.0), 6, 6, (6,)),
        ((1.0,), 6, 2, (6,)),
        ((0.3, 0.6, 1.0), 10, 2, (4, 6, 10)),
    ],
)
def test_stages_are_whole_chunks(shares: Any, sequences: int, chunk: int, expected: tuple[int, ...]) -> None:
    assert preparing.stage_sequences(shares, sequences, chunk) == expected


def test_the_manifest_lists_nothing_that_goes(
    finished: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    manifest = Manifest.load(finished["random"][0] / "manifest.json")
    assert not [name for name in manifest.files if name.startswith("fits/")]
    assert "evidence/statistics.safetensors" in manifest.files


def test_losses_are_opened_once_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import ExitStack, contextmanager

    events: list[str] = []

    class Source(Value):
        def losses(self, candidates: Sequence[Any], first: int, last: int) -> list[float]:
            return [float(first + last)]

    @contextmanager
    def opened() -> Any:
        events.append("opened")
        yield Source()
        events.append("closed")

    with ExitStack() as until:
        late = sources.LateLosses(opened, until)
        assert events == []
        assert late.losses([], 1, 2) == late.losses([], 2, 1) == [3.0]
        assert events == ["opened"]
    assert events == ["opened", "closed"]
