"""The engine's side of the protocol: one JSON object a line on stdin, one on stdout.

Runs under any engine's own interpreter, so it needs the standard library alone.  Knows nothing of engines or workloads.

    serve(Session)      # Session(model, format, threads, context).generate(prompts, new, keep)

Requests: {"op": "load", model, format, threads, context} · {"op": "generate", prompts, new, keep} · {"op": "memory"} ·
{"op": "quit"} · any other op is a method of the session that takes the request's other fields.
Replies have "ok"; with false, "error" says why.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """Times of one generation, in seconds since it was submitted.

    Call `token(sequence, id)` when the id is on the host; sequences count from 0.
    """

    def __init__(self, sequences: int) -> None:
        self._times: list[list[float]] = [[] for _ in range(sequences)]
        self._tokens: list[list[int]] = [[] for _ in range(sequences)]
        self._start = time.perf_counter()

    def token(self, sequence: int, token: int) -> None:
        self._times[sequence].append(time.perf_counter() - self._start)
        self._tokens[sequence].append(int(token))

    def reply(self) -> dict[str, Any]:
        """What `generate` returns: first and last time and the ids of each sequence, all times of a single one."""
        reply: dict[str, Any] = {
            "first": [times[0] for times in self._times],
            "last": [times[-1] for times in self._times],
            "tokens": self._tokens,
        }
        if len(self._times) == 1:
            reply["times"] = self._times[0]
        return reply


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


def serve(open_session: Callable[..., Any]) -> None:
    """Answer requests until the end of input or `quit`.

    Args:
        open_session: called with (model, format, threads, context); gives an object with `generate`, `version`,
            `precision` (what weights, activations, KV cache and sums are kept in).
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print on stdout
    session: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "quit":
            break
        try:
            if op == "load":
                started = time.perf_counter()
                session = open_session(**request)
                result = {"load_s": time.perf_counter() - started}
                result |= {"version": session.version, "precision": session.precision}
            elif op == "memory":
                result = {"peak_bytes": peak_bytes()}
            else:
                result = getattr(session, op)(**request)
            reply = {"ok": True, **result}
        except Exception as error:
            traceback.print_exc()
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
