"""Pictures of bars: speed beside the machine's limit, memory, energy.

Knows results; each function yields the pictures that they allow.

    list(speeds(study, pen))
"""

from __future__ import annotations

from collections.abc import Iterator

from finial.lab.probes.energy import Cost
from finial.lab.report.drawing import Chart, Pen, bars, slug
from finial.lab.report.results import Result, Study, joules, number, percent

HEADLINES = 6  # workloads of a family that get bars of their own


def speeds(study: Study, pen: Pen) -> Iterator[Chart]:
    """Bars by engine in each format of one workload, with intervals and the limit."""
    found: dict[tuple[str, int, str], list[list[Result]]] = {}
    for cell in study.cells():
        if (
            cell
            and cell[0].unit == "tok/s"
            and cell[0].cell.workload.kind != "serve"
            and any(result.ok for result in cell)
        ):
            _, model, _, threads = cell[0].group
            found.setdefault((model, threads, cell[0].cell.workload.name), []).append(cell)
    families: dict[tuple[str, int, str], int] = {}
    for (model, threads, name), cells in found.items():
        workload = cells[0][0].cell.workload
        family = (model, threads, workload.family or name)
        families[family] = families.get(family, 0) + 1
        if workload.family in ("depth", "cache") or families[family] > HEADLINES:
            continue  # curves show those better
        yield bars(
            pen,
            cells,
            lambda result: None if result.value is None else (result.value.median, result.value.low, result.value.high),
            name=slug("speed", model, threads, name),
            heading=f"{name}: {model}, {threads} thread{'s' * (threads != 1)}",
            axis="tokens per second",
            caption="Median, 95 % interval, share of the limit; upright: the median of what the machine allowed.",
            label=lambda result: (number(result.middle), percent(result.share)),
            limit=True,
        )


def memory(study: Study, pen: Pen) -> Iterator[Chart]:
    """Bars of peak memory beside what the weights and the cache must take."""
    found: dict[tuple[str, int], list[list[Result]]] = {}
    for cell in study.cells():
        if cell and cell[0].cell.workload.kind == "memory" and any(result.ok for result in cell):
            _, model, _, threads = cell[0].group
            found.setdefault((model, threads), []).append(cell)
    for (model, threads), cells in found.items():
        yield bars(
            pen,
            cells,
            lambda result: None if result.value is None else (result.value.median, result.value.low, result.value.high),
            name=slug("memory", model, threads),
            heading=f"Peak memory after a short text: {model}",
            axis="GB (10⁹ bytes) of the process tree",
            caption="The upright line is the weights in their format and the KV cache that was filled.",
            label=lambda result: ("", number(result.middle)),
            limit=True,
        )


def energy(study: Study, pen: Pen) -> Iterator[Chart]:
    """Bars of joules per token, a picture for each counter; none where nothing was measured."""
    for counter in dict.fromkeys(result.energy.counters for result in study.results if result.energy is not None):

        def spent(result: Result, counter: str = counter) -> tuple[float, float, float] | None:
            found = result.energy
            if found is None or found.counters != counter or found.gross_j is None:
                return None
            net = [x for x in (found.net_empty_j, found.net_loaded_j) if x is not None]
            return found.gross_j, max(0.0, min([*net, found.gross_j])), found.gross_j

        kinds = ("decode", "generate")
        cells = [
            cell for cell in study.cells() if cell and cell[0].cell.workload.kind in kinds and any(map(spent, cell))
        ]
        yield bars(
            pen,
            cells[:HEADLINES],
            spent,
            name=slug("energy", counter),
            heading=f"Energy per token, by {counter}",
            axis="joules per generated token",
            caption="Gross, from a cumulative counter, with tokens per joule; the thin line reaches down to what is "
            "left beyond the idle machine.",
            label=lambda result: ("", _joules(result.energy) if result.energy is not None else ""),
            limit=False,
            room=2.0,
        )


def _joules(energy: Cost) -> str:
    return f"{joules(energy.gross_j)} J · {joules(energy.tokens_per_j)} tok/J"
