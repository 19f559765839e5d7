"""What a record's samples come to: medians, shares of the limit, paired ratios, rankings, growth laws.

Knows records and statistics; shows nothing.

    share(cell, "finial", data.peaks), ratio(cell, "finial", "llama.cpp"), rank(cell)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finial.lab.open_loop import Summary, summary
from finial.lab.probes.energy import SHORTEST_S, Cost, Energy, cost
from finial.lab.record import Cell, Data, Reading, Row, Sample
from finial.lab.roofline import peak_for
from finial.lab.statistics import Interval, Ratio, exponent, median, median_interval, paired_ratio

DISTURBED = 0.05  # share of the machine that others took, from which a sample is called disturbed


def ours(names: Sequence[str]) -> str | None:
    """The row that others are compared with: finial's own, else the first."""
    own = [name for name in names if name.startswith("finial") and "reference" not in name and "no cache" not in name]
    return (own or list(names) or [None])[0]  # type: ignore[list-item]


def measured(cell: Cell) -> dict[str, Row]:
    """Rows that have numbers."""
    return {name: row for name, row in cell.engines.items() if row.status == "ok" and row.samples}


def by_round(cell: Cell, name: str) -> dict[int, float]:
    """Samples of an engine by round."""
    row = measured(cell).get(name)
    return {} if row is None else {sample.round: sample.value for sample in row.samples}


def ratio(cell: Cell, name: str, rival: str) -> Ratio | None:
    """How much better one is than another, over the rounds that both have; above 1 is better in every kind."""
    mine, theirs = by_round(cell, name), by_round(cell, rival)
    rounds = sorted(mine.keys() & theirs.keys())
    if not rounds:
        return None
    pair = [mine[r] for r in rounds], [theirs[r] for r in rounds]
    return paired_ratio(*(reversed(pair) if cell.workload.lower else pair))


def rank(cell: Cell) -> list[tuple[str, Interval]]:
    """Engines with a number, best median first."""
    found = [(name, median_interval(row.values)) for name, row in measured(cell).items()]
    return sorted(found, key=lambda pair: pair[1].median, reverse=not cell.workload.lower)


def best_rival(cell: Cell, name: str | None) -> str | None:
    """The best of the others."""
    return next((rival for rival, _ in rank(cell) if rival != name), None)


def share(cell: Cell, name: str, peaks: Mapping[str, Mapping[str, float]]) -> float | None:
    """Median over samples of the time that the machine allowed, as it was around the sample, over the time taken.

    The bandwidth is the better of the two probes around a sample, so a share is never flattered by a bad one.  It is
    the CPU's: rows of a GPU or a server have no share.
    """
    row = measured(cell).get(name)
    if cell.floor is None or row is None or cell.workload.kind not in ("decode", "prompt", "generate"):
        return None
    if row.device not in ("", "cpu"):
        return None  # the bandwidth that was measured is the CPU's
    peak = peak_for(cell.format, dict(peaks.get(str(cell.threads), {})))
    shares = []
    for sample in row.samples:
        read = [r.read_gb_s for r in (sample.before, sample.after) if r is not None and r.read_gb_s]
        if read:
            shares.append(cell.floor.seconds(max(read), peak) * sample.value / cell.floor.tokens)
    return median(shares) if shares else None


def readings(cell: Cell) -> list[Reading]:
    """The probes around a cell's samples."""
    return [s.after for row in cell.engines.values() for s in row.samples if s.after is not None]


def limit(cell: Cell, peaks: Mapping[str, Mapping[str, float]]) -> tuple[float, str] | None:
    """What the floor comes to at the median of the cell's probes: the workload's number, and what sets it."""
    if cell.floor is None:
        return None
    if cell.workload.kind == "memory":
        return float(cell.floor.weight_bytes + cell.floor.kv_bytes), "weights + KV"
    found = readings(cell)
    read = [r.read_gb_s for r in found if r.read_gb_s]
    if cell.workload.kind not in ("decode", "prompt", "generate") or not read:
        return None
    seconds = cell.floor.seconds(median(read), peak_for(cell.format, dict(peaks.get(str(cell.threads), {}))))
    reads = seconds <= cell.floor.bytes / median(read) / 1e9
    by = "compute" if not reads else "cache read" if any(r.from_cache for r in found) else "read"
    return cell.floor.tokens / seconds, by


def first_token_s(row: Row) -> float | None:
    """Median time to the first token, of the slowest sequence of each run."""
    found = [max(sample.first) for sample in row.samples if sample.first]
    return median(found) if found else None


def token_times(row: Row) -> list[float]:
    """Inter-token latencies of all kept runs, in seconds."""
    return [
        later - earlier
        for sample in row.samples
        for series in sample.times or ()
        for earlier, later in itertools.pairwise(series)
    ]


def decode_tok_s(sample: Sample, new: int, sequences: int) -> float | None:
    """Tokens per second after the first, of a run."""
    if new < 2 or not sample.first or max(sample.last) <= min(sample.first):
        return None
    return sequences * (new - 1) / (max(sample.last) - min(sample.first))


def peak_bytes(cell: Cell, name: str) -> int | None:
    """The most memory that an engine held, as far as its row says."""
    row = cell.engines.get(name)
    if row is None or row.memory is None:
        return None
    return row.memory.get("peak_bytes")


def memory(cells: Sequence[Cell]) -> dict[str, dict[str, int]]:
    """By engine: what it held at most over some cells, in bytes: "peak", "device_peak", "weight", "kv", "workspace"."""
    found: dict[str, dict[str, int]] = {}
    for cell in cells:
        for name, row in measured(cell).items():
            told = {key.removesuffix("_bytes"): value for key, value in (row.memory or {}).items() if value is not None}
            if told.get("peak", 0) > found.get(name, {}).get("peak", -1):
                found[name] = told
    return found


def energy(data: Data, cell: Cell, name: str) -> Cost | None:
    """Joules per token of a row, gross and net of both idles; None where it has no number or there is no counter."""
    row = measured(cell).get(name)
    if row is None or row.energy is None or not row.energy.tokens:
        return None
    empty, loaded = (
        Energy.of(SHORTEST_S, {c: w * SHORTEST_S for c, w in data.idle_w[key].items()}) if key in data.idle_w else None
        for key in ("empty", f"loaded {cell.model}/{cell.format}/{cell.threads}")
    )
    return cost(Energy.of(row.energy.seconds, row.energy.joules), row.energy.tokens, empty, loaded)


def energy_line(data: Data) -> str:
    """Which counters were read, or why there were none."""
    found = {
        c for cell in data.cells.values() for row in cell.engines.values() if row.energy for c in row.energy.joules
    }
    return f"energy: {', '.join(sorted(found))}" if found else f"energy: unavailable ({data.energy or 'no counter'})"


@dataclass(frozen=True)
class Growth:
    """Step time as a power of the depth: seconds ∝ depth^exponent, with its interval, over `points` depths."""

    exponent: Interval
    points: int


def growth(cells: Sequence[Cell], name: str) -> Growth | None:
    """The growth law of an engine's decode step over depths; None with fewer than three."""
    points = []
    for cell in cells:
        row = measured(cell).get(name)
        if row is not None and cell.workload.kind == "decode" and cell.workload.sequences == 1:
            points.append((float(cell.workload.depth), [1 / value for value in row.values]))
    if len({depth for depth, _ in points}) < 3:
        return None
    points.sort()
    return Growth(exponent([depth for depth, _ in points], [seconds for _, seconds in points]), len(points))


def served(data: Data) -> list[tuple[Cell, str, Summary]]:
    """Every run of open-loop load that has numbers, with what it came to."""
    return [
        (cell, name, summary(row.samples[0].requests or []))
        for cell in data.cells.values()
        for name, row in measured(cell).items()
        if cell.workload.kind == "serve"
    ]


def disturbances(data: Data) -> tuple[int, list[float]]:
    """How many samples others disturbed, and the shares of all that are known."""
    found = [
        s.others for c in data.cells.values() for r in c.engines.values() for s in r.samples if s.others is not None
    ]
    return sum(others > DISTURBED for others in found), found


def precision_labels(data: Data) -> dict[tuple[str, str], list[str]]:
    """(engine, version) -> what it keeps numbers in, by format."""
    labels: dict[tuple[str, str], list[str]] = {}
    for cell in data.cells.values():
        for name, row in cell.engines.items():
            if row.precision:
                seen = labels.setdefault((name, row.version), [])
                label = f"{cell.format}: {row.precision}"
                if label not in seen:
                    seen.append(label)
    return labels


def note_lines(data: Data) -> list[str]:
    """How engines say that they ran, each remark once, with the format in which it first held."""
    lines: dict[tuple[str, str], str] = {}
    for cell in data.cells.values():
        for name, row in cell.engines.items():
            for note in row.notes:
                lines.setdefault((name, note), f"{name}, {cell.format}: {note}")
    return list(lines.values())


def groups(data: Data) -> dict[tuple[str, str], list[Cell]]:
    """Cells by model and format, in the order of the run."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in data.cells.values():
        found.setdefault((cell.model, cell.format), []).append(cell)
    return found


def machine_line(machine: Mapping[str, Any]) -> str:
    """One line on the computer."""
    cpu, total = machine["cpu"], machine["memory"]["total_bytes"]
    gpus = "".join(f", {gpu['name']}" for gpu in machine.get("gpus", ()))
    return (
        f"{cpu['model']}, {cpu['usable_cores']} cores, {cpu['usable_threads']} threads"
        + (f", {total / 2**30:.0f} GiB" if total else "")
        + gpus
        + f"; {machine['system']['name']}, kernel {machine['system']['kernel']}"
    )


def power_law(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(a, p) of y = a·x^p by least squares on logarithms, to draw it."""
    p, a = np.polyfit(np.log(xs), np.log(ys), 1)
    return float(np.exp(a)), float(p)
