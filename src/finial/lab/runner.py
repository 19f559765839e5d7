"""The run: engines in random order within each round, the machine probed beside each sample, cells into the record.

Knows processes, samples, workloads and the record; nothing of any engine's inside, and prints through `say` alone.

    Runner(record, places, engines, probe, print).group(group)
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from finial.errors import FinialError
from finial.files.checkpoint import open_checkpoint
from finial.lab.engines.table import Engine, Places
from finial.lab.probes.energy import Meter, idle_watts
from finial.lab.probes.memory import MemoryProbe, held
from finial.lab.processes import Processes, Subject
from finial.lab.record import Cell, Reading, Record, Row, Sample, Verdict, cells_of, reject, unjudged
from finial.lab.roofline import Floor
from finial.lab.samples import RUN_S, Invalid, Sampler
from finial.lab.verdicts import Judge
from finial.lab.worker import Worker, WorkerError
from finial.lab.workloads import LOAD, MEMORY, Group, Workload, prompts, rounds_for

DISTURBED = 0.05  # share of the machine that others took during a sample, from which it is measured again
AGAIN = 2  # times at most; the last one stays, with its share in the record

PROBE_S = 0.5  # a reading so old still stands beside a sample that is shorter than half of it
# A comparison is cut short after so many times of what it may take, when it has so many rounds: ten are what short work
# wants, fewer than five pairs show nothing.
CUT_SHORT = ((1.0, 10), (2.0, 5))
WARM_S = 20.0  # of warming up, after which the next run counts
KEPT_TIMES = 10  # rounds whose token times are in the record

WINDOW_S = 1.5  # of an engine's work for its energy: counters move in steps of 1 ms (RAPL) to 100 ms (NVML)
IDLE_S = 2.0  # of measuring what an idle machine takes


class Prober(Protocol):
    """What `finial.lab.limits.Probe` gives."""

    def now(self, threads: int, nbytes: int = 0) -> dict[str, Any]:
        """Bandwidth and latency."""

    def peaks(self, threads: int) -> dict[str, float]:
        """Arithmetic peaks."""


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
        self._reading = None
        processes = Processes(group, self._places, self._say, self._memory_bytes)
        for engine in engines:
            processes.make_ready(engine)
        config = open_checkpoint(self._places.checkpoint(group.model)).config
        context = min(-(-max(w.positions for w in group.workloads) // 128) * 128, config.max_context)
        self._record.data.peaks.setdefault(str(group.threads), self._probe.peaks(group.threads))
        try:
            if group.starts > 1 and f"{group.key}/{MEMORY.name}" not in self._record.cells:
                self._starts(group, processes, [Subject(engine) for engine in engines], config.vocab_size)
            for workload in left:
                subjects = self._subjects(group, workload)
                for subject in subjects:
                    if subject.name not in processes.workers and subject.name not in processes.failed:
                        processes.start(subject, context)  # new, or it died in an earlier workload
                self._measure(group, processes, workload, subjects, config.vocab_size)
            if judge is not None:
                self._judge(judge, group, processes, context)
        finally:
            processes.close()

    def _subjects(self, group: Group, workload: Workload) -> list[Subject]:
        able = [e for e in self._engines if e.runs(group.format, workload)]
        return [Subject(e, cache) for e in able for cache in workload.caches if cache or e.uncached]

    def _judge(self, judge: Judge, group: Group, processes: Processes, context: int) -> None:
        """Verdicts on what has numbers, each saved when it is there; rows whose text is not the model's lose theirs."""
        key = f"{group.model}/{group.format}"
        verdicts = self._record.data.verdicts.setdefault(key, {})
        cells = cells_of(self._record.data, group)
        subjects = self._subjects_of(group)
        for name in unjudged(self._record.data, group):
            if name not in subjects:
                continue
            if name not in processes.workers:  # it died since, or the run was interrupted before its verdicts
                processes.start_again(subjects[name], context)
            worker, failed = processes.workers.get(name), processes.failed
            found = judge.judge(group, name, worker, cells) if worker is not None else Verdict(error=failed[name])
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

    # --- samples -----------------------------------------------------------------------------------------------

    def _starts(self, group: Group, processes: Processes, subjects: Sequence[Subject], vocab_size: int) -> None:
        """Load times and the memory of a short text, each start a process of its own."""
        cells = {w.kind: self._cell(group, w, subjects) for w in (LOAD, MEMORY)}
        unknown: dict[str, WorkerError] = {}
        for round in range(group.starts):
            for order, subject in enumerate(self._shuffled(subjects)):
                with processes.alone(subject, 512) as started:
                    if started is None:
                        continue
                    worker, probe = started
                    try:
                        worker.ask("run", RUN_S, prompts=prompts(MEMORY, vocab_size, round), new=MEMORY.new, keep=False)
                        told = held(worker.ask("memory", RUN_S), probe)
                    except WorkerError as error:
                        processes.failed[subject.name] = str(error)
                        continue
                load_s = processes.replies[subject.name]["load_s"]
                for kind, number in (("load", load_s), ("memory", told["peak_bytes"])):
                    if not number:
                        unknown[subject.name] = WorkerError("nobody says what its process held")
                        continue
                    row = cells[kind].engines[subject.name]
                    row.samples.append(Sample(round, order, float(number)))
                    row.memory = told
        for workload in (LOAD, MEMORY):
            self._finish(group, processes, cells[workload.kind], subjects, unknown if workload is MEMORY else {})

    def _measure(
        self, group: Group, processes: Processes, workload: Workload, subjects: Sequence[Subject], vocab_size: int
    ) -> None:
        cell = self._cell(group, workload, subjects)
        sampler = Sampler(processes, workload, vocab_size, self._say)
        needed: dict[str, int] = {}
        for subject in subjects:
            if subject.name in processes.workers:
                enough = min(WARM_S, self._cell_s / len(subjects))
                last = sampler.warm(subject, cell.engines[subject.name], enough)
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
                if not sampler.able(subject) or round >= needed[subject.name]:
                    continue
                sample = sampler.sample(subject, round)
                text = None if sample is None else sample.tokens
                after = self._probed(group.threads, nbytes, 0.0 if sample is None else sample.wall_s or 0.0)
                for attempt in range(1, AGAIN + 1):
                    if sample is None or (sample.others or 0) <= DISTURBED or spare == 0:
                        break
                    spare -= 1
                    before = after
                    sample = sampler.sample(subject, round + attempt * 1000)
                    after = self._probed(group.threads, nbytes, 0.0 if sample is None else sample.wall_s or 0.0)
                if sample is not None:
                    sample.round, sample.order, sample.before, sample.after = round, order, before, after
                    if round >= KEPT_TIMES or workload.new == 1:
                        sample.times = None
                    # Judged by the prompts of round 0, which a sample that was measured again does not have.
                    sample.tokens = None if round else text
                    cell.engines[subject.name].samples.append(sample)
                before = after
        if self._meter is not None:
            for subject in self._shuffled(subjects):
                if sampler.able(subject):
                    energy = sampler.energy(subject, self._meter, self._window_s)
                    cell.engines[subject.name].energy = energy
        self._finish(group, processes, cell, subjects, sampler.failed)

    def _rest(self, group: Group) -> None:
        """What the machine takes while all engines of the group are loaded and wait, once a group."""
        key = f"loaded {group.key}"
        if self._meter is not None and key not in self._record.data.idle_w:
            found = idle_watts(self._meter, self._idle_s)
            self._record.data.idle_w.update({key: found} if found else {})

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
        processes: Processes,
        cell: Cell,
        subjects: Sequence[Subject],
        failed: dict[str, WorkerError],
    ) -> None:
        for subject in subjects:
            row = cell.engines[subject.name]
            error, out = failed.get(subject.name), processes.why_out(subject)
            if error is not None:
                reject(row, "invalid" if isinstance(error, Invalid) else "failed", str(error))
            elif out is not None:
                reject(row, "failed", out)
            reply = processes.replies.get(subject.name, {})
            row.version, row.precision = str(reply.get("version", "")), str(reply.get("precision", ""))
            row.device, row.load_s = str(reply.get("device", "")), reply.get("load_s")
            worker = processes.workers.get(subject.name)
            if worker is not None and worker.alive and row.status == "ok":
                self._remarks(worker, row)
        cell.at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        key = f"{group.key}/{cell.workload.name}"
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
