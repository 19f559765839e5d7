"""A server under open-loop load, as a record: each rate a cell, and a verdict on what the server says.

Knows loads, records and the judge; prints through `say` alone.

    record = measure([Load(url, rate=2.0, seconds=30)], Path("serve.json"), model=None, say=print)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from finial.errors import RequestError
from finial.lab.engines.table import server
from finial.lab.limits import busy
from finial.lab.open_loop import Load, cell, words
from finial.lab.quality_run import open_worker
from finial.lab.record import Record, Verdict, reject
from finial.lab.session import CACHE, Model, version
from finial.lab.verdicts import GREEDY, WINDOW, Judge
from finial.lab.worker import WorkerError
from finial.lab.workloads import Group, Workload
from finial.machine import describe

FORMAT = "served"  # of the cells: what a server keeps its weights in is its own affair


def measure(
    loads: Sequence[Load],
    out: Path,
    model: Model | None,
    say: Callable[[str], None],
    *,
    command: Sequence[str] = (),
    fresh: bool = False,
    places: Path = CACHE / "engines",
) -> Record:
    """Run the loads that the record does not have yet, one after the other; the record is saved after each.

    Args:
        loads: at least one, all of one server.
        model: that it serves, for the verdict; None: there is none.
    Raises:
        RequestError: no server there; a record of another plan.
    """
    url, name = loads[0].url, "served" if model is None else model.name
    plan = {"serve": url, "model": name, "loads": [[x.name, x.prompt_words, x.tokens] for x in loads]}
    if out.exists() and not fresh:
        record = Record.open(out)
        if record.data.plan != plan:
            raise RequestError(f"{out} is the record of another plan", fix="give another --out, or --fresh")
    else:
        machine: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(describe().to_dict()))
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        record = Record.create(out, plan=plan, started=started, commit=version(), machine=machine, busy=busy())
        record.data.command = list(command)
        record.data.energy = "the server is measured from outside"
    for load in loads:
        key = f"{name}/{FORMAT}/0/{load.name}"
        if key in record.cells:
            continue
        say(f"{load.name} …")
        record.cells[key] = cell(load, asyncio.run(load.run()), name)
        record.save()
        (row,) = record.cells[key].engines.values()
        say(f"{load.name}: {words(row.samples[0].requests or []) if row.samples else row.reason}")
    verdicts = record.data.verdicts.setdefault(f"{name}/{FORMAT}", {})
    if model is not None and url not in verdicts:
        verdicts[url] = _verdict(record, model, url, loads[0].key, places)
        for row in (found.engines[url] for found in record.cells.values()):
            if verdicts[url].flaws and row.status == "ok":
                reject(row, "invalid", verdicts[url].flaws[0])
        record.save()
    return record


def _verdict(record: Record, model: Model, url: str, key: str, engines: Path) -> Verdict:
    """Through the adapter for such servers, as any engine's."""
    places, engine = model.places(engines, {}), server(url, key)
    group = Group(model.name, FORMAT, 0, (Workload("served", "serve"),))
    try:
        worker, _, _ = open_worker(
            engine.command(places),
            engine.process_environment(1),
            model=str(model.path),
            format=FORMAT,
            threads=1,
            context=WINDOW + GREEDY,
            options=dict(engine.options),
        )
    except WorkerError as error:
        return Verdict(error=str(error))
    try:
        with Judge(places, 1) as judge:
            return judge.judge(group, url, worker, list(record.cells.values()))
    finally:
        worker.close()
