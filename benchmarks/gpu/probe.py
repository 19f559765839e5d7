"""The first experiments for a persistent kernel, on the GPU at hand; see probe.cuh.  Figures for its design.

Each checks what it can, too: sums of what was read, numbers that went from block to block.

    python3 -m benchmarks.gpu.measure probe
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finial.backends.cuda import kernels
from finial.backends.cuda.device import Launch
from finial.backends.cuda.kernels import Kernel

_ARGS = "P data,P counters,P cells,P out,P bytes,i rounds,i padding"
kernels._FIELDS["ProbeArgs"], kernels._LAYOUT["ProbeArgs"] = kernels.layout(_ARGS)
HAND_OFFS = ("counter", "counter, each warp polls", "two levels", "flags", "value and epoch")
Row = dict[str, Any]


@dataclass(frozen=True)
class ClusterKernel(Kernel):
    """A kernel whose blocks belong together by `size`; how many is compiled into it."""

    size: int = 2

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.template}_{self.size}"

    @property
    def source(self) -> str:  # type: ignore[override]
        plain = Kernel(self.template, self.header, self.args, self.constants, self.threads)
        return plain.source.replace(plain.name, self.name).replace("FINIAL_KERNEL(", f"FINIAL_CLUSTER({self.size}, ")


@dataclass(frozen=True)
class Probe:
    """One experiment.

    Attributes:
        unit: "GB/s", "us" of a round or of a launch, or "floats/ns".
        blocks: of the grid, for each multiprocessor.
        multiple: of which the number of blocks must be one.
        launches: one after another, when it is the launch that is measured.
    """

    kernel: Kernel
    unit: str
    blocks: int = 1
    multiple: int = 1
    rounds: int = 1
    launches: int = 1


def kernel(template: str, threads: int, shared: int = 0, cooperative: bool = False, **constants: int | bool) -> Kernel:
    """One of probe.cuh."""
    header = str(Path(__file__).with_name("probe.cuh"))
    named = kernels._constants(**constants)
    return Kernel(template, header, "ProbeArgs", named, threads, 1, shared, 90, cooperative)


def clusters(size: int) -> Kernel:
    """The barrier of a cluster of that many blocks."""
    header = str(Path(__file__).with_name("probe.cuh"))
    return ClusterKernel("cluster", header, "ProbeArgs", kernels._constants(SIZE=size), 256, least_arch=90, size=size)


def all_probes(ring_kb: int = 190) -> dict[str, Probe]:
    """Name -> experiment; the ring has that much shared memory."""
    found = {f"plain read, {deep} loads": Probe(kernel("plain_read", 512, DEEP=deep), "GB/s", 4) for deep in (4, 8)}
    for slot in (8192, 16384, 32768):
        slots = (ring_kb << 10) // slot
        found[f"ring, slots of {slot}"] = Probe(
            kernel("ring", 288, 1024 + slots * slot, SLOT=slot, SLOTS=slots), "GB/s"
        )
    for variant, name in enumerate(HAND_OFFS):
        found[f"hand-off: {name}"] = Probe(kernel("hand_off", 256, 0, True, VARIANT=variant), "us", rounds=2000)
    for kb in (64, 128, 256):  # keys and values of a head that all blocks of its team read
        found[f"{kb} KiB read by 16 blocks each"] = Probe(kernel("team_read", 256, KB=kb, TEAM=16), "us", rounds=200)
    for wide in (1, 2, 4):
        found[f"reductions of {wide}"] = Probe(kernel("reductions", 256, WIDE=wide), "floats/ns", rounds=2000)
    for size in (2, 4, 8):
        found[f"barrier of a cluster of {size}"] = Probe(clusters(size), "us", multiple=size, rounds=2000)
    found["edge"] = Probe(kernel("edge", 256, EARLY=False), "us", launches=200)
    found["edge, next allowed at once"] = Probe(kernel("edge", 256, EARLY=True), "us", launches=200)
    return found


def run(device: Any, size: int = 1 << 30, samples: int = 7, least: int = 1) -> Row:
    """Each probe's figure, "wrong" where what it moved did not arrive, "failed" where the GPU refused it.

    Args:
        size: bytes that are read.
        least: rounds and launches are divided by this.
    """
    data, counters = device.allocate(size), device.allocate(1 << 16)
    cells, out = device.allocate(1 << 16), device.allocate(1 << 22)
    ones = np.ones(min(size, 1 << 26), np.uint8)
    for at in range(0, size, len(ones)):
        device.upload(data + at, ones)
    result: Row = {"multiprocessors": device.multiprocessors}
    for name, probe in all_probes().items():
        try:
            blocks = device.multiprocessors * probe.blocks // probe.multiple * probe.multiple
            rounds, launches = max(1, probe.rounds // least), max(1, probe.launches // least)
            if blocks == 0:
                result[name] = f"no room for {probe.multiple} blocks at once"
                continue
            pack = probe.kernel.pack(data=data, counters=counters, cells=cells, out=out, bytes=size, rounds=rounds)
            recording = device.record([Launch(probe.kernel, (blocks, 1, 1), pack)] * launches)
            times = []
            for _ in range(samples):
                device.upload(counters, np.zeros(1 << 14, np.uint32))
                device.upload(cells, np.zeros(1 << 14, np.float32))
                times.append(device.elapsed_ms(lambda recording=recording: device.replay(recording)))
            ms = statistics.median(times[samples // 3 :])
            found = np.empty(blocks * probe.kernel.threads, np.float32)
            device.download(out if not name.startswith("red") else cells, found)
            result[name] = _figure(probe, ms, rounds, launches, size, blocks)
            if not _right(name, probe, found, rounds, size, blocks):
                result[name] = f"wrong: {result[name]}"
        except Exception as error:  # one experiment that a GPU refuses leaves the others
            result[name] = f"failed: {error}"
    return result


def _figure(probe: Probe, ms: float, rounds: int, launches: int, size: int, blocks: int) -> str:
    if probe.unit == "GB/s":
        return f"{size / ms / 1e6:.0f} GB/s"
    if probe.unit == "us":
        return f"{ms * 1000 / rounds / launches:.3f} us"
    wide = 1 if "WIDE = 1" in str(probe.kernel.constants) else 2 if "WIDE = 2" in str(probe.kernel.constants) else 4
    return f"{rounds * blocks * probe.kernel.threads * wide / ms / 1e6:.2f} floats/ns"


def _right(name: str, probe: Probe, found: np.ndarray, rounds: int, size: int, blocks: int) -> bool:
    threads = probe.kernel.threads
    if name.startswith("plain"):
        stride, deep = blocks * threads, 4 if "4 loads" in name else 8
        each = max(0, size // 16 // stride // deep * deep)
        return size // 16 % stride != 0 or size // 16 // stride % deep != 0 or bool((found == 4 * each).all())
    if "KiB read" in name:
        return bool((found == 4.0 * rounds * (int(name.split()[0]) << 10) // 16 // threads).all())
    if name.startswith("ring"):
        slot = int(name.split()[-1])
        used = found.reshape(blocks, threads)[:, : threads - 32]
        return bool(used.sum(dtype=np.float64) == size // blocks // slot * slot * blocks / 4)
    if name.startswith("red"):
        wide = int(name[-1])
        total = min(float(rounds) * blocks * threads * wide, 2.0**24 * min(1024, threads * wide))
        return bool(found[:1024].sum(dtype=np.float64) == total)
    if name.startswith(("hand", "barrier")):
        return not found[:blocks].any()
    return True
