"""Tokens on their way from the device to the host, one row of words for each step, in memory that both see.

A word is the step's epoch and a token in one, so that whoever sees the epoch has the token; epochs are never used
twice.  Knows nothing of steps, graphs and sampling.

    ring = Ring(device); first = ring.epochs(5); tokens = ring.wait(first, rows=1)
"""

from __future__ import annotations

import time
import weakref

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.device import Device, Pinned
from finial.errors import BackendError

STEPS, ROWS = 256, 64
_PAUSE_S = 20e-6  # between two looks; the device is steps ahead of who waits, so this delays nothing but a stream


class Ring:
    """`STEPS` steps of `ROWS` words: the word of (epoch, row) is [epoch % STEPS, row], epoch << 32 | token.

    Attributes:
        address: of the first word, for kernels.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        pinned = device.pinned(STEPS * ROWS * 8)
        self.address = pinned.address
        self._words = pinned.array.view(np.uint64).reshape(STEPS, ROWS)
        self._next = 1
        weakref.finalize(self, _free, device, pinned).atexit = False

    def epochs(self, steps: int) -> int:
        """The first of so many epochs in a row, all new; at most STEPS."""
        assert 1 <= steps <= STEPS
        if self._next + steps > 2**32:
            self._words[:] = 0
            self._next = 1  # a word as it was in the beginning never is an epoch
        first = self._next
        self._next += steps
        return first

    def wait(self, epoch: int, rows: int) -> NDArray[np.int32]:
        """The tokens of a step that the device has been asked for, once they are there.

        Raises:
            BackendError: the device failed, or has done all it was asked for and the step is not there.
        """
        words = self._words[epoch % STEPS, :rows]
        last = False
        while True:
            seen = words.copy()
            if ((seen >> np.uint64(32)) == epoch).all():
                return seen.astype(np.uint32).view(np.int32)
            if last:
                raise BackendError(f"{self._device.name} ended its work without the tokens of a step")
            last = not self._device.busy()
            if not last:
                time.sleep(_PAUSE_S)


def _free(device: Device, pinned: Pinned) -> None:
    device.free_pinned(pinned)
