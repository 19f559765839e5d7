"""Machines as file trees: what the probes read from /proc, /sys, NVML and commands, on machines that are not here."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from finial import machine
from finial.machine import Sources, cpu, extras, gpu, native, sources
from machines import linux, write

GIB = 1 << 30


def cpus(count: int, threads_per_core: int = 1, per_socket: int | None = None) -> dict[str, str]:
    """Topology as Linux numbers it: first one thread of every core, then the second ones."""
    cores = count // threads_per_core
    files = {"sys/devices/system/cpu/online": f"0-{count - 1}\n"}
    for number in range(count):
        core = number % cores
        folder = f"sys/devices/system/cpu/cpu{number}/topology"
        files[f"{folder}/physical_package_id"] = f"{core // per_socket if per_socket else 0}\n"
        files[f"{folder}/core_id"] = f"{core % per_socket if per_socket else core}\n"
    return files


def cache(number: int, index: int, level: int, kind: str, size: str, shared: str) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu{number}/cache/index{index}"
    return {
        f"{folder}/level": f"{level}\n",
        f"{folder}/type": kind,
        f"{folder}/size": size,
        f"{folder}/shared_cpu_list": shared,
    }


ZEN = {
    "proc/cpuinfo": "\n\n".join(
        f"processor\t: {n}\nmodel name\t: AMD Ryzen 9 7950X  16-Core Processor\nflags\t\t: fpu sse4_2 avx f16c "
        "fma avx2 avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16"
        for n in range(8)
    ),
    "proc/meminfo": "MemTotal:       65536000 kB\nMemFree:         1000000 kB\nMemAvailable:   60000000 kB\n",
    "proc/loadavg": "0.52 0.58 0.59 1/467 12345\n",
    "proc/self/cgroup": "0::/user.slice\n",
    "proc/sys/kernel/osrelease": "6.8.0-48-generic\n",
    "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.1 LTS"\nNAME="Ubuntu"\n',
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/node/node0/cpulist": "0-7",
    **cpus(8, threads_per_core=2),
    **cache(0, 0, 1, "Data\n", "32K\n", "0,4\n"),
    **cache(1, 0, 1, "Data\n", "32K\n", "1,5\n"),
    **cache(0, 3, 3, "Unified\n", "32M\n", "0-1,4-5\n"),
    **cache(1, 3, 3, "Unified\n", "32M\n", "0-1,4-5\n"),
    **cache(2, 3, 3, "Unified\n", "32M\n", "2-3,6-7\n"),
}


def test_amd_desktop(tmp_path: Path) -> None:
    here = linux(tmp_path, ZEN)
    found = machine.probe_cpu(here)
    assert found.model == "AMD Ryzen 9 7950X 16-Core Processor"
    assert (found.sockets, found.cores, found.threads) == (1, 4, 8)
    assert (found.usable_cores, found.usable_threads, found.quota) == (4, 8, None)
    assert found.features[:3] == ("sse4_2", "avx", "f16c") and "avx512_bf16" in found.features
    assert found.governor == "performance" and found.load == 0.52 and found.numa_nodes == 1
    assert [(c.level, c.kind, c.bytes, c.count, c.shared) for c in found.caches] == [
        (1, "data", 32 << 10, 2, 2),
        (3, "unified", 32 << 20, 2, 4),
    ]
    assert found.last_level_bytes == 64 << 20
    memory = machine.probe_memory(here)
    assert memory.total_bytes == 65536000 << 10 and memory.available_bytes == 60000000 << 10
    system = machine.probe_system(here)
    assert (system.name, system.kernel, system.arch) == ("Ubuntu 24.04.1 LTS", "6.8.0-48-generic", "x86_64")


def test_affinity_mask_bounds_usable_cores(tmp_path: Path) -> None:
    siblings = machine.probe_cpu(linux(tmp_path, ZEN, affinity=lambda: frozenset({1, 5})))
    assert (siblings.usable_cores, siblings.usable_threads, siblings.threads) == (1, 2, 8)
    apart = machine.probe_cpu(linux(tmp_path, ZEN, affinity=lambda: frozenset({1, 2})))
    assert (apart.usable_cores, apart.usable_threads) == (2, 2)


def test_two_sockets(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\n", **cpus(16, 2, per_socket=4)}
    found = machine.probe_cpu(linux(tmp_path, files))
    assert (found.sockets, found.cores, found.threads) == (2, 8, 16)


@pytest.mark.parametrize(
    ("quota", "cores", "threads"),
    [("150000 100000", 2, 2), ("50000 100000", 1, 1), ("max 100000", 4, 8), ("9900000 100000", 4, 8)],
)
def test_container_with_a_cpu_quota(tmp_path: Path, quota: str, cores: int, threads: int) -> None:
    found = machine.probe_cpu(linux(tmp_path, {**ZEN, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota}))
    assert (found.usable_cores, found.usable_threads) == (cores, threads)


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/kubepods/pod1/app"
    files = {
        **ZEN,
        "proc/self/cgroup": "0::/kubepods/pod1/app\n",
        f"{group}/cpu.max": "max 100000",
        "sys/fs/cgroup/kubepods/cpu.max": "200000 100000",
        "sys/fs/cgroup/kubepods/pod1/cpu.max": "600000 100000",
        f"{group}/memory.max": "max\n",
        "sys/fs/cgroup/kubepods/pod1/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/kubepods/pod1/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/kubepods/pod1/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 7\n",
    }
    here = linux(tmp_path, files)
    assert machine.probe_cpu(here).quota == 2.0
    memory = machine.probe_memory(here)
    assert (memory.total_bytes, memory.limit_bytes) == (4 * GIB, 4 * GIB)
    assert memory.available_bytes == 2 * GIB, "clean page cache can be had"
    assert memory.machine_bytes == 65536000 << 10


def test_cgroup_version_1(tmp_path: Path) -> None:
    files = {
        **ZEN,
        "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n",
        "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{2 * GIB}",
        "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{GIB}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    here = linux(tmp_path, files)
    assert machine.probe_cpu(here).usable_cores == 3
    assert machine.probe_memory(here).available_bytes == GIB


def test_a_group_that_is_not_mounted_here(tmp_path: Path) -> None:
    files = {**ZEN, "proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}
    assert machine.probe_memory(linux(tmp_path, files)).limit_bytes == GIB


def test_arm_server_and_board(tmp_path: Path) -> None:
    features = "fp asimd asimdhp asimddp sve bf16 i8mm"
    info = f"processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    found = machine.probe_cpu(linux(tmp_path / "a", {"proc/cpuinfo": info}, arch="aarch64"))
    assert found.model == "Arm Neoverse V1" and found.features == ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")
    assert (found.threads, found.usable_cores, found.cores) == (1, 1, None)
    board = {"proc/cpuinfo": info.replace("0xd40", "0xfff"), "proc/device-tree/model": "Raspberry Pi 5\0"}
    found = machine.probe_cpu(linux(tmp_path / "b", board, arch="aarch64"))
    assert found.model == "Arm implementer 0x41 part 0xfff (Raspberry Pi 5)"


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    here = linux(tmp_path, {})
    found, memory = machine.probe_cpu(here), machine.probe_memory(here)
    assert found.model == "x86_64" and found.usable_cores == found.threads == 1 and found.features == ()
    assert memory.total_bytes is None and memory.available_bytes is None
    assert machine.probe_gpus(here) == ()
    assert [(c.name, c.readable) for c in machine.probe_energy(here)] == [("none", False)]
    assert not machine.probe_vulkan(here).loader


@pytest.mark.parametrize("system", ["Darwin", "Windows", "FreeBSD"])
def test_other_systems_without_their_tools_still_answer(tmp_path: Path, system: str) -> None:
    told = machine.describe(linux(tmp_path, {}, system=system, arch="arm64"))
    assert told.cpu.threads >= 1 and told.cpu.usable_cores >= 1
    assert told.energy
    json.dumps(told.to_dict())


def test_mac(tmp_path: Path) -> None:
    answers = {
        "sysctl -a": "machdep.cpu.brand_string: Apple M3 Pro\nhw.physicalcpu: 11\nhw.logicalcpu: 11\nhw.packages: 1\n"
        "hw.l1dcachesize: 65536\nhw.l2cachesize: 4194304\nhw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_BF16: 1\n"
        "hw.optional.arm.FEAT_SME: 0\n",
        "sysctl -n hw.memsize": "19327352832\n",
        "vm_stat": "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:   1000.\n"
        "Pages active:  5.\nPages inactive:  2000.\nPages speculative:  24.\n",
        "system_profiler SPDisplaysDataType -json": json.dumps(
            {
                "SPDisplaysDataType": [
                    {
                        "sppci_model": "Apple M3 Pro",
                        "sppci_cores": "14",
                        "spdisplays_vendor": "sppci_vendor_Apple",
                        "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
                    }
                ]
            }
        ),
    }
    here = linux(tmp_path, {}, system="Darwin", arch="arm64", run=lambda command: answers.get(" ".join(command)))
    found = machine.probe_cpu(here)
    assert (found.model, found.cores, found.features) == ("Apple M3 Pro", 11, ("asimd", "bf16"))
    memory = machine.probe_memory(here)
    assert memory.total_bytes == 19327352832 and memory.available_bytes == 3024 * 16384
    (card,) = machine.probe_gpus(here)
    assert (card.vendor, card.name, card.driver) == ("Apple", "Apple M3 Pro, 14 cores", "Metal 3")


# ------------------------------------------------------------------------------------------------ GPUs, energy


class FakeNvml:
    """The functions of NVML that are used, on one H100; `counter` and `start` are codes that they return."""

    def __init__(self, counter: int = 0, start: int = 0) -> None:
        self.counter, self.start, self.open = counter, start, 0

    def nvmlInit_v2(self) -> int:
        self.open += self.start == 0
        return self.start

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, size: Any) -> int:
        buffer.value = b"580.65.06"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, number: Any) -> int:
        number._obj.value = 13000
        return 0

    def nvmlDeviceGetCount_v2(self, number: Any) -> int:
        number._obj.value = 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = 1
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: Any) -> int:
        buffer.value = b"NVIDIA H100 PCIe"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total = 80 * GIB
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 9, 0
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:
        energy._obj.value = 1234567
        return self.counter


def nvidia_sources(root: Path, library: FakeNvml, files: Mapping[str, str] | None = None) -> Sources:
    return linux(root, files or {}, load=lambda names: library if "libnvidia-ml.so.1" in names else None)


def test_nvml_gpu_and_its_energy(tmp_path: Path) -> None:
    library = FakeNvml()
    here = nvidia_sources(tmp_path, library)
    (card,) = machine.probe_gpus(here)
    assert card == gpu.Gpu("NVIDIA", "NVIDIA H100 PCIe", "nvidia 580.65.06", 80 * GIB, "9.0", "13.0", "NVML")
    (counter,) = machine.probe_energy(here)
    assert counter.joules == 1234.567 and counter.name == "NVML 0 NVIDIA H100 PCIe" and counter.readable
    assert library.open == 0, "NVML is shut down again"


def test_nvml_without_a_counter(tmp_path: Path) -> None:
    (counter,) = machine.probe_energy(nvidia_sources(tmp_path, FakeNvml(counter=3)))
    assert not counter.readable and "no such counter" in counter.reason


NVIDIA_PCI = {
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/device": "0x2684\n",
}


def test_nvidia_smi_when_nvml_fails(tmp_path: Path) -> None:
    row = "NVIDIA GeForce RTX 4090, 550.54.15, 24564, 8.9\n"
    here = linux(
        tmp_path,
        NVIDIA_PCI,
        load=lambda names: FakeNvml(start=9),
        run=lambda command: row if command[0] == "nvidia-smi" else None,
    )
    (card,) = machine.probe_gpus(here)
    assert card.name == "NVIDIA GeForce RTX 4090" and card.driver == "nvidia 550.54.15"
    assert card.memory_bytes == 24564 << 20 and card.compute == "8.9" and card.source == "nvidia-smi"


def test_nvidia_proc_tree(tmp_path: Path) -> None:
    files = {
        **NVIDIA_PCI,
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release\n",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA A10G\nIRQ:   24\n",
    }
    (card,) = machine.probe_gpus(linux(tmp_path, files))
    assert (card.name, card.driver) == ("NVIDIA A10G", "nvidia 535.129.03")


def test_nvidia_card_without_a_driver(tmp_path: Path) -> None:
    (card,) = machine.probe_gpus(linux(tmp_path, NVIDIA_PCI))
    assert card.vendor == "NVIDIA" and card.driver is None and "0x2684" in card.name


def test_amd_and_intel_gpus_and_what_is_no_gpu(tmp_path: Path) -> None:
    devices = "sys/bus/pci/devices"
    files = {
        f"{devices}/0000:03:00.0/class": "0x030000",
        f"{devices}/0000:03:00.0/vendor": "0x1002",
        f"{devices}/0000:03:00.0/device": "0x744c",
        f"{devices}/0000:03:00.0/mem_info_vram_total": f"{24 * GIB}",
        f"{devices}/0000:04:00.0/class": "0x030000",
        f"{devices}/0000:04:00.0/vendor": "0x8086",
        f"{devices}/0000:04:00.0/device": "0x56a0",
        f"{devices}/0000:05:00.0/class": "0x020000",  # Intel's network card
        f"{devices}/0000:05:00.0/vendor": "0x8086",
        f"{devices}/0000:06:00.0/class": "0x030000",  # a virtual machine's screen
        f"{devices}/0000:06:00.0/vendor": "0x1234",
        "sys/bus/pci/drivers/amdgpu/x": "",
        "proc/sys/kernel/osrelease": "6.8.0\n",
    }
    write(tmp_path, files)
    (tmp_path / devices / "0000:03:00.0" / "driver").symlink_to(tmp_path / "sys/bus/pci/drivers/amdgpu")
    amd, intel = machine.probe_gpus(linux(tmp_path, files))
    assert (amd.vendor, amd.driver, amd.memory_bytes) == ("AMD", "amdgpu 6.8.0", 24 * GIB)
    assert (intel.vendor, intel.driver) == ("Intel", None)


def test_vulkan_loader_and_manifests(tmp_path: Path) -> None:
    files = {"usr/share/vulkan/icd.d/lvp_icd.x86_64.json": "{}", "etc/vulkan/icd.d/nvidia_icd.json": "{}"}
    here = linux(tmp_path, files, load=lambda names: object() if "libvulkan.so.1" in names else None)
    assert machine.probe_vulkan(here) == gpu.Vulkan(True, ("lvp", "nvidia"))


RAPL = {
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1000000\n",
    "sys/class/powercap/intel-rapl:1/name": "psys\n",  # a zone without a counter
}


def test_rapl_readable(tmp_path: Path) -> None:
    found = machine.probe_energy(linux(tmp_path, RAPL))
    assert [(c.name, c.joules) for c in found] == [("RAPL package-0", 262143.32885), ("RAPL package-0/core", 1.0)]


def test_rapl_for_root_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = linux(tmp_path, RAPL)
    plain = Path.read_text

    def read_text(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "energy_uj":  # what the kernel does; permission bits would not stop tests that run as root
            raise PermissionError(13, "Permission denied")
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    for counter in machine.probe_energy(here):
        assert not counter.readable and "chmod a+r" in counter.reason


# ------------------------------------------------------------------------------------ extras, native, this machine


def install(root: Path, name: str, requires: Sequence[str] = (), provides: Sequence[str] = ()) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1"]
    lines += [f"Provides-Extra: {extra}" for extra in provides] + [f"Requires-Dist: {need}" for need in requires]
    write(root, {f"{name}-1.dist-info/METADATA": "\n".join(lines) + "\n"})


def test_extras_come_from_the_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path,
        "roofcap",
        requires=[
            "numpy>=2.0",
            "torch-like>=2.6; extra == 'convert'",
            "present[fast]>=1; extra == 'draw'",
            'absent-here; extra == "draw"',
            f"elsewhere; extra == 'draw' and sys_platform != '{sys.platform}'",
            "roofcap[convert,draw]; extra == 'all'",
        ],
        provides=["convert", "draw", "all"],
    )
    install(tmp_path, "present")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    found = {extra.name: extra for extra in extras.probe_extras("roofcap") or ()}
    assert found["draw"].packages == ("absent-here", "present") and found["draw"].missing == ("absent-here",)
    assert found["convert"].command == 'pip install "roofcap[convert]"' and not found["convert"].installed
    assert found["all"].missing == ("absent-here", "torch-like")


def test_extras_of_what_is_not_installed() -> None:
    assert extras.probe_extras("no-such-distribution-here") is None


def test_bandwidth_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "finial._native", None)
    told = native.probe_native()
    assert told.isa is None and "finial._native" in told.error
    for result in machine.measure_bandwidth([1, 2], 1 << 20, 0.01):
        assert result.read_gb_s is None and result.error


def test_bandwidth_of_this_machine() -> None:
    for result in machine.measure_bandwidth([1, 2], 32 << 20, 0.02):
        assert result.read_gb_s is not None and 0.1 < result.read_gb_s < 100_000


def test_buffer_for_bandwidth_exceeds_caches_and_spares_memory(tmp_path: Path) -> None:
    found = cpu.probe_cpu(linux(tmp_path, ZEN))
    plenty = machine.Memory(64 * GIB, 60 * GIB, 64 * GIB, None)
    assert machine.bandwidth_bytes(found, plenty) == max(GIB, 16 * found.last_level_bytes)
    scarce = machine.Memory(GIB, GIB, GIB, None)
    assert machine.bandwidth_bytes(found, scarce) == GIB // 8


def test_buffer_for_bandwidth_is_as_large_as_what_a_step_reads(tmp_path: Path) -> None:
    found = cpu.probe_cpu(linux(tmp_path, ZEN))
    plenty, scarce = machine.Memory(64 * GIB, 60 * GIB, 64 * GIB, None), machine.Memory(GIB, GIB // 4, GIB, None)
    for reads in (5 << 20, 335_544_320, 2 * GIB):
        assert machine.bandwidth_bytes(found, plenty, reads) == reads
    assert machine.bandwidth_bytes(found, plenty, 1000) == 1 << 20
    assert machine.bandwidth_bytes(found, scarce, 2 * GIB) == GIB // 32


def test_a_reader_keeps_its_buffer_while_size_and_threads_stay() -> None:
    reader = machine.BandwidthProbe()
    first = reader.measure(1, 4 << 20, 0.01)
    buffer = reader._native
    assert first.read_gb_s and reader.measure(1, 4 << 20, 0.01).read_gb_s and reader._native is buffer
    assert reader.measure(2, 4 << 20, 0.01).read_gb_s and reader._native is not buffer
    refused = reader.measure(1, 10, 0.01)
    assert refused.read_gb_s is None and "16384" in refused.error
    assert reader.measure(1, 4 << 20, 0.01).read_gb_s


@pytest.mark.parametrize(
    ("usable", "steps"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_thread_steps(usable: int, steps: tuple[int, ...]) -> None:
    assert machine.thread_steps(usable) == steps


def test_peak_memory_rises_with_what_is_touched() -> None:
    before = machine.peak_bytes()
    block = bytearray(os.urandom(1 << 20) * 192)
    after = machine.peak_bytes()
    assert before is not None and after is not None and len(block) == 192 << 20
    assert 20 << 20 < before < 64 * GIB
    assert after >= len(block)


def test_peak_memory_falls_back_to_getrusage(tmp_path: Path) -> None:
    assert (machine.peak_bytes(linux(tmp_path, {})) or 0) > 10 << 20
    assert (tmp_path / "x").exists() is False


def test_this_machine_in_full() -> None:
    told = machine.describe()
    assert told.cpu.threads >= told.cpu.usable_threads >= 1
    assert told.memory.total_bytes and told.memory.available_bytes
    assert told.memory.total_bytes >= told.memory.available_bytes
    assert told.bandwidth == ()
    json.dumps(told.to_dict())


def test_commands_that_fail_hang_or_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "slow"
    script.write_text("#!/bin/sh\nsleep 5\n")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(sources, "COMMAND_LIMIT_S", 0.2)
    here = Sources()
    assert here.run([str(script)]) is None
    assert here.run([str(tmp_path / "missing")]) is None
    assert here.run([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert here.load(["libno-such-library.so.1"]) is None


def test_structures_have_the_sizes_of_their_headers() -> None:
    from finial.machine import memory

    assert ctypes.sizeof(memory._MemoryStatus) == 64  # MEMORYSTATUSEX
    assert ctypes.sizeof(memory._MemoryCounters) == 8 + 8 * ctypes.sizeof(ctypes.c_size_t)  # PROCESS_MEMORY_COUNTERS
