"""Whether a reply is the work that was asked for, and its number.

Knows workloads and replies (docs/lab-protocol.md); nothing of processes.

    wrong = check(workload, reply, vocab_size, wall_s); value(workload, reply)
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from finial.lab.workloads import Workload

# A reply's clock may be off the lab's by what JSON, pipes and a stopped process cost; and an engine prepares a request
# before its own clock starts, or the lab's machine was taken away meanwhile.
EARLY_S, LATE_S, LATE_SHARE = 0.02, 1.0, 0.5


def check(workload: Workload, reply: dict[str, Any], vocab_size: int, wall_s: float | None = None) -> str:
    """Why a reply to `run` is not the work that was asked for; empty when it is.

    Args:
        wall_s: what the lab saw between question and answer; None: unknown, as in a warm-up that compiles.
    """
    tokens, first, last, times = (reply.get(name) for name in ("tokens", "first", "last", "times"))
    if not isinstance(tokens, list) or not all(isinstance(ids, list) for ids in tokens):
        return "no lists of tokens"
    counts = [len(ids) for ids in tokens]
    if counts != [workload.new] * workload.sequences:
        return f"unequal work: {counts} tokens instead of {workload.sequences} × {workload.new}"
    for ids in tokens:
        strange = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size]
        if strange:
            return f"{strange[0]!r} is no token of {vocab_size:,}"
    for name, values in (("first", first), ("last", last)):
        if not isinstance(values, list) or len(values) != workload.sequences or not all(map(_time, values)):
            return f"{name!r} is not one time for each sequence"
    assert isinstance(first, list) and isinstance(last, list)
    if not all(0 < a <= b for a, b in zip(first, last, strict=True)):
        return "times that go backwards"
    paced = workload.kind in ("decode", "first")  # the number is of what comes after the first token
    if workload.new > 1 and (paced or times is not None) and any(a == b for a, b in zip(first, last, strict=True)):
        return "all tokens at one moment"
    together = reply.get("at_first", [1] * workload.sequences)
    if paced and together is None:
        return "tokens came several at once, and nobody says how many with the first: no rate"
    if together is not None and not _counts(together, workload):
        return "'at_first' is not one number of tokens for each sequence"
    if times is not None:
        wrong = _times(workload, times, first, last)
        if wrong:
            return wrong
    if wall_s is not None:
        if max(last) > wall_s + EARLY_S:
            return f"the last token came after {max(last):.3g} s, the answer after {wall_s:.3g} s"
        if wall_s > max(last) * (1 + LATE_SHARE) + LATE_S:
            return f"the answer took {wall_s:.3g} s, the last token is said to have come after {max(last):.3g} s"
    return ""


def _counts(value: Any, workload: Workload) -> bool:
    whole = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    return whole and len(value) == workload.sequences and all(1 <= n <= workload.new for n in value)


def _time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _times(workload: Workload, times: Any, first: list[float], last: list[float]) -> str:
    if not isinstance(times, list) or [len(t) for t in times] != [workload.new] * workload.sequences:
        return "not one time for each token"
    for series, a, b in zip(times, first, last, strict=True):
        if not all(map(_time, series)) or any(y < x for x, y in itertools.pairwise(series)):
            return "times of tokens that go backwards"
        if series[0] != a or series[-1] != b:
            return "times of tokens that do not begin and end with the first and the last"
    return ""


def value(workload: Workload, reply: dict[str, Any]) -> float:
    """The workload's number from a checked reply."""
    first: float = min(reply["first"])
    last: float = max(reply["last"])
    if workload.kind == "prompt":
        return sum(workload.prompt_lengths) / first
    if workload.kind == "generate":
        return workload.sequences * workload.new / last
    together = reply.get("at_first") or [1] * workload.sequences
    steps: int = workload.sequences * workload.new - sum(together)
    if workload.kind == "first":
        return first / ((last - first) / (steps / workload.sequences))
    return steps / (last - first)
