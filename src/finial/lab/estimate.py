"""How long a run will take, from the size of its work alone.

estimate(groups, engines)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from finial.lab.engines.table import Engine
from finial.lab.workloads import Group, Workload, rounds_for

# Of an engine of 0.6 B parameters (1.2 GB in bf16) on two cores of 2024; an estimate need not be better than a factor
# of two or three.  Smaller models are faster, down to what calls cost.
DECODE_TOK_S, PROMPT_TOK_S, BYTES = 30.0, 300.0, 1.2e9
LEAST_TOKEN_S = 0.0003
START_S, PROBE_S, VERDICT_S = 3.0, 0.2, 15.0


def estimate(
    groups: Sequence[Group],
    engines: Sequence[Engine],
    model_bytes: float = BYTES,
    window_s: float = 0.0,
    most_s: float = math.inf,
) -> float:
    """Seconds for everything.

    Args:
        model_bytes: of the weights.
        window_s: of work whose energy is measured, in each row; most_s: that a workload may take.
    """
    return sum(group_seconds(group, engines, model_bytes, window_s, most_s) for group in groups)


def group_seconds(
    group: Group, engines: Sequence[Engine], model_bytes: float, window_s: float = 0.0, most_s: float = math.inf
) -> float:
    """Of one group: starting its engines, its workloads, its verdicts."""
    able = [e for e in engines if any(e.runs(group.format, w) for w in group.workloads)]
    total = START_S * len(able) * (group.starts + (group.starts > 1)) + VERDICT_S * model_bytes / BYTES
    each = (workload_seconds(group, w, engines, model_bytes, window_s) for w in group.workloads)
    return total + sum(min(seconds, most_s) for seconds in each)


def workload_seconds(
    group: Group, workload: Workload, engines: Sequence[Engine], model_bytes: float, window_s: float = 0.0
) -> float:
    """Of one cell."""
    scale = max(model_bytes / BYTES, 1e-3)
    token = max(scale / DECODE_TOK_S, LEAST_TOKEN_S)
    fill = sum(workload.prompt_lengths) * max(scale / PROMPT_TOK_S, LEAST_TOKEN_S / 30)
    count = sum(engine.runs(group.format, workload) * len(workload.caches) for engine in engines)
    run = (workload.new - 1) * token
    if workload.caches != (True,):
        run += (workload.new - 1) * fill / 2  # half of the rows read everything again for each token
    once = run + (0 if workload.keeps else fill)
    rounds = rounds_for(workload, once)
    return count * (fill + (once + min(PROBE_S, once)) * rounds + once * workload.warmups / 2 + window_s)
