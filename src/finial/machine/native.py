"""The native part as built here: its instruction sets, and the read bandwidth that it measures.

A missing or broken native module is a result that says so, never an exception.

    measure_bandwidth([1, 2], nbytes=1 << 30, seconds=0.3)
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finial.machine.cpu import Cpu
from finial.machine.memory import Memory

_MIB = 1 << 20


@dataclass(frozen=True)
class Native:
    """The native CPU module.

    Attributes:
        isa: the instruction set in use; available: those that build and CPU share, slowest first.
        threads: how many it takes when nobody says; None with an error.
        error: why it cannot be used; empty when it can.
    """

    isa: str | None
    available: tuple[str, ...]
    threads: int | None
    error: str


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth with so many threads: 1e9 bytes per second, the fastest of several passes."""

    threads: int
    read_gb_s: float | None
    error: str


def _module() -> Any:
    return importlib.import_module("finial._native")


def probe_native() -> Native:
    """Never raises."""
    try:
        module = _module()
        return Native(str(module.isa()), tuple(module.isas_available()), int(module.cores()["physical"]), "")
    except (ImportError, RuntimeError) as error:
        return Native(None, (), None, str(error))


def bandwidth_bytes(cpu: Cpu, memory: Memory, reads: int = 0) -> int:
    """Of a buffer that is read as a step is which reads so many bytes: as large, so that caches hold as much of it.

    Cores that share no last level have several, of which the system may know one: of 256 MiB those hold a part that
    they do not hold of 1 GiB (98 and 85 GB/s, two cores of EPYC Turin).

    Args:
        reads: 0: a buffer of which no cache holds much, 1 GiB or sixteen times the last level.
    Returns:
        At least 1 MiB; at most an eighth of free memory, but 16 MiB are taken.
    """
    wanted = max(reads, _MIB) if reads else max(1024 * _MIB, 16 * cpu.last_level_bytes)
    room = wanted if memory.available_bytes is None else memory.available_bytes // 8
    return min(wanted, max(16 * _MIB, room))


class BandwidthProbe:
    """Measures read bandwidth, over one buffer for as long as its size and the threads stay.  Never raises."""

    def __init__(self) -> None:
        self._of: tuple[int, int] | None = None
        self._native: Any = None

    def measure(self, threads: int, nbytes: int, seconds: float) -> Bandwidth:
        """One measurement, about `seconds` long once the buffer is there."""
        try:
            if self._of != (threads, nbytes):
                self._of = self._native = None  # the old buffer goes before the new one comes
                self._native = _module().BandwidthProbe(threads, nbytes)
                self._of = threads, nbytes
            return Bandwidth(threads, round(float(self._native.gb_s(seconds)), 2), "")
        except (ImportError, RuntimeError, ValueError, MemoryError) as error:
            return Bandwidth(threads, None, str(error) or type(error).__name__)


def measure_bandwidth(threads: Sequence[int], nbytes: int, seconds: float = 0.3) -> tuple[Bandwidth, ...]:
    """One measurement per number of threads, each about `seconds` long.  Never raises."""
    return tuple(BandwidthProbe().measure(count, nbytes, seconds) for count in threads)


def thread_steps(usable: int) -> tuple[int, ...]:
    """1, 2, 4, … and all: a curve in few measurements."""
    return (*(2**power for power in range(usable.bit_length()) if 2**power < usable), usable)
