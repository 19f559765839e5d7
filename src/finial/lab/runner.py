"""The run: engines in their own processes, in random order within each round, the machine probed beside each sample.

Knows workers, workloads and the record; nothing of any engine's inside, and prints through `say` alone.

    Runner(record, places, engines, probe, print).group(group)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finial.files.checkpoint import open_checkpoint
from finial.lab.engines.setup import SetupError, make_file, missing
from finial.lab.engines.table import Engine, Places
from finial.lab.limits import taken_seconds
from finial.lab.record import Record
from finial.lab.roofline import Floor
from finial.lab.worker import Worker, WorkerError
from finial.lab.workloads import CONTEXT, DEMO, LOAD, MEMORY, Group, Workload, check, prompts, value
from finial.verdict import Verdict, judge

LOAD_S, RUN_S = 180.0, 300.0  # limits, far from what anything takes: the slowest compiles for two minutes

DISTURBED = 0.05  # share of the machine that others took during a sample, from which it is measured again
AGAIN = 2  # times at most; the last one stays, with its share in the record

VERDICT_TEXT = (
    "The roof of a house keeps the rain out, and the higher it stands the more of the sky it must hold up. "
    "A builder who knows the weight of every beam can say how far the walls may be apart; one who guesses "
    "will learn it from the first winter."
)
VERDICT_GREEDY = 16


class Prober(Protocol):
    """What `Probe` gives."""

    def now(self, threads: int) -> dict[str, Any]:
        """Bandwidth and latency."""

    def peaks(self, threads: int) -> dict[str, float]:
        """Arithmetic peaks."""


class Runner:
    """One run into one record.

    Args:
        seed: of the order of engines in each round.
    """

    def __init__(
        self,
        record: Record,
        places: Places,
        engines: Sequence[Engine],
        probe: Prober,
        say: Callable[[str], None],
        seed: int = 0,
    ) -> None:
        self._record, self._places, self._engines = record, places, engines
        self._probe, self._say = probe, say
        self._random = random.Random(seed)
        self._workers: dict[str, Worker] = {}
        self._failed: dict[str, str] = {}  # engine -> why it is out of this group
        self._replies: dict[str, dict[str, Any]] = {}  # engine -> its answer to load
        self._files: dict[str, Path] = {}

    def group(self, group: Group) -> None:
        """Measure a group's workloads that the record does not have yet."""
        left = [w for w in group.workloads if f"{group.key}/{w.name}" not in self._record.cells]
        if not left:
            return
        engines = [e for e in self._engines if any(e.runs(group.model, group.format, w) for w in left)]
        if not engines:
            return
        self._failed, self._replies, self._files = {}, {}, {}
        for engine in engines:
            self._make_ready(engine, group)
        config = open_checkpoint(self._places.checkpoint(group.model)).config
        context = min(CONTEXT, config.max_context)
        self._record.data["peaks"].setdefault(str(group.threads), self._probe.peaks(group.threads))
        try:
            if group.starts > 1 and f"{group.key}/{MEMORY.name}" not in self._record.cells:
                self._starts(group, engines, config.vocab_size)
            for engine in engines:
                self._start(engine, group, context)
            for workload in left:
                able = [e for e in engines if e.runs(group.model, group.format, workload)]
                self._measure(group, workload, able, config.vocab_size, context)
        finally:
            for worker in self._workers.values():
                worker.close()
            self._workers = {}

    def verdict(self, group: Group) -> None:
        """finial against its own float32 reference, on the group's file."""
        engine = next((e for e in self._engines if e.name == "finial"), None)
        key = f"{group.model}/{group.format}"
        if engine is None or key in self._record.data["verdicts"]:
            return
        self._failed, self._replies, self._files = {}, {}, {}
        self._make_ready(engine, group)
        self._start(engine, group, 512)
        worker = self._workers.pop(engine.name, None)
        try:
            if worker is None:
                raise WorkerError(self._failed[engine.name])
            verdict = self._judge(engine, group, worker)
            self._record.data["verdicts"][key] = asdict(verdict)
            self._say(f"verdict {key}: KL {verdict.kl_mean:.1e}, top-1 {verdict.top1:.1%}")
        except WorkerError as error:
            self._record.data["verdicts"][key] = {"error": str(error)}
            self._say(f"verdict {key}: {error}")
        finally:
            if worker is not None:
                worker.close()
        self._record.save()

    def _judge(self, engine: Engine, group: Group, worker: Worker) -> Verdict:
        """An engine's logits beside those of finial's reference in float32, which reads the same file."""
        file = self._files[engine.name]
        ids = open_checkpoint(file).text().encode(VERDICT_TEXT)
        chosen = worker.ask("run", RUN_S, prompts=[ids], new=VERDICT_GREEDY, keep=False)["tokens"][0]
        reference = Worker(engine.command(self._places), engine.process_environment(group.threads))
        with tempfile.TemporaryDirectory(prefix="finial-verdict-") as folder:
            theirs, ours = Path(folder) / "reference.npy", Path(folder) / "engine.npy"
            worker.ask("score", RUN_S, ids=ids, path=str(ours))
            try:
                options = {"backend": "reference", "kv_format": "f32"}
                load = {"model": str(file), "format": group.format, "threads": group.threads, "options": options}
                reference.ask("load", LOAD_S, context=len(ids) + VERDICT_GREEDY, sequences=1, cache=True, **load)
                reference.ask("score", RUN_S, ids=ids + chosen, path=str(theirs))
            finally:
                reference.close()
            expected = np.load(theirs)
            return judge(expected[: len(ids)], np.load(ours), expected[len(ids) - 1 : -1], chosen)

    # --- processes ---------------------------------------------------------------------------------------------

    def _make_ready(self, engine: Engine, group: Group) -> None:
        reason = missing(engine, self._places)
        if not reason:
            try:
                suffix = engine.formats[group.format]
                self._files[engine.name] = make_file(self._places, group.model, suffix)
            except SetupError as error:
                reason = str(error)
        if reason:
            self._failed[engine.name] = reason
            self._say(f"{engine.name} {group.format}: {reason}")

    def _start(self, engine: Engine, group: Group, context: int) -> None:
        """A loaded process, or the reason why there is none."""
        if engine.name in self._failed:
            return
        try:
            worker = Worker(engine.command(self._places), engine.process_environment(group.threads))
        except WorkerError as error:
            self._failed[engine.name] = str(error)
            return
        try:
            self._replies[engine.name] = worker.ask(
                "load",
                LOAD_S,
                model=str(self._files[engine.name]),
                format=group.format,
                threads=group.threads,
                context=context,
                sequences=max(w.sequences for w in group.workloads),
                cache=True,
                options=dict(engine.options),
            )
            self._workers[engine.name] = worker
        except WorkerError as error:
            worker.kill()
            self._failed[engine.name] = str(error)
            self._say(f"{engine.name} {group.format}: {error}")

    def _starts(self, group: Group, engines: Sequence[Engine], vocab_size: int) -> None:
        """Load times and the memory of a short text, each start a process of its own."""
        cells = {w.kind: self._cell(group, w, engines) for w in (LOAD, MEMORY)}
        for round in range(group.starts):
            for order, engine in enumerate(self._shuffled(engines)):
                self._start(engine, group, 512)
                worker = self._workers.pop(engine.name, None)
                if worker is None:
                    continue
                try:
                    worker.ask("run", RUN_S, prompts=prompts(MEMORY, vocab_size, round), new=MEMORY.new, keep=False)
                    peak = worker.ask("memory", RUN_S)["peak_bytes"]
                except WorkerError as error:
                    self._failed[engine.name] = str(error)
                    continue
                finally:
                    worker.close()
                for kind, number in (("load", self._replies[engine.name]["load_s"]), ("memory", peak)):
                    cells[kind]["engines"][engine.name]["samples"].append(
                        {"round": round, "order": order, "value": number}
                    )
        for workload in (LOAD, MEMORY):
            self._finish(group, workload, cells[workload.kind], engines)

    # --- samples -----------------------------------------------------------------------------------------------

    def _measure(
        self, group: Group, workload: Workload, engines: Sequence[Engine], vocab_size: int, context: int
    ) -> None:
        cell = self._cell(group, workload, engines)
        failed: dict[str, str] = {}  # in this workload alone
        for engine in engines:
            if engine.name not in self._workers and engine.name not in self._failed:
                self._start(engine, group, context)  # it died in an earlier workload
            for warmup in range(workload.warmups):
                if engine.name in self._workers and engine.name not in failed:
                    sample = self._sample(engine, workload, vocab_size, -2 - warmup, failed)
                    if sample is not None:
                        cell["engines"][engine.name].setdefault("warmup", []).append(sample)
        before = self._probe.now(group.threads)
        spare = workload.rounds * len(engines) // 2  # on a machine that is never quiet, trying again only costs time
        for round in range(workload.rounds):
            for order, engine in enumerate(self._shuffled(engines)):
                if engine.name not in self._workers or engine.name in failed:
                    continue
                sample = self._sample(engine, workload, vocab_size, round, failed)
                after = self._probe.now(group.threads)
                for attempt in range(1, AGAIN + 1):
                    if sample is None or (sample["others"] or 0) <= DISTURBED or spare == 0:
                        break
                    spare -= 1
                    before = after
                    sample = self._sample(engine, workload, vocab_size, round + attempt * 1000, failed)
                    after = self._probe.now(group.threads)
                if sample is not None:
                    cell["engines"][engine.name]["samples"].append(
                        {"round": round, "order": order, **sample, "before": before, "after": after}
                    )
                before = after
        self._finish(group, workload, cell, engines, failed)

    def _sample(
        self, engine: Engine, workload: Workload, vocab_size: int, run: int, failed: dict[str, str]
    ) -> dict[str, Any] | None:
        worker = self._workers[engine.name]
        request = {"prompts": prompts(workload, vocab_size, run), "new": workload.new, "keep": workload.keeps}
        clocks = time.perf_counter(), taken_seconds(), worker.processor_seconds()
        try:
            reply = worker.ask("run", RUN_S, **request)
            others = _others(clocks, (time.perf_counter(), taken_seconds(), worker.processor_seconds()))
            wrong = check(workload, reply)
            if wrong:
                raise WorkerError(wrong)
        except WorkerError as error:
            failed[engine.name] = str(error)
            self._say(f"{engine.name}, {workload.name}: {error}")
            if not worker.alive:
                del self._workers[engine.name]
            return None
        sample = {"value": value(workload, reply), "first": reply["first"], "last": reply["last"], "others": others}
        if run >= 0 and run % 1000 == 0:  # the first round, tried again or not
            sample["tokens"] = [ids[:16] for ids in reply["tokens"]]  # enough to see whether engines agree
        return sample

    def _shuffled(self, engines: Sequence[Engine]) -> list[Engine]:
        return self._random.sample(list(engines), len(engines))

    def _cell(self, group: Group, workload: Workload, engines: Sequence[Engine]) -> dict[str, Any]:
        floor = None
        if workload.kind != "load" and group.model != DEMO:
            layout = self._places.models / f"{group.model}-{group.format}.gguf"
            if layout.exists():
                floor = asdict(Floor.of(layout, workload))
        return {
            "model": group.model,
            "format": group.format,
            "threads": group.threads,
            "workload": asdict(workload),
            "floor": floor,
            "native": _native_hash(),
            "engines": {engine.name: {"status": "ok", "samples": []} for engine in engines},
        }

    def _finish(
        self,
        group: Group,
        workload: Workload,
        cell: dict[str, Any],
        engines: Sequence[Engine],
        failed: dict[str, str] | None = None,
    ) -> None:
        for engine in engines:
            row = cell["engines"][engine.name]
            reason = (failed or {}).get(engine.name) or self._failed.get(engine.name)
            if reason:
                row |= {"status": "failed", "reason": reason}
            reply = self._replies.get(engine.name, {})
            row |= {key: reply[key] for key in ("version", "precision") if key in reply}
        cell["at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._record.cells[f"{group.key}/{workload.name}"] = cell
        self._record.save()
        values = ", ".join(
            f"{name} {sorted(s['value'] for s in row['samples'])[len(row['samples']) // 2]:.4g}"
            for name, row in cell["engines"].items()
            if row["samples"]
        )
        self._say(f"{group.key} · {workload.name}: {values}")


def _native_hash() -> str | None:
    """Of finial's native module as it is on disk now: a build under a run shows in the record."""
    found = importlib.util.find_spec("finial._native")
    if found is None or found.origin is None:
        return None
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:12]


Clocks = tuple[float, float | None, float | None]  # wall, the machine's processor time, the engine's own; seconds


def _others(start: Clocks, end: Clocks) -> float | None:
    """Share of the machine's processor time between two readings that was not the engine's; None: unknown."""
    if None in (*start, *end):
        return None
    wall, machine, own = (b - a for a, b in zip(start, end, strict=True))  # type: ignore[operator]
    return max(0.0, (machine - own) / (wall * (os.cpu_count() or 1)))
