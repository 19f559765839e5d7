"""Energy: joules over a window from cumulative counters, gross, and net of what the machine takes when it idles.

Knows the counters of finial.machine.energy and Apple's powermetrics; nothing of engines.  There is no estimate: without
a counter that can be read, energy is "unavailable", with the reason.

    meter = open_meter(Sources()); before = meter.read(); …; meter.used(before, meter.read()).gross_j
"""

from __future__ import annotations

import os
import plistlib
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from finial.lab.probes.clock import Clock, DeviceClock
from finial.machine.energy import probe_energy
from finial.machine.sources import Sources

SHORTEST_S = 1.0  # counters are updated every 1 ms (RAPL) to 100 ms (NVML): a shorter window is mostly their step


@dataclass(frozen=True)
class Reading:
    """All counters at one time: joules by name, and seconds."""

    at: float
    joules: Mapping[str, float]


@dataclass(frozen=True)
class Energy:
    """What a window took.

    Attributes:
        seconds: its length; gross_j: by counter.
        total_j: of the counters that do not contain one another.
        counters: their names, "" when energy is unavailable; reason: why it is, empty when it is not.
    """

    seconds: float
    gross_j: Mapping[str, float]
    total_j: float | None
    counters: str
    reason: str = ""

    @staticmethod
    def of(seconds: float, gross_j: Mapping[str, float]) -> Energy:
        """Of what each counter moved on; a window shorter than a counter's step can say gives no total."""
        chosen = whole(sorted(gross_j))
        short = seconds < SHORTEST_S
        return Energy(
            seconds,
            dict(sorted(gross_j.items())),
            None if short else sum(gross_j[name] for name in chosen),
            " + ".join(chosen),
            f"a window of {seconds:.2f} s is shorter than {SHORTEST_S:.0f} s" if short else "",
        )

    @property
    def watts(self) -> float | None:
        """Mean power of the window."""
        return None if self.total_j is None or self.seconds <= 0 else self.total_j / self.seconds

    def net_j(self, idle: Energy) -> float | None:
        """Joules beyond what an idle machine would have taken in the same time; None where either is unknown."""
        if self.total_j is None or idle.watts is None:
            return None
        return self.total_j - idle.watts * self.seconds


@dataclass(frozen=True)
class Cost:
    """Joules per token: as the counter has it, and beyond each of two idles; None: unavailable.

    Attributes:
        net_empty_j: beyond the machine with nothing loaded: what running the model costs, its memory held included.
        net_loaded_j: beyond the machine with the model loaded and waiting: what the tokens themselves cost.
        watts: mean power of the window.
    """

    gross_j: float | None
    net_empty_j: float | None
    net_loaded_j: float | None
    counters: str
    reason: str
    watts: float | None = None

    @property
    def tokens_per_j(self) -> float | None:
        """Of the gross energy."""
        return 1 / self.gross_j if self.gross_j else None


def cost(window: Energy, tokens: int, empty: Energy | None = None, loaded: Energy | None = None) -> Cost:
    """Joules per token of a window."""
    assert tokens > 0

    def each(joules: float | None) -> float | None:
        return None if joules is None else joules / tokens

    return Cost(
        gross_j=each(window.total_j),
        net_empty_j=None if empty is None else each(window.net_j(empty)),
        net_loaded_j=None if loaded is None else each(window.net_j(loaded)),
        counters=window.counters,
        reason=window.reason,
        watts=window.watts,
    )


class Meter(Protocol):
    """What reads counters."""

    def read(self) -> Reading:
        """All counters now."""

    def used(self, before: Reading, after: Reading) -> Energy:
        """What lies between two readings."""

    def close(self) -> None:
        """No more readings."""


def idle(meter: Meter, seconds: float, sleep: Callable[[float], None]) -> Energy:
    """What the machine takes while this process sleeps; call it with nothing loaded, and with the model loaded."""
    before = meter.read()
    sleep(seconds)
    return meter.used(before, meter.read())


def idle_watts(meter: Meter, seconds: float) -> dict[str, float]:
    """By counter, while nothing is asked of anybody; empty where the counters ran backwards."""
    found = idle(meter, seconds, time.sleep)
    return {name: joules / found.seconds for name, joules in found.gross_j.items()}


@dataclass
class CounterMeter:
    """RAPL's and NVML's counters.

    Args:
        clock: beside which they are read.
    """

    sources: Sources
    clock: Clock = field(default_factory=DeviceClock)

    def read(self) -> Reading:
        """Those that can be read."""
        found = probe_energy(self.sources)
        return Reading(self.clock.now(), {c.name: c.joules for c in found if c.joules is not None})

    def used(self, before: Reading, after: Reading) -> Energy:
        """Differences; a RAPL counter that began again at zero meanwhile is continued by its range."""
        seconds = after.at - before.at
        found = probe_energy(self.sources)
        ranges = {counter.name: counter.range_joules for counter in found}
        gross = {}
        for name in before.joules.keys() & after.joules.keys():
            joules = after.joules[name] - before.joules[name]
            span = ranges.get(name)
            if joules < 0 and span:
                joules += span
            if joules >= 0:
                gross[name] = joules
        if not gross:
            reason = "; ".join(f"{counter.name}: {counter.reason}" for counter in found if counter.reason)
            return Energy(seconds, {}, None, "", reason or "a counter ran backwards")
        return Energy.of(seconds, gross)

    def close(self) -> None:
        """Nothing is held."""


def whole(names: Sequence[str]) -> list[str]:
    """Those that add up without counting anything twice.

    RAPL: `core` and `uncore` are inside their package, `psys` holds the packages; `dram` is beside them (Linux,
    power/powercap).  NVML counters are whole boards.
    """
    rapl = [name for name in names if name.startswith("RAPL ")]
    chosen = [n for n in rapl if n.removeprefix("RAPL ").startswith("package") and "/" not in n]
    chosen += [n for n in rapl if n.endswith("/dram") or n == "RAPL dram"]
    return chosen + [n for n in names if not n.startswith("RAPL ")] if chosen or not rapl else list(names[:1])


class NoMeter:
    """Where there is no counter.

    Args:
        reason: why.
    """

    def __init__(self, reason: str, clock: Clock | None = None) -> None:
        self._reason, self._clock = reason, clock or DeviceClock()

    def read(self) -> Reading:
        """The time alone."""
        return Reading(self._clock.now(), {})

    def used(self, before: Reading, after: Reading) -> Energy:
        """Unavailable."""
        return Energy(after.at - before.at, {}, None, "", self._reason)

    def close(self) -> None:
        """Nothing is held."""


class AppleMeter:
    """Adds up the samples of Apple's powermetrics, which root alone may run; what they count is Apple's own estimate.

    powermetrics(1) with `--format plist` writes one property list a sample, each ended by a NUL; `processor` in it has
    `cpu_energy`, `gpu_energy` and `ane_energy` in millijoules of that sample.
    """

    NAME = "Apple powermetrics (Apple's estimate)"
    COMMAND = ("powermetrics", "--samplers", "cpu_power,gpu_power,ane_power", "--format", "plist", "-i", "100")

    def __init__(self, command: Sequence[str] = COMMAND, clock: Clock | None = None) -> None:
        self._clock = clock or DeviceClock()
        self._joules, self._lock, self._first = 0.0, threading.Lock(), threading.Event()
        self._process = subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        threading.Thread(target=self._add, name="powermetrics", daemon=True).start()

    def read(self) -> Reading:
        """What came until now; the first call waits for the first sample."""
        self._first.wait(5)
        with self._lock:
            return Reading(self._clock.now(), {self.NAME: self._joules} if self._first.is_set() else {})

    def used(self, before: Reading, after: Reading) -> Energy:
        """As exact as a sample is long: 0.1 s."""
        seconds = after.at - before.at
        if self.NAME not in before.joules or self.NAME not in after.joules:
            return Energy(seconds, {}, None, "", "powermetrics gave no sample")
        return Energy.of(seconds, {self.NAME: after.joules[self.NAME] - before.joules[self.NAME]})

    def close(self) -> None:
        """End powermetrics."""
        self._process.terminate()
        self._process.wait()

    def _add(self) -> None:
        assert self._process.stdout is not None
        pending = b""
        while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
            *whole_ones, pending = (pending + chunk).split(b"\0")
            for sample in whole_ones:
                joules = _apple_joules(sample)
                if joules is not None:
                    with self._lock:
                        self._joules += joules
                    self._first.set()


def _apple_joules(sample: bytes) -> float | None:
    try:
        processor: Any = plistlib.loads(sample.strip()).get("processor", {})
        parts = [processor.get(f"{part}_energy") for part in ("cpu", "gpu", "ane")]
    except (plistlib.InvalidFileException, ValueError, AttributeError):
        return None
    known = [float(part) for part in parts if part is not None]
    return sum(known) / 1e3 if known else None


class FakeMeter:
    """A machine of so many watts on a fake clock; `watts` may change on the way.

    Args:
        clock: whose time passes.
    """

    NAME = "fake"

    def __init__(self, clock: Clock, watts: float = 0.0) -> None:
        self._clock, self._watts, self._joules, self._at = clock, watts, 0.0, clock.now()

    @property
    def watts(self) -> float:
        """Present power."""
        return self._watts

    @watts.setter
    def watts(self, value: float) -> None:
        self.read()
        self._watts = value

    def read(self) -> Reading:
        """Joules until now."""
        now = self._clock.now()
        self._joules += self._watts * (now - self._at)
        self._at = now
        return Reading(now, {self.NAME: self._joules})

    def used(self, before: Reading, after: Reading) -> Energy:
        """The difference."""
        joules = after.joules[self.NAME] - before.joules[self.NAME]
        return Energy(after.at - before.at, {self.NAME: joules}, joules, self.NAME)

    def close(self) -> None:
        """Nothing is held."""


def open_meter(sources: Sources | None = None, clock: Clock | None = None) -> Meter:
    """The meter of this machine; one that says why there is none, where there is none."""
    sources, clock = sources or Sources(), clock or DeviceClock()
    counters = probe_energy(sources)
    if any(counter.readable for counter in counters):
        return CounterMeter(sources, clock)
    if sources.system == "Darwin" and hasattr(os, "geteuid") and os.geteuid() == 0:
        return AppleMeter(clock=clock)
    return NoMeter("; ".join(c.reason if c.name == "none" else f"{c.name}: {c.reason}" for c in counters), clock)
