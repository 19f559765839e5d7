"""The CPU: model, sockets, cores, threads, those that this process may use, instruction sets, caches.

Knows /proc, /sys, control groups, sysctl and the Windows registry; nothing of what the numbers are for.

    cpu = probe_cpu(Sources()); cpu.usable_cores
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finial.machine.sources import Sources, cgroup_folders, cpu_list, read, read_int, to_int

# What matrix products are made of, in the order in which the hardware got them; Linux's names of the flags.
# fmt: off
X86_FLAGS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)
ARM_FLAGS = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme", "sme2")
# fmt: on

# Linux, arch/arm64/include/asm/cputype.h: implementer and part numbers of the cores that servers and boards have.
ARM_PARTS: Mapping[tuple[int, int], str] = {
    (0x41, 0xD03): "Arm Cortex-A53",
    (0x41, 0xD05): "Arm Cortex-A55",
    (0x41, 0xD08): "Arm Cortex-A72",
    (0x41, 0xD0B): "Arm Cortex-A76",
    (0x41, 0xD41): "Arm Cortex-A78",
    (0x41, 0xD0C): "Arm Neoverse N1",
    (0x41, 0xD40): "Arm Neoverse V1",
    (0x41, 0xD49): "Arm Neoverse N2",
    (0x41, 0xD4F): "Arm Neoverse V2",
    (0xC0, 0xAC3): "Ampere-1",
    (0x61, 0x022): "Apple M1 (Icestorm)",
    (0x61, 0x023): "Apple M1 (Firestorm)",
}

# winnt.h, IsProcessorFeaturePresent: PF_* numbers.
WINDOWS_FEATURES: Mapping[int, str] = {
    38: "sse4_2",
    39: "avx",
    40: "avx2",
    41: "avx512f",
    19: "asimd",
    43: "asimddp",
    46: "sve",
}


@dataclass(frozen=True)
class Cache:
    """One kind of cache: `count` of them, `bytes` each, `shared` logical CPUs on one."""

    level: int
    kind: str  # "data", "instruction", "unified"
    bytes: int
    count: int
    shared: int


@dataclass(frozen=True)
class Cpu:
    """A machine's processors.  None: this system does not say.

    Attributes:
        threads: logical CPUs that are online; cores: physical ones among them.
        usable_threads, usable_cores: those left by the affinity mask and the control group's CPU quota, at least 1.
        quota: CPUs' worth of time that the control group grants, or None without a limit.
        features: of X86_FLAGS or ARM_FLAGS those that CPU and kernel have, in that order.
        load: processes that ran or waited to, mean of the last minute.
    """

    model: str
    sockets: int | None
    cores: int | None
    threads: int
    usable_cores: int
    usable_threads: int
    quota: float | None
    features: tuple[str, ...]
    caches: tuple[Cache, ...]
    numa_nodes: int | None
    governor: str | None
    load: float | None

    @property
    def last_level_bytes(self) -> int:
        """All caches of the highest level together; 0 when unknown."""
        level = max((cache.level for cache in self.caches), default=0)
        return sum(cache.bytes * cache.count for cache in self.caches if cache.level == level)


def probe_cpu(sources: Sources) -> Cpu:
    """Never raises: what a system does not say is None or empty."""
    if sources.linux:
        return _linux(sources)
    if sources.system == "Darwin":
        return _mac(sources)
    if sources.system == "Windows":
        return _windows()
    count = os.cpu_count() or 1
    return _plain("unknown", count, None)


def _plain(model: str, threads: int, cores: int | None, features: tuple[str, ...] = ()) -> Cpu:
    return Cpu(model, None, cores, threads, cores or threads, threads, None, features, (), None, None, _load())


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):  # Windows has none
        return None


# --------------------------------------------------------------------------------------------------- Linux


def _linux(sources: Sources) -> Cpu:
    blocks = _cpuinfo(read(sources.proc / "cpuinfo") or "")
    first = blocks[0] if blocks else {}
    folder = sources.sys / "devices" / "system" / "cpu"
    online = cpu_list(read(folder / "online") or "") or frozenset(range(max(1, len(blocks))))
    places = {cpu: _place(sources, blocks, cpu) for cpu in online}
    known = bool(places) and all(place is not None for place in places.values())
    allowed = sources.affinity()
    usable = (online & allowed if allowed else online) or online
    quota = _quota(sources)
    limit = math.ceil(quota) if quota is not None else len(online)
    usable_cores = len({places[cpu] for cpu in usable}) if known else len(usable)
    load = read(sources.proc / "loadavg")
    flags = (first.get("flags") or first.get("Features") or "").split()
    nodes = list((sources.sys / "devices" / "system" / "node").glob("node[0-9]*"))
    return Cpu(
        model=_model(sources, first),
        sockets=len({place[0] for place in places.values() if place}) if known else None,
        cores=len(set(places.values())) if known else None,
        threads=len(online),
        usable_cores=max(1, min(usable_cores, limit)),
        usable_threads=max(1, min(len(usable), limit)),
        quota=quota,
        features=_ordered(flags),
        caches=_caches(sources, online),
        numa_nodes=len(nodes) or None,
        governor=read(folder / "cpu0" / "cpufreq" / "scaling_governor"),
        load=float(load.split()[0]) if load else None,
    )


def _cpuinfo(text: str) -> list[dict[str, str]]:
    blocks = []
    for part in re.split(r"\n\s*\n", text):
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in part.splitlines())}
        if "processor" in fields:
            blocks.append(fields)
    return blocks


def _model(sources: Sources, first: Mapping[str, str]) -> str:
    if first.get("model name"):
        return " ".join(first["model name"].split())
    implementer, part = to_int(first.get("CPU implementer")), to_int(first.get("CPU part"))
    board = read(sources.proc / "device-tree" / "model")
    if implementer is not None and part is not None:
        name = ARM_PARTS.get((implementer, part), f"Arm implementer {implementer:#x} part {part:#x}")
        return f"{name} ({board})" if board else name
    return board or first.get("Model") or sources.arch or "unknown"


def _place(sources: Sources, blocks: list[dict[str, str]], cpu: int) -> tuple[int, int] | None:
    """(socket, core) of a logical CPU."""
    topology = sources.sys / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
    package, core = read_int(topology / "physical_package_id"), read_int(topology / "core_id")
    if package is None or core is None:
        block = next((b for b in blocks if b["processor"] == str(cpu)), {})
        package, core = to_int(block.get("physical id")), to_int(block.get("core id"))
    # Some boards give -1 as their package: one socket.
    return None if package is None or core is None else (max(0, package), core)


def _quota(sources: Sources) -> float | None:
    """CPUs' worth of time; the tightest of this group and those around it (Linux, admin-guide/cgroup-v2, cpu.max)."""
    folders, unified = cgroup_folders(sources, "cpu")
    grants = []
    for folder in folders:
        if unified:
            words = (read(folder / "cpu.max") or "").split()
            quota, period = (to_int(words[0]), to_int(words[1])) if len(words) == 2 else (None, None)
        else:
            quota, period = read_int(folder / "cpu.cfs_quota_us"), read_int(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            grants.append(quota / period)
    return min(grants, default=None)


def _ordered(flags: Iterable[str]) -> tuple[str, ...]:
    have = set(flags)
    return tuple(flag for flag in (*X86_FLAGS, *ARM_FLAGS) if flag in have)


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _caches(sources: Sources, online: frozenset[int]) -> tuple[Cache, ...]:
    groups: dict[tuple[int, str, int], set[frozenset[int]]] = {}
    for cpu in sorted(online):
        for index in sorted((sources.sys / "devices" / "system" / "cpu" / f"cpu{cpu}" / "cache").glob("index[0-9]*")):
            level, size = read_int(index / "level"), re.fullmatch(r"(\d+)([KMG]?)", read(index / "size") or "")
            kind, shared = (read(index / "type") or "unified").lower(), read(index / "shared_cpu_list")
            if level is not None and size is not None:
                key = (level, kind, int(size[1]) * _UNITS.get(size[2], 1))
                groups.setdefault(key, set()).add(cpu_list(shared) if shared else frozenset([cpu]))
    return tuple(
        Cache(level, kind, nbytes, len(sets), max(map(len, sets)))
        for (level, kind, nbytes), sets in sorted(groups.items())
    )


# ------------------------------------------------------------------------------------------- macOS, Windows


def _mac(sources: Sources) -> Cpu:
    values: dict[str, str] = {}
    for line in (sources.run(["sysctl", "-a"]) or "").splitlines():
        key, separator, value = line.partition(": ")
        if separator:
            values[key] = value.strip()

    def number(key: str) -> int | None:
        return to_int(values.get(key))

    # Apple's names (sysctl hw.optional) beside Linux's.
    arm = {
        "AdvSIMD": "asimd",
        "arm.FEAT_FP16": "asimdhp",
        "arm.FEAT_DotProd": "asimddp",
        "arm.FEAT_I8MM": "i8mm",
        "arm.FEAT_BF16": "bf16",
        "arm.FEAT_SME": "sme",
        "arm.FEAT_SME2": "sme2",
    }
    flags = {name for key, name in arm.items() if number(f"hw.optional.{key}")}
    intel = f"{values.get('machdep.cpu.features', '')} {values.get('machdep.cpu.leaf7_features', '')}"
    flags |= {{"sse4.2": "sse4_2", "avx1.0": "avx"}.get(flag, flag) for flag in intel.lower().split()}
    threads = number("hw.logicalcpu") or os.cpu_count() or 1
    cores = number("hw.physicalcpu") or threads
    caches = []
    for level, kind, key in ((1, "instruction", "hw.l1icachesize"), (1, "data", "hw.l1dcachesize"),
                             (2, "unified", "hw.l2cachesize"), (3, "unified", "hw.l3cachesize")):  # fmt: skip
        nbytes = number(key)
        if nbytes:
            shared = 1 if level == 1 else threads
            caches.append(Cache(level, kind, nbytes, max(1, threads // shared), shared))
    return Cpu(
        model=values.get("machdep.cpu.brand_string", "unknown"),
        sockets=number("hw.packages"),
        cores=cores,
        threads=threads,
        usable_cores=cores,
        usable_threads=threads,
        quota=None,
        features=_ordered(flags),
        caches=tuple(caches),
        numa_nodes=None,
        governor=None,
        load=_load(),
    )


def _windows() -> Cpu:
    model, features = "unknown", set()
    try:
        registry = importlib.import_module("winreg")
        path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, path) as key:
            model = str(registry.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    except (ImportError, OSError):
        model = os.environ.get("PROCESSOR_IDENTIFIER", "unknown")
    windows = getattr(ctypes, "windll", None)
    if windows is not None:
        present = windows.kernel32.IsProcessorFeaturePresent
        features = {name for number, name in WINDOWS_FEATURES.items() if present(number)}
    return _plain(model, os.cpu_count() or 1, None, _ordered(features))
