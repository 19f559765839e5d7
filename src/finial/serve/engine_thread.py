"""One thread that drives the engine, and asyncio tasks that wait for what it makes.

Knows engines, handles and one event loop; nothing of requests, text or HTTP.

    thread = EngineThread(llm.engine); thread.start(asyncio.get_running_loop())
    watch = Watch(); handle = thread.submit(tokens, params, watch=watch)
    while not handle.finished: await watch.wait()

After a step the thread wakes the event loop at most once, whatever the number of tokens and of those who wait, and
not again before the loop has looked: a loop that is busy finds the tokens of several steps at its next turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from finial.engine.generate import Engine
from finial.engine.handle import Handle, Pooling
from finial.engine.sampling import SamplingParams
from finial.serve.metrics import Meter


class Watch:
    """Wakes the one task that waits for some handles.  Everything but `note` belongs to the event loop.

    Args:
        every: wake for every piece; False: only when a handle has ended.
    """

    __slots__ = ("_changed", "_every", "_future", "_thread")

    def __init__(self, every: bool = True) -> None:
        self._every = every
        self._changed = False
        self._future: asyncio.Future[None] | None = None
        self._thread: EngineThread | None = None

    def note(self, handle: Handle) -> None:
        """The handle's listener: called in the thread that drives the engine."""
        assert self._thread is not None
        self._thread.meter.piece(handle)
        if self._every or handle.finish_reason is not None:
            self._thread._changed.append(self)

    def touch(self, changed: bool = True) -> None:
        """Something is new, or the engine has stopped."""
        self._changed |= changed
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        """Return once something is new since the last return; EngineStopped when nothing ever will be."""
        thread = self._thread
        assert thread is not None, "nothing was submitted with this watch"
        while not self._changed:
            if thread.failure is not None:
                raise EngineStopped("the engine has stopped") from thread.failure
            self._future = asyncio.get_running_loop().create_future()
            thread._asleep.add(self)
            try:
                await self._future
            finally:
                thread._asleep.discard(self)
                self._future = None
        self._changed = False


class EngineStopped(RuntimeError):
    """The thread ended because of a mistake of ours; its cause is that mistake."""


class EngineThread:
    """Drives one engine until closed.

    Args:
        keep_core: stay on the first core, see `keep_first_core`.

    Attributes:
        meter: counts its tokens.
        failure: what ended the thread against its will.
    """

    def __init__(self, engine: Engine, meter: Meter | None = None, *, keep_core: bool = False) -> None:
        self.engine = engine
        self.meter = meter if meter is not None else Meter()
        self.failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: deque[Watch] = deque()
        self._asleep: set[Watch] = set()
        self._keep_core = keep_core
        self._woken = False  # the loop was told and has not looked yet
        self._work = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="finial-engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; tasks of `loop` may wait from now on."""
        self._loop = loop
        self._thread.start()

    def submit(self, tokens: Sequence[int], params: SamplingParams, *, watch: Watch, **how: Any) -> Handle:
        """As `Engine.submit`, from any thread; `watch` learns of its pieces."""
        watch._thread = self
        handle = self.engine.submit(tokens, params, listener=watch.note, **how)
        self._work.set()
        return handle

    def embed(self, tokens: Sequence[int], pooling: Pooling, *, watch: Watch, **how: Any) -> Handle:
        """As `Engine.embed`, from any thread; `watch` learns of its end."""
        watch._thread = self
        handle = self.engine.embed(tokens, pooling, listener=watch.note, **how)
        self._work.set()
        return handle

    def cancel(self, handle: Handle) -> None:
        """As `Engine.cancel`: never waits; the pages are back after the step that is running now."""
        if handle.finish_reason is None:
            self.engine.cancel(handle)
            self._work.set()

    def close(self) -> None:
        """End the thread after its step.  What is unfinished stays so: close the engine next."""
        self._closing = True
        self._work.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        step, changed, work = self.engine.step, self._changed, self._work
        try:
            while not self._closing:
                work.clear()
                worked = step()
                if changed and not self._woken:
                    self._wake()
                if not worked:
                    work.wait()
                elif self._keep_core:
                    self._keep_core = False
                    keep_first_core()
        except BaseException as error:
            self.failure = error
            self._wake()
            raise

    def _wake(self) -> None:
        self._woken = True
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._look)
        except RuntimeError:  # the loop is closed: nobody is left who could wait
            self._closing = True

    def _look(self) -> None:
        self._woken = False  # first: what is appended from here on wakes again
        changed = self._changed
        for watch in {changed.popleft() for _ in range(len(changed))}:
            watch.touch()
        if self.failure is not None:
            for watch in list(self._asleep):
                watch.touch(changed=False)


def keep_first_core() -> None:
    """Keep the calling thread on the first core that the process may use, where the system has such a call.

    For the thread that drives the cpu backend, once the backend's own threads are there: those keep to the cores behind
    the first, and each step waits for all.  Beside a busy event loop the kernel may otherwise put this thread onto
    a core of theirs and leave it there, and every barrier of a step then costs a time slice: on two cores 4,096 tokens
    for 8 clients took 2.8 s instead of 0.35 in about every third server (benchmarks/serve.py, the demo model).
    """
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # refused by some sandboxes; then it stays where the kernel puts it
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
