"""Device memory for the values of one list of launches: where each lies, and what is taken again.

Knows nothing of graphs or kernels.

    workspace = Workspace(device); block = workspace.take(4096); workspace.give(block)
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from finial.backends.cuda.device import Device, free_all


@dataclass
class Block:
    """Memory that values share; free for others when nobody uses it."""

    address: int
    nbytes: int
    users: int = 0


@dataclass(frozen=True)
class Place:
    """Where a value's rows lie: `stride` elements apart, float32 or (half) bf16.

    `pick` is the address of the numbers that say which row of there is row r; 0: row r itself.
    """

    address: int
    stride: int
    block: Block | None = None
    pick: int = 0
    half: bool = False


class Workspace:
    """Device memory for the values of one list of launches, taken again as values die; goes with the object."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: dict[int, list[Block]] = {}
        self.addresses: list[int] = []
        self.nbytes = 0
        weakref.finalize(self, free_all, device, self.addresses).atexit = False

    def take(self, nbytes: int) -> Block:
        """Memory with whatever was there before."""
        free = self._free.get(nbytes)
        return free.pop() if free else Block(self.keep(nbytes), nbytes)

    def give(self, block: Block) -> None:
        """Nobody uses it any more."""
        self._free.setdefault(block.nbytes, []).append(block)

    def keep(self, nbytes: int) -> int:
        """Memory that is not taken again."""
        self.addresses.append(self._device.allocate(max(nbytes, 16)))
        self.nbytes += nbytes
        return self.addresses[-1]
