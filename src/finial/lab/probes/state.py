"""The machine's state before and after: load, clocks, governor, throttling, temperature; and what changed between.

Knows /proc, /sys and NVML; nothing of engines.

    before = read_state(Sources()); …; warnings(before, read_state(Sources()))
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finial.machine.gpu import nvml, nvml_devices
from finial.machine.sources import Sources, read, read_int

# nvmlDeviceGetCurrentClocksEventReasons, nvml.h; idle and applications' own settings are not throttling.
REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2
SLOWER = 0.95  # a clock below this share of what it was
BUSY = 0.05  # of a machine's processors, per one


@dataclass(frozen=True)
class DeviceState:
    """One GPU; None: unknown."""

    name: str
    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    throttled: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """The machine at one time; None: it does not say.

    Attributes:
        load: runnable threads, mean over the last minute (proc_loadavg(5)); per_core: divided by the cores.
        mhz: mean of the cores' present clocks; lowest_mhz: of the slowest.
        governors: of frequency scaling, all that are in use.
        throttles: how often any core was throttled for heat since boot.
        temperature_c: of the hottest sensor.
    """

    load: float | None = None
    per_core: float | None = None
    mhz: float | None = None
    lowest_mhz: float | None = None
    governors: tuple[str, ...] = ()
    throttles: int | None = None
    temperature_c: float | None = None
    devices: tuple[DeviceState, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def read_state(sources: Sources | None = None) -> State:
    """Never raises."""
    sources = sources if sources is not None else Sources()
    devices = tuple(_devices(sources))
    if not sources.linux:
        return State(devices=devices)
    words = (read(sources.proc / "loadavg") or "").split()
    load = float(words[0]) if words else None
    cpus = sources.sys / "devices" / "system" / "cpu"
    folders = sorted(cpus.glob("cpu[0-9]*"))
    # A machine without frequency scaling, as most virtual ones are, shows the clock in /proc/cpuinfo alone.
    clocks = [khz / 1e3 for f in folders if (khz := read_int(f / "cpufreq" / "scaling_cur_freq")) is not None]
    if not clocks:
        lines = (read(sources.proc / "cpuinfo") or "").splitlines()
        clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    governors = {read(folder / "cpufreq" / "scaling_governor") for folder in folders} - {None}
    counts = [read_int(folder / "thermal_throttle" / "core_throttle_count") for folder in folders]
    known = [count for count in counts if count is not None]
    return State(
        load=load,
        per_core=None if load is None or not folders else load / len(folders),
        mhz=sum(clocks) / len(clocks) if clocks else None,
        lowest_mhz=min(clocks) if clocks else None,
        governors=tuple(sorted(g for g in governors if g)),
        throttles=sum(known) if known else None,
        temperature_c=_temperature(sources),
        devices=devices,
    )


def warnings(before: State, after: State) -> list[str]:
    """What between two states makes a measurement doubtful, in words; empty when nothing does."""
    found = []
    if before.per_core is not None and before.per_core > BUSY * 2:
        found.append(f"load {before.load:.2f} before it began: something else was running")
    if before.governors and set(before.governors) != {"performance"}:
        found.append(f"frequency governor {', '.join(before.governors)}, not performance")
    if before.throttles is not None and after.throttles is not None and after.throttles > before.throttles:
        found.append(f"throttled for heat {after.throttles - before.throttles} times")
    if before.mhz and after.mhz and after.mhz < SLOWER * before.mhz:
        found.append(f"cores slowed from {before.mhz:.0f} to {after.mhz:.0f} MHz")
    for old, new in zip(before.devices, after.devices, strict=False):
        if new.throttled:
            found.append(f"{new.name} throttled: {', '.join(new.throttled)}")
        if old.sm_mhz and new.sm_mhz and new.sm_mhz < SLOWER * old.sm_mhz:
            found.append(f"{new.name} slowed from {old.sm_mhz} to {new.sm_mhz} MHz")
    return found


@dataclass
class FakeState:
    """A machine whose states are told in advance; the last one stays."""

    states: Sequence[State] = field(default_factory=lambda: [State(load=0.0, per_core=0.0)])
    reads: int = 0

    def read(self) -> State:
        """The next one."""
        self.reads += 1
        return self.states[min(self.reads, len(self.states)) - 1]


def _temperature(sources: Sources) -> float | None:
    """Millidegrees of thermal zones and hwmon sensors (Linux, thermal/sysfs-api; hwmon/sysfs-interface)."""
    classes = sources.sys / "class"
    files = [*classes.glob("thermal/thermal_zone*/temp"), *classes.glob("hwmon/hwmon*/temp*_input")]
    values = [value for file in files if (value := read_int(file)) is not None]
    plausible = [value / 1e3 for value in values if 0 < value < 150_000]  # unconnected sensors read nonsense
    return max(plausible, default=None)


def _devices(sources: Sources) -> list[DeviceState]:
    with nvml(sources) as library:
        if library is None:
            return []
        found = []
        for name, handle in nvml_devices(library):
            mask = ctypes.c_ulonglong()
            # Its older name, which every driver still has.
            known = library.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(mask)) == 0
            found.append(
                DeviceState(
                    name=name,
                    sm_mhz=_number(library.nvmlDeviceGetClockInfo, handle, NVML_CLOCK_SM),
                    memory_mhz=_number(library.nvmlDeviceGetClockInfo, handle, NVML_CLOCK_MEM),
                    temperature_c=_number(library.nvmlDeviceGetTemperature, handle, NVML_TEMPERATURE_GPU),
                    throttled=tuple(r for bit, r in REASONS.items() if mask.value & bit) if known else (),
                )
            )
        return found


def _number(function: Any, handle: Any, which: int) -> int | None:
    value = ctypes.c_uint()
    return int(value.value) if function(handle, ctypes.c_uint(which), ctypes.byref(value)) == 0 else None
