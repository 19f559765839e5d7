"""`finial pull`, `convert`, `synth`: get models and make them.

Knows arguments and progress; the work is done in finial.files.

    finial pull Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from finial.cli import console

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def pull(
    name: Annotated[str, typer.Argument(help="owner/name, owner/name@revision, or owner/name/file.gguf")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    file: Annotated[
        str | None, typer.Option(help="One file (name or pattern) of a repository that has several.")
    ] = None,
) -> None:
    """Fetch a model from the Hugging Face hub.

    Only the files needed; what is on disk is not fetched again.
    A download that broke off is continued. The path is printed.
    """
    from finial.files.hub import pull as fetch

    with console.progress(name) as report:
        path = fetch(name, revision, file, progress=report)
    print(path)


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A model directory, .gguf or .pth file, or MODEL's name.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .gguf file, or a directory for safetensors.")],
    format: Annotated[
        str | None, typer.Option(help="bf16, f16, f32, for GGUF also q8_0, q4_0 (default: as stored).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="For .pth: config.json, or a directory with it.")] = None,
    arch: Annotated[str | None, typer.Option(help="For .pth: a preset of `finial synth` of the same shape.")] = None,
    force: Force = False,
) -> None:
    """Rewrite a model: safetensors, GGUF and PyTorch's .pth into safetensors or GGUF."""
    from finial.files.convert import convert as rewrite
    from finial.files.hub import resolve

    path = Path(source).expanduser()
    if not path.exists():
        path = resolve(source)
    started = time.perf_counter()
    with console.progress(out.name) as report:
        path = rewrite(
            path,
            out,
            format,
            config=config,
            arch=arch,
            force=force,
            progress=lambda done, total: report(out.name, done, total),
        )
    _made(path, started)


def synth(
    preset: Annotated[str, typer.Argument(help="qwen3-0.6b, llama-3.2-1b, … (a wrong name lists them).")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make.")],
    seed: Annotated[int, typer.Option(help="The same seed, the same bytes.")] = 0,
    layers: Annotated[int | None, typer.Option(help="Only so many layers.")] = None,
    force: Force = False,
) -> None:
    """Write a random bf16 model of a real one's exact shape, to measure speed."""
    from finial.files.synth import synth as write

    started = time.perf_counter()
    with console.progress(directory.name) as report:
        path = write(
            preset,
            directory,
            seed,
            layers,
            progress=lambda done, total: report(directory.name, done, total),
            force=force,
        )
    _made(path, started)


def _made(path: Path, started: float) -> None:
    """The path on standard output; how large and how quick on standard error."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    print(path)
    console.note(f"{console.size(total)} in {time.perf_counter() - started:.1f} s")
