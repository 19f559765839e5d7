"""Instead of a GPU, the device of the tests: the kernels' own sources on the CPU.  Importing it puts it in place.

With it `python -m benchmarks.gpu --twin` runs every line that `make gpu` runs, on a small model, with times that mean
nothing, so that no slip of the pen costs a minute on a GPU.  Needs g++ and `tests` on the path; pytest takes it as
`-p benchmarks.gpu.twin`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from cuda_twin import TwinDevice
from finial.backends.cuda import driver
from finial.backends.cuda.device import Launch


class BenchDevice(TwinDevice):
    """What `CudaDevice` has beyond the protocol."""

    dependent = True

    def elapsed_ms(self, work: Callable[[], object], times: int = 1) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.synchronize()
        return (time.perf_counter() - start) * 1000

    def run_each(self, launches: Sequence[Launch]) -> list[float]:
        self.record(launches)
        return [self.elapsed_ms(lambda launch=launch: self.replay([launch])) for launch in launches]


def open_device(index: int = 0) -> Any:
    """As `driver.open_device`."""
    # Where nobody asks for the megakernel it is not tried out either, which would take minutes here.
    asked = os.environ.get("FINIAL_CUDA", "").startswith("mega")
    return BenchDevice(arena=256 << 20, refuses_waiting="" if asked else "the twin's blocks take turns")


driver.open_device = open_device
