"""The commands, in the order of their use, and how a process of them begins and ends."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Final, NoReturn, TextIO

import typer

from flap_export.cli import artifacts, console, searching, shrinking, using
from flap_export.devices import keep_to_quota
from flap_export.errors import FlapExportError, InputError
from flap_export.manifest import installed_versions

app = typer.Typer(
    name="flap-export",
    help="Prune a causal language model, export it, prove that the artifact computes the same, measure the speedup.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Rich's tables cut the names of long options off at 80 columns.
    rich_markup_mode=None,
)
UNFORESEEN: Final = 70
"""Exit code of an error that no input explains; Python's own is 1, which here says that a gate was breached."""
_received: Final[list[int]] = []
"""Signals that came while a command ran."""
BROKEN_PIPE: Final = 128 + signal.SIGPIPE
"""What a shell reports of a process whose reader went away; Typer's own 1 would read as a breached gate."""


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    as_json = "--json" in sys.argv[1:]
    _open_closed_streams()
    keep_to_quota()
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler that is set already, or a signal that is ignored (nohup), was asked for.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _ended)
    try:
        _call()
    except _SignalledError:
        if _received[0] == signal.SIGINT:
            console.side().print("interrupted")
        sys.exit(128 + _received[0])
    except SystemExit as left:
        # Typer prints usage errors itself, and ends by an exit whose cause is the error.
        if isinstance(left.__context__, BrokenPipeError):
            sys.exit(BROKEN_PIPE)
        describe = getattr(left.__context__, "format_message", None)
        if as_json and describe is not None:
            console.emit_error_json("Usage", describe(), 2)
        raise
    except FlapExportError as error:
        console.emit_error(error, as_json=as_json)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        _leave_by(error, as_json)
    except Exception as error:
        traceback.print_exc()
        versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
        console.side().print(f"a defect of flap_export, or of what it runs on; please report it with these: {versions}")
        if as_json:
            console.emit_error_json("Unforeseen", f"{type(error).__name__}: {error}", UNFORESEEN)
        sys.exit(UNFORESEEN)


class _SignalledError(Exception):
    """The process was told to end, and does."""


def _call() -> None:
    """Run the command; whatever becomes of a signal within it (torch makes errors of its own of it), it ends the run.

    Raises:
        _SignalledError: a signal came, and an exception of any kind after it.
    """
    try:
        app(standalone_mode=True)
    except BaseException as error:
        if _received:
            raise _SignalledError from error
        raise


def _open_closed_streams() -> None:
    """Give a process that was started without standard output or error (`>&-`) one that goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, _nowhere())


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _ended(number: int, frame: FrameType | None) -> NoReturn:
    """End as an exception does, so that nothing half-written stays."""
    _received.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _leave_by(error: OSError, as_json: bool) -> NoReturn:
    """What the operating system refuses and no stage expects, in one line: a name too long, a full standard output."""
    where = f"'{error.filename}': " if error.filename is not None else ""
    refused = InputError(f"{where}{error.strerror or error}")
    try:
        console.emit_error(refused, as_json=as_json)
        sys.stdout.flush()
    except OSError:
        # Standard output itself is what failed; without this, Python tries once more when it ends.
        sys.stdout = _nowhere()
        console.emit_error(refused, as_json=False)
    sys.exit(refused.exit_code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import flap_export

        typer.echo(flap_export.__version__)
        raise typer.Exit


for _command in (
    shrinking.run,
    shrinking.prune,
    shrinking.compare,
    searching.search,
    artifacts.export,
    artifacts.build,
    artifacts.validate,
    artifacts.bench,
    using.evaluate,
    using.generate,
    using.predict,
    using.inspect,
    using.verify,
    using.report,
):
    app.command()(_command)
