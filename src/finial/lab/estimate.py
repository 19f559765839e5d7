"""How long a run will take, from the size of its work alone.

estimate(plan(quick=True, threads=2), engines)
"""

from __future__ import annotations

from collections.abc import Sequence

from finial.lab.engines.table import Engine
from finial.lab.workloads import DEMO, Group

# Of an engine of 0.6 B parameters on two cores of 2024; an estimate need not be better than a factor of two.
DECODE_TOK_S, PROMPT_TOK_S = 30.0, 300.0
START_S, PROBE_S, VERDICT_S = 3.0, 0.2, 15.0


def estimate(groups: Sequence[Group], engines: Sequence[Engine]) -> float:
    """Seconds."""
    total = 0.0
    for group in groups:
        able = [e for e in engines if any(e.runs(group.model, group.format, w) for w in group.workloads)]
        total += START_S * len(able) * (group.starts + (group.starts > 1))
        total += VERDICT_S if group.model != DEMO and group.threads > 1 else 1.0
        for workload in group.workloads:
            count = sum(engine.runs(group.model, group.format, workload) for engine in engines)
            fill = workload.depth * workload.sequences / PROMPT_TOK_S
            run = (workload.new - 1) / DECODE_TOK_S / (50 if group.model == DEMO else 1)
            fills = 1 if workload.keeps else workload.rounds + workload.warmups
            total += count * (fill * fills + (run + PROBE_S) * workload.rounds)
    return total
