"""The run: engines in their own processes, in random order within each round, the machine probed beside each sample.

Knows workers, workloads and the record; nothing of any engine's inside, and prints through `say` alone.

    Runner(record, places, engines, probe, print).group(group)
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finial.errors import FinialError
from finial.files.checkpoint import open_checkpoint
from finial.lab.checks import check, value
from finial.lab.engines.setup import SetupError, make_file, missing
from finial.lab.engines.table import Engine, Places
from finial.lab.limits import taken_seconds
from finial.lab.probes.energy import Meter, idle_watts
from finial.lab.probes.memory import MemoryProbe, held
from finial.lab.record import Cell, Energy, Reading, Record, Row, Sample, Verdict, cells_of, reject, unjudged
from finial.lab.roofline import Floor
from finial.lab.verdicts import Judge
from finial.lab.worker import Worker, WorkerError
from finial.lab.workloads import LOAD, MEMORY, Group, Workload, prompts, rounds_for

LOAD_S, RUN_S = 180.0, 300.0  # limits, far from what anything takes: the slowest compiles for two minutes

DISTURBED = 0.05  # share of the machine that others took during a sample, from which it is measured again
AGAIN = 2  # times at most; the last one stays, with its share in the record
OTHERS_S = 0.2  # shorter samples are too short for the kernel's clock of 10 ms to say who took what

PROBE_S = 0.5  # a reading so old still stands beside a sample that is shorter than half of it
STEADY = 0.05  # two warm-up runs that differ by less are steady
# A comparison is cut short after so many times of what it may take, when it has so many rounds: ten are what short work
# wants, fewer than five pairs show nothing.
CUT_SHORT = ((1.0, 10), (2.0, 5))
WARM_S = 20.0  # of warming up, after which the next run counts
KEPT_TIMES = 10  # rounds whose token times are in the record

WINDOW_S = 1.5  # of an engine's work for its energy: counters move in steps of 1 ms (RAPL) to 100 ms (NVML)
IDLE_S = 2.0  # of measuring what an idle machine takes
ENERGY_RUN = 1_000_000  # number of the first run of such a window: its prompts are those of no sample


class Prober(Protocol):
    """What `finial.lab.limits.Probe` gives."""

    def now(self, threads: int, nbytes: int = 0) -> dict[str, Any]:
        """Bandwidth and latency."""

    def peaks(self, threads: int) -> dict[str, float]:
        """Arithmetic peaks."""


class Invalid(WorkerError):
    """It answered, but not what was asked."""


@dataclass(frozen=True)
class Subject:
    """What a row is about."""

    engine: Engine
    cache: bool = True

    @property
    def name(self) -> str:
        """Of the row."""
        return self.engine.name if self.cache else f"{self.engine.name}, no cache"


class Runner:
    """One run into one record.

    Args:
        seed: of the order of engines in each round.
        memory_bytes: that one engine may hold.
        tick: called with a cell's key when it is done.
        most_rounds: caps the rounds of workloads that leave them open; cell_s does it by the seconds that a workload's
            samples take, as `CUT_SHORT` says, and allows as much for all warming up.
        meter: of energy; None: nothing is measured.
        window_s: of an engine's work whose energy is measured, at least; idle_s: of waiting with the engines loaded.
    """

    def __init__(
        self,
        record: Record,
        places: Places,
        engines: Sequence[Engine],
        probe: Prober,
        say: Callable[[str], None],
        seed: int = 0,
        memory_bytes: int | None = None,
        tick: Callable[[str], None] = lambda key: None,
        most_rounds: int = 200,
        meter: Meter | None = None,
        window_s: float = WINDOW_S,
        idle_s: float = IDLE_S,
        cell_s: float = math.inf,
    ) -> None:
        self._record, self._places, self._engines = record, places, engines
        self._probe, self._say, self._tick = probe, say, tick
        self._memory_bytes, self._most_rounds = memory_bytes, most_rounds
        self._meter = meter if meter is not None and meter.read().joules else None
        self._window_s, self._idle_s, self._cell_s = window_s, idle_s, cell_s
        self._random = random.Random(seed)
        self._workers: dict[str, Worker] = {}
        self._failed: dict[str, str] = {}  # engine or subject -> why it is out of this group
        self._replies: dict[str, dict[str, Any]] = {}  # its answer to load
        self._files: dict[str, Path] = {}
        self._watching: dict[str, MemoryProbe] = {}
        self._reading: Reading | None = None
        self._read = (0, 0)  # threads and bytes of that reading

    def group(self, group: Group, judge: Judge | None = None) -> None:
        """Measure a group's workloads that the record does not have yet, then judge what was written.

        Args:
            judge: gives the verdicts; None: the record has none.
        """
        left = [w for w in group.workloads if f"{group.key}/{w.name}" not in self._record.cells]
        if not left and (judge is None or not unjudged(self._record.data, group)):
            return
        engines = [e for e in self._engines if any(e.runs(group.format, w) for w in left or group.workloads)]
        if not engines:
            return
        self._failed, self._replies, self._files, self._reading = {}, {}, {}, None
        for engine in engines:
            self._make_ready(engine, group)
        config = open_checkpoint(self._places.checkpoint(group.model)).config
        context = min(-(-max(w.positions for w in group.workloads) // 128) * 128, config.max_context)
        self._record.data.peaks.setdefault(str(group.threads), self._probe.peaks(group.threads))
        try:
            if group.starts > 1 and f"{group.key}/{MEMORY.name}" not in self._record.cells:
                self._starts(group, [Subject(engine) for engine in engines], config.vocab_size)
            for workload in left:
                subjects = self._subjects(group, workload)
                for subject in subjects:
                    if subject.name not in self._workers and subject.name not in self._failed:
                        self._start(subject, group, context)  # new, or it died in an earlier workload
                self._measure(group, workload, subjects, config.vocab_size)
            if judge is not None:
                self._judge(judge, group, context)
        finally:
            for worker in self._workers.values():
                worker.close()
            self._workers = {}

    def _subjects(self, group: Group, workload: Workload) -> list[Subject]:
        able = [e for e in self._engines if e.runs(group.format, workload)]
        return [Subject(e, cache) for e in able for cache in workload.caches if cache or e.uncached]

    def _judge(self, judge: Judge, group: Group, context: int) -> None:
        """Verdicts on what has numbers, each saved when it is there; rows whose text is not the model's lose theirs."""
        key = f"{group.model}/{group.format}"
        verdicts = self._record.data.verdicts.setdefault(key, {})
        cells = cells_of(self._record.data, group)
        subjects = self._subjects_of(group)
        for name in unjudged(self._record.data, group):
            if name not in subjects:
                continue
            if name not in self._workers:  # it died since, or the run was interrupted before its verdicts
                if subjects[name].engine.name in self._files:
                    self._failed.pop(name, None)
                self._start(subjects[name], group, context)
            worker = self._workers.get(name)
            found = judge.judge(group, name, worker, cells) if worker is not None else Verdict(error=self._failed[name])
            verdicts[name] = found
            self._record.save()
            self._say(f"verdict {key} {name}: {_said(found)}")
        for name, verdict in verdicts.items():
            for row in [cell.engines[name] for cell in cells if verdict.flaws and name in cell.engines]:
                if row.status == "ok":
                    reject(row, "invalid", verdict.flaws[0])
        self._record.save()

    def _subjects_of(self, group: Group) -> dict[str, Subject]:
        return {s.name: s for workload in group.workloads for s in self._subjects(group, workload)}

    # --- processes ---------------------------------------------------------------------------------------------

    def _make_ready(self, engine: Engine, group: Group) -> None:
        reason = missing(engine, self._places)
        if not reason:
            try:
                self._files[engine.name] = make_file(self._places, group.model, engine.formats[group.format])
            except (SetupError, FinialError) as error:
                reason = str(error)
        if reason:
            self._failed[engine.name] = reason
            self._say(f"{engine.name} {group.format}: {reason}")

    def _start(self, subject: Subject, group: Group, context: int, watched: bool = False) -> None:
        """A loaded process, or the reason why there is none.

        Args:
            watched: sample what it and its devices hold, from before it loads; that takes processor time.
        """
        engine = subject.engine
        if engine.name in self._failed:
            self._failed[subject.name] = self._failed[engine.name]
            return
        try:
            environment = engine.process_environment(group.threads)
            worker = Worker(engine.command(self._places), environment, self._memory_bytes)
        except WorkerError as error:
            self._failed[subject.name] = str(error)
            return
        if watched:
            self._watching[subject.name] = MemoryProbe(worker.pid).__enter__()
        try:
            self._replies[subject.name] = worker.ask(
                "load",
                LOAD_S,
                model=str(self._files[engine.name]),
                format=group.format,
                threads=group.threads,
                context=context,
                sequences=max(w.sequences for w in group.workloads),
                cache=subject.cache,
                options=dict(engine.options),
            )
            self._workers[subject.name] = worker
        except WorkerError as error:
            worker.kill()
            self._failed[subject.name] = str(error)
            self._say(f"{subject.name} {group.format}: {error}")

    def _starts(self, group: Group, subjects: Sequence[Subject], vocab_size: int) -> None:
        """Load times and the memory of a short text, each start a process of its own."""
        cells = {w.kind: self._cell(group, w, subjects) for w in (LOAD, MEMORY)}
        unknown: dict[str, WorkerError] = {}
        for round in range(group.starts):
            for order, subject in enumerate(self._shuffled(subjects)):
                self._start(subject, group, 512, watched=True)
                worker, probe = self._workers.pop(subject.name, None), self._watching.pop(subject.name, None)
                if worker is None:
                    if probe is not None:
                        probe.__exit__(None, None, None)
                    continue
                assert probe is not None
                try:
                    worker.ask("run", RUN_S, prompts=prompts(MEMORY, vocab_size, round), new=MEMORY.new, keep=False)
                    told = held(worker.ask("memory", RUN_S), probe)
                except WorkerError as error:
                    self._failed[subject.name] = str(error)
                    continue
                finally:
                    probe.__exit__(None, None, None)
                    worker.close()
                for kind, number in (("load", self._replies[subject.name]["load_s"]), ("memory", told["peak_bytes"])):
                    if not number:
                        unknown[subject.name] = WorkerError("nobody says what its process held")
                        continue
                    row = cells[kind].engines[subject.name]
                    row.samples.append(Sample(round, order, float(number)))
                    row.memory = told
        for workload in (LOAD, MEMORY):
            self._finish(group, workload, cells[workload.kind], subjects, unknown if workload is MEMORY else {})

    # --- samples -----------------------------------------------------------------------------------------------

    def _measure(self, group: Group, workload: Workload, subjects: Sequence[Subject], vocab_size: int) -> None:
        cell = self._cell(group, workload, subjects)
        failed: dict[str, WorkerError] = {}  # in this workload alone
        needed: dict[str, int] = {}
        for subject in subjects:
            if subject.name in self._workers:
                enough = min(WARM_S, self._cell_s / len(subjects))
                last = self._warm(subject, workload, vocab_size, cell.engines[subject.name], failed, enough)
                needed[subject.name] = min(rounds_for(workload, last), max(workload.rounds, self._most_rounds))
        self._rest(group)
        steps = {"decode": 1, "generate": workload.new}.get(workload.kind)  # a prompt is bound by computing
        nbytes = cell.floor.bytes // steps if cell.floor is not None and steps else 0
        before = self._probed(group.threads, nbytes, 0.0)
        rounds, started = max(needed.values(), default=0), time.perf_counter()
        spare = rounds * len(subjects) // 2  # on a machine that is never quiet, trying again only costs time
        for round in range(rounds):
            late = 0.0 if workload.rounds else (time.perf_counter() - started) / self._cell_s
            if any(late > times and round >= enough for times, enough in CUT_SHORT):
                break
            for order, subject in enumerate(self._shuffled(subjects)):
                if subject.name not in self._workers or subject.name in failed or round >= needed[subject.name]:
                    continue
                sample = self._sample(subject, workload, vocab_size, round, failed)
                after = self._probed(group.threads, nbytes, 0.0 if sample is None else sample.wall_s or 0.0)
                for attempt in range(1, AGAIN + 1):
                    if sample is None or (sample.others or 0) <= DISTURBED or spare == 0:
                        break
                    spare -= 1
                    before = after
                    sample = self._sample(subject, workload, vocab_size, round + attempt * 1000, failed)
                    after = self._probed(group.threads, nbytes, 0.0 if sample is None else sample.wall_s or 0.0)
                if sample is not None:
                    sample.round, sample.order, sample.before, sample.after = round, order, before, after
                    if round >= KEPT_TIMES or workload.new == 1:
                        sample.times = None
                    if round:
                        sample.tokens = None
                    cell.engines[subject.name].samples.append(sample)
                before = after
        for subject in self._shuffled(subjects) if self._meter is not None else ():
            if subject.name in self._workers and subject.name not in failed:
                cell.engines[subject.name].energy = self._energy(subject, workload, vocab_size, failed)
        self._finish(group, workload, cell, subjects, failed)

    def _rest(self, group: Group) -> None:
        """What the machine takes while all engines of the group are loaded and wait, once a group."""
        key = f"loaded {group.key}"
        if self._meter is not None and key not in self._record.data.idle_w:
            found = idle_watts(self._meter, self._idle_s)
            self._record.data.idle_w.update({key: found} if found else {})

    def _energy(
        self, subject: Subject, workload: Workload, vocab_size: int, failed: dict[str, WorkerError]
    ) -> Energy | None:
        """A window of work without a pause, so long that the counters' steps do not matter."""
        assert self._meter is not None
        before, end, runs = self._meter.read(), time.perf_counter() + self._window_s, 0
        while runs == 0 or time.perf_counter() < end:
            if self._ask(subject, workload, vocab_size, ENERGY_RUN + runs, failed) is None:
                return None
            runs += 1
        used = self._meter.used(before, self._meter.read())
        return Energy(used.seconds, dict(used.gross_j), runs * workload.worked) if used.gross_j else None

    def _warm(
        self,
        subject: Subject,
        workload: Workload,
        vocab_size: int,
        row: Row,
        failed: dict[str, WorkerError],
        enough_s: float,
    ) -> float:
        """Runs that do not count, until two in a row are close or so much time is gone; seconds of the last one."""
        started, last = time.perf_counter(), 1.0
        for warmup in range(workload.warmups):
            sample = self._sample(subject, workload, vocab_size, -2 - warmup, failed)
            if sample is None:
                break
            sample.times = sample.tokens = None
            row.warmup.append(sample)
            last = sample.wall_s or last
            close = len(row.warmup) > 1 and abs(sample.value / row.warmup[-2].value - 1) < STEADY
            if close or time.perf_counter() - started > enough_s:
                break
        return last

    def _sample(
        self, subject: Subject, workload: Workload, vocab_size: int, run: int, failed: dict[str, WorkerError]
    ) -> Sample | None:
        answer = self._ask(subject, workload, vocab_size, run, failed)
        if answer is None:
            return None
        reply, wall, others = answer
        return Sample(
            value=value(workload, reply),
            first=reply["first"],
            last=reply["last"],
            times=reply.get("times"),
            tokens=[ids[:16] for ids in reply["tokens"]],  # enough to see whether they are the model's
            others=others if wall >= OTHERS_S else None,
            wall_s=wall,
        )

    def _ask(
        self, subject: Subject, workload: Workload, vocab_size: int, run: int, failed: dict[str, WorkerError]
    ) -> tuple[dict[str, Any], float, float | None] | None:
        """A checked reply, the seconds that it took, and the share of the machine that others took meanwhile."""
        worker = self._workers[subject.name]
        request = {
            "prompts": prompts(workload, vocab_size, run),
            "new": workload.new,
            "keep": workload.keeps and subject.cache,
        }
        clocks = time.perf_counter(), taken_seconds(), worker.processor_seconds()
        try:
            reply = worker.ask("run", RUN_S, **request)
            after = time.perf_counter(), taken_seconds(), worker.processor_seconds()
            wall = after[0] - clocks[0]
            wrong = check(workload, reply, vocab_size, wall if run >= 0 else None)
            if wrong:
                raise Invalid(wrong)
        except WorkerError as error:
            failed[subject.name] = error
            self._say(f"{subject.name}, {workload.name}: {error}")
            if not worker.alive:
                del self._workers[subject.name]
            return None
        return reply, wall, _others(clocks, after)

    def _probed(self, threads: int, nbytes: int, wall_s: float) -> Reading:
        """The machine now; beside short samples, a moment ago, when it was asked the same."""
        fresh = self._reading is not None and time.time() - self._reading.at < PROBE_S
        fresh, self._read = fresh and self._read == (threads, nbytes), (threads, nbytes)
        if self._reading is None or not fresh or wall_s > PROBE_S / 2:
            self._reading = Reading(**self._probe.now(threads, nbytes))
        return self._reading

    def _shuffled(self, subjects: Sequence[Subject]) -> list[Subject]:
        return self._random.sample(list(subjects), len(subjects))

    # --- cells -------------------------------------------------------------------------------------------------

    def _cell(self, group: Group, workload: Workload, subjects: Sequence[Subject]) -> Cell:
        return Cell(
            model=group.model,
            format=group.format,
            threads=group.threads,
            workload=workload,
            floor=self._floor(group, workload),
            native=native_hash(),
            engines={subject.name: Row(cache=subject.cache) for subject in subjects},
        )

    def _floor(self, group: Group, workload: Workload) -> Floor | None:
        """Of finial's own file of the format, else of the checkpoint with its matrices in that format."""
        if workload.kind == "load":
            return None
        made = self._places.models / f"{group.model}-{group.format}.gguf"
        checkpoint = self._places.checkpoint(group.model)
        try:
            if made.exists():
                return Floor.of(made, workload)
            return Floor.of(checkpoint, workload, format=None if group.format == "stored" else group.format)
        except (FinialError, KeyError):
            return None  # a format that finial does not have: such rows have no share

    def _finish(
        self,
        group: Group,
        workload: Workload,
        cell: Cell,
        subjects: Sequence[Subject],
        failed: dict[str, WorkerError],
    ) -> None:
        for subject in subjects:
            row = cell.engines[subject.name]
            error = failed.get(subject.name)
            if error is not None:
                reject(row, "invalid" if isinstance(error, Invalid) else "failed", str(error))
            elif subject.name in self._failed or subject.engine.name in self._failed:
                reason = self._failed.get(subject.name) or self._failed[subject.engine.name]
                reject(row, "failed", reason)
            reply = self._replies.get(subject.name, {})
            row.version, row.precision = str(reply.get("version", "")), str(reply.get("precision", ""))
            row.device, row.load_s = str(reply.get("device", "")), reply.get("load_s")
            worker = self._workers.get(subject.name)
            if worker is not None and worker.alive and row.status == "ok":
                self._remarks(worker, row)
        cell.at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        key = f"{group.key}/{workload.name}"
        self._record.cells[key] = cell
        self._record.save()
        medians = {name: sorted(row.values)[len(row.values) // 2] for name, row in cell.engines.items() if row.samples}
        self._say(f"{key}: " + ", ".join(f"{name} {number:.4g}" for name, number in medians.items()))
        self._tick(key)

    def _remarks(self, worker: Worker, row: Row) -> None:
        """What it held, unless that was measured, and how it ran."""
        try:
            told = worker.ask("memory", RUN_S)
        except WorkerError:
            return  # it keeps its numbers
        if row.memory is None:
            row.memory = held(told, MemoryProbe(worker.pid))
        row.notes = [str(note) for note in told.get("notes", [])]


def _said(verdict: Verdict) -> str:
    if verdict.error:
        return f"none: {verdict.error}"
    about = "tokens alone" if verdict.kl_mean is None else f"KL {verdict.kl_mean:.1e}"
    about += "" if verdict.top1 is None else f", top-1 {verdict.top1:.1%}"
    return about + "".join(f"; {flaw}" for flaw in verdict.flaws)


def native_hash() -> str | None:
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
