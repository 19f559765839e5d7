"""`finial quality`: how far an engine or a format is from the float32 reference.

Knows arguments and the page; the verdict is made in finial.lab.

    finial quality demo --format q4_0
    finial quality MODEL --engine llama.cpp --engine finial --format q8_0 --text book.txt
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finial.cli import console
from finial.cli.engines import HOME
from finial.cli.options import ModelArgument

if TYPE_CHECKING:
    from finial.lab.quality import Quality


def quality(
    model: ModelArgument = "demo",
    engine: Annotated[
        list[str] | None, typer.Option(help="finial (default) or one of `finial engines`; may be repeated.")
    ] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="Weight format; may be repeated (default: as stored).")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="sampled (from the reference), passage (of this project), or a text file; may be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Of each text at most.")] = 1024,
    greedy: Annotated[int, typer.Option(min=1, help="Length of the greedy text.")] = 64,
    reference: Annotated[
        str, typer.Option(help="auto, reference (NumPy), cpu (all in float32) or transformers (float32).")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="finial's backend that is judged.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one per usable core.")] = None,
    rounding: Annotated[
        bool, typer.Option("--rounding", help="Also show what rounding to the format alone costs (small models).")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="For --engine server: its address, such as http://127.0.0.1:8000")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the verdicts there as JSON.")] = None,
    root: Annotated[Path, typer.Option(help="Folder of engines' environments.", show_default=False)] = HOME,
) -> None:
    """Hold an engine or a format against the float32 reference.

    Teacher-forced KL, top-1 and top-5 agreement, perplexity with its standard error, and where greedy text parts.
    """
    from finial.files.hub import resolve
    from finial.lab.engines.table import Places
    from finial.lab.quality_engines import judge_all
    from finial.lab.quality_run import usable_threads

    found = judge_all(
        resolve(model),
        engines=engine or ["finial"],
        formats=format or ["stored"],
        texts=text or ["sampled", "passage"],
        limit=tokens,
        greedy=greedy,
        reference=reference,
        backend=backend,
        threads=threads or usable_threads(),
        rounding=rounding,
        url=url,
        places=Places(root, root.parent / "models"),
        say=console.note,
    )
    if out is not None:
        _save(out, json.dumps([verdict.to_dict() for verdict in found], indent=1) + "\n")
    _page(found).show(console.out())


def _page(found: list[Quality]) -> console.Page:
    from finial.lab.answer import words as in_words
    from finial.lab.quality import BASES
    from finial.lab.verdicts import recorded

    page = console.Page()
    page.section("quality")
    page.row("reference", found[0].reference)
    for quality in found:
        verdict = quality.verdict
        page.section(f"{quality.engine} · {quality.format} · {quality.text}")
        said = in_words(recorded(quality))
        page.row("in short", said[0].upper() + said[1:])
        page.row("precision", quality.precision)
        page.row("basis", BASES[quality.basis], f"{quality.top} a position" if quality.top else "")
        for flaw in quality.flaws:
            page.row("WRONG", flaw)
        if not math.isnan(verdict.kl_mean):
            least = "" if quality.basis == "logits" else "at least "
            words = f"{least}mean {verdict.kl_mean:.1e} · p99 {verdict.kl_p99:.1e} · max {verdict.kl_max:.1e} nats"
            alone = quality.rounding
            page.row("KL", words, f"the format alone: {alone.kl_mean:.1e}" if alone is not None else "")
        page.row("top-1", _percent(verdict.top1), f"at {console.count(verdict.positions, 'position')}")
        if not math.isnan(verdict.top5):
            page.row("top-5", _percent(verdict.top5))
        if verdict.perplexity is not None:
            ppl = verdict.perplexity
            page.row("perplexity", f"{ppl.value:.3f} ± {ppl.error:.3f}", f"reference {ppl.reference:.3f}")
            page.row("ratio", f"{ppl.ratio:.5f} ± {ppl.ratio_error:.5f}", "token by token against the reference")
        parted = verdict.divergence
        words = "equal" if parted is None else f"equal for {parted.position}"
        remark = "" if parted is None else f"the reference prefers its own token there by {parted.margin:.3f} nats"
        page.row("greedy text", f"{words} of {console.count(verdict.greedy_tokens, 'token')}", remark)
        repeat = "the same text" if quality.repeat_same_text else "ANOTHER text"
        if quality.repeat_kl_max is not None:
            repeat += f", KL at most {quality.repeat_kl_max:.1e} nats" if quality.repeat_kl_max else ", KL 0"
        page.row("its own repeat", repeat)
    return page


def _save(path: Path, text: str) -> None:
    """To a temporary name, then renamed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)


def _percent(share: float) -> str:
    return f"{share:.2%}"
