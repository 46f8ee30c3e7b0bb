"""Candidates evaluated on a local Ray cluster of two workers, with one of them killed on the way."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import candidate_of, tiny_problem

from flap_export.errors import InputError, MissingRequirementError, ModelError
from flap_export.searching.problem import Problem
from flap_export.searching.space import Candidate
from flap_export.searching.workers import MAX_LOST, RayLosses, ray_losses, threads_of

OBJECT_STORE_BYTES = 80 << 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Room for three workers, whatever this machine has; ports are free ones."""
    ray = pytest.importorskip("ray")
    # Workers import what the tests do; and compute as this process does.
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env={"env_vars": variables},
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return tiny_problem("llama", tmp_path_factory.mktemp("problem"), num_hidden_layers=3, sequences=4)


@pytest.fixture(scope="module")
def candidates(problem: Problem) -> list[Candidate]:
    shares = [(0.0, 0.2), (0.5, 0.4), (1.0, 0.6), (0.0, 1.0)]
    return [candidate_of(problem.space, [one, other, (0.5, 0.5)]) for one in shares for other in shares]


@pytest.fixture(scope="module")
def alone(problem: Problem, candidates: list[Candidate]) -> list[float]:
    """What this process says, with one thread as every worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with problem.opened() as losses:
        found = losses.losses(candidates, 0, 4)
    torch.set_num_threads(threads)
    assert len(set(found)) == len(candidates)
    return found


@pytest.fixture(scope="module")
def workers(cluster: Any, problem: Problem) -> Iterator[RayLosses]:
    with ray_losses(problem, 2) as losses:
        yield losses
    assert cluster.is_initialized()


def test_workers_say_what_one_process_says(workers: RayLosses, candidates: list[Candidate], alone: list[float]) -> None:
    """Not a bit differs, and every stage of the text is to be had."""
    assert workers.losses(candidates, 0, 4) == alone
    assert workers.losses([candidates[3], candidates[1], candidates[3]], 0, 4) == [alone[3], alone[1], alone[3]]
    assert workers.losses([], 0, 4) == []
    parts = [workers.losses(candidates[:2], *rows) for rows in ((0, 2), (2, 4))]
    assert [sum(part) for part in zip(*parts, strict=True)] == pytest.approx(alone[:2], rel=1e-12)


def test_a_lost_workers_candidates_are_evaluated_elsewhere(
    cluster: Any,
    workers: RayLosses,
    candidates: list[Candidate],
    alone: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its process is killed while it has a group to evaluate; another one takes its place."""
    before = list(workers.actors)
    pid = cluster.get(before[1].__ray_call__.remote(lambda _: os.getpid()))
    # What it is given now waits behind this, and is lost with it.
    before[1].__ray_call__.remote(lambda _: time.sleep(600))
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    assert workers.losses(candidates, 0, 4) == alone
    killer.join()
    assert [record.message for record in caplog.records] == [
        "a worker was lost; its 4 candidates are evaluated elsewhere"
    ]
    assert workers.actors[0] is before[0]
    assert workers.actors[1] is not before[1]
    assert workers.losses(candidates, 0, 4) == alone
    assert len(caplog.records) == 1


def test_workers_that_are_lost_again_and_again(
    cluster: Any, problem: Problem, candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = RayLosses._started

    def doomed(self: RayLosses) -> Any:
        actor = started(self)
        cluster.kill(actor)
        return actor

    monkeypatch.setattr(RayLosses, "_started", doomed)
    with (
        ray_losses(problem, 1) as losses,
        pytest.raises(MissingRequirementError, match=rf"{MAX_LOST + 1} workers in a row were lost .*Ray's logs"),
    ):
        losses.losses(candidates, 0, 4)


def test_errors_of_ours_come_out_as_ours(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the opening and of the work, without a worker's traceback."""
    # The other two workers keep theirs.
    monkeypatch.setattr("flap_export.searching.workers.threads_of", lambda *_: 1)
    problem = tiny_problem("llama", tmp_path, compensation="none", num_hidden_layers=2)
    candidate = candidate_of(problem.space, [(0.5, 0.5), (0.0, 0.0)])
    (tmp_path / "dense").rename(tmp_path / "elsewhere")
    with ray_losses(problem, 1) as losses:
        with pytest.raises(ModelError, match=r"^no model directory at '.*dense'$") as caught:
            losses.losses([candidate], 0, 6)
        assert type(caught.value) is ModelError
        # Put right, the same worker goes on.
        (tmp_path / "elsewhere").rename(tmp_path / "dense")
        assert losses.losses([candidate], 0, 6)[0] > 0

        def broken(worker: Any) -> None:
            supernet = worker._losses._supernet
            supernet._restore = lambda site, weight, kept: (weight[:, kept] * float("nan"), None)
            supernet._blocks.clear()
            supernet._layers.clear()
            worker._losses.forget_states()

        cluster.get(losses.actors[0].__ray_call__.remote(broken))
        with pytest.raises(InputError, match=r"^the logits at rates \[0\.\d+, 0\.0\] are not finite; .*float32$"):
            losses.losses([candidate], 0, 6)

        def misused(worker: Any) -> None:
            worker._losses = 5

        cluster.get(losses.actors[0].__ray_call__.remote(misused))
        with pytest.raises(cluster.exceptions.RayTaskError, match="'int' object has no attribute 'losses'"):
            losses.losses([candidate], 0, 6)


def test_more_workers_than_there_is_room_for(cluster: Any, problem: Problem) -> None:
    """Ray would wait for ever."""
    with (
        pytest.raises(MissingRequirementError, match=r"4 workers take as many CPUs, and the cluster has 3; .*fewer"),
        ray_losses(problem, 4),
    ):
        pass
    assert cluster.is_initialized()


def test_a_cluster_of_its_own_is_shut_down(cluster: Any, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where no worker could be started."""
    events: list[str] = []
    monkeypatch.setattr(cluster, "is_initialized", lambda: bool(events))
    monkeypatch.setattr(cluster, "init", lambda **_: events.append("begun"))
    monkeypatch.setattr(cluster, "shutdown", lambda: events.append("shut down"))
    with pytest.raises(MissingRequirementError), ray_losses(problem, 4):
        pass
    assert events == ["begun", "shut down"]


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [([8], 2, 4), ([8], 3, 2), ([3, 3], 1, 3), ([4, 8], 3, 4), ([2], 2, 1), ([0], 1, 1)],
)
def test_threads_leave_room_for_every_worker(cores: list[int], workers: int, threads: int) -> None:
    """On one machine each: a worker does not span two."""
    assert threads_of(cores, workers) == threads


def test_without_ray(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingRequirementError, match=r"needs Ray; to mend it: pip install 'flap-export\[search\]'"),
        ray_losses(problem),
    ):
        pass
