"""`finial engines`: which engines there are, which run here, installing one, and a smoke test.

Knows arguments and pages; the work is done in finial.lab.engines.

    finial engines
    finial engines install openvino
    finial engines check llama.cpp
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finial.cli import console

Root = Annotated[
    Path, typer.Option("--root", help="Folder of the environments.", envvar="FINIAL_ENGINES", show_default=False)
]
HOME = Path.home() / ".cache" / "finial" / "engines"

app = typer.Typer(help="Other engines: which there are, which run here, how to get them.", invoke_without_command=True)


@app.callback()
def engines(context: typer.Context, root: Root = HOME) -> None:
    """List the engines with their state on this machine."""
    context.obj = root
    if context.invoked_subcommand is not None:
        return
    from finial.lab.engines.environments import ENVIRONMENTS, state

    page = console.Page()
    page.section("engines")
    page.row("finial", "this one", "every backend and format; it needs no environment")
    for name, environment in ENVIRONMENTS.items():
        found = state(name, root)
        if found.python is None:
            page.row(name, "–", found.why)
        else:
            page.row(name, found.version, f"{'in this interpreter · ' if found.own else ''}{environment.runs}")
    page.row(
        "server", "any", "OpenAI-compatible endpoints: vllm serve, llama-server, Ollama, LM Studio, finial serve, …"
    )
    page.show(console.out())


@app.command()
def install(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="As `finial engines` lists them.")],
    force: Annotated[bool, typer.Option("--force", help="Make it anew; try it where it cannot work.")] = False,
) -> None:
    """Make an isolated environment for an engine: whole, or not at all."""
    from finial.lab.engines.environments import install as make

    for name in names:
        print(make(name, context.obj, console.note, force=force))


@app.command()
def check(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Default: all that are installed.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder of the files that are made for engines.", show_default=False)
    ] = None,
) -> None:
    """Run the demo model on an engine and hold it against the float32 reference."""
    from finial.lab.engines.check import check as run
    from finial.lab.engines.check import checkable

    root: Path = context.obj
    failed = 0
    page = console.Page()
    page.section("smoke test on the demo model")
    for name in names or checkable(root):
        found = run(name, root, models or root.parent / "models", console.note)
        failed += not found.ok
        page.row(name, "works" if found.ok else "fails", found.text)
    page.show(console.out())
    if failed:
        raise typer.Exit(1)
