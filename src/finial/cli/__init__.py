"""The terminal: the only part that prints for a person.

One file per group of commands; what they show is computed elsewhere.  Heavy imports happen inside the commands, so that
`finial --help` is quick.

    finial run demo -p "To be"        # the console script calls `main`
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from finial import __version__
from finial.cli import console
from finial.cli.batch import batch
from finial.cli.bench import bench, compare, report
from finial.cli.chat import chat as chat_command
from finial.cli.engines import app as engines_app
from finial.cli.look import doctor, info
from finial.cli.make import convert, pull, synth
from finial.cli.quality import quality
from finial.cli.run import run as run_command
from finial.cli.serve import serve
from finial.errors import FinialError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE
MISTAKE = 2

app = typer.Typer(
    name="finial",
    help="Runs small language models as fast as the machine physically allows, and proves it.",
    epilog='Try: finial run demo -p "ROMEO:"',
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    run_command,
    chat_command,
    serve,
    batch,
    info,
    doctor,
    pull,
    convert,
    synth,
    bench,
    compare,
    report,
    quality,
):
    app.command()(_command)
app.add_typer(engines_app, name="engines")


def _version(asked: bool) -> None:
    if asked:
        print(f"finial {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


# The class of all wrong usage, which typer does not export under a name of its own in every version.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code; errors are printed, not raised.

    0 done, 2 a mistake of the person's or a file's, 130 interrupted, 141 the reader of our output went away.
    FINIAL_DEBUG=1 lets errors through with their traceback.
    """
    console.prepare_streams()
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="finial", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except FinialError as error:
        if os.environ.get("FINIAL_DEBUG", "") not in ("", "0"):
            raise
        console.print_error(error.what, error.fix)
        return MISTAKE
    except _UsageError as error:
        console.print_usage_error(error)
        return MISTAKE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        console.silence()
        return BROKEN_PIPE
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        console.silence()  # typer had caught it first
        return BROKEN_PIPE


def main() -> None:
    """The console script."""
    sys.exit(invoke())
