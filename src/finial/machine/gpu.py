"""GPUs, their drivers, and the Vulkan loader, without importing anything heavy.

Knows NVML (by ctypes), nvidia-smi, /proc/driver/nvidia, the kernel's DRM and PCI trees and Apple's system_profiler.

    for gpu in probe_gpus(Sources()): gpu.name, gpu.driver
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finial.machine.sources import Sources, read, read_int

VENDORS = {0x10DE: "NVIDIA", 0x1002: "AMD", 0x8086: "Intel"}  # PCI vendor numbers, pci-ids


@dataclass(frozen=True)
class Gpu:
    """One GPU.  None: unknown.

    Attributes:
        driver: kernel driver and version, such as "nvidia 580.65.06"; None: no driver is bound to it.
        compute: CUDA compute capability, such as "9.0".
        cuda: the newest CUDA version that the driver supports, such as "13.0".
        source: where this was read.
    """

    vendor: str
    name: str
    driver: str | None
    memory_bytes: int | None
    compute: str | None
    cuda: str | None
    source: str


@dataclass(frozen=True)
class Vulkan:
    """The Vulkan loader and the drivers that have told it about themselves (their manifests' names)."""

    loader: bool
    drivers: tuple[str, ...]


def probe_gpus(sources: Sources) -> tuple[Gpu, ...]:
    """Never raises."""
    if sources.system == "Darwin":
        return _apple(sources)
    nvidia = _nvml(sources) or _smi(sources) or _proc_nvidia(sources)
    return (*nvidia, *_kernel(sources, skip_nvidia=bool(nvidia)))


# ------------------------------------------------------------------------------------------------- NVIDIA


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t, nvml.h."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@contextmanager
def nvml(sources: Sources) -> Iterator[Any | None]:
    """The NVML library, initialised, or None."""
    library = sources.load(("libnvidia-ml.so.1", "nvml.dll"))
    if library is None or library.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield library
    finally:
        library.nvmlShutdown()


def nvml_devices(library: Any) -> Iterator[tuple[str, Any]]:
    """(name, handle) of every device."""
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return
    for index in range(count.value):
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0:
            library.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
            yield name.value.decode(errors="replace"), handle


def _nvml(sources: Sources) -> list[Gpu]:
    with nvml(sources) as library:
        if library is None:
            return []
        version = ctypes.create_string_buffer(80)
        library.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
        newest = ctypes.c_int()
        known = library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(newest)) == 0
        cuda = f"{newest.value // 1000}.{newest.value % 1000 // 10}" if known else None
        gpus = []
        for name, handle in nvml_devices(library):
            memory, major, minor = _NvmlMemory(), ctypes.c_int(), ctypes.c_int()
            has_memory = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
            has_compute = (
                library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
            )
            gpus.append(
                Gpu(
                    "NVIDIA",
                    name,
                    f"nvidia {version.value.decode(errors='replace')}",
                    int(memory.total) if has_memory else None,
                    f"{major.value}.{minor.value}" if has_compute else None,
                    cuda,
                    "NVML",
                )
            )
        return gpus


def _smi(sources: Sources) -> list[Gpu]:
    fields = "name,driver_version,memory.total,compute_cap"
    report = sources.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    gpus = []
    for line in (report or "").splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 4:
            memory = int(words[2]) << 20 if words[2].isdigit() else None
            compute = words[3] if re.fullmatch(r"\d+\.\d+", words[3]) else None
            gpus.append(Gpu("NVIDIA", words[0], f"nvidia {words[1]}", memory, compute, None, "nvidia-smi"))
    return gpus


def _proc_nvidia(sources: Sources) -> list[Gpu]:
    folder = sources.proc / "driver" / "nvidia"
    version = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", read(folder / "version") or "")
    gpus = []
    for card in sorted((folder / "gpus").glob("*")):
        name = re.search(r"^Model:\s+(.+)$", read(card / "information") or "", re.MULTILINE)
        driver = f"nvidia {version[1]}" if version else "nvidia"
        gpus.append(Gpu("NVIDIA", name[1].strip() if name else "GPU", driver, None, None, None, str(folder)))
    return gpus


# -------------------------------------------------------------------------------------------- kernel trees


def _kernel(sources: Sources, skip_nvidia: bool) -> list[Gpu]:
    """Display controllers of the PCI tree: AMD's and Intel's, and NVIDIA's when its own tools are absent."""
    gpus = []
    for device in sorted((sources.sys / "bus" / "pci" / "devices").glob("*")):
        kind, vendor = read_int(device / "class"), read_int(device / "vendor")
        # PCI class 03xxxx is a display controller, 1200xx a processing accelerator (PCI Code and ID Assignment).
        if kind is None or vendor not in VENDORS or not (kind >> 16 == 0x03 or kind >> 8 == 0x1200):
            continue
        if not (vendor == 0x10DE and skip_nvidia):
            gpus.append(_pci(sources, device, VENDORS[vendor]))
    return gpus


def _pci(sources: Sources, device: Path, vendor: str) -> Gpu:
    number = read_int(device / "device")
    name = read(device / "product_name") or f"{vendor} GPU {number:#06x}" if number is not None else f"{vendor} GPU"
    link = device / "driver"
    module = link.resolve().name if link.exists() else None
    driver = None
    if module is not None:
        # Drivers inside the kernel have the kernel's version.
        version = read(sources.sys / "module" / module / "version") or read(sources.proc / "sys/kernel/osrelease")
        driver = f"{module} {version}" if version else module
    return Gpu(vendor, name, driver, read_int(device / "mem_info_vram_total"), None, None, str(device))


def _apple(sources: Sources) -> tuple[Gpu, ...]:
    report = sources.run(["system_profiler", "SPDisplaysDataType", "-json"])
    try:
        cards = json.loads(report or "{}").get("SPDisplaysDataType", [])
    except (ValueError, AttributeError):
        return ()
    gpus = []
    for card in cards:
        vendor = re.sub(r"^sppci_vendor_", "", str(card.get("spdisplays_vendor", "Apple")))
        cores, metal = card.get("sppci_cores"), card.get("spdisplays_mtlgpufamilysupport")
        name = str(card.get("sppci_model", "GPU")) + (f", {cores} cores" if cores else "")
        driver = str(metal).replace("spdisplays_", "").replace("metal", "Metal ") if metal else "Metal"
        gpus.append(Gpu(vendor, name, driver, None, None, None, "system_profiler"))
    return tuple(gpus)


# -------------------------------------------------------------------------------------------------- Vulkan


def probe_vulkan(sources: Sources) -> Vulkan:
    """Whether a Vulkan loader can be loaded, and which drivers' manifests lie where it looks.

    Folders: Khronos, Vulkan-Loader, docs/LoaderDriverInterface.md, "Driver Discovery on Linux".
    """
    names = ("libvulkan.so.1", "vulkan-1.dll", "libvulkan.1.dylib", "libMoltenVK.dylib")
    folders = ("etc/vulkan/icd.d", "usr/local/share/vulkan/icd.d", "usr/share/vulkan/icd.d")
    manifests = {
        path.stem.removesuffix(f".{sources.arch}") for f in folders for path in (sources.root / f).glob("*.json")
    }
    drivers = sorted(name.removesuffix("_icd") for name in manifests)
    return Vulkan(sources.load(names) is not None, tuple(drivers))
