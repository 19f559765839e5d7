"""Two or more records side by side: ratios with intervals, and a verdict for each row.

Knows records; prints nothing.

    for line in compare([old, new]): line.name, line.ratio, line.verdict
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finial.lab.analysis import by_round, measured
from finial.lab.record import Data
from finial.lab.statistics import Ratio, median, paired_ratio, unpaired_ratio

FASTER, SLOWER, NOTHING, BROKEN, GONE, NEW = (
    "faster",
    "slower",
    "no difference shown",
    "broken",
    "gone",
    "new",
)
REGRESSIONS = (SLOWER, BROKEN, GONE)
WORSE_KL = 2.0  # times the first record's divergence, and at least ROUNDING nats more
ROUNDING = 1e-4


@dataclass(frozen=True)
class Line:
    """An engine in a cell, in the first record and in a later one.

    Attributes:
        ratio: above 1 is better in the later one; None where one of them has no number.
        verdict: of the six words above; note: why, or what else changed.
    """

    cell: str
    engine: str
    unit: str
    before: float | None
    after: float | None
    ratio: Ratio | None
    verdict: str
    note: str = ""

    @property
    def regression(self) -> bool:
        """Whether it should stop a build."""
        return self.verdict in REGRESSIONS


def compare(first: Data, later: Data, tolerance: float = 0.0) -> list[Line]:
    """Every row of either.

    Rows of one run are paired by round; two runs share no machine state, so each side is resampled by itself unless
    both records are the same run (same start), whose rounds are the same rounds.

    Args:
        tolerance: share by which a row may be slower before it counts as slower.
    """
    lines = []
    same_run = first.started == later.started
    for key in dict.fromkeys([*first.cells, *later.cells]):
        old, new = first.cells.get(key), later.cells.get(key)
        names = dict.fromkeys([*(old.engines if old else ()), *(new.engines if new else ())])
        for name in names:
            cell = old or new
            assert cell is not None
            before = measured(old).get(name) if old else None
            after = measured(new).get(name) if new else None
            unit = cell.workload.unit
            scale = 1e-9 if cell.workload.kind == "memory" else 1.0
            values = [None if row is None else scale * median(row.values) for row in (before, after)]
            found = None
            if before is not None and after is not None and old is not None and new is not None:
                a, b = by_round(new, name), by_round(old, name)
                rounds = sorted(a.keys() & b.keys())
                paired = same_run and bool(rounds)
                pair = ([a[r] for r in rounds], [b[r] for r in rounds]) if paired else (after.values, before.values)
                pair = (pair[1], pair[0]) if cell.workload.lower else pair
                found = paired_ratio(*pair) if paired else unpaired_ratio(*pair)
            status, note = _verdict(found, tolerance, before is not None, after is not None)
            if status == GONE:
                row = new.engines.get(name) if new is not None else None
                status, note = (GONE, "not in the later record") if row is None else (BROKEN, row.reason)
            worse = _worse(first, later, f"{cell.model}/{cell.format}", name)
            if worse and after is not None:
                status, note = BROKEN, worse
            lines.append(Line(key, name, unit, values[0], values[1], found, status, note))
    return lines


def _verdict(found: Ratio | None, tolerance: float, before: bool, after: bool) -> tuple[str, str]:
    if found is None:
        if before:
            return (GONE, "") if not after else (NOTHING, "")
        return (NEW, "") if after else (NOTHING, "no number in either")
    if found.pairs < 3:
        return NOTHING, f"{found.pairs} samples are too few"
    if found.high < 1 - tolerance:
        return SLOWER, ""
    return (FASTER, "") if found.low > 1 else (NOTHING, "")


def _worse(first: Data, later: Data, key: str, name: str) -> str:
    """Whether an engine departs further from the reference than it did."""
    old, new = (data.verdicts.get(key, {}).get(name) for data in (first, later))
    if old is None or new is None or old.kl_mean is None or new.kl_mean is None:
        return ""
    if new.kl_mean > WORSE_KL * old.kl_mean and new.kl_mean - old.kl_mean > ROUNDING:
        return f"its divergence from the reference rose from {old.kl_mean:.1e} to {new.kl_mean:.1e} nats"
    return ""


def summary(lines: Sequence[Line]) -> str:
    """One sentence."""
    counts = {word: sum(line.verdict == word for line in lines) for word in (FASTER, SLOWER, NOTHING, BROKEN, GONE)}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "nothing to compare"
