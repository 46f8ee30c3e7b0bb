"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from flap_export.errors import LARGEST_SEED, check_choice

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what is being done, to standard error.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Cores one operator may use.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything drawn at random.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Sequences to use; a shorter text is then an error.")]
SequenceLength = Annotated[int | None, typer.Option(min=2, help="Tokens of one sequence (128).")]


def finite(value: Any) -> Any:
    """Callback of every option that is a number: ranges let NaN through, and open ones infinity.

    Raises:
        BadParameter: it is one of them, or one of several is.
    """
    for number in value if isinstance(value, list | tuple) else (value,):
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"must be a finite number, got {number}")
    return value


def one_of(option: str, value: str | None, known: Any) -> Any:
    """A value, if it is one of those a table knows; None is.

    Raises:
        InputError: it is not.
    """
    if value is not None:
        check_choice(f"--{option}", value, known)
    return value
