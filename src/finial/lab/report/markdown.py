"""A record as Markdown: every speed beside its share of the machine's limit, its ratio and its verdict.

Knows the record's shape; measures nothing.

    print(render(record.data))
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from statistics import median as middle

from finial.lab.analysis import (
    DISTURBED,
    best_rival,
    disturbances,
    energy,
    energy_line,
    first_token_s,
    groups,
    growth,
    limit,
    machine_line,
    measured,
    memory,
    note_lines,
    ours,
    precision_labels,
    ratio,
    readings,
    served,
    share,
    token_times,
)
from finial.lab.record import Cell, Data, Reading
from finial.lab.report.results import joules, weights
from finial.lab.statistics import median, percentiles, spread


def render(data: Data, title: str = "Benchmark") -> str:
    """The whole page."""
    notes: list[str] = []
    parts = [f"# {title}, {data.started}", "", *_head(data), ""]
    for (model, format), cells in groups(data).items():
        parts += [f"## {model}, {weights(format)}", "", *_group(data, cells, notes), ""]
        parts += [
            *_latencies(cells),
            *_served(data, cells),
            *_growth(cells),
            *_memory(cells),
            *_energy(data, cells),
            *_verdicts(data, model, format),
            "",
        ]
    if notes:
        parts += ["## Not measured", "", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    return "\n".join([*parts, *_legend()]) + "\n"


def _head(data: Data) -> Iterator[str]:
    yield f"{machine_line(data.machine)}; finial {data.commit}; instruction set {data.machine['native']['isa']}."
    if data.command:
        yield f"\nMeasured by `{shlex.join(data.command)}`."
    for warning in data.warnings:
        yield f"\n**{warning}**"
    if data.busy is not None and data.busy > DISTURBED:
        yield f"\n**The machine was busy: {data.busy:.0%} of its processors' time was taken before the run began.**"
    disturbed, found = disturbances(data)
    if disturbed:
        yield (
            f"\n**During {disturbed} of {len(found)} samples something else took more than {DISTURBED:.0%} of the "
            f"machine (median {middle(found):.0%}, most {max(found):.0%}), although each was measured again.**"
        )
    builds = dict.fromkeys(cell.native for cell in data.cells.values())
    if len(builds) > 1:
        yield f"\n**finial's native module changed under the run: {', '.join(map(str, builds))}.**"
    yield ""
    probes: dict[tuple[int, bool], list[Reading]] = {}
    for cell in data.cells.values():
        for reading in readings(cell):
            probes.setdefault((cell.threads, reading.from_cache), []).append(reading)
    for (threads, cached), around in sorted(probes.items()):
        read = [r.read_gb_s for r in around if r.read_gb_s]
        latency = [r.core_to_core_ns for r in around if r.core_to_core_ns]
        if read:
            yield (
                f"- {threads} thread{'s' * (threads > 1)}: reads {min(read):.0f} – {middle(read):.0f} – {max(read):.0f}"
                f" GB/s {'from cache ' * cached}(least, median, most of the run's probes)"
                + (f"; core to core {min(latency):.0f} – {max(latency):.0f} ns" if latency else "")
                + "".join(f"; {k} {gops / 1000:.2f} T/s" for k, gops in data.peaks.get(str(threads), {}).items())
            )
    for (name, version), precisions in precision_labels(data).items():
        yield f"- {name} ({version}) — {'; '.join(precisions)}"
    for line in note_lines(data):
        yield f"- {line}"
    yield f"- {energy_line(data)}"


def _group(data: Data, cells: list[Cell], notes: list[str]) -> Iterator[str]:
    present = list(dict.fromkeys(name for cell in cells for name in cell.engines))
    first = ours(present)
    names = [name for name in present if name == first] + [name for name in present if name != first]
    yield f"| | unit | {' | '.join(names)} | limit | {first} ÷ best of the others |"
    yield "|---" * (len(names) + 4) + "|"
    for cell in cells:
        columns = [_value(data, cell, name, notes) for name in names]
        best = best_rival(cell, first)
        versus = ratio(cell, first, best) if best is not None and first is not None else None
        text = "–"
        if versus is not None:
            text = f"{versus.median:.2f} × [{versus.low:.2f}, {versus.high:.2f}] {best}"
            text = f"{text}: no difference shown" if not versus.shown else f"**{text}**" if versus.low > 1 else text
        yield f"| {cell.workload.name} | {cell.workload.unit} | {' | '.join(columns)} | {_limit(data, cell)} | {text} |"


def _value(data: Data, cell: Cell, name: str, notes: list[str]) -> str:
    row = cell.engines.get(name)
    if row is None:
        return "–"
    if row.status != "ok":
        note = f"{name}, {cell.format}: {row.reason}"
        if note not in notes:
            notes.append(note)
        return f"{row.status} ({notes.index(note) + 1})"
    if not row.samples:
        return "–"
    number = median(row.values)
    kind = cell.workload.kind
    shown = f"{digits(number / 1e9 if kind == 'memory' else number)} ± {100 * spread(row.values):.0f} %"
    part = share(cell, name, data.peaks)
    return shown if part is None else f"{shown} ({100 * part:.0f} %)"


def _limit(data: Data, cell: Cell) -> str:
    found = limit(cell, data.peaks)
    if found is None:
        return "–"
    number, by = found
    return f"{digits(number / 1e9 if cell.workload.kind == 'memory' else number)} ({by})"


def _latencies(cells: list[Cell]) -> Iterator[str]:
    lines = []
    for cell in cells:
        for name, row in measured(cell).items():
            times, first = token_times(row), first_token_s(row)
            if cell.workload.kind != "generate" or first is None:
                continue
            between = " / ".join(f"{1e3 * p:.3g}" for p in percentiles(times)) if times else "no single tokens"
            lines.append(f"| {cell.workload.name} | {name} | {1e3 * first:.3g} | {between} |")
    if lines:
        yield "| | engine | time to first token, ms | between tokens, ms (p50 / p95 / p99) |"
        yield "|---|---|---|---|"
        yield from [*lines, ""]


def _served(data: Data, cells: list[Cell]) -> Iterator[str]:
    runs = [(cell, name, found) for cell, name, found in served(data) if cell in cells]
    if not runs:
        return
    heads = (
        "requests",
        "goodput, requests/s",
        "tok/s",
        "first token, ms",
        "between tokens, ms",
        "waiting at most",
        "failed",
    )
    yield f"| open loop | server | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 2) + "|"
    for cell, name, found in runs:
        first, gaps = (" / ".join(f"{1e3 * t:.3g}" for t in times) or "–" for times in (found.first, found.gaps))
        failed = ", ".join(f"{count} × {reason}" for reason, count in found.errors.items()) or "0"
        figures = (found.requests, f"{found.goodput:.3g}", f"{found.tok_s:.4g}", first, gaps, found.waiting, failed)
        yield f"| {cell.workload.name} | {name} | {' | '.join(map(str, figures))} |"
    yield ""
    yield (
        "Goodput: requests that ended whole, with the first token within 1 s of when they were due and gaps within "
        "0.2 s. Times: p50 / p95 / p99."
    )
    yield ""


def _growth(cells: list[Cell]) -> Iterator[str]:
    for family in dict.fromkeys(cell.workload.family for cell in cells):
        some = [cell for cell in cells if cell.workload.family == family]
        names = dict.fromkeys(name for cell in some for name in cell.engines)
        for name in names:
            found = growth(some, name) if family in ("cache", "depth") else None
            if found is not None:
                p = found.exponent
                yield (
                    f"- {name}: the time of a step grows as depth^{p.median:.2f} [{p.low:.2f}, {p.high:.2f}] over "
                    f"{found.points} depths"
                )
    yield ""


MEMORY = {"peak": "peak", "weight": "weights", "kv": "KV cache", "workspace": "workspace", "device_peak": "device peak"}


def _memory(cells: list[Cell]) -> Iterator[str]:
    found = memory(cells)
    if not found:
        return
    yield f"| memory, MB | {' | '.join(MEMORY.values())} |"
    yield "|---" * (len(MEMORY) + 1) + "|"
    for name, told in found.items():
        figures = [f"{told[key] / 1e6:,.1f}" if key in told else "–" for key in MEMORY]
        yield f"| {name} | {' | '.join(figures)} |"
    yield ""


def _energy(data: Data, cells: list[Cell]) -> Iterator[str]:
    found = [(cell, name, cost) for cell in cells for name in measured(cell) if (cost := energy(data, cell, name))]
    if not found:
        yield "Energy per token and tokens per joule: unavailable."
        yield ""
        return
    heads = (
        "J per token",
        "net of the empty machine",
        "net of it with engines loaded",
        "tokens per J",
        "W",
        "counters",
    )
    yield f"| energy | engine | {' | '.join(heads)} |"
    yield "|---" * 8 + "|"
    for cell, name, cost in found:
        figures = (cost.gross_j, cost.net_empty_j, cost.net_loaded_j, cost.tokens_per_j, cost.watts)
        yield f"| {cell.workload.name} | {name} | {' | '.join(map(joules, figures))} | {cost.counters} |"
    yield ""


def _verdicts(data: Data, model: str, format: str) -> Iterator[str]:
    verdicts = data.verdicts.get(f"{model}/{format}")
    if not verdicts:
        yield "**No verdict: these speeds stand without proof that the output is right.**"
        return
    heads = ("positions", "KL mean", "p99", "max, nats", "top-1", "top-5", "perplexity", "greedy text")
    yield f"| verdict against the float32 reference | {' | '.join(heads)} |"
    yield "|---" * 9 + "|"
    for name, verdict in verdicts.items():
        if verdict.error:
            yield f"| {name} | no verdict: {verdict.error} | | | | | | | |"
            continue
        parted = verdict.divergence
        greedy = (
            f"equal over {verdict.greedy_tokens} tokens"
            if parted is None
            else f"parts after {parted.position} tokens, where its choice is {parted.margin:.1e} nats behind"
        )
        least = "" if verdict.basis == "logits" else "≥ "  # the rest of the vocabulary is unknown
        kl = [f"{least}{x:.1e}" if x is not None else "–" for x in (verdict.kl_mean, verdict.kl_p99, verdict.kl_max)]
        same = ["–" if share is None else f"{share:.1%}" for share in (verdict.top1, verdict.top5)]
        ppl = "–" if verdict.perplexity is None else f"{verdict.perplexity:.4g}"
        ppl += "" if verdict.perplexity_error is None else f" ± {verdict.perplexity_error:.2g}"
        greedy += "" if verdict.repeat_same_text is not False else "; **another one when asked again**"
        flaws = "".join(f"; **{flaw}**" for flaw in verdict.flaws)
        seen = f"{verdict.positions}" if verdict.positions else "greedy tokens alone"
        yield f"| {name} | {seen} | {' | '.join([*kl, *same, ppl])} | {greedy}{flaws} |"


def _legend() -> Iterator[str]:
    yield (
        "Median ± half the distance between the quartiles; in brackets the share of the limit, which is the same work "
        "for every engine: the bytes of finial's format over the read bandwidth measured around the sample, or for "
        "prompts the operations over the measured arithmetic peak. Ratios are medians of paired rounds with a 95 % "
        "bootstrap interval, above 1 where the first engine is better; bold where the interval leaves 1 out in its "
        "favour. Depths are of a filled cache; batches count all sequences' tokens."
    )


def digits(value: float) -> str:
    """Three significant digits."""
    places = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{places}f}"
