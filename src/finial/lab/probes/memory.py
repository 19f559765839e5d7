"""Memory: the most that a process and everything it started held, and the most that its devices held.

Knows /proc, `ps` and NVML; nothing of engines.  A sampler in a thread, because a tree of processes keeps no high-water
mark: each process has one, but their peaks need not coincide.

    with MemoryProbe(process.pid) as probe: …
    probe.peak().process_bytes
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from finial.machine.gpu import nvml, nvml_devices
from finial.machine.sources import Sources, read

_NUMBERS = re.compile(r"\s*\d+\s+\d+\s+\d+\s*")
INTERVAL_S = 0.25  # looking takes processor time from what is measured


@dataclass(frozen=True)
class Peak:
    """The most held at one time, in bytes; None: this system does not say.

    Attributes:
        process_bytes: of the process and all below it; for one process its own high-water mark, which misses nothing
            between samples.  Pages that several processes map are counted once where the system tells them apart.
        how: "RSS" for a process alone, "PSS" for a tree, "RSS summed" for a tree whose shared pages count repeatedly.
        device_bytes: that all devices held beyond what they held at the beginning.  The whole device's, as a container
            hides which process holds what.
        samples: how often it was looked at.
    """

    process_bytes: int | None
    how: str
    device_bytes: int | None
    samples: int


@dataclass(frozen=True)
class Parts:
    """What a peak consists of, as far as the engine itself says; bytes, None: unknown.

    Attributes:
        workspace_bytes: the rest of the peak: code, buffers, allocators' reserves.
    """

    weight_bytes: int | None
    kv_bytes: int | None
    workspace_bytes: int | None


def parts(peak_bytes: int | None, weight_bytes: int | None, kv_bytes: int | None) -> Parts:
    """Divide a peak; a rest below zero (weights mapped from a file and not all touched) is unknown."""
    if peak_bytes is None or weight_bytes is None or kv_bytes is None:
        return Parts(weight_bytes, kv_bytes, None)
    rest = peak_bytes - weight_bytes - kv_bytes
    return Parts(weight_bytes, kv_bytes, rest if rest >= 0 else None)


class Memory(Protocol):
    """What `MemoryProbe` does."""

    def __enter__(self) -> Memory:
        """Begin."""

    def __exit__(self, *error: object) -> None:
        """End."""

    def now(self) -> int | None:
        """Bytes that the tree holds now."""

    def peak(self) -> Peak:
        """The most so far."""


class MemoryProbe:
    """Samples a tree of processes until it is left.

    Args:
        pid: the first process of the tree.
        interval_s: between samples.
    """

    def __init__(self, pid: int, sources: Sources | None = None, interval_s: float = INTERVAL_S) -> None:
        self._pid, self._interval = pid, interval_s
        self._sources = sources if sources is not None else Sources()
        self._process: int | None = None
        self._device: int | None = None
        self._before: int | None = None
        self._samples, self._how = 0, ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> MemoryProbe:
        self._before = device_bytes(self._sources)
        self.sample()
        self._thread = threading.Thread(target=self._run, name="memory probe", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def now(self) -> int | None:
        """Bytes that the tree holds now; None when it is gone or nobody says."""
        how, held = self._linux() if self._sources.linux else self._ps()
        if not held:
            return None
        self._how = how if len(held) > 1 or not self._how else self._how  # once a tree, always a tree
        self._process = _larger(self._process, sum(held))
        return sum(held)

    def sample(self) -> None:
        """Look once."""
        now = self.now()
        if self._before is not None:
            self._device = _larger(self._device, device_bytes(self._sources))
        if self._sources.linux:
            self._process = _larger(self._process, _kilobytes(self._sources, self._pid, "status", "VmHWM"))
        self._samples += now is not None

    def peak(self) -> Peak:
        """The most so far."""
        device = None
        if self._before is not None and self._device is not None:
            device = max(0, self._device - self._before)
        return Peak(self._process, self._how, device, self._samples)

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self.sample()

    def _linux(self) -> tuple[str, list[int]]:
        pids = tree(self._pid, self._sources)
        if len(pids) > 1:  # Asking for PSS walks all page tables, which a single process is spared.
            held = [_kilobytes(self._sources, pid, "smaps_rollup", "Pss") for pid in pids]
            if held[0] is not None:
                return "PSS", [value for value in held if value is not None]
        held = [_kilobytes(self._sources, pid, "status", "VmRSS") for pid in pids]
        return "RSS" if len(pids) == 1 else "RSS summed", [value for value in held if value is not None]

    def _ps(self) -> tuple[str, list[int]]:
        """macOS and the BSDs: `ps` gives resident kilobytes (ps(1), rss)."""
        report = self._sources.run(["ps", "-axo", "pid=,ppid=,rss="]) or ""
        rows = [[int(word) for word in line.split()] for line in report.splitlines() if _NUMBERS.fullmatch(line)]
        inside = _below(self._pid, [(pid, parent) for pid, parent, _ in rows])
        held = [kilobytes << 10 for pid, _, kilobytes in rows if pid in inside]
        return "RSS" if len(held) == 1 else "RSS summed", held


class FakeMemory:
    """A tree that holds what it is told to, and remembers the most."""

    def __init__(self, held: int = 0, device: int | None = None) -> None:
        self.held, self.device = held, device
        self._most, self._samples = 0, 0

    def __enter__(self) -> FakeMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.now()

    def now(self) -> int | None:
        """What it was told."""
        self._most, self._samples = max(self._most, self.held), self._samples + 1
        return self.held

    def peak(self) -> Peak:
        """The most at any look."""
        return Peak(self._most, "fake", self.device, self._samples)


def held(told: dict[str, Any], probe: MemoryProbe) -> dict[str, int | None]:
    """What an engine said of its memory, and what its processes are seen to hold; the rest of a peak is workspace."""
    probe.sample()
    seen = probe.peak()
    found: dict[str, int | None] = {name: told[name] for name in told if name.endswith("_bytes")}
    # Nobody says what a server's processes hold: its adapter's are not it.
    if found.get("peak_bytes") and seen.process_bytes is not None:
        found["peak_bytes"] = max(found["peak_bytes"] or 0, seen.process_bytes)
    if found.get("device_peak_bytes") is None and seen.device_bytes:
        found["device_peak_bytes"] = seen.device_bytes
    on = found.get("device_peak_bytes") or found.get("peak_bytes")
    if found.get("workspace_bytes") is None:
        found["workspace_bytes"] = parts(on, found.get("weight_bytes"), found.get("kv_bytes")).workspace_bytes
    return {name: value for name, value in found.items() if value is not None}


def tree(pid: int, sources: Sources) -> list[int]:
    """A process and all below it, by /proc; those that end while one looks are left out."""
    tasks = sources.proc / str(pid) / "task"
    if (
        tasks / str(pid) / "children"
    ).exists():  # only where the kernel keeps them (proc_tid_children(5)); much cheaper
        found, left = [], [pid]
        while left:
            found.append(left.pop())
            files = (sources.proc / str(found[-1]) / "task").glob("*/children")
            left += [int(child) for file in files for child in (read(file) or "").split()]
        return sorted(found)
    links = []
    for folder in sources.proc.glob("[0-9]*"):
        stat = read(folder / "stat")
        if stat is not None and ")" in stat:  # proc_pid_stat(5): the name is in brackets and may hold any character
            links.append((int(folder.name), int(stat.rsplit(")", 1)[1].split()[1])))
    return sorted(_below(pid, links))


def device_bytes(sources: Sources) -> int | None:
    """Bytes in use on all NVIDIA devices (nvmlDeviceGetMemoryInfo); None without any."""
    with nvml(sources) as library:
        if library is None:
            return None
        used = [_used(library, handle) for _, handle in nvml_devices(library)]
        known = [value for value in used if value is not None]
        return sum(known) if known else None


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t, nvml.h."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _used(library: Any, handle: Any) -> int | None:
    memory = _NvmlMemory()
    return int(memory.used) if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0 else None


def _below(pid: int, links: Iterable[tuple[int, int]]) -> set[int]:
    children: dict[int, list[int]] = {}
    known = set()
    for child, parent in links:
        children.setdefault(parent, []).append(child)
        known.add(child)
    found, left = set(), [pid] if pid in known else []
    while left:
        process = left.pop()
        if process not in found:
            found.add(process)
            left += children.get(process, [])
    return found


def _kilobytes(sources: Sources, pid: int, file: str, name: str) -> int | None:
    """A line `name:  123 kB` of /proc/pid/file, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", read(sources.proc / str(pid) / file) or "", re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _larger(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else max(a, b)
