"""What a command says: one JSON object or words on standard output; progress, logs and errors on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flap_export.errors import FlapExportError, GateBreachedError


def words() -> Console:
    """Standard output, for people."""
    # Without emoji: `:train:` in the name of a dataset is one.
    return Console(highlight=False, soft_wrap=True, emoji=False)


def side() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def configure_logging(verbose: bool) -> None:
    """Send the library's log to standard error, and quieten the libraries below it."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    logging.getLogger("flap_export").setLevel(logging.INFO if verbose else logging.WARNING)


def emit_json(value: Any) -> None:
    """Print one JSON object; a record prints as it is saved."""
    text = value.model_dump_json(indent=2) if hasattr(value, "model_dump_json") else json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show(value: Any, parts: Any, as_json: bool) -> None:
    """A command's result: the record as JSON, or its parts in words."""
    if as_json:
        emit_json(value)
        return
    out = words()
    for part in parts:
        out.print(part)


def emit_error(error: FlapExportError, *, as_json: bool) -> None:
    """Say what went wrong: in words on standard error, and as the JSON object where one was asked for."""
    if as_json:
        kind = type(error).__name__.removesuffix("Error")
        gate = {"gate": error.gate} if isinstance(error, GateBreachedError) else {}
        emit_error_json(kind, str(error), error.exit_code, **gate)
    side().print(f"[bold red]error:[/] {escape(str(error))}")


def emit_error_json(kind: str, message: str, exit_code: int, **more: str) -> None:
    """An error as the one JSON object."""
    emit_json({"error": {"kind": kind, **more, "message": message, "exit_code": exit_code}})


@contextmanager
def progress_bars() -> Iterator[Any]:
    """A progress callback that draws bars where standard error is a terminal, and is silent elsewhere."""
    console = side()
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks or bars.tasks[tasks[what]].finished:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield advance


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    for position, column in enumerate(columns):
        drawn.add_column(column, justify="left" if position == 0 else "right", header_style="dim")
    return drawn
