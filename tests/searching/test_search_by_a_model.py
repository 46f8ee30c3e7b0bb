"""Whole searches by the prompts of a language model behind a real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import LAYERS
from served import Server, fails, good, says
from tiny import save_tokens, tiny_checkpoint, tokens_of
from typer.testing import CliRunner

from flap_export.cli.app import app
from flap_export.errors import InputError, MissingRequirementError
from flap_export.searching import preparing
from flap_export.searching.journal import check_of

pytest.importorskip("openai", reason="pip install 'flap-export[search]'")

LENGTH = 8
Search = Callable[..., dict[str, Any]]


@pytest.fixture
def searched(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Search:
    """Search on the command line; gives the report without what the clock says."""
    monkeypatch.setattr(preparing, "CHUNK_TOKENS", 2 * LENGTH)
    model = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=LAYERS)
    text = save_tokens(tmp_path / "ids.npy", tokens_of(24, LENGTH))

    def search(output: Path, *options: str, url: str | None = None, seed: int = 0) -> dict[str, Any]:
        arguments = ["search", str(model), "--output", str(output), "--ratio", "0.4", "--method", "flap"]
        arguments += ["--calibration", text, "--samples", "10", "--fitness-samples", "8", "--evaluations", "14"]
        arguments += ["--population", "4", "--mutations", "2", "--crossovers", "2", "--seed", str(seed), "--json"]
        arguments += ["--proposer", f"openai:{url or server.url}", "--model", "m", "--retries", "0", *options]
        result = CliRunner().invoke(app, arguments, catch_exceptions=True)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        report: dict[str, Any] = json.loads(result.stdout)
        for run in report["runs"]:
            del run["seconds"]
            if run["usage"]:
                del run["usage"]["seconds"]
        del report["prepare_s"]
        return report

    return search


def test_a_search_by_a_model_ends_with_rates_and_what_they_took(
    searched: Search, server: Server, tmp_path: Path
) -> None:
    server.script = [good]
    report = searched(tmp_path / "out", "--prices", "2:8")
    (run,) = report["runs"]
    usage = run["usage"]
    assert report["chosen"] == run["name"] == "openai-0"
    assert usage["questions"] == usage["requests"] == len(server.requests) > 3
    assert usage["valid"] > 6
    assert usage["prompt_tokens"] == 11 * usage["questions"]
    assert run["cost"] == pytest.approx((11 * 2 + 7 * 8) * usage["questions"] / 1e6)
    assert run["evaluations"] <= 14
    assert run["best"]["fitness"] <= min(report["references"].values())


@pytest.mark.parametrize("answers", [1, 2, 4])
def test_a_server_that_dies_pauses_the_search_and_loses_nothing(
    answers: int, searched: Search, server: Server, tmp_path: Path
) -> None:
    server.script = [good]
    whole = searched(tmp_path / "whole")
    server.script = [*[good] * answers, fails(503)]
    server.requests.clear()
    with pytest.raises(MissingRequirementError, match="same command") as ended:
        searched(tmp_path / "out")
    assert ended.value.exit_code == 3
    assert len(server.requests) == answers + 1
    server.script, before = [good], len(server.requests)
    # The server came back at another address.
    resumed = searched(tmp_path / "out", url=server.url.replace("127.0.0.1", "localhost"))
    assert {**resumed, "options": whole["options"], "runs": [{**resumed["runs"][0], "proposer": None}]} == {
        **whole,
        "runs": [{**whole["runs"][0], "proposer": None}],
    }
    assert len(server.requests) - before == whole["runs"][0]["usage"]["questions"] - answers


def signed(events: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of a journal."""
    check = ""
    for event in events:
        own = {name: value for name, value in event.items() if name != "check"}
        check = check_of(own, check)
        yield json.dumps({**own, "check": check}) + "\n"


def test_a_search_is_replayed_without_its_model(searched: Search, server: Server, tmp_path: Path) -> None:
    server.script = [good]
    report = searched(tmp_path / "out")
    asked = len(server.requests)
    again = tmp_path / "again"
    (again / "runs" / "openai-0").mkdir(parents=True)
    journal = (tmp_path / "out" / "runs" / "openai-0" / "journal.jsonl").read_text().splitlines(keepends=True)
    # The answers alone: losses are measured anew.
    kept = [event for line in journal if (event := json.loads(line))["event"] != "loss"]
    (again / "runs" / "openai-0" / "journal.jsonl").write_text("".join(signed(kept)))
    shutil.copy(tmp_path / "out" / "request.json", again)
    assert searched(again, "--replay") == report
    assert len(server.requests) == asked


def test_a_replay_asks_nobody(searched: Search, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the journal holds no further answers"):
        searched(tmp_path / "out", "--replay")


def test_nonsense_all_the_way_leaves_a_conventional_search(searched: Search, server: Server, tmp_path: Path) -> None:
    server.script = [says("I would rather talk about the weather.")]
    run = searched(tmp_path / "out")["runs"][0]
    assert run["usage"]["valid"] == 0
    assert run["usage"]["filled"] >= 8
    assert 13 < run["evaluations"] <= 14
