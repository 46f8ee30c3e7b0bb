"""Where the losses of a search come from: this process or a cluster, opened when the first loss is asked for.

A search that is run again over its journals finds most losses there, a finished one all of them: it then neither fits
nor runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import final

from flap_export.errors import InputError, check_choice
from flap_export.progress import Progress
from flap_export.searching.fitness import Losses
from flap_export.searching.preparing import Prepared
from flap_export.searching.space import Candidate


@final
class LateLosses:
    """Losses from what is opened when they are asked for."""

    def __init__(self, opened: Callable[[], AbstractContextManager[Losses]], until: ExitStack) -> None:
        """Nothing is opened yet.

        Args:
            opened: opens it.
            until: closes it.
        """
        self._opened, self._until = opened, until
        self._losses: Losses | None = None

    def losses(self, candidates: Sequence[Candidate], first: int, last: int) -> list[float]:
        """As `flap_export.searching.fitness.Losses` has it."""
        if self._losses is None:
            self._losses = self._until.enter_context(self._opened())
        return self._losses.losses(candidates, first, last)


def workers_of(workers: str) -> tuple[bool, int | None]:
    """Whether candidates go to a cluster, and to how many workers; None where it decides.

    Raises:
        InputError: it is none of `local`, `ray` and `ray:N`.
        MissingRequirementError: Ray is not installed.
    """
    name, colon, count = workers.partition(":")
    check_choice("--workers", name, ("local", "ray"))
    if colon and (name == "local" or not count.isdecimal() or int(count) < 1):
        raise InputError(f"--workers must be local, ray or ray:N with N workers, got '{workers}'")
    if name == "ray":
        from flap_export.searching.workers import check_ray

        check_ray()
    return name == "ray", int(count) if count else None


@contextmanager
def opened_losses(ready: Prepared, workers: str, progress: Progress) -> Iterator[Losses]:
    """Losses of a problem's candidates.

    Args:
        ready: the problem; its factors are made where they are not there.
        workers: see `flap_export.searching.stage.search`.
        progress: told after every layer while the dense model runs.

    Raises:
        InputError: it is none of `local`, `ray` and `ray:N`.
        MissingRequirementError: Ray is not installed.
    """
    with ExitStack() as until:
        yield LateLosses(partial(_opened, ready, *workers_of(workers), progress), until)


@contextmanager
def _opened(ready: Prepared, remote: bool, count: int | None, progress: Progress) -> Iterator[Losses]:
    ready.make_fits(progress)
    if not remote:
        with ready.problem.opened(progress=progress) as local:
            yield local
        return
    from flap_export.searching.workers import ray_losses

    with ray_losses(ready.problem, count) as cluster:
        yield cluster
