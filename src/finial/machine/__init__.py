"""The machine as data: CPU, memory, GPUs, energy counters, optional parts, measured read bandwidth.

Knows operating systems and how to ask them; nothing of models, and prints nothing.  Every probe takes a `Sources`, so
that any machine can be faked, and none raises: what is unknown is None or says why.

    machine = describe(); machine.cpu.model, machine.memory.available_bytes
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from typing import Any

from finial.machine.cpu import Cache, Cpu, probe_cpu
from finial.machine.energy import Counter, probe_energy
from finial.machine.extras import Extra, probe_extras
from finial.machine.gpu import Gpu, Vulkan, probe_gpus, probe_vulkan
from finial.machine.memory import Memory, peak_bytes, probe_memory
from finial.machine.native import (
    Bandwidth,
    BandwidthProbe,
    Native,
    bandwidth_bytes,
    measure_bandwidth,
    probe_native,
    thread_steps,
)
from finial.machine.sources import Sources, read

__all__ = [
    "Bandwidth",
    "BandwidthProbe",
    "Cache",
    "Counter",
    "Cpu",
    "Extra",
    "Gpu",
    "Machine",
    "Memory",
    "Native",
    "Sources",
    "System",
    "Vulkan",
    "bandwidth_bytes",
    "describe",
    "measure_bandwidth",
    "peak_bytes",
    "probe_cpu",
    "probe_energy",
    "probe_extras",
    "probe_gpus",
    "probe_memory",
    "probe_native",
    "probe_vulkan",
    "thread_steps",
]


@dataclass(frozen=True)
class System:
    """The operating system and the Python that runs."""

    name: str
    kernel: str
    arch: str
    python: str


@dataclass(frozen=True)
class Machine:
    """Everything; `extras` is None when finial runs from its sources without being installed."""

    system: System
    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...]
    vulkan: Vulkan
    energy: tuple[Counter, ...]
    extras: tuple[Extra, ...] | None
    native: Native
    bandwidth: tuple[Bandwidth, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def describe(sources: Sources | None = None, bandwidth_s: float = 0.0) -> Machine:
    """The machine that `sources` show.

    Args:
        bandwidth_s: seconds for each measurement of the read bandwidth; 0 measures nothing.
    """
    sources = sources if sources is not None else Sources()
    cpu, memory = probe_cpu(sources), probe_memory(sources)
    measured: tuple[Bandwidth, ...] = ()
    if bandwidth_s > 0:
        measured = measure_bandwidth(thread_steps(cpu.usable_threads), bandwidth_bytes(cpu, memory), bandwidth_s)
    return Machine(
        system=probe_system(sources),
        cpu=cpu,
        memory=memory,
        gpus=probe_gpus(sources),
        vulkan=probe_vulkan(sources),
        energy=probe_energy(sources),
        extras=probe_extras(),
        native=probe_native(),
        bandwidth=measured,
    )


def probe_system(sources: Sources) -> System:
    """Name and version of the operating system, its kernel and architecture, and Python's version."""
    name, kernel = sources.system, platform.release()
    if sources.linux:
        lines = (line.partition("=") for line in (read(sources.root / "etc" / "os-release") or "").splitlines())
        release = {key: value.strip("\"'") for key, _, value in lines}
        name = release.get("PRETTY_NAME") or release.get("NAME") or "Linux"
        kernel = read(sources.proc / "sys" / "kernel" / "osrelease") or kernel
    elif sources.system == "Darwin":
        name = f"macOS {platform.mac_ver()[0]}".strip()
    elif sources.system == "Windows":
        name = f"Windows {platform.version()}"
    return System(name, kernel, sources.arch, f"{platform.python_implementation()} {platform.python_version()}")
