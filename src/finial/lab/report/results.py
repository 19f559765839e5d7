"""Records as flat results, for pictures and pages: what each engine did in each workload, and what that comes to.

Knows records and their analysis; draws and writes nothing.

    study = Study.of([record.data]); study.results[0].value, study.results[0].share
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from finial.lab import analysis
from finial.lab.probes.energy import Cost
from finial.lab.record import Cell, Data, Row, Verdict
from finial.lab.statistics import Interval, Ratio, median_interval


@dataclass(frozen=True)
class Result:
    """One engine in one workload.

    Attributes:
        record: label of the record that it is from.
        values: of the samples, in `unit` (GB of memory, where the record has bytes).
        value: their median with its interval; None where there is no number that may stand.
        limit, limited_by: the value that the machine allows, and what bounds it.
        share: the limit's time over the time taken; None where nothing is known.
    """

    record: str
    cell: Cell
    engine: str
    row: Row
    values: tuple[float, ...]
    value: Interval | None
    limit: float | None
    limited_by: str
    share: float | None
    verdict: Verdict | None
    energy: Cost | None

    @property
    def ok(self) -> bool:
        """Whether there is a number that may stand."""
        return self.value is not None

    @property
    def middle(self) -> float:
        """The median, where there is one."""
        assert self.value is not None
        return self.value.median

    @property
    def unit(self) -> str:
        """Of its numbers."""
        return self.cell.workload.unit

    @property
    def group(self) -> tuple[str, str, str, int]:
        """What a set of comparable workloads shares: record, model, format, threads."""
        return self.record, self.cell.model, self.cell.format, self.cell.threads

    @property
    def step_s(self) -> float:
        """Seconds of one step, where the number is a rate."""
        return self.cell.workload.sequences / self.middle


class Study:
    """The results of any number of records, in the records' order.

    Attributes:
        records: by label.
    """

    def __init__(self, records: Mapping[str, Data]) -> None:
        self.records = dict(records)

    @staticmethod
    def of(records: Sequence[Data]) -> Study:
        """Labelled by when they began, and by their place where two began together."""
        starts = [data.started for data in records]
        return Study(
            {
                start if starts.count(start) == 1 else f"{start} ({place})": data
                for place, (start, data) in enumerate(zip(starts, records, strict=True), 1)
            }
        )

    @property
    def many(self) -> bool:
        """Whether a result must say which record it is from."""
        return len(self.records) > 1

    @cached_property
    def results(self) -> list[Result]:
        """All of them, failed ones too."""
        return [result for cell in self.cells() for result in cell]

    @cached_property
    def engines(self) -> list[str]:
        """finial's first, then as the records have them."""
        names = dict.fromkeys(result.engine for result in self.results)
        return sorted(names, key=lambda name: not name.startswith("finial"))

    def cells(self) -> Iterator[list[Result]]:
        """Results that stand side by side, cell by cell."""
        for label, data in self.records.items():
            for cell in data.cells.values():
                yield [_result(label, data, cell, engine, row) for engine, row in cell.engines.items()]

    @cached_property
    def groups(self) -> dict[tuple[str, str, str, int], list[list[Result]]]:
        """Cells by group."""
        found: dict[tuple[str, str, str, int], list[list[Result]]] = {}
        for cell in self.cells():
            if cell:
                found.setdefault(cell[0].group, []).append(cell)
        return found


def ratio(ours: Result, theirs: Result) -> Ratio | None:
    """How many times better `ours` is, over the rounds that both have; above 1 is better whatever the unit."""
    return analysis.ratio(ours.cell, ours.engine, theirs.engine) if ours.cell is theirs.cell else None


def best(cell: Sequence[Result]) -> Result | None:
    """The one with the best median; None when nothing stands."""
    standing = [result for result in cell if result.ok]
    if not standing:
        return None
    return (min if standing[0].cell.workload.lower else max)(standing, key=lambda result: result.middle)


def ours(cell: Sequence[Result]) -> Result | None:
    """finial's own where it stands, else the best."""
    standing = {result.engine: result for result in cell if result.ok}
    name = analysis.ours(list(standing))
    return standing[name] if name is not None and name.startswith("finial") else best(cell)


def _result(label: str, data: Data, cell: Cell, engine: str, row: Row) -> Result:
    scale = 1e-9 if cell.workload.kind == "memory" else 1.0
    values = tuple(value * scale for value in row.values) if row.status == "ok" else ()
    limit = analysis.limit(cell, data.peaks)
    return Result(
        record=label,
        cell=cell,
        engine=engine,
        row=row,
        values=values,
        value=median_interval(values) if values else None,
        limit=None if limit is None else limit[0] * scale,
        limited_by="" if limit is None else limit[1],
        share=analysis.share(cell, engine, data.peaks),
        verdict=data.verdicts.get(f"{cell.model}/{cell.format}", {}).get(engine),
        energy=analysis.energy(data, cell, engine),
    )


def number(value: float) -> str:
    """Three significant digits, as people read them."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    return f"{value:,.{digits}f}"


def joules(value: float | None) -> str:
    """Three significant digits, however small; "unavailable" where nothing was measured."""
    return "unavailable" if value is None else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share as a whole percentage; nothing where it is unknown."""
    return "" if share is None else f"{100 * share:.0f} %"


def weights(format: str) -> str:
    """A format as people say it."""
    return "weights as stored" if format == "stored" else format


def title(group: tuple[str, str, str, int], many: bool = False) -> str:
    """A group in words: "qwen3-0.6b, bf16, 2 threads"."""
    record, model, format, threads = group
    text = f"{model}, {weights(format)}" + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")
    return f"{text} ({record})" if many else text
