"""One workload's samples: an engine is asked, its reply is checked, and what else the machine did meanwhile is noted.

Knows processes and replies; nothing of the order of samples, of the record and of the machine's probes.

    sampler = Sampler(processes, workload, vocab_size, print)
    sampler.warm(subject, row, enough_s=20); sampler.sample(subject, round); sampler.failed
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from finial.lab.checks import check, value
from finial.lab.limits import taken_seconds
from finial.lab.probes.energy import Meter
from finial.lab.processes import Processes, Subject
from finial.lab.record import Energy, Row, Sample
from finial.lab.worker import WorkerError
from finial.lab.workloads import Workload, prompts

RUN_S = 300.0  # a limit, far from what anything takes
OTHERS_S = 0.2  # shorter samples are too short for the kernel's clock of 10 ms to say who took what
STEADY = 0.05  # two warm-up runs that differ by less are steady
ENERGY_RUN = 1_000_000  # number of the first run of a window for energy: its prompts are those of no sample


class Invalid(WorkerError):
    """It answered, but not what was asked."""


class Sampler:
    """Asks the group's processes for one workload.

    Attributes:
        failed: who cannot go on in this workload, and why.
    """

    def __init__(self, processes: Processes, workload: Workload, vocab_size: int, say: Callable[[str], None]) -> None:
        self._processes, self._workload, self._vocab_size, self._say = processes, workload, vocab_size, say
        self.failed: dict[str, WorkerError] = {}

    def able(self, subject: Subject) -> bool:
        """Whether it runs and has not failed."""
        return subject.name in self._processes.workers and subject.name not in self.failed

    def warm(self, subject: Subject, row: Row, enough_s: float) -> float:
        """Runs that do not count, until two in a row are close or so much time is gone; seconds of the last one."""
        started, last = time.perf_counter(), 1.0
        for warmup in range(self._workload.warmups):
            sample = self.sample(subject, -2 - warmup)
            if sample is None:
                break
            sample.times = sample.tokens = None
            row.warmup.append(sample)
            last = sample.wall_s or last
            close = len(row.warmup) > 1 and abs(sample.value / row.warmup[-2].value - 1) < STEADY
            if close or time.perf_counter() - started > enough_s:
                break
        return last

    def sample(self, subject: Subject, run: int) -> Sample | None:
        """One run, by whose number prompts are drawn; below zero none that counts.  None: it failed."""
        answer = self._ask(subject, run)
        if answer is None:
            return None
        reply, wall, others = answer
        return Sample(
            value=value(self._workload, reply),
            first=reply["first"],
            last=reply["last"],
            times=reply.get("times"),
            tokens=[ids[:16] for ids in reply["tokens"]],  # enough to see whether they are the model's
            others=others if wall >= OTHERS_S else None,
            wall_s=wall,
        )

    def energy(self, subject: Subject, meter: Meter, window_s: float) -> Energy | None:
        """A window of work without a pause, so long that the counters' steps do not matter."""
        before, end, runs = meter.read(), time.perf_counter() + window_s, 0
        while runs == 0 or time.perf_counter() < end:
            if self._ask(subject, ENERGY_RUN + runs) is None:
                return None
            runs += 1
        used = meter.used(before, meter.read())
        return Energy(used.seconds, dict(used.gross_j), runs * self._workload.worked) if used.gross_j else None

    def _ask(self, subject: Subject, run: int) -> tuple[dict[str, Any], float, float | None] | None:
        """A checked reply, the seconds that it took, and the share of the machine that others took meanwhile."""
        workload, worker = self._workload, self._processes.workers[subject.name]
        request = {
            "prompts": prompts(workload, self._vocab_size, run),
            "new": workload.new,
            "keep": workload.keeps and subject.cache,
        }
        clocks = time.perf_counter(), taken_seconds(), worker.processor_seconds()
        try:
            reply = worker.ask("run", RUN_S, **request)
            after = time.perf_counter(), taken_seconds(), worker.processor_seconds()
            wall = after[0] - clocks[0]
            wrong = check(workload, reply, self._vocab_size, wall if run >= 0 else None)
            if wrong:
                raise Invalid(wrong)
        except WorkerError as error:
            self.failed[subject.name] = error
            self._say(f"{subject.name}, {workload.name}: {error}")
            if not worker.alive:
                del self._processes.workers[subject.name]
            return None
        return reply, wall, _others(clocks, after)


Clocks = tuple[float, float | None, float | None]  # wall, the machine's processor time, the engine's own; seconds


def _others(start: Clocks, end: Clocks) -> float | None:
    """Share of the machine's processor time between two readings that was not the engine's; None: unknown."""
    if None in (*start, *end):
        return None
    wall, machine, own = (b - a for a, b in zip(start, end, strict=True))  # type: ignore[operator]
    return max(0.0, (machine - own) / (wall * (os.cpu_count() or 1)))
