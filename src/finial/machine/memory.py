"""Memory: how much there is, how much is free for this process, and how much it has used at most.

Knows /proc, control groups, sysctl and the Windows API; nothing of models.

    probe_memory(Sources()).available_bytes; peak_bytes()
"""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass

from finial.machine.sources import Sources, cgroup_folders, read, read_int, to_int


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes; None: this system does not say.

    Attributes:
        total_bytes: what this process could ever have: the machine's, or its control group's limit when lower.
        available_bytes: what a new allocation can have now without swapping, within that limit.
        machine_bytes: the machine's, whatever the limit.
        limit_bytes: the control group's limit, None without one.
    """

    total_bytes: int | None
    available_bytes: int | None
    machine_bytes: int | None
    limit_bytes: int | None


def probe_memory(sources: Sources) -> Memory:
    """Never raises."""
    if sources.linux:
        return _linux(sources)
    if sources.system == "Darwin":
        return _mac(sources)
    if sources.system == "Windows":
        return _windows()
    return Memory(None, None, None, None)


def _linux(sources: Sources) -> Memory:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", read(sources.proc / "meminfo") or "", re.MULTILINE))
    machine = int(fields["MemTotal"]) << 10 if "MemTotal" in fields else None
    available = int(fields["MemAvailable"]) << 10 if "MemAvailable" in fields else None
    limit = None
    folders, unified = cgroup_folders(sources, "memory")
    for folder in folders:
        ceiling = read_int(folder / ("memory.max" if unified else "memory.limit_in_bytes"))
        if ceiling is None or (machine is not None and ceiling >= machine):
            continue  # "max", or version 1's way to say so, a number beyond any machine
        limit = ceiling if limit is None else min(limit, ceiling)
        used = read_int(folder / ("memory.current" if unified else "memory.usage_in_bytes")) or 0
        # Clean page cache counts as used but goes when it is needed (admin-guide/cgroup-v2, memory.stat).
        cached = re.search(r"^inactive_file (\d+)", read(folder / "memory.stat") or "", re.MULTILINE)
        room = max(0, ceiling - used + (int(cached[1]) if cached else 0))
        available = room if available is None else min(available, room)
    return Memory(limit if limit is not None else machine, available, machine, limit)


def _mac(sources: Sources) -> Memory:
    total = to_int((sources.run(["sysctl", "-n", "hw.memsize"]) or "").strip())
    report = sources.run(["vm_stat"]) or ""
    page = re.search(r"page size of (\d+) bytes", report)
    pages = dict(re.findall(r"^Pages (\w+):\s+(\d+)", report, re.MULTILINE))
    available = None
    if page and "free" in pages:
        available = int(page[1]) * sum(int(pages.get(kind, 0)) for kind in ("free", "inactive", "speculative"))
    return Memory(total, available, total, None)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX, sysinfoapi.h."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("page_total", ctypes.c_uint64),
        ("page_available", ctypes.c_uint64),
        ("virtual_total", ctypes.c_uint64),
        ("virtual_available", ctypes.c_uint64),
        ("extended", ctypes.c_uint64),
    )


def _windows() -> Memory:
    windows = getattr(ctypes, "windll", None)
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if windows is None or not windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return Memory(None, None, None, None)
    return Memory(status.total, status.available, status.total, None)


class _MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS, psapi.h."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("now", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 6),
    )


def peak_bytes(sources: Sources | None = None) -> int | None:
    """The most physical memory that this process has held, in bytes; mapped file pages that it touched included."""
    sources = sources if sources is not None else Sources()
    if sources.system == "Windows":
        windows = getattr(ctypes, "windll", None)
        counters = _MemoryCounters(size=ctypes.sizeof(_MemoryCounters))
        if windows is None:
            return None
        process = ctypes.c_void_p(windows.kernel32.GetCurrentProcess())
        ok = windows.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
        return int(counters.peak) if ok else None
    if sources.linux:
        # getrusage would do, but there a child starts with the size of the process that forked it.
        high = re.search(r"^VmHWM:\s+(\d+) kB", read(sources.proc / "self" / "status") or "", re.MULTILINE)
        if high:
            return int(high[1]) << 10
    if sys.platform == "win32":
        return None
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sources.system == "Darwin" else largest << 10  # getrusage(2): bytes on macOS, KiB elsewhere
