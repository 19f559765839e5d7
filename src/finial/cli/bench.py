"""`finial bench`, `finial compare` and `finial report`: measure, set records side by side, make pages of them.

Knows how to show what `finial.lab` found.

    finial bench --workload depth --depth 1:1024:x2
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finial.cli import console
from finial.errors import RequestError

if TYPE_CHECKING:
    from finial.lab.answer import Answer, Table
    from finial.lab.probes.energy import Cost
    from finial.lab.session import Model, Session

REGRESSION = 1

_WHAT = "What to measure"
_HOW = "How"


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="demo (embedded), a directory, a .gguf file, or a hub name. [default: demo]",
            show_default=False,
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", "-w", help="A family; may be repeated. --list shows them.", rich_help_panel=_WHAT),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="A table as people publish it. --list shows them.", rich_help_panel=_WHAT)
    ] = "",
    prompt: Annotated[str, typer.Option(help="Prompt lengths: 128,512 or 1:1024:x2.", rich_help_panel=_WHAT)] = "",
    generate: Annotated[str, typer.Option(help="Tokens to generate, likewise.", rich_help_panel=_WHAT)] = "",
    depth: Annotated[str, typer.Option(help="Cache positions: 1:32768:x2.", rich_help_panel=_WHAT)] = "",
    batch: Annotated[str, typer.Option(help="Sequences at once: 1:64:x2.", rich_help_panel=_WHAT)] = "",
    format: Annotated[str, typer.Option(help="Weight formats: bf16,q8_0,q4_0.", rich_help_panel=_WHAT)] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads: 1,2,4.", rich_help_panel=_WHAT)] = "",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            "-e",
            help="Only this one, of `finial engines`, or server (with --url); may be repeated.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    url: Annotated[
        str,
        typer.Option(
            help="Also measure MODEL behind this OpenAI-compatible server, as engine server.", rich_help_panel=_WHAT
        ),
    ] = "",
    rounds: Annotated[
        int, typer.Option(min=0, help="Samples of each engine; 0: as the time needs.", rich_help_panel=_HOW)
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The record; gone on with when it is there.", rich_help_panel=_HOW)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the record.", rich_help_panel=_HOW)] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and for how long.", rich_help_panel=_HOW)
    ] = False,
    no_verdict: Annotated[
        bool, typer.Option("--no-verdict", help="Do not check the text. For trials.", rich_help_panel=_HOW)
    ] = False,
    text: Annotated[
        str, typer.Option(help="Of the verdicts: sampled, passage, or a text file.", rich_help_panel=_HOW)
    ] = "sampled",
    reference: Annotated[
        str,
        typer.Option(help="Of the verdicts: auto, reference, cpu or transformers.", rich_help_panel=_HOW),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order of engines.", rich_help_panel=_HOW)] = 0,
    python: Annotated[
        list[str] | None,
        typer.Option(metavar="ENVIRONMENT=PATH", help="Interpreter of an engine's environment.", rich_help_panel=_HOW),
    ] = None,
    engines: Annotated[Path | None, typer.Option(help="Where engines' environments lie.", rich_help_panel=_HOW)] = None,
    serve: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Load an OpenAI-compatible server instead: requests leave when they are due (open loop).",
            rich_help_panel=_WHAT,
        ),
    ] = "",
    rate: Annotated[str, typer.Option(help="With --serve: requests a second, 0.5,1,2.", rich_help_panel=_WHAT)] = "1",
    seconds: Annotated[
        float, typer.Option(min=1, help="With --serve: of sending, at each rate.", rich_help_panel=_WHAT)
    ] = 30.0,
    list_all: Annotated[bool, typer.Option("--list", help="Show workloads and presets.")] = False,
) -> int:
    """Measure engines on the same work: what is fastest here, and does it still say the same?

    Without arguments: the demo model on every backend and installed engine, in less than two minutes.
    """
    from finial.lab.engines.table import server
    from finial.lab.plan import QUICK_S, Plan
    from finial.lab.session import CACHE, Model, Session, choose
    from finial.lab.workloads import Sizes
    from finial.machine import probe_native

    if list_all:
        _list()
        return 0
    if "serve" in (workload or []) and not serve:
        raise RequestError("workload serve is measured on a running server", fix="finial bench MODEL --serve URL")
    if serve:
        served = Model.find(model) if model else None
        return _serve(serve, served, rate, seconds, _range(prompt)[:1], _range(generate)[:1], out, fresh)
    sizes = Sizes(_range(prompt), _range(generate), _range(depth), _range(batch), rounds=rounds)
    formats = [name.strip() for name in format.split(",") if name.strip()]
    plan = Plan.of(
        workload or [],
        sizes,
        formats,
        _range(threads),
        usable=probe_native().threads or 1,
        preset=preset,
    )
    found = Model.find(model or "demo")
    places = found.places(engines or CACHE / "engines", dict(_named(text) for text in python or []))
    quick = not (workload or preset)
    if "server" in (engine or []) and not url:
        raise RequestError("engine server without an address", fix="add --url http://127.0.0.1:8000")
    names = [name for name in engine or [] if name != "server"]
    alone = bool(engine) and not names
    chosen, left = ([], {}) if alone else choose(names, places, quick, plan.formats, found.name)
    chosen += [server(url, os.environ.get("OPENAI_API_KEY", ""))] if url else []
    if out is None:
        out = Path(f"finial-bench-{found.name}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    session = Session(
        found,
        plan,
        places,
        chosen,
        out,
        ["finial", *sys.argv[1:]],
        fresh,
        seed,
        text,
        reference,
        QUICK_S if quick else math.inf,
    )
    for reason in dict.fromkeys(left.values()):
        console.note(f"left out: {', '.join(name for name in left if left[name] == reason)}: {reason}")
    if dry_run:
        _dry(session, [e.name for e in chosen])
        return 0
    if not session.complete(judged=not no_verdict):
        console.note(f"about {_time(session.seconds)} at most; record: {out}")
        if session.resumed:
            console.note(f"going on with {out}: {console.count(session.resumed, 'cell')} there")
        try:
            with _progress(session) as (say, tick):
                session.run(say, tick, judged=not no_verdict)
        except KeyboardInterrupt:
            console.note(f"interrupted; the same command with --out {out} goes on", "yellow")
            raise
    _show(session, out)
    return 0


def compare(
    records: Annotated[
        list[Path], typer.Argument(metavar="A.json B.json …", help="The first is what others are held against.")
    ],
    tolerance: Annotated[float, typer.Option(min=0, max=1, help="Share by which a row may be slower: 0.05.")] = 0.0,
) -> int:
    """Set records side by side: ratios with intervals and a verdict for each row.

    Exit code 1 when any row is slower, broken or gone.
    """
    from rich.table import Table
    from rich.text import Text

    from finial.lab.compare import compare as lines_of
    from finial.lab.compare import summary
    from finial.lab.record import Record

    if len(records) < 2:
        raise RequestError("one record has nothing to be compared with", fix="name two or more")
    first = Record.open(records[0])
    worst = 0
    for path in records[1:]:
        lines = lines_of(first.data, Record.open(path).data, tolerance)
        table = Table(title=f"{path} against {records[0]}", title_justify="left", box=None, pad_edge=False)
        for name in ("", "engine", "before", "after", "ratio [95 %]", "verdict"):
            table.add_column(name, justify="right" if name in ("before", "after") else "left", overflow="fold")
        for line in lines:
            r = line.ratio
            ratio = "" if r is None else f"{r.median:.3f} [{r.low:.3f}, {r.high:.3f}]"
            style = "red" if line.regression else "green" if line.verdict == "faster" else ""
            values = [console.significant(v) if v is not None else "–" for v in (line.before, line.after)]
            verdict = Text(line.verdict + (f": {line.note}" if line.note else ""), style=style)
            table.add_row(Text(console.clean(line.cell)), Text(line.engine), *values, ratio, verdict)
        console.out().print(table)
        console.out().print(summary(lines))
        worst = max(worst, REGRESSION if any(line.regression for line in lines) else 0)
    return worst


def report(
    records: Annotated[list[Path], typer.Argument(metavar="RECORD…", help="Written by finial bench.")],
    html: Annotated[Path | None, typer.Option(help="One self-contained page with pictures.")] = None,
    charts: Annotated[Path | None, typer.Option(metavar="DIR", help="The pictures, each as SVG and PNG.")] = None,
    md: Annotated[Path | None, typer.Option(help="Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(help="A line for each sample.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Benchmark",
) -> int:
    """Make pages and pictures of records. Without options, Markdown on standard output."""
    from finial.lab.record import Record
    from finial.lab.report import csv_text, markdown_text

    data = [Record.open(path).data for path in records]
    if html is not None:
        from finial.lab.report.html import page

        _write(html, page(data, title).encode())
    if charts is not None:
        from finial.lab.report.charts import draw

        console.note(f"{charts}: {console.count(len(draw(data, charts)), 'file')}")
    if md is not None:
        _write(md, markdown_text(data).encode())
    if csv is not None:
        _write(csv, csv_text(data).encode())
    if not any((html, charts, md, csv)):
        print(markdown_text(data), end="")
    return 0


# --------------------------------------------------------------------------------------------------- parts


def _write(path: Path, data: bytes) -> None:
    from finial.files.disk import atomic_file

    with atomic_file(path, len(data)) as write:
        write(data)
    console.note(str(path))


def _serve(
    url: str,
    model: Model | None,
    rates: str,
    seconds: float,
    prompt: tuple[int, ...],
    new: tuple[int, ...],
    out: Path | None,
    fresh: bool,
) -> int:
    from finial.lab.answer import answer
    from finial.lab.open_loop import Load, summary
    from finial.lab.served import measure

    try:
        numbers = [float(text) for text in rates.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) <= 0:
        raise RequestError(f"--rate {rates!r}", fix="write numbers above 0, as 0.5,1,2")
    out = out if out is not None else Path(f"finial-bench-serve-{time.strftime('%Y%m%d-%H%M%S')}.json")
    words, tokens, key = (*prompt, 32)[0], (*new, 32)[0], os.environ.get("OPENAI_API_KEY", "")
    loads = [Load(url, number, seconds, "", words, tokens, key=key) for number in numbers]
    console.note(f"{_time(seconds * len(loads))} and more; record: {out}")
    record = measure(loads, out, model, console.note, command=["finial", *sys.argv[1:]], fresh=fresh)
    _sentence(answer(record.data))
    page = console.Page()
    for cell in record.cells.values():
        (row,) = cell.engines.values()
        page.section(cell.workload.name)
        if not row.samples:
            page.row(row.status, row.reason)
            continue
        found = summary(row.samples[0].requests or [])
        page.row("goodput", f"{console.significant(found.goodput)} requests/s", "first token in 1 s, gaps in 0.2 s")
        page.row("in time", f"{found.good} of {console.count(found.requests, 'request')}")
        page.row("tokens", f"{console.significant(found.tok_s)} tok/s", "of requests that ended whole")
        for name, times in (("first token", found.first), ("between tokens", found.gaps)):
            shown = " / ".join(console.significant(1e3 * value) for value in times)
            page.row(name, f"{shown} ms" if shown else None, "p50 / p95 / p99")
        page.row("waiting", f"{found.waiting} at most", "requests that were open at once")
        page.row("sent late", f"{1e3 * found.late:.0f} ms at most", "by this side")
        for reason, count in found.errors.items():
            page.row("failed", f"{count}", reason)
    page.show(console.out())
    if model is None:
        console.note("no verdict on its text: name the model that it serves (finial bench MODEL --serve URL)", "yellow")
    console.note(f"record: {out}   page: finial report {out} --html {out.with_suffix('.html')}")
    return 0


def _range(text: str) -> tuple[int, ...]:
    from finial.lab.workloads import parse_range

    return parse_range(text) if text else ()


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise RequestError(f"--python {text!r}", fix="write ENVIRONMENT=PATH, as transformers=/usr/bin/python3")
    return name, Path(path)


def _list() -> None:
    from finial.lab.plan import PRESETS
    from finial.lab.workloads import FAMILIES

    page = console.Page()
    page.section("workloads (--workload)")
    for name, family in FAMILIES.items():
        page.row(name, family.what)
    page.row("serve", "open-loop load on a server: goodput, first token, between tokens, errors (--serve URL)")
    page.section("presets (--preset)")
    for name, preset in PRESETS.items():
        page.row(name, preset.what, " ".join(preset.families))
    page.show(console.out())


def _dry(session: Session, engines: list[str]) -> None:
    from finial.lab.report.results import weights

    page = console.Page()
    for group in session.groups:
        page.section(f"{group.model}, {weights(group.format)}, {console.count(group.threads, 'thread')}")
        for workload in group.workloads:
            seconds = session.cell_seconds().get(f"{group.key}/{workload.name}")
            page.row(workload.name, "done" if seconds is None else f"about {_time(seconds)}")
    page.section("engines")
    page.row("", ", ".join(engines))
    page.show(console.out())
    console.out().print(f"about {_time(session.seconds)} in all")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


@contextmanager
def _progress(session: Session) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Lines as cells are done, and on a terminal a bar with the time left."""
    left = session.cell_seconds()
    if not sys.stderr.isatty():
        yield console.note, lambda key: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err(), transient=True) as shown:
        task = shown.add_task("measuring", total=sum(left.values()) or 1.0)
        yield (
            lambda text: shown.console.print(console.clean(text), style="dim", markup=False),
            lambda key: shown.advance(task, left.get(key, 0.0)),
        )


def _show(session: Session, out: Path) -> None:
    from finial.lab.answer import answer

    found = answer(session.record.data)
    screen = console.out()
    _sentence(found)
    for table in found.tables:
        screen.print()
        _ranking(table)
    screen.print()
    screen.print(console.clean(found.limit), markup=False, soft_wrap=True)
    screen.print(console.clean(found.energy), markup=False, soft_wrap=True)
    for warning in session.record.data.warnings:
        console.note(warning, "yellow")
    console.note(f"record: {out}   page: finial report {out} --html {out.with_suffix('.html')}")


def _energy(cost: Cost | None) -> list[str]:
    from finial.lab.report.results import joules

    return [joules(figure) for figure in ((None, None) if cost is None else (cost.gross_j, cost.tokens_per_j))]


def _brief(reason: str, most: int = 100) -> str:
    clean = console.clean(reason)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def _sentence(found: Answer) -> None:
    from rich.text import Text

    console.out().print(Text(console.clean(found.sentence), style="bold green"), soft_wrap=True)


def _ranking(table: Table) -> None:
    from rich.table import Table as Grid
    from rich.text import Text

    from finial.lab.report.results import weights

    cell = table.cell
    title = f"{cell.workload.name} · {cell.model}, {weights(cell.format)}, {console.count(cell.threads, 'thread')}"
    grid = Grid(title=title, title_justify="left", box=None, pad_edge=False)
    metered = any(standing.energy is not None for standing in table.standings)
    names = ["", "engine", cell.workload.unit, "95 % interval", "of the limit", "the best is", "memory", "verdict"]
    for name in [*names, *(["J/token", "tok/J"] if metered else [])]:
        right = name in (cell.workload.unit, "of the limit", "memory", "J/token", "tok/J")
        grid.add_column(name, justify="right" if right else "left")
    for place, standing in enumerate(table.standings, 1):
        value, versus, verdict = standing.value, standing.versus, standing.verdict
        faster = "" if versus is None else f"{versus.median:.2f} × faster" if versus.shown else "no difference shown"
        judged = "none"
        if verdict is not None and not verdict.error:
            same = "" if verdict.greedy_agreement is None else f", {verdict.greedy_agreement:.0%} the reference's"
            least = "" if verdict.basis == "logits" else "≥ "
            judged = f"tokens alone{same}" if verdict.kl_mean is None else f"KL {least}{verdict.kl_mean:.1e}"
        grid.add_row(
            str(place),
            Text(standing.engine, style="bold" if place == 1 else ""),
            console.significant(value.median),
            f"{console.significant(value.low)} – {console.significant(value.high)}",
            "" if standing.share is None else f"{standing.share:.0%}",
            faster,
            "" if standing.peak_bytes is None else console.size(standing.peak_bytes),
            judged,
            *(_energy(standing.energy) if metered else ()),
        )
    for name, (status, reason) in table.failures.items():
        grid.add_row("–", Text(name, style="dim"), Text(status, style="red"), "", "", "", "", Text(_brief(reason)))
    console.out().print(grid)
    for name, row in cell.engines.items():
        for note in row.notes:
            console.out().print(Text(console.clean(f"   {name}: {note}"), style="dim"), soft_wrap=True)
