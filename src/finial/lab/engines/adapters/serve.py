"""The engine's side of the protocol: one JSON object a line on stdin, one on stdout (docs/lab-protocol.md).

Runs under any engine's own interpreter, so it needs the standard library alone.  Knows nothing of engines or workloads.

    serve(Session, engine="finial", version=finial.__version__)
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROTOCOL = 1
OPERATIONS = ("run", "score", "greedy", "sample")  # of a session; a session need only have `run`


class Clock:
    """Times of one generation, in seconds since it was submitted.

    Call `token(sequence, id)` when the id is on the host; sequences count from 0.

    Args:
        synchronise: waits until the device is done; needed where an id can be had before that.
    """

    def __init__(self, sequences: int, synchronise: Callable[[], object] | None = None) -> None:
        self._synchronise = synchronise
        self._times: list[list[float]] = [[] for _ in range(sequences)]
        self._tokens: list[list[int]] = [[] for _ in range(sequences)]
        self._start = time.perf_counter()

    def token(self, sequence: int, token: int) -> None:
        if self._synchronise is not None:
            self._synchronise()
        self._times[sequence].append(time.perf_counter() - self._start)
        self._tokens[sequence].append(int(token))

    def reply(self) -> dict[str, Any]:
        """What `run` returns: first and last time, the ids and the time of every token, for each sequence."""
        return {
            "first": [times[0] for times in self._times],
            "last": [times[-1] for times in self._times],
            "tokens": self._tokens,
            "times": self._times,
        }


def top(entries: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    """What `score` returns where there are no logits.

    Args:
        entries: one a position: log-probabilities of the most likely tokens after it; empty where unknown.
    """
    ranked = [sorted(entry.items(), key=lambda item: (-item[1], item[0])) for entry in entries]
    return {"kind": "top", "top": [[[int(token), float(value)] for token, value in entry] for entry in ranked]}


def peak_bytes() -> int | None:
    """The most physical memory this process has held, mapped file pages that it touched included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the memory of the process that forked this one
        high = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(high[1]) << 10 if high else None
    if sys.platform == "win32":
        return None
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest << 10


def _die_with_parent() -> None:
    """A lab that is killed must not leave stopped processes that hold gigabytes."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of prctl(2)


def serve(open_session: Callable[..., Any], engine: str, version: str) -> None:
    """Answer requests until the end of input or `quit`.

    Args:
        open_session: called with the fields of `load`; gives an object with `run` and `precision` (what weights,
            activations, KV cache and sums are kept in), and, where it can, the other `OPERATIONS`, `memory` and
            `device`.
        engine, version: what `hello` says.
    """
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print on stdout
    session: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "quit":
            break
        try:
            if op == "hello":
                operations = [name for name in OPERATIONS if hasattr(open_session, name)]
                result = {"protocol": PROTOCOL, "engine": engine, "version": version, "operations": operations}
            elif op == "load":
                started = time.perf_counter()
                session = open_session(**request)
                result = {"load_s": time.perf_counter() - started, "version": version, "precision": session.precision}
                result["device"] = getattr(session, "device", "cpu")
            elif op == "memory":
                result = {"peak_bytes": peak_bytes(), **(session.memory() if hasattr(session, "memory") else {})}
            elif op in OPERATIONS and hasattr(session, op):
                result = getattr(session, op)(**request)
            else:
                raise ValueError(f"{engine} cannot {op}")
            reply = {"ok": True, **result}
        except Exception as error:
            traceback.print_exc()
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
