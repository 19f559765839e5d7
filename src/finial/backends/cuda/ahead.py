"""Runs of decode steps without the host between them: a step's graph ends with a kernel that prepares the next step.

The host has a few steps under way at any time and reads tokens from a ring in its own memory; it never waits for the
device's queue to empty.  Knows how a run's integers lie on the device; nothing of the steps' other kernels.

    block = AheadBlock(recorded rows …); block.upload(…); for tokens in run(…): ...
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from finial.backends import Ahead
from finial.backends.cuda import kernels, ring
from finial.backends.cuda.device import Device, Launch
from finial.backends.cuda.feeds import Ints, bucket
from finial.backends.cuda.ring import Ring
from finial.backends.cuda.workspace import Workspace

STOPS = 32  # stop ids of a row at most
# Steps that the device has been asked for beyond those that the host has seen.  A step of the smallest models takes
# half a millisecond on the fastest GPUs, so that this is a few milliseconds in which the host may do something else;
# when a run is closed, so many steps were for nothing.
UNDER_WAY = 8


class AheadBlock:
    """A run's integers on the device, for one bucket of rows: epoch, states of rows, stop ids, random numbers."""

    def __init__(self, workspace: Workspace, rows: int) -> None:
        self._rows = rows
        self._states, self._stops = 4, 4 + 4 * rows
        self._draws = self._stops + STOPS * rows
        self._ints = np.zeros(self._draws + 2 * ring.STEPS * rows, np.int32)
        self.address = workspace.keep(self._ints.nbytes)

    def launch(self, vocab: int, page_size: int, **args: int) -> Launch:
        """The kernel that ends each step.

        Args:
            args: the fields of ahead.cuh's struct that are not this block's.
        """
        kernel = kernels.sample_ahead(vocab, page_size, ring.STEPS, ring.ROWS)
        packed = kernel.pack(
            epoch=self.address,
            states=self.address + 4 * self._states,
            stop_ids=self.address + 4 * self._stops,
            draws=self.address + 4 * self._draws,
            vocab=vocab,
            **args,
        )
        return Launch(kernel, (self._rows, 1, 1), packed)

    def upload(self, device: Device, ahead: Ahead, epoch: int) -> None:
        """Before a run whose first step has this epoch."""
        steps, count = ahead.uniforms.shape
        ints, rows = self._ints, self._rows
        ints[: self._draws] = 0
        ints[0] = np.uint32(epoch).view(np.int32)
        states = ints[self._states : self._stops].reshape(rows, 4)
        states[:count, 1] = ahead.limits
        states[:, 2] = np.arange(rows) * STOPS
        stops = ints[self._stops : self._draws].reshape(rows, STOPS)
        for row, ids in enumerate(ahead.stop_ids):
            states[row, 3] = len(ids)
            stops[row, : len(ids)] = sorted(ids)
        end = self._draws + 2 * steps * rows
        draws = ints[self._draws : end].view(np.float64).reshape(steps, rows)
        draws[:, :count], draws[:, count:] = ahead.uniforms, 0.0
        device.upload(self.address, ints[:end])


def fits(ahead: Ahead) -> bool:
    """Whether a run of so many steps, rows and stop ids has room."""
    steps, rows = ahead.uniforms.shape
    return 1 <= steps <= ring.STEPS and rows <= ring.ROWS and max(map(len, ahead.stop_ids), default=0) <= STOPS


def run(device: Device, words: Ring, recording: Any, ahead: Ahead, epoch: int) -> Generator[Ints, None, None]:
    """See `finial.backends.RunsAhead.ahead`; what the first step needs is on the device.

    Args:
        recording: of one step, which ends with an `AheadBlock`'s launch.
    """
    steps, rows = ahead.uniforms.shape
    begun = min(steps, UNDER_WAY)
    for _ in range(begun):
        device.replay(recording)
    return _tokens(device, words, recording, ahead, epoch, begun, rows)


def _tokens(
    device: Device, words: Ring, recording: Any, ahead: Ahead, epoch: int, begun: int, rows: int
) -> Generator[Ints, None, None]:
    left, steps = ahead.limits.tolist(), len(ahead.uniforms)
    for step in range(steps):
        tokens = words.wait(epoch + step, rows)
        for row, token in enumerate(tokens.tolist()):
            left[row] = 0 if token < 0 or token in ahead.stop_ids[row] else left[row] - 1
        # Fewer rows may be another bucket's, whose sums are grouped otherwise: its tokens are those of single steps.
        go_on = bucket(sum(more > 0 for more in left)) == bucket(rows)
        if go_on and begun < steps:
            device.replay(recording)
            begun += 1
        yield tokens
        if not go_on:
            return
