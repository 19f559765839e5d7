"""What a program needs of a device: memory, kernels, and lists of launches that run again and again.

Knows no graph and no driver: `driver.py` is the GPU, and the tests have one that runs the same kernel sources on a CPU.

    recording = device.record([Launch(kernel, (128, 1, 1), kernel.pack(...))])
    device.replay(recording)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.kernels import Kernel


@dataclass(frozen=True)
class Launch:
    """One kernel over a grid of blocks, with its packed argument struct."""

    kernel: Kernel
    grid: tuple[int, int, int]
    args: bytes


@dataclass(frozen=True, eq=False)
class Pinned:
    """Memory of the host that the device may write to while it works: here an array, there an address."""

    array: NDArray[np.uint8]
    address: int


def free_all(device: Device, addresses: list[int]) -> None:
    """Give all of them back; for finalizers, which must not hold what they end."""
    while addresses:
        device.free(addresses.pop())


class Device(Protocol):
    """Addresses are integers; work is done in the order in which it is asked for.

    Attributes:
        name: for messages, such as "cuda:0 NVIDIA H200".
        capability: as 90.
        multiprocessors: how many.
        shared_memory: bytes that a block may have.
        refuses_waiting: why blocks of one launch must not wait for each other; "": they may.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_memory: int
    refuses_waiting: str

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""

    def allocate(self, nbytes: int) -> int:
        """Zeroed memory; raises BackendError when there is not enough."""

    def free(self, address: int) -> None:
        """Give it back."""

    def upload(self, address: int, data: NDArray[Any]) -> None:
        """Copy a contiguous array there; the array may change when this returns."""

    def download(self, address: int, data: NDArray[Any]) -> None:
        """Fill a contiguous array from there, after everything asked for before."""

    def pinned(self, nbytes: int) -> Pinned:
        """Zeroed memory of the host that kernels can write to; raises BackendError when there is none."""

    def free_pinned(self, pinned: Pinned) -> None:
        """Give it back, once all work that was asked for is done; its array must not be looked at any more."""

    def record(self, launches: Sequence[Launch]) -> Any:
        """Compile what is needed; something that `replay` runs, which gives back what it holds when it is let go."""

    def replay(self, recording: Any) -> None:
        """Run the launches in order, each after the one before; returns before they end."""

    def resident(self, kernel: Kernel) -> int:
        """Blocks of a kernel that can be at work at once."""

    def launch(self, launch: Launch) -> None:
        """Run one launch, all of whose blocks are at work at once; returns before it ends."""

    def synchronize(self) -> None:
        """Wait for everything asked for."""

    def busy(self) -> bool:
        """Whether anything asked for is not done yet; never waits.  Raises BackendError when the device failed."""
