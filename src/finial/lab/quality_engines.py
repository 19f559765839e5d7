"""Verdicts on several engines and formats of one model, each engine opened, judged and closed in turn.

Knows the table of engines and their files; nothing of arguments or pages.

    judge_all(Path("model"), engines=["finial"], formats=["q4_0"], texts=["sampled"], …)[0].verdict.kl_mean
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from finial.errors import RequestError
from finial.lab.engines.environments import EngineError
from finial.lab.engines.setup import SetupError, make_file, missing
from finial.lab.engines.table import ENGINES, Engine, Places, find, server
from finial.lab.quality import Quality
from finial.lab.quality_run import Judge, open_worker
from finial.lab.worker import WorkerError


def judge_all(
    model: Path,
    *,
    engines: Sequence[str],
    formats: Sequence[str],
    texts: Sequence[str],
    limit: int,
    greedy: int,
    reference: str,
    backend: str,
    threads: int,
    rounding: bool,
    url: str | None,
    places: Places,
    say: Callable[[str], None],
) -> list[Quality]:
    """One verdict for each engine, format and text.

    Args:
        model: the checkpoint that every engine's file is made from.
        backend: finial's, when "finial" is among the engines.
        url: where the engine called "server" is.
    Raises:
        RequestError: an engine, format or reference that there is not.
        EngineError: an engine cannot be run or fed here, or failed.
    """
    places = replace(places, checkpoints={**places.checkpoints, model.name: model})
    chosen = [_engine(name, backend, url) for name in engines]
    for engine in chosen:
        for format in formats:
            if format not in engine.formats:
                fix = f"it has {', '.join(engine.formats)}"
                raise RequestError(f"{engine.name} has no format {format!r}", fix=fix)
    found = []
    try:
        with Judge(
            model,
            texts,
            reference,
            threads,
            limit=limit,
            greedy=greedy,
            rounding=rounding,
            places=places,
            say=say,
        ) as judge:
            for engine in chosen:
                for format in formats:
                    found += _judge(judge, engine, format, model, threads, places)
    except (SetupError, WorkerError) as error:
        raise EngineError(
            str(error), fix="finial engines shows what runs here, finial engines check tries it"
        ) from None
    return found


def _engine(name: str, backend: str, url: str | None) -> Engine:
    if name == "server":
        if url is None:
            raise RequestError("engine server without an address", fix="add --url http://127.0.0.1:8000/v1")
        return server(url, os.environ.get("OPENAI_API_KEY", ""))
    if name == "finial":
        return replace(ENGINES[name], options={"backend": backend})
    return find(name)


def _judge(judge: Judge, engine: Engine, format: str, model: Path, threads: int, places: Places) -> list[Quality]:
    reason = missing(engine, places)
    if reason:
        raise EngineError(f"{engine.name}: {reason}")
    options = dict(engine.options)
    if engine.adapter == "run_finial.py":  # reads every checkpoint and re-encodes it: no file is made for it
        file = model
        options |= {} if format == "stored" else {"format": format}
    else:
        file = make_file(places, model.name, engine.formats[format])
    worker, operations, loaded = open_worker(
        engine.command(places),
        engine.process_environment(threads),
        model=str(file),
        format=format,
        threads=threads,
        context=judge.context,
        sequences=1,
        cache=True,
        options=options,
    )
    try:
        return judge.verdict(worker, operations, engine.name, format, loaded["precision"])
    finally:
        worker.close()
