"""The processes of a group: each engine's file made, its process started and loaded, or the reason why there is none.

Knows workers and what engines are started with; nothing of rounds, samples and cells.

    processes = Processes(group, places, print)
    processes.make_ready(engine); processes.start(Subject(engine), context=512); processes.workers[engine.name]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finial.errors import FinialError
from finial.lab.engines.setup import SetupError, make_file, missing
from finial.lab.engines.table import Engine, Places
from finial.lab.probes.memory import MemoryProbe
from finial.lab.worker import Worker, WorkerError
from finial.lab.workloads import Group

LOAD_S = 600.0  # a limit, far from what anything takes: vLLM compiles for a minute and more, above three on slow cores


@dataclass(frozen=True)
class Subject:
    """What a row is about."""

    engine: Engine
    cache: bool = True

    @property
    def name(self) -> str:
        """Of the row."""
        return self.engine.name if self.cache else f"{self.engine.name}, no cache"


class Processes:
    """Those of one group.

    Args:
        memory_bytes: that one engine may hold.

    Attributes:
        workers: loaded, by subject; without those that died.
        replies: to `load`, by subject; failed: why an engine or a subject is out of this group.
    """

    def __init__(
        self, group: Group, places: Places, say: Callable[[str], None], memory_bytes: int | None = None
    ) -> None:
        self._group, self._places, self._say, self._memory_bytes = group, places, say, memory_bytes
        self._files: dict[str, Path] = {}
        self.workers: dict[str, Worker] = {}
        self.replies: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def make_ready(self, engine: Engine) -> None:
        """Its file of the model, made if need be; or it is out."""
        reason = missing(engine, self._places)
        if not reason:
            try:
                file = make_file(self._places, self._group.model, engine.formats[self._group.format])
                self._files[engine.name] = file
            except (SetupError, FinialError) as error:
                reason = str(error)
        if reason:
            self.failed[engine.name] = reason
            self._say(f"{engine.name} {self._group.format}: {reason}")

    def start(self, subject: Subject, context: int) -> None:
        """Load it, to stay; or it is out."""
        worker = self._started(subject)
        if worker is not None and self._loads(worker, subject, context):
            self.workers[subject.name] = worker

    def start_again(self, subject: Subject, context: int) -> None:
        """As `start`, whatever ended it before, if only its file is there."""
        if subject.engine.name in self._files:
            self.failed.pop(subject.name, None)
        self.start(subject, context)

    @contextmanager
    def alone(self, subject: Subject, context: int) -> Iterator[tuple[Worker, MemoryProbe] | None]:
        """A process for this once, and what it and its devices hold, sampled from before it loads: that takes processor
        time.  None where it does not start."""
        worker = self._started(subject)
        if worker is None:
            yield None
            return
        try:
            with MemoryProbe(worker.pid) as probe:
                yield (worker, probe) if self._loads(worker, subject, context) else None
        finally:
            worker.close()

    def why_out(self, subject: Subject) -> str | None:
        """The reason, its own or its engine's."""
        return self.failed.get(subject.name) or self.failed.get(subject.engine.name)

    def close(self) -> None:
        """End them all."""
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def _started(self, subject: Subject) -> Worker | None:
        engine = subject.engine
        if engine.name in self.failed:
            self.failed[subject.name] = self.failed[engine.name]
            return None
        try:
            environment = engine.process_environment(self._group.threads)
            return Worker(engine.command(self._places), environment, self._memory_bytes)
        except WorkerError as error:
            self.failed[subject.name] = str(error)
            return None

    def _loads(self, worker: Worker, subject: Subject, context: int) -> bool:
        group = self._group
        try:
            self.replies[subject.name] = worker.ask(
                "load",
                LOAD_S,
                model=str(self._files[subject.engine.name]),
                format=group.format,
                threads=group.threads,
                context=context,
                sequences=max(w.sequences for w in group.workloads),
                cache=subject.cache,
                options=dict(subject.engine.options),
            )
            return True
        except WorkerError as error:
            worker.kill()
            self.failed[subject.name] = str(error)
            self._say(f"{subject.name} {group.format}: {error}")
            return False
