"""`finial batch`: a file of requests answered into another, from where the last run ended.

Knows options and the bar; lines, files and answers are finial.jobs'.

    finial batch in.jsonl out.jsonl --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from finial.cli import console, options
from finial.cli.run import load
from finial.errors import BackendError


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One request on each line.", show_default=False)],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="Gets one answer on each line.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As for run (default: what the first request names, else demo)."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the requests call the model (default: as --model).")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests computed side by side.")] = 16,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help='Ray Data: "local", or the address of a cluster.', rich_help_panel="Ray"),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Actors, each with the model.", rich_help_panel="Ray")] = 1,
    format: options.Format = None,
    backend: options.Backend = "auto",
    threads: options.Threads = None,
    max_context: options.MaxContext = None,
    kv_format: options.KvFormat = "bf16",
) -> int:
    """Answer a file of requests, in OpenAI's batch format.

    Run it again and it goes on where it ended, whatever ended it.
    A request that cannot be answered gets its error as the answer.
    """
    try:
        importlib.import_module("finial.serve.app")
    except ModuleNotFoundError as error:
        raise BackendError(
            f"finial batch needs the package {error.name}", fix='install it: pip install "finial[serve]"'
        ) from None
    from finial.jobs import run_local, run_ray
    from finial.jobs_file import JobFiles, first_model

    with JobFiles(source, target) as files:
        total = files.count()
        if files.done:
            console.note(f"{target}: {console.count(files.done, 'answer')} there already")
        if files.done == total:
            return 0
        chosen = model or first_model(source) or "demo"
        name = name or (chosen if model is None else None)
        how: dict[str, Any] = {
            "backend": backend,
            "format": format,
            "threads": threads,
            "max_context": max_context,
            "kv_format": kv_format,
            "max_batch": max_batch,
            "hidden": True,  # for embeddings
        }
        try:
            if ray is not None:
                with _bar(files.done, total) as report:
                    run_ray(
                        files,
                        {"model": chosen, **how},
                        address=ray,
                        name=name,
                        workers=workers,
                        cpus=threads or 1,
                        rows=4 * max_batch,
                        report=report,
                    )
            else:
                with load(chosen, **how) as llm, _bar(files.done, total) as report:
                    run_local(files, llm, name=name, report=report)
        except KeyboardInterrupt:
            console.note(f"{files.done:,} of {total:,} answered; the same command goes on from here")
            raise
    console.note(f"{target}: {console.count(total, 'answer')}")
    return 0


@contextmanager
def _bar(done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Answers so far, how fast and how long still, while standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if not task.speed else f"{console.significant(task.speed)} a second", style="dim")

    columns = (TextColumn("answers"), BarColumn(bar_width=None), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console.err(), transient=True) as shown:
        task = shown.add_task("", total=total, completed=done)
        yield lambda count: shown.update(task, advance=count)
