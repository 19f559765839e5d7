"""The machine beside every sample: read bandwidth and core-to-core latency; arithmetic peaks once per group.

The bandwidth is finial's own probe; the rest is probe.c, compiled on first use.  Without a C compiler those are None.

    probe = Probe(cache_directory); probe.now(threads=2), probe.peaks(threads=2), busy()
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from finial.machine import BandwidthProbe, Sources, bandwidth_bytes, probe_cpu, probe_memory

SOURCE = Path(__file__).with_name("probe.c")
SECONDS = 0.15  # a dozen passes over the buffer
PEAKS = {"f32": 0, "bf16": 1, "int8": 2}  # kinds of probe.c
TILE_PEAKS = {"bf16": ("amx_bf16", 3), "int8": ("amx_int8", 4)}  # where the CPU has the feature


class Probe:
    """Measures now.

    Attributes:
        error: why there is no latency and no arithmetic peak; empty when there is.
    """

    def __init__(self, cache: Path) -> None:
        self._library, self.error = _build(cache)
        self._cpus = _cpus()
        self._cpu, self._bandwidth = probe_cpu(Sources()), BandwidthProbe()
        self._sizes: dict[int, int] = {}  # of the buffer for so many bytes

    def now(self, threads: int, nbytes: int = 0) -> dict[str, Any]:
        """The fields of `record.Reading`: with as many threads as the engines have.

        Args:
            nbytes: that a step reads, and so the bandwidth's buffer; when the last cache level holds them, the
                bandwidth is the cache's. 0: a buffer that no cache holds.
        """
        cached = 0 < nbytes <= self._cpu.last_level_bytes
        if nbytes not in self._sizes:
            self._sizes[nbytes] = bandwidth_bytes(self._cpu, probe_memory(Sources()), nbytes)
        read = self._bandwidth.measure(threads, self._sizes[nbytes], SECONDS / 3 if cached else SECONDS)
        now = {"read_gb_s": read.read_gb_s, "core_to_core_ns": self._latency(), "at": round(time.time(), 2)}
        return {**now, "from_cache": cached, "over_bytes": self._sizes[nbytes]}

    def peaks(self, threads: int) -> dict[str, float]:
        """1e9 operations per second by kind of number; those that this CPU has, by its fastest instruction."""
        if self._library is None:
            return {}
        cpus = (ctypes.c_int * threads)(*(self._cpus[i % len(self._cpus)] for i in range(threads)))
        found = {name: self._library.peak_gops(kind, cpus, threads, 0.2) for name, kind in PEAKS.items()}
        for name, (feature, kind) in TILE_PEAKS.items():
            if feature in self._cpu.features:
                found[name] = max(found[name], self._library.peak_gops(kind, cpus, threads, 0.2))
        return {name: round(value, 1) for name, value in found.items() if value > 0}

    def _latency(self) -> float | None:
        if self._library is None or len(self._cpus) < 2:
            return None
        best = min(self._library.core_to_core_ns(self._cpus[0], self._cpus[-1], 5000) for _ in range(3))
        return round(best, 1) if best > 0 else None


def taken_seconds() -> float | None:
    """Processor time that anything has taken since the machine started, the hypervisor's included; None: unknown."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # proc_stat(5): idle and iowait


def busy(seconds: float = 0.5) -> float | None:
    """Share of all processors' time that something took while this process slept; None where nobody says."""
    before = taken_seconds()
    time.sleep(seconds)
    after = taken_seconds()
    if before is None or after is None:
        return None
    return min(1.0, (after - before) / seconds / (os.cpu_count() or 1))  # the kernel's clock ticks 100 times a second


def _cpus() -> list[int]:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return sorted(affinity(0)) if affinity is not None else []


def _build(cache: Path) -> tuple[Any, str]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no C compiler"
    name = f"probe-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    library = cache / name
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        built = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(built), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return None, f"{compiler}: {(done.stderr.strip().splitlines() or ['failed'])[0]}"
        built.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.core_to_core_ns.restype = loaded.peak_gops.restype = ctypes.c_double
    loaded.core_to_core_ns.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    loaded.peak_gops.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_double]
    return loaded, ""
