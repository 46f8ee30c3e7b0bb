"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what is being done, to standard error.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Cores one operator may use.")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Sequences to use; a shorter text is then an error.")]
SequenceLength = Annotated[int | None, typer.Option(min=2, help="Tokens of one sequence (128).")]
