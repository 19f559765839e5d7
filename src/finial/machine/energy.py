"""Cumulative energy counters: which there are, whether this process may read them, and why not.

Knows Linux's powercap tree (RAPL) and NVML.  Counters only: a wattage that somebody estimated is not one.

    for counter in probe_energy(Sources()): counter.name, counter.joules or counter.reason
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from finial.machine.gpu import nvml, nvml_devices
from finial.machine.sources import Sources, read, read_int


@dataclass(frozen=True)
class Counter:
    """One counter.

    Attributes:
        joules: its present value, since an unspecified beginning; None when it cannot be read.
        reason: why it cannot be read, and what would change that; empty when it can.
        range_joules: where it begins again at zero; None: it does not, or nobody says.
    """

    name: str
    joules: float | None
    reason: str
    range_joules: float | None = None

    @property
    def readable(self) -> bool:
        """Whether its value was read."""
        return self.joules is not None


def probe_energy(sources: Sources) -> tuple[Counter, ...]:
    """Every counter of this machine; at least one entry, which says why there is none.  Never raises."""
    found = [*(_rapl(sources) if sources.linux else ()), *_nvml(sources)]
    if sources.system == "Darwin":
        found.append(Counter("Apple powermetrics", None, "it reports power, not energy, and to root only"))
    if not found:
        reason = "no RAPL under /sys/class/powercap, no NVML"
        found.append(
            Counter("none", None, reason if sources.linux else f"{sources.system} offers none without a driver")
        )
    return tuple(found)


def _rapl(sources: Sources) -> list[Counter]:
    """Zones `intel-rapl:N[:M]`, also on AMD (Linux, power/powercap: energy_uj in microjoules)."""
    counters = []
    folder = sources.sys / "class" / "powercap"
    for zone in sorted(folder.glob("intel-rapl:*")):
        name, file = read(zone / "name"), zone / "energy_uj"
        if name is None or not file.exists():
            continue
        parent = read(folder / zone.name.rsplit(":", 1)[0] / "name") if zone.name.count(":") > 1 else None
        label = f"RAPL {parent}/{name}" if parent else f"RAPL {name}"
        value = read_int(file)
        # Readable by root alone since the PLATYPUS attack (CVE-2020-8694).
        reason = (
            "" if value is not None else f"not permitted; `sudo chmod a+r {folder}/intel-rapl:*/energy_uj` allows it"
        )
        span = read_int(zone / "max_energy_range_uj")
        joules = None if value is None else value / 1e6
        counters.append(Counter(label, joules, reason, None if span is None else span / 1e6))
    return counters


def _nvml(sources: Sources) -> list[Counter]:
    """nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver was loaded, Volta and later (nvml.h)."""
    counters = []
    with nvml(sources) as library:
        if library is None:
            return []
        for index, (name, handle) in enumerate(nvml_devices(library)):
            millijoules = ctypes.c_ulonglong()
            code = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
            value = millijoules.value / 1e3 if code == 0 else None
            reason = "" if code == 0 else "this device has no such counter" if code == 3 else f"NVML error {code}"
            counters.append(Counter(f"NVML {index} {name}", value, reason))
    return counters
