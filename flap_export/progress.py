"""How far something is: a callback that every long stage takes. Only the command line draws bars."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""
