"""A whole run as a person asks for it: model, engines and plan in, a record out, resumed when it was interrupted.

Knows the lab's parts and the disk; prints through `say` alone.

    session = Session.prepare("demo", plan, places, engines, out); session.run(say)
"""

from __future__ import annotations

import hashlib
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy

import finial
from finial.errors import RequestError
from finial.files.checkpoint import Checkpoint, open_checkpoint
from finial.files.hub import resolve
from finial.lab.engines.setup import missing, unmakeable
from finial.lab.engines.table import ENGINES, Engine, Places, find
from finial.lab.estimate import estimate, workload_seconds
from finial.lab.limits import Probe, busy
from finial.lab.plan import Plan
from finial.lab.probes.energy import Meter, idle_watts, open_meter
from finial.lab.probes.state import read_state, warnings
from finial.lab.quality_run import REFERENCES, TEXTS
from finial.lab.record import Record, unjudged
from finial.lab.runner import IDLE_S, WINDOW_S, Runner
from finial.lab.verdicts import Judge
from finial.lab.workloads import DEMO, Group
from finial.machine import Sources, describe, probe_energy

CACHE = Path.home() / ".cache" / "finial"
BUSY = 0.05  # share of the machine that others may take before a run is doubtful
MEMORY_SHARE = 0.9  # of the machine's memory that one engine may hold
Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """What a person called it, and where it is."""

    name: str
    path: Path
    checkpoint: Checkpoint

    @staticmethod
    def find(text: str) -> Model:
        """FileError or ModelError when it is none."""
        path = resolve(text)
        name = DEMO if text == DEMO else path.stem if path.suffix == ".gguf" else path.name
        if name == "" or "/" in name:
            name = "model"
        if text not in (DEMO, str(path)) and "/" in text and not Path(text).exists():
            name = text.split("@")[0].split("/")[-1]  # a hub name; its directory is called by a commit
        return Model(name, path, open_checkpoint(path))

    def places(self, engines: Path, pythons: dict[str, Path], cache: Path = CACHE) -> Places:
        """Files that engines need of it are kept beside those of other models, by where it lies and when it changed."""
        newest = max((f.stat().st_mtime_ns for f in self._files()), default=0)
        key = hashlib.sha256(f"{self.path.resolve()} {newest}".encode()).hexdigest()[:12]
        own = {} if self.name == DEMO else {self.name: self.path}
        return Places(engines, cache / "bench" / f"{self.name}-{key}", pythons, own)

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        return sorted(
            f for f in self.path.iterdir() if f.suffix in (".safetensors", ".gguf") or f.name == "config.json"
        )

    def hashes(self) -> dict[str, dict[str, Any]]:
        """Name -> size and SHA-256 of its weights and configuration."""
        found = {}
        for file in self._files():
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
        return found


def choose(
    names: Sequence[str], places: Places, quick: bool, formats: Sequence[str], model: str = DEMO
) -> tuple[list[Engine], dict[str, str]]:
    """Engines to measure, and why others are left out.

    Args:
        names: asked for; those are measured, or fail in their row.  Empty: all that are installed.
        quick: leave out what takes longer to start than everything else takes to run.
    Raises:
        RequestError: an unknown name.
    """
    if names:
        return list({engine.name: engine for engine in map(find, names)}.values()), {}
    chosen, left = [], {}
    for engine in ENGINES.values():
        reason = missing(engine, places)
        if not reason and not set(formats) & set(engine.formats):
            reason = f"it has no file of format {', '.join(formats)}"
        wanted = [format for format in formats if format in engine.formats]
        if not reason and all(unmakeable(engine, places, model, format) for format in wanted):
            reason = unmakeable(engine, places, model, wanted[0])
        if not reason and quick and engine.options.get("compile"):
            reason = f"it compiles for longer than all others run: --engine {engine.name!r}"
        if reason:
            left[engine.name] = reason
        else:
            chosen.append(engine)
    return chosen, left


class Session:
    """A run that is about to happen.

    Attributes:
        groups: what will be measured; seconds: how long it will take, within a factor of two or three.
        resumed: cells that are there already.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        places: Places,
        engines: Sequence[Engine],
        out: Path,
        command: Sequence[str] = (),
        fresh: bool = False,
        seed: int = 0,
        text: str = "sampled",
        reference: str = "auto",
        cell_s: float = math.inf,
    ) -> None:
        """Opens the record at `out` when it is there.

        Args:
            text, reference: of the verdicts, as those of `finial.lab.quality_run.Judge`.
            cell_s: of samples of one workload, as `Runner` has it.

        Raises:
            RequestError: a workload that does not fit the model; a record of another plan; an unknown reference.
            FileError: `out` is no record.
        """
        if reference not in REFERENCES:
            raise RequestError(f"no reference {reference!r}", fix=f"choose from {', '.join(REFERENCES)}")
        if text not in TEXTS and not Path(text).is_file():
            raise RequestError(f"no text {text!r}", fix=f"choose from {', '.join(TEXTS)}, or name a text file")
        config = model.checkpoint.config
        sizes = replace(plan.sizes, limit=min(plan.sizes.limit, config.max_context))
        self.groups: list[Group] = replace(plan, sizes=sizes).groups(model.name)
        self._model, self._places, self._engines, self._seed = model, places, list(engines), seed
        metered = any(counter.readable for counter in probe_energy(Sources()))
        self._window_s = WINDOW_S if metered else 0.0
        self.seconds = estimate(self.groups, self._engines, model.checkpoint.nbytes, self._window_s, 2 * cell_s)
        key = {
            "model": model.name,
            "engines": [" ".join(filter(None, (e.name, e.options.get("url", "")))) for e in engines],
            "groups": [{"format": g.format, "threads": g.threads, "starts": g.starts} for g in self.groups],
            "workloads": [asdict(w) for w in self.groups[0].workloads],
        }
        self._text, self._reference, self._cell_s = text, reference, cell_s
        if (text, reference) != ("sampled", "auto"):
            key["verdict"] = [text, reference]
        key = _plain(key)
        if out.exists() and not fresh:
            self.record = Record.open(out)
            if self.record.data.plan != key:
                raise RequestError(f"{out} is the record of another plan", fix="give another --out, or --fresh")
        else:
            self.record = Record.create(
                out,
                plan=key,
                started=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
                commit=version(),
                machine=_plain(describe().to_dict()),
                busy=None,
            )
            self.record.data.command = list(command)
        self.resumed = len(self.record.cells)

    def complete(self, judged: bool = True) -> bool:
        """Whether everything is in the record: all cells, and with `judged` a verdict on every row that has numbers."""
        measured = all(
            f"{group.key}/{w.name}" in self.record.cells
            for group in self.groups
            for w in group.workloads
            if any(e.runs(group.format, w) for e in self._engines)
        )
        return measured and not (judged and any(unjudged(self.record.data, group) for group in self.groups))

    def cell_seconds(self) -> dict[str, float]:
        """Estimate of every cell that is not there yet, by key."""
        size = self._model.checkpoint.nbytes
        return {
            key: min(workload_seconds(group, w, self._engines, size, self._window_s), 2 * self._cell_s)
            for group in self.groups
            for w in group.workloads
            if (key := f"{group.key}/{w.name}") not in self.record.cells
        }

    def run(
        self,
        say: Say,
        tick: Callable[[str], None] = lambda key: None,
        judged: bool = True,
        probe: Any = None,
        meter: Meter | None = None,
    ) -> None:
        """Measure what is missing; KeyboardInterrupt leaves a record that can be resumed."""
        data = self.record.data
        taken, before = busy(), read_state()
        if data.busy is None:
            data.busy = taken
        if taken is not None and taken > BUSY:
            say(f"WARNING: {taken:.0%} of this machine is taken by something else: the numbers will be wrong")
        probe = probe if probe is not None else Probe(CACHE)
        if getattr(probe, "error", ""):
            _add(data.warnings, f"No core-to-core latency and no arithmetic peak: {probe.error}.")
        data.files.update(self._model.hashes())
        data.versions = {"finial": finial.__version__, "python": platform.python_version(), "numpy": numpy.__version__}
        total = data.machine["memory"]["total_bytes"]
        limit = None if total is None else int(MEMORY_SHARE * total)
        threads = max(group.threads for group in self.groups)
        with closing(open_meter() if meter is None else meter) as meter:
            start = meter.read()
            data.energy = "" if start.joules else meter.used(start, meter.read()).reason
            empty = idle_watts(meter, IDLE_S) if start.joules else {}
            data.idle_w.update({"empty": empty} if empty else {})
            runner = Runner(
                self.record,
                self._places,
                self._engines,
                probe,
                say,
                self._seed,
                limit,
                tick,
                meter=meter,
                window_s=WINDOW_S,
                idle_s=IDLE_S,
                cell_s=self._cell_s,
            )
            with Judge(self._places, threads, self._text, self._reference) as judge:
                for group in self.groups:
                    runner.group(group, judge if judged else None)
        after = read_state()
        data.states = _plain({"before": before.to_dict(), "after": after.to_dict()})
        for warning in warnings(before, after):
            _add(data.warnings, warning[0].upper() + warning[1:] + ".")
        self.record.save()


def _add(warnings: list[str], text: str) -> None:
    if text not in warnings:
        warnings.append(text)


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def version() -> str:
    """Commit of the sources, or the version of the package."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return finial.__version__
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else finial.__version__
