"""The commands, in the order of their use."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Final

import typer

from flap_export.cli import artifacts, console, searching, shrinking, using
from flap_export.errors import FlapExportError

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
"""Exit code of an error that is nobody's input; Python's own is 1, which says that a gate was breached."""


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    as_json = "--json" in sys.argv[1:]
    try:
        app(standalone_mode=True)
    except FlapExportError as error:
        console.emit_error(error, as_json=as_json)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.side().print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        traceback.print_exc()
        if as_json:
            message = f"{type(error).__name__}: {error}"
            console.emit_json({"error": {"kind": "Unforeseen", "message": message, "exit_code": UNFORESEEN}})
        sys.exit(UNFORESEEN)


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
