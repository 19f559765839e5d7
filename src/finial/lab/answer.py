"""The answer that a run opens with: a ranking, what the machine allows, and one sentence that says what to use.

Knows records; prints nothing.

    found = answer(record.data); found.sentence, found.rows
"""

from __future__ import annotations

from dataclasses import dataclass

from finial.lab.analysis import energy, energy_line, limit, measured, peak_bytes, rank, ratio, readings, served, share
from finial.lab.probes.energy import Cost
from finial.lab.record import Cell, Data, Verdict
from finial.lab.statistics import Interval, Ratio, median

SAME_KL = 0.01  # nats of mean divergence below which a text is the same for a reader: bf16 is near 1e-4, q8_0 near 1e-3
UNCOMPARED = ("load", "memory")


@dataclass(frozen=True)
class Standing:
    """A line of the ranking.

    Attributes:
        versus: the best engine's advantage over this one; None for the best itself.
        verdict: None where there is none.
    """

    engine: str
    value: Interval
    share: float | None
    versus: Ratio | None
    peak_bytes: int | None
    verdict: Verdict | None
    energy: Cost | None = None


@dataclass(frozen=True)
class Table:
    """The ranking of one cell, what the machine allows there, and the rows without a number: status and reason."""

    cell: Cell
    standings: list[Standing]
    limit: tuple[float, str] | None
    failures: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """Everything to say first; `energy` says which counters were read, or why there were none."""

    tables: list[Table]
    limit: str
    sentence: str
    energy: str


def answer(data: Data) -> Answer:
    """Of a record that has at least one cell."""
    if all(cell.workload.kind == "serve" for cell in data.cells.values()):
        return _served(data)
    cells = [c for c in data.cells.values() if c.workload.kind not in UNCOMPARED]
    tables = [_table(data, cell) for cell in cells]
    line = energy_line(data)
    return Answer(tables, _limit(tables), _sentence(tables), f"{line[0].upper()}{line[1:]}.")


def _served(data: Data) -> Answer:
    """Of a server under load: the highest rate at which all that was sent was answered in time."""
    tables = [_table(data, cell) for cell in data.cells.values()]
    runs = served(data)
    if not runs:
        return Answer(tables, "", "The server answered no request: the reasons stand beside it.", "")
    kept = [(cell, found) for cell, _, found in runs if found.good == found.requests]
    cell, found = max(kept or [(c, f) for c, _, f in runs], key=lambda pair: pair[1].goodput)
    said = (
        f"{runs[0][1]} answered everything in time up to this load"
        if kept
        else f"{runs[0][1]} was late or failed at every load"
    )
    first = " / ".join(f"{1e3 * t:,.3g}" for t in found.first)
    verdict = data.verdicts.get(f"{cell.model}/{cell.format}", {}).get(runs[0][1])
    sentence = (
        f"{said}: {cell.workload.name}, {found.goodput:.3g} requests/s in time, {found.tok_s:,.4g} tok/s, first token "
        f"{first} ms (p50 / p95 / p99); {words(verdict)}."
    )
    return Answer(tables, "", sentence, "")


def _table(data: Data, cell: Cell) -> Table:
    verdicts = data.verdicts.get(f"{cell.model}/{cell.format}", {})
    ranking = rank(cell)
    standings = []
    for place, (name, value) in enumerate(ranking):
        versus = ratio(cell, ranking[0][0], name) if place else None
        standings.append(
            Standing(
                name,
                value,
                share(cell, name, data.peaks),
                versus,
                peak_bytes(cell, name),
                verdicts.get(name),
                energy(data, cell, name),
            )
        )
    failures = {name: (row.status, row.reason) for name, row in cell.engines.items() if row.status != "ok"}
    return Table(cell, standings, limit(cell, data.peaks), failures)


def _limit(tables: list[Table]) -> str:
    table = next((t for t in tables if t.limit is not None and t.cell.workload.kind == "decode"), None)
    if table is None or table.limit is None or table.cell.floor is None:
        return "The limit of this machine is unknown: its read bandwidth could not be measured."
    found = [r.read_gb_s for r in readings(table.cell) if r.read_gb_s]
    number, by = table.limit
    source = "from its last cache" if by == "cache read" else "from memory"
    others = any(row.device not in ("", "cpu") for row in table.cell.engines.values())
    return (
        f"This machine reads {median(found):.0f} GB/s {source} with {table.cell.threads} threads; a step must read "
        f"{table.cell.floor.bytes / 1e6:,.1f} MB, so no engine{' on its CPU' * others} can pass {number:,.0f} tok/s."
    )


def _sentence(tables: list[Table]) -> str:
    ranked = [t for t in tables if t.standings]
    if not ranked:
        return "No engine gave a number here: the reasons stand beside them."
    table = next((t for t in ranked if t.cell.workload.kind == "decode"), ranked[0])
    best = table.standings[0]
    others = [s for s in table.standings[1:] if not _same_engine(s.engine, best.engine)]
    said = f"Use {best.engine}: "
    work = table.cell.workload.name
    rival = others[0] if others else None
    if rival is None:
        said += f"it is the only one measured ({best.value.median:,.4g} {table.cell.workload.unit}, {work})"
    elif rival.versus is not None and rival.versus.shown:
        v = rival.versus
        said += f"{v.median:.2f} × [{v.low:.2f}, {v.high:.2f}] the speed of {rival.engine} ({work})"
    else:
        said = f"Use {best.engine} or {rival.engine}: no difference shown between them ({work})"
    if best.share is not None:
        said += f", {best.share:.0%} of what this machine allows"
    lost = [t for t in ranked if t is not table and _beaten(t, best.engine)]
    said += f"; {words(best.verdict)}."
    if lost:
        where = ", ".join(f"{t.standings[0].engine} for {t.cell.workload.name}" for t in lost[:3])
        said += f" Faster elsewhere: {where}."
    return said


def _beaten(table: Table, engine: str) -> bool:
    """Whether another one is shown to be faster there."""
    own = next((s for s in table.standings if s.engine == engine), None)
    return own is not None and own.versus is not None and own.versus.shown


def words(verdict: Verdict | None) -> str:
    """A verdict as half a sentence."""
    if verdict is None:
        return "nobody has checked that its text is right"
    if verdict.flaws:
        return f"its output is wrong: {verdict.flaws[0]}"
    if verdict.error:
        return f"no verdict on its text ({verdict.error})"
    if verdict.kl_mean is None:
        share = verdict.greedy_agreement
        return "its text could not be compared" if share is None else f"{share:.0%} of its tokens are the reference's"
    if verdict.basis != "logits":
        where = "its own text" if verdict.basis == "generated" else "the text"
        return f"its most likely tokens along {where} are at least {verdict.kl_mean:.1e} nats from the reference's" + (
            "" if verdict.top1 is None else f", the first choice the same at {verdict.top1:.1%}"
        )
    if verdict.kl_mean < SAME_KL:
        return f"it says the same as the float32 reference (KL {verdict.kl_mean:.1e} nats)"
    return f"it departs from the float32 reference by {verdict.kl_mean:.2g} nats a token"


def _same_engine(a: str, b: str) -> bool:
    return a.removesuffix(", no cache") == b.removesuffix(", no cache")


def has_numbers(data: Data) -> bool:
    """Whether any engine was measured at all."""
    return any(measured(cell) for cell in data.cells.values())
