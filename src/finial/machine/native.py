"""The native part as built here: its instruction sets, and the read bandwidth that it measures.

A missing or broken native module is a result that says so, never an exception.

    measure_bandwidth([1, 2], nbytes=256 << 20, seconds=0.3)
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


def bandwidth_bytes(cpu: Cpu, memory: Memory) -> int:
    """A buffer that no cache holds: 256 MiB or four times the last cache level, at most an eighth of free memory."""
    wanted = max(256 * _MIB, 4 * cpu.last_level_bytes)
    room = wanted if memory.available_bytes is None else memory.available_bytes // 8
    return max(16 * _MIB, min(wanted, room))


def measure_bandwidth(threads: Sequence[int], nbytes: int, seconds: float = 0.3) -> tuple[Bandwidth, ...]:
    """One measurement per number of threads, each about `seconds` long.  Never raises."""
    results = []
    for count in threads:
        try:
            results.append(Bandwidth(count, round(float(_module().read_bandwidth(count, nbytes, seconds)), 2), ""))
        except (ImportError, RuntimeError, ValueError, MemoryError) as error:
            results.append(Bandwidth(count, None, str(error) or type(error).__name__))
    return tuple(results)


def thread_steps(usable: int) -> tuple[int, ...]:
    """1, 2, 4, … and all: a curve in few measurements."""
    return (*(2**power for power in range(usable.bit_length()) if 2**power < usable), usable)
