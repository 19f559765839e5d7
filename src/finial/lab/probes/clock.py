"""Time: a clock that is read only when the device has done everything it was given.

Knows how a device says that it is done, as a function; nothing of torch, CUDA or engines.  An engine in a process of
its own synchronises there (adapters/serve.py), for nobody else can.

    clock = DeviceClock(torch.cuda.synchronize); start = clock.now(); …; clock.now() - start
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Protocol

OVERHEAD_READS = 101


class Clock(Protocol):
    """Something that tells the time."""

    def now(self) -> float:
        """Seconds since an unspecified beginning; never smaller than before."""


class DeviceClock:
    """The host's monotonic clock behind a device's barrier.

    Args:
        synchronise: returns when the device is done; the default is for work that is done when its call returns.
        host: seconds of a monotonic clock.
    """

    def __init__(
        self, synchronise: Callable[[], object] = lambda: None, host: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronise, self._host = synchronise, host

    def now(self) -> float:
        """Seconds, read after the device is done."""
        self._synchronise()
        return self._host()

    def overhead_s(self) -> float:
        """What a reading itself takes: the median distance of readings with nothing between them."""
        readings = [self.now() for _ in range(OVERHEAD_READS)]
        return sorted(b - a for a, b in itertools.pairwise(readings))[OVERHEAD_READS // 2 - 1]


class FakeClock:
    """Time that passes only when it is told to."""

    def __init__(self, at: float = 0.0) -> None:
        self.at = at

    def now(self) -> float:
        """The time it was told."""
        return self.at

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.at += seconds
