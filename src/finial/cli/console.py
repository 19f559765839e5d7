"""What all commands share: streams, colours, errors, progress, and pages of aligned rows.

Knows rich and terminals; nothing of models.  Standard output carries results, standard error everything else.

    page = Page("model"); page.row("layers", "28"); page.show(console.out())
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

PLAIN_WIDTH = 120  # of pages that are piped
COLUMN = 28  # remarks are aligned behind values up to so wide; wider ones have theirs where they end
UNAVAILABLE = "unavailable"
# Arguments of the public object that are options with the same name here.
FLAGS = (
    "max_tokens max_context temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty seed "
    "threads kv_format layers"
).split()

# C0 but tab and newline, DEL, and C1: what a terminal obeys instead of showing (ECMA-48, 5.2 and 5.3).
_CONTROLS = dict.fromkeys([*(c for c in range(0x20) if c not in (0x09, 0x0A)), *range(0x7F, 0xA0)])


def clean(text: str) -> str:
    """Text that cannot command a terminal; foreign text (a model's, a file name) goes through this."""
    return text.translate(_CONTROLS)


def prepare_streams() -> None:
    """A character that the terminal's encoding lacks becomes "?", not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def silence() -> None:
    """Nobody reads standard output any more: what Python still flushes at its end goes nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = io.StringIO()


def out() -> Console:
    """For results."""
    return _console(sys.stdout)


def err() -> Console:
    """For everything else."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    from rich.console import Console

    made = Console(file=stream, highlight=False)
    # Not a terminal: no width to keep to, unless the person says one.
    return (
        made
        if made.is_terminal or "COLUMNS" in os.environ
        else Console(file=stream, highlight=False, width=PLAIN_WIDTH)
    )


def print_error(what: str, fix: str = "") -> None:
    """One red line, and one that says what to do."""
    from rich.text import Text

    console = err()
    console.print(Text.assemble(("error: ", "bold red"), clean(_as_flags(what))), soft_wrap=True)
    if fix:
        console.print(Text.assemble(("  fix: ", "bold"), clean(_as_flags(fix))), soft_wrap=True)


def _as_flags(text: str) -> str:
    """What Python calls max_tokens=9 is --max-tokens 9 here."""
    return re.sub(rf"\b({'|'.join(FLAGS)})=(?=\S)", lambda match: f"--{match[1].replace('_', '-')} ", text)


def print_usage_error(error: Exception) -> None:
    """A wrong command line, in the same form."""
    what = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "finial"
    if not what.strip():  # a bare `finial`: typer has printed the help
        return
    print_error(what, f"{path} --help shows what there is")


def note(text: str, style: str = "dim") -> None:
    """A remark on standard error."""
    err().print(clean(text), style=style, markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------- pages


@dataclass
class Page:
    """A heading and rows of name, value and remark, aligned."""

    sections: list[tuple[str, list[tuple[str, Text | str, str]]]] = field(default_factory=list)

    def section(self, title: str) -> None:
        """Rows that follow belong to it."""
        self.sections.append((title, []))

    def row(self, name: str, value: Text | str | None, remark: str = "") -> None:
        """One line; None reads "unavailable"."""
        self.sections[-1][1].append((name, UNAVAILABLE if value is None else value, remark))

    def show(self, console: Console) -> None:
        """Print it, no wider than the console."""
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        names = max((len(name) for _, section in self.sections for name, _, _ in section), default=0)
        for title, section in self.sections:
            if title:
                console.print(Text(clean(title), style="bold"))
            column = max((w for _, value, remark in section if remark and (w := _width(value)) <= COLUMN), default=0)
            for name, value, remark in section:
                shown = Text(clean(value)) if isinstance(value, str) else value.copy()
                if shown.plain == UNAVAILABLE:
                    shown.stylize("dim")
                if remark:
                    gap = max(column - shown.cell_len, 0) + 2
                    fits = names + 4 + shown.cell_len + gap + len(remark) <= console.width
                    shown.append(" " * gap if fits else "\n").append(clean(remark), style="dim")
                grid = Table.grid(padding=(0, 2))
                grid.add_column(width=names, style="cyan", no_wrap=True)
                grid.add_column(overflow="fold")
                grid.add_row(name, shown)
                console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def _width(value: Text | str) -> int:
    from rich.cells import cell_len

    return cell_len(str(value))


def bar(share: float, width: int = 20) -> Text:
    """A filled bar; `share` of 1 is full."""
    from rich.text import Text

    filled = round(max(0.0, min(1.0, share)) * width)
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    full, empty = ("█", "░") if encoding.startswith("utf") else ("#", ".")
    return Text.assemble((full * filled, "green"), (empty * (width - filled), "dim"))


# -------------------------------------------------------------------------------------------------- numbers


def size(nbytes: float | None) -> str:
    """Bytes in powers of 1000, as files and bandwidths are counted: "7.97 MB"."""
    if nbytes is None:
        return UNAVAILABLE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= scale:
            return f"{significant(nbytes / scale)} {unit}"
    return f"{nbytes:.0f} bytes"


def binary(nbytes: int) -> str:
    """Bytes in powers of 1024, as caches and memory are built: "32 KiB"."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << power:
            return f"{significant(nbytes / (1 << power))} {unit}"
    return f"{nbytes} bytes"


def significant(value: float) -> str:
    """Three significant digits without an exponent, and no decimals that say nothing: 7.97, 31.5, 512, 1,024."""
    if value >= 100:
        return f"{value:,.0f}"
    text = f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".")


def count(number: int, noun: str) -> str:
    """ "1 core", "2 cores"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# ------------------------------------------------------------------------------------------------- progress


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error while it is a terminal, nothing otherwise.  Yields f(name, bytes done, bytes in all)."""
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=err(), transient=True) as shown:

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = shown.add_task(clean(name or what), total=total or None)
            shown.update(tasks[name], completed=done, total=total or None)

        yield report


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on standard error while it is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with err().status(clean(what)):
        yield
