"""The first experiments for a persistent kernel, on the GPU at hand; see probe.cuh.  Figures for its design, no test.

python3 -m benchmarks.gpu.measure probe
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finial.backends.cuda import kernels
from finial.backends.cuda.device import Launch
from finial.backends.cuda.kernels import Kernel

_ARGS = "P data,P counters,P out,P bytes,i rounds,i blocks,i variant,i padding"
Row = dict[str, Any]


def kernel(template: str, threads: int, shared: int = 0, **constants: int | bool) -> Kernel:
    """One of probe.cuh."""
    header = str(Path(__file__).with_name("probe.cuh"))
    return Kernel(template, header, "ProbeArgs", kernels._constants(**constants), threads, shared=shared, least_arch=90)


def all_kernels() -> dict[str, Kernel]:
    """Name -> kernel."""
    found = {f"plain read, {deep} loads": kernel("plain_read", 512, DEEP=deep) for deep in (4, 8)}
    for slot in (8192, 16384, 32768):
        slots = (190 << 10) // slot
        found[f"ring, slots of {slot}"] = kernel("ring", 288, 1024 + slots * slot, SLOT=slot, SLOTS=slots)
    for variant, name in enumerate(("counter", "counter, each warp polls", "two levels", "flags", "value and epoch")):
        found[f"hand-off: {name}"] = kernel("hand_off", 256, VARIANT=variant)
    for wide in (1, 2, 4):
        found[f"reductions of {wide}"] = kernel("reductions", 256, WIDE=wide)
    found["edge"] = kernel("edge", 256, EARLY=False)
    found["edge, next allowed at once"] = kernel("edge", 256, EARLY=True)
    return found


def run(device: Any) -> Row:
    """GB/s, microseconds a hand-off, reductions a microsecond, microseconds a dependent kernel."""
    kernels._FIELDS["ProbeArgs"], kernels._LAYOUT["ProbeArgs"] = kernels.layout(_ARGS)
    blocks, size = device.multiprocessors, 1 << 30
    data, counters, out = device.allocate(size), device.allocate(1 << 16), device.allocate(1 << 22)
    result: Row = {"multiprocessors": blocks}

    def time_ms(launches: list[Launch], before: Callable[[], None] = lambda: None) -> float:
        recording = device.record(launches)
        samples = []
        for _ in range(7):
            before()
            samples.append(device.elapsed_ms(lambda: device.replay(recording)))
        return statistics.median(samples[2:])

    def reset() -> None:
        import numpy as np

        device.upload(counters, np.zeros(1 << 14, np.uint32))

    for name, found in all_kernels().items():
        try:
            rounds = 2000 if name.startswith(("hand", "red")) else 1
            grid = (blocks * (4 if name.startswith("plain") else 1), 1, 1)
            pack = found.pack(data=data, counters=counters, out=out, bytes=size, rounds=rounds, blocks=blocks)
            count = 1 if not name.startswith("edge") else 200
            ms = time_ms([Launch(found, grid, pack)] * count, reset)
            if name.startswith(("plain", "ring")):
                result[name] = f"{size / ms / 1e6:.0f} GB/s"
            elif name.startswith("hand"):
                result[name] = f"{ms * 1000 / rounds:.3f} us"
            elif name.startswith("red"):
                result[name] = f"{rounds * blocks * 256 * int(name[-1]) / ms / 1e6:.2f} floats/ns"
            else:
                result[name] = f"{ms * 1000 / count:.3f} us"
        except Exception as error:  # one experiment that a GPU refuses leaves the others
            result[name] = f"failed: {error}"
    return result
