"""Losses of candidates from several processes or machines, by Ray.

One actor per GPU, or per share of the cores. Every actor opens the problem by itself: weights and factors are files
that it maps, so that a machine holds them once however many actors it has, and that all machines must see under the
same path. Candidates go out in groups of neighbours, which share prefixes; the groups of a worker that is lost go to
others, and a new worker takes its place.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, final

import torch

from flap_export.errors import FlapExportError, MissingRequirementError
from flap_export.searching.fitness import Losses
from flap_export.searching.problem import Problem
from flap_export.searching.space import Candidate

GROUPS_PER_WORKER: Final = 2
"""Of one batch: more even out what workers differ in speed, fewer share more prefixes."""
MAX_LOST: Final = 5
"""Workers lost in a row, without a result in between, before the search gives up."""

_logger = logging.getLogger(__name__)


@final
class Worker:
    """What an actor does: opens the problem once, and tells losses."""

    def __init__(self, problem: Problem, device: str, threads: int) -> None:
        """Open nothing yet: of what goes wrong in here Ray keeps the text alone.

        Args:
            problem: what candidates are judged on.
            device: where.
            threads: that this process computes with.
        """
        self._problem, self._device, self._threads = problem, device, threads
        self._opened = ExitStack()
        self._losses: Losses | None = None

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        """As `flap_export.searching.fitness.Losses` has it."""
        if self._losses is None:
            torch.set_num_threads(self._threads)
            self._losses = self._opened.enter_context(self._problem.opened(device=self._device))
        return self._losses.losses(candidates, first, last)


@final
class RayLosses:
    """Losses from actors; see the module and `ray_losses`."""

    def __init__(self, problem: Problem, workers: int | None) -> None:
        """Start the workers.

        Args:
            problem: what candidates are judged on.
            workers: how many; None is as many as there is room for.

        Raises:
            MissingRequirementError: the cluster has no room for as many.
        """
        import ray

        self._ray: Any = ray
        self._problem = self._ray.put(problem)
        self._space, self._device = problem.space, "cuda" if problem.device.startswith("cuda") else "cpu"
        resource = "GPU" if self._device == "cuda" else "CPU"
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = [int(node.get(resource, 0)) for node in nodes]
        self.workers = workers or max(sum(room), 1)
        if self.workers > sum(room):
            # Ray would wait for a machine to join.
            raise MissingRequirementError(
                f"{self.workers} workers take as many {resource}s, and the cluster has {sum(room)}",
                f"name fewer workers, or start Ray on machines with more {resource}s",
            )
        self._threads = threads_of([int(node.get("CPU", 0)) for node in nodes], self.workers)
        self.actors = [self._started() for _ in range(self.workers)]

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        """Loss of every candidate, summed over the tokens of sequences first..last-1, in nats.

        Raises:
            InputError: a candidate's logits are not finite.
            MissingRequirementError: workers are lost again and again.
        """
        errors = self._ray.exceptions
        queue = deque(self._groups(candidates))
        idle, lost = list(self.actors), 0
        running: dict[Any, tuple[Any, list[Candidate]]] = {}
        found: dict[Candidate, float] = {}
        while queue or running:
            while queue and idle:
                actor, group = idle.pop(), queue.popleft()
                running[actor.losses.remote(group, first, last)] = actor, group
            (reference,), _ = self._ray.wait(list(running), num_returns=1)
            actor, group = running.pop(reference)
            try:
                found |= dict(zip(group, self._ray.get(reference), strict=True))
                lost = 0
            except (errors.RayActorError, errors.ObjectLostError, errors.OutOfMemoryError) as error:
                lost += 1
                if lost > MAX_LOST:
                    raise MissingRequirementError(
                        f"{lost} workers in a row were lost ({error}); what was found so far is kept",
                        "look at Ray's logs, then give the same command again",
                    ) from error
                _logger.warning("a worker was lost; its %d candidates are evaluated elsewhere", len(group))
                queue.append(group)
                actor = self._replaced(actor)
            except errors.RayTaskError as error:
                # Ours without the worker's traceback, which Ray makes part of its text.
                raise (error.cause if isinstance(error.cause, FlapExportError) else error) from None
            idle.append(actor)
        return [found[candidate] for candidate in candidates]

    def _groups(self, candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
        """Neighbours together, in as many groups as keep all workers busy."""
        ordered = sorted(dict.fromkeys(candidates), key=lambda candidate: tuple(self._space.steps(candidate)))
        size = -(-len(ordered) // (GROUPS_PER_WORKER * self.workers))
        for start in range(0, len(ordered), max(size, 1)):
            yield ordered[start : start + size]

    def _started(self) -> Any:
        resources = {"num_gpus": 1, "num_cpus": 1} if self._device == "cuda" else {"num_cpus": self._threads}
        actor = self._ray.remote(**resources)(Worker)
        return actor.remote(self._problem, self._device, self._threads)

    def _replaced(self, actor: Any) -> Any:
        # One that merely cannot be reached would keep its share of the machine.
        self._ray.kill(actor)
        new = self._started()
        self.actors[self.actors.index(actor)] = new
        return new


def threads_of(cores: Sequence[int], workers: int) -> int:
    """Threads of every worker, as many as leave room for all of them.

    Args:
        cores: of every machine.
        workers: no more than there are cores.
    """
    return max((n for n in range(1, max(cores, default=0) + 1) if sum(c // n for c in cores) >= workers), default=1)


def check_ray() -> None:
    """Whether Ray is installed.

    Raises:
        MissingRequirementError: it is not.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise MissingRequirementError(
            "evaluating candidates on several workers needs Ray", "pip install 'flap-export[search]'"
        ) from error


@contextmanager
def ray_losses(problem: Problem, workers: int | None = None) -> Iterator[RayLosses]:
    """Start workers on the cluster that Ray finds (`RAY_ADDRESS`), or on this machine.

    Args:
        problem: what candidates are judged on.
        workers: how many; None is one per GPU, or per core.

    Raises:
        MissingRequirementError: Ray is not installed, or the cluster has no room for as many workers.
    """
    check_ray()
    import ray

    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, include_dashboard=False)
    actors: list[Any] = []
    try:
        losses = RayLosses(problem, workers)
        actors = losses.actors
        yield losses
    finally:
        for actor in actors:
            ray.kill(actor)
        if own:
            ray.shutdown()
