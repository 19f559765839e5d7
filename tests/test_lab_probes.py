"""The lab's probes on machines that are not here: clocks, trees of processes, counters, states; and on this one."""

from __future__ import annotations

import plistlib
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finial.lab import checks, session
from finial.lab.analysis import energy
from finial.lab.engines.table import ENGINES
from finial.lab.limits import Probe
from finial.lab.plan import Plan
from finial.lab.probes.clock import DeviceClock, FakeClock
from finial.lab.probes.energy import (
    AppleMeter,
    CounterMeter,
    FakeMeter,
    Meter,
    NoMeter,
    Reading,
    cost,
    idle,
    open_meter,
    whole,
)
from finial.lab.probes.memory import FakeMemory, MemoryProbe, Parts, parts, tree
from finial.lab.probes.state import FakeState, State, read_state, warnings
from finial.lab.record import Data, Record
from finial.lab.report import markdown_text
from finial.lab.session import Model, Session
from finial.lab.workloads import Sizes
from finial.machine import Sources, probe_cpu
from machines import linux, write
from waiting import HUNG_S, until

MIB = 1 << 20


class Nvml:
    """One board whose readings are set from outside."""

    def __init__(self) -> None:
        self.millijoules, self.used, self.sm, self.celsius, self.reasons = 0, 0, 1980, 40, 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, number: Any) -> int:
        number._obj.value = 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = 1
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: Any) -> int:
        buffer.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:
        energy._obj.value = self.millijoules
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.used = self.used
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, which: Any, value: Any) -> int:
        value._obj.value = {1: self.sm, 2: 3201}[which.value]
        return 0

    def nvmlDeviceGetTemperature(self, handle: Any, which: Any, value: Any) -> int:
        value._obj.value = self.celsius
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, mask: Any) -> int:
        mask._obj.value = self.reasons
        return 0


def nvidia(root: Path, board: Nvml, files: Mapping[str, str] | None = None) -> Sources:
    return linux(root, files or {}, load=lambda names: board if "libnvidia-ml.so.1" in names else None)


# --- time --------------------------------------------------------------------------------------------------------


def test_the_clock_is_read_after_the_device_is_done() -> None:
    order: list[str] = []
    device = FakeClock()

    def synchronise() -> None:
        order.append("wait")
        device.sleep(2.0)  # what was queued still had to run

    def host() -> float:
        order.append("read")
        return device.at

    clock = DeviceClock(synchronise, host)
    start = clock.now()
    assert clock.now() - start == 2.0 and order == ["wait", "read"] * 2


def test_the_clock_knows_what_a_reading_takes() -> None:
    fake = FakeClock()
    assert DeviceClock(lambda: fake.sleep(0.25), fake.now).overhead_s() == 0.25
    assert 0 <= DeviceClock().overhead_s() < 1e-3


# --- memory ------------------------------------------------------------------------------------------------------


def process(
    pid: int, parent: int, rss_kb: int, pss_kb: int | None = None, peak_kb: int | None = None
) -> dict[str, str]:
    files = {
        f"proc/{pid}/stat": f"{pid} (a (strange) name) S {parent} 1 1",
        f"proc/{pid}/status": f"VmHWM:\t{peak_kb or rss_kb} kB\nVmRSS:\t{rss_kb} kB\n",
    }
    return files if pss_kb is None else files | {f"proc/{pid}/smaps_rollup": f"Rss: {rss_kb} kB\nPss: {pss_kb} kB\n"}


def test_a_tree_of_processes_counts_shared_pages_once(tmp_path: Path) -> None:
    files = (
        process(10, 1, 1024, 700) | process(11, 10, 1024, 600) | process(12, 11, 512, 100) | process(99, 1, 9999, 9999)
    )
    here = linux(tmp_path, files)
    assert tree(10, here) == [10, 11, 12]
    probe = MemoryProbe(10, here)
    assert probe.now() == 1400 << 10
    probe.sample()
    assert probe.peak().how == "PSS" and probe.peak().process_bytes == 1400 << 10


def test_children_are_taken_from_the_kernel_where_it_keeps_them(tmp_path: Path) -> None:
    files = process(10, 1, 1024, 700) | process(11, 10, 1024, 600) | process(12, 1, 512, 100)
    children = {"proc/10/task/10/children": "11 ", "proc/10/task/15/children": "12 ", "proc/11/task/11/children": ""}
    assert tree(10, linux(tmp_path, files | children)) == [10, 11, 12], "12 was started by another thread"


def test_a_process_alone_has_its_high_water_mark(tmp_path: Path) -> None:
    probe = MemoryProbe(10, linux(tmp_path, process(10, 1, 1024, peak_kb=5000)))
    probe.sample()
    assert probe.peak().process_bytes == 5000 << 10 and probe.peak().how == "RSS"


def test_a_process_that_is_gone_is_unknown(tmp_path: Path) -> None:
    with MemoryProbe(10, linux(tmp_path, process(99, 1, 5))) as probe:
        assert probe.now() is None
    assert probe.peak().process_bytes is None and probe.peak().samples == 0


def test_macs_are_asked_with_ps() -> None:
    report = "    1     0   900\n   10     1  2048\n   11    10  1024\n   12     1  4096\nPID garbage\n"
    asked: list[list[str]] = []

    def run(command: Any) -> str:
        asked.append(list(command))
        return report

    here = Sources(system="Darwin", run=run, load=lambda names: None)
    assert MemoryProbe(10, here).now() == 3 * MIB and asked[0][0] == "ps"


def test_device_memory_is_what_came_on_top(tmp_path: Path) -> None:
    board = Nvml()
    board.used = 500 * MIB
    with MemoryProbe(10, nvidia(tmp_path, board, process(10, 1, 4)), interval_s=0.005) as probe:
        board.used = 2500 * MIB
        seen = probe.peak().samples
        until(lambda: probe.peak().samples > seen + 1)  # the first may have begun before
        board.used = 700 * MIB
    assert probe.peak().device_bytes == 2000 * MIB


def test_memory_of_a_real_child_and_its_child() -> None:
    grandchild = "b = bytearray(60 << 20); print('.', flush=True); input()"
    code = (
        "import subprocess, sys; b = bytearray(40 << 20);"
        f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE);"
        "p.stdout.readline(); print('.', flush=True); input(); p.communicate(b'x\\n')"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    with child, MemoryProbe(child.pid, interval_s=0.01) as probe:
        child.stdout.readline()
        now = probe.now()
        child.stdin.write(b"x\n")
        child.stdin.flush()
        child.wait(HUNG_S)
    peak = probe.peak()
    if now is None:
        pytest.skip("this system does not say what a process holds")
    assert peak.process_bytes is not None and 100 * MIB <= now <= 200 * MIB and peak.process_bytes >= 100 * MIB


def test_parts_of_a_peak() -> None:
    assert parts(100, 60, 30) == Parts(60, 30, 10)
    assert parts(80, 60, 30) == Parts(60, 30, None), "a file mapped but not touched"
    assert parts(100, None, 30) == Parts(None, 30, None)


def test_fake_memory_keeps_the_most() -> None:
    fake = FakeMemory(5)
    with fake:
        fake.now()
        fake.held = 9
        fake.now()
        fake.held = 2
    assert fake.peak().process_bytes == 9


# --- energy ------------------------------------------------------------------------------------------------------

RAPL = {
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "1000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "500000\n",
    "sys/class/powercap/intel-rapl:0:1/name": "dram\n",
    "sys/class/powercap/intel-rapl:0:1/energy_uj": "100000\n",
    "sys/class/powercap/intel-rapl:1/name": "psys\n",
    "sys/class/powercap/intel-rapl:1/energy_uj": "9000000\n",
}


def test_rapl_adds_up_what_does_not_overlap(tmp_path: Path) -> None:
    clock = FakeClock()
    meter = CounterMeter(linux(tmp_path, RAPL), clock)
    before = meter.read()
    clock.sleep(4)
    zone = "sys/class/powercap/intel-rapl:"
    write(tmp_path, {f"{zone}0/energy_uj": "81000000", f"{zone}0:0/energy_uj": "60500000"})
    write(tmp_path, {f"{zone}0:1/energy_uj": "8100000", f"{zone}1/energy_uj": "109000000"})
    used = meter.used(before, meter.read())
    assert used.gross_j["RAPL package-0"] == 80 and used.gross_j["RAPL package-0/core"] == 60
    assert used.total_j == pytest.approx(88) and used.watts == pytest.approx(22), "package and memory, no more"
    assert used.counters == "RAPL package-0 + RAPL package-0/dram"


def test_a_counter_that_begins_again_is_continued(tmp_path: Path) -> None:
    files = RAPL | {"sys/class/powercap/intel-rapl:0/energy_uj": "262143000000"}
    clock = FakeClock()
    meter = CounterMeter(linux(tmp_path, files), clock)
    before = meter.read()
    clock.sleep(2)
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "671150"})
    assert meter.used(before, meter.read()).gross_j["RAPL package-0"] == pytest.approx(1.0)


def test_board_energy_gross_and_net_of_two_idles(tmp_path: Path) -> None:
    board, clock = Nvml(), FakeClock()
    meter = CounterMeter(nvidia(tmp_path, board), clock)

    def work(seconds: float, watts: float) -> None:
        clock.sleep(seconds)
        board.millijoules += int(1000 * watts * seconds)

    empty = idle(meter, 5, lambda seconds: work(seconds, 75))
    loaded = idle(meter, 5, lambda seconds: work(seconds, 120))
    before = meter.read()
    work(10, 400)
    window = meter.used(before, meter.read())
    found = cost(window, 1000, empty, loaded)
    assert (found.gross_j, found.net_empty_j, found.net_loaded_j) == pytest.approx((4.0, 3.25, 2.8))
    assert found.counters == "NVML 0 NVIDIA H200"


def test_a_window_shorter_than_a_counters_step_gives_no_number(tmp_path: Path) -> None:
    board, clock = Nvml(), FakeClock()
    meter = CounterMeter(nvidia(tmp_path, board), clock)
    before = meter.read()
    clock.sleep(0.3)
    board.millijoules += 90_000
    used = meter.used(before, meter.read())
    assert used.total_j is None and used.watts is None and "shorter" in used.reason
    assert cost(used, 10).gross_j is None


def test_no_counter_is_unavailable_with_its_reason(tmp_path: Path) -> None:
    meter = open_meter(linux(tmp_path, {}), FakeClock())
    assert isinstance(meter, NoMeter)
    used = meter.used(meter.read(), meter.read())
    assert used.total_j is None and "no RAPL" in used.reason
    found = cost(used, 5, used, used)
    assert (found.gross_j, found.net_empty_j, found.net_loaded_j) == (None, None, None) and "no RAPL" in found.reason


def test_which_counters_add_up() -> None:
    assert whole(["NVML 0 A", "NVML 1 A"]) == ["NVML 0 A", "NVML 1 A"]
    assert whole(["RAPL psys"]) == ["RAPL psys"]
    two = ["RAPL package-0", "RAPL package-0/core", "RAPL package-1", "RAPL psys"]
    assert whole(two) == ["RAPL package-0", "RAPL package-1"]


def test_powermetrics_is_added_up(tmp_path: Path) -> None:
    samples = [
        {"processor": {"cpu_energy": 800, "gpu_energy": 150, "ane_energy": 50}},
        {"processor": {"cpu_energy": 500}},
    ]
    stream = b"\0\n".join(plistlib.dumps(sample) for sample in samples) + b"\0garbage\0"
    (tmp_path / "samples").write_bytes(stream)
    code = """
import sys
sys.stdout.buffer.write(open(sys.argv[1], "rb").read()[:-9])
sys.stdout.flush()
input()
"""
    meter = AppleMeter([sys.executable, "-c", code, str(tmp_path / "samples")])
    try:
        until(lambda: meter.read().joules.get(AppleMeter.NAME, 0) >= 1)
        assert meter.read().joules == {AppleMeter.NAME: pytest.approx(1.0)}, "the second sample has not ended yet"
    finally:
        meter.close()


def test_fake_meter_integrates_its_power() -> None:
    clock = FakeClock()
    meter = FakeMeter(clock, watts=10)
    before = meter.read()
    clock.sleep(2)
    meter.watts = 30
    clock.sleep(1)
    used = meter.used(before, meter.read())
    assert used.total_j == 50 and idle(meter, 2, clock.sleep).watts == 30


# A machine of 10 W, 15 W with the engines loaded, 40 W at work: seconds and watts between one reading and the next.
INTERVALS = ((0, 0), (0, 0), (2, 10), (0, 0), (0, 0), (2, 15), (0, 0), (4, 40))


class Tree(CounterMeter):
    """RAPL's files as a kernel would write them, on a clock that moves by `INTERVALS`."""

    def __init__(self, root: Path) -> None:
        self.root, self.left, self.joules = root, iter(INTERVALS), 1.0
        super().__init__(linux(root, RAPL), FakeClock())

    def read(self) -> Reading:
        seconds, watts = next(self.left)
        assert isinstance(self.clock, FakeClock)
        self.clock.sleep(seconds)
        self.joules += seconds * watts
        write(self.root, {"sys/class/powercap/intel-rapl:0/energy_uj": f"{round(self.joules * 1e6)}"})
        return super().read()


class FakeProbe:
    def now(self, threads: int, nbytes: int = 0) -> dict[str, Any]:
        return {"read_gb_s": 50.0, "core_to_core_ns": 55.0, "at": time.time()}

    def peaks(self, threads: int) -> dict[str, float]:
        return {"bf16": 100.0}


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, meter: Meter) -> Data:
    """The record of a run of finial on the demo model, with such a meter."""
    monkeypatch.setattr(session, "WINDOW_S", 0.01)
    monkeypatch.setattr(session, "IDLE_S", 0.01)
    monkeypatch.setattr(checks, "LATE_S", HUNG_S)
    model = Model.find("demo")
    places = model.places(folder / "engines", {}, folder)
    plan = Plan.of(["decode"], Sizes(generate=(9,), depth=(8,), rounds=2), threads=[1], usable=1)
    made = Session(model, plan, places, [ENGINES["finial"]], folder / "r.json")
    made.run(lambda text: None, judged=False, probe=FakeProbe(), meter=meter)
    return Record.open(folder / "r.json").data


def test_a_run_measures_its_energy_between_two_idles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = measured(tmp_path, monkeypatch, Tree(tmp_path / "machine"))
    (cell,) = data.cells.values()
    window = cell.engines["finial"].energy
    assert window is not None and window.seconds == 4 and window.joules["RAPL package-0"] == pytest.approx(160)
    assert window.tokens >= 9 and window.tokens % 9 == 0
    assert data.idle_w["empty"]["RAPL package-0"] == 10 and data.idle_w["loaded demo/stored/1"]["RAPL package-0"] == 15
    found = energy(data, cell, "finial")
    assert found is not None and found.watts == 40 and "package-0" in found.counters
    joules = [each * window.tokens for each in (found.gross_j, found.net_empty_j, found.net_loaded_j) if each]
    assert joules == pytest.approx([160, 160 - 4 * 10, 160 - 4 * 15])
    assert data.energy == "" and "energy: RAPL package-0" in markdown_text([data])


def test_a_run_without_a_counter_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = measured(tmp_path, monkeypatch, open_meter(linux(tmp_path / "machine", {})))
    assert "no RAPL" in data.energy and not data.idle_w
    assert all(row.energy is None for cell in data.cells.values() for row in cell.engines.values())
    assert f"energy: unavailable ({data.energy})" in markdown_text([data])


# --- state -------------------------------------------------------------------------------------------------------


def cpu(number: int, khz: int, governor: str = "performance", throttles: int = 0) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu{number}"
    return {
        f"{folder}/cpufreq/scaling_cur_freq": f"{khz}\n",
        f"{folder}/cpufreq/scaling_governor": f"{governor}\n",
        f"{folder}/thermal_throttle/core_throttle_count": f"{throttles}\n",
    }


def test_state_of_a_machine(tmp_path: Path) -> None:
    files = (
        cpu(0, 3_000_000)
        | cpu(1, 2_000_000, "powersave", 3)
        | {
            "proc/loadavg": "1.50 1.00 0.50 3/500 1234\n",
            "sys/class/thermal/thermal_zone0/temp": "55000\n",
            "sys/class/hwmon/hwmon2/temp1_input": "71500\n",
            "sys/class/hwmon/hwmon2/temp2_input": "-274000\n",
        }
    )
    state = read_state(linux(tmp_path, files))
    assert (state.load, state.per_core, state.mhz, state.lowest_mhz) == (1.5, 0.75, 2500, 2000)
    assert state.governors == ("performance", "powersave") and state.throttles == 3 and state.temperature_c == 71.5


def test_a_virtual_machine_shows_its_clock_in_cpuinfo(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": "processor: 0\ncpu MHz\t\t: 2596.132\nprocessor: 1\ncpu MHz\t\t: 2400.000\n"}
    state = read_state(linux(tmp_path, files))
    assert state.mhz == pytest.approx(2498.066) and state.governors == () and state.throttles is None


def test_state_of_a_board(tmp_path: Path) -> None:
    board = Nvml()
    board.reasons = 0x01 | 0x04 | 0x40  # idle is no reason to worry
    (device,) = read_state(nvidia(tmp_path, board)).devices
    assert (device.sm_mhz, device.memory_mhz, device.temperature_c) == (1980, 3201, 40)
    assert device.throttled == ("software power cap", "hardware thermal slowdown")


def test_what_changed_is_said(tmp_path: Path) -> None:
    board = Nvml()
    quiet = cpu(0, 3_000_000) | {"proc/loadavg": "0.02 0 0 1/1 1"}
    before = read_state(nvidia(tmp_path, board, quiet))
    assert warnings(before, before) == []
    board.sm, board.reasons = 1500, 0x20
    after = read_state(nvidia(tmp_path, board, cpu(0, 2_500_000, throttles=7)))
    said = " · ".join(warnings(before, after))
    assert "throttled for heat 7 times" in said and "3000 to 2500 MHz" in said
    assert "software thermal slowdown" in said and "1980 to 1500" in said
    busy = read_state(nvidia(tmp_path, board, cpu(0, 3_000_000, "powersave") | {"proc/loadavg": "1.9 0 0 1/1 1"}))
    said = " · ".join(warnings(busy, busy))
    assert "load 1.90" in said and "powersave" in said


def test_a_state_nobody_knows_warns_of_nothing(tmp_path: Path) -> None:
    state = read_state(linux(tmp_path, {}))
    assert state == State() and warnings(state, state) == []


def test_fake_states_come_in_order() -> None:
    fake = FakeState([State(load=0.0), State(load=1.0)])
    assert [fake.read().load for _ in range(3)] == [0.0, 1.0, 1.0]


def test_this_machine_answers() -> None:
    state = read_state()
    assert state.load is None or state.load >= 0
    meter = open_meter()
    assert meter.used(meter.read(), meter.read()).seconds >= 0


def test_the_machine_is_probed_over_as_many_bytes_as_a_step_reads(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    for reads, in_cache in ((3 << 20, True), (300_000_000, probe_cpu(Sources()).last_level_bytes >= 300_000_000)):
        now = probe.now(threads=1, nbytes=reads)
        assert now["over_bytes"] <= reads and (now["over_bytes"] == reads or reads > 16 << 20)
        assert now["read_gb_s"] > 0.1 and now["from_cache"] is in_cache
    assert probe.now(threads=1)["over_bytes"] >= 16 << 20
