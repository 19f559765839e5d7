"""One self-contained page: the answer, the pictures, every number, the machine; no script, nothing fetched.

Knows results, pictures and the template beside it.

    page([record.data], "Benchmark")          # HTML as one string
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from statistics import median
from typing import Any

from finial import __version__
from finial.lab.analysis import (
    DISTURBED,
    disturbances,
    energy_line,
    machine_line,
    memory,
    note_lines,
    precision_labels,
    readings,
)
from finial.lab.answer import answer
from finial.lab.open_loop import summary
from finial.lab.quality import BASES
from finial.lab.record import Cell, Data, Verdict
from finial.lab.report.charts import pictures
from finial.lab.report.markdown import MEMORY
from finial.lab.report.results import Result, Study, best, joules, number, ours, percent, ratio, title
from finial.lab.report.theme import DARK_SERIES, LIGHT_SERIES, PAGE, inline


def page(records: Sequence[Data], heading: str = "Benchmark") -> str:
    """The page.

    Raises:
        RequestError: matplotlib, which draws its pictures, is missing.
    """
    import jinja2

    study = Study.of(records)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.render(
        version=__version__,
        memory_names=list(MEMORY.values()),
        heading=heading,
        answers=[_answer(label, data, study.many) for label, data in study.records.items() if data.cells],
        light=LIGHT_SERIES,
        dark=DARK_SERIES,
        charts=[
            {
                "name": chart.name,
                "title": chart.title,
                "caption": chart.caption,
                "drawing": _labelled(inline(chart.svg(), f"c{index}"), chart.title),
            }
            for index, chart in enumerate(pictures(study, PAGE))
        ],
        groups=[
            _group(index, title(group, study.many), cells) for index, (group, cells) in enumerate(study.groups.items())
        ],
        records=[_record(label, data, study.many) for label, data in study.records.items()],
    )


def _answer(label: str, data: Data, many: bool) -> list[str]:
    found = answer(data)
    return [f"{label}: {found.sentence}" if many else found.sentence, found.limit]


def _labelled(svg: str, words: str) -> str:
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)


def _group(index: int, heading: str, cells: Sequence[Sequence[Result]]) -> dict[str, Any]:
    results = [result for cell in cells for result in cell]
    engines = sorted(dict.fromkeys(r.engine for r in results), key=lambda name: not name.startswith("finial"))
    return {
        "id": f"table-{index}",
        "title": heading,
        "engines": engines,
        "lines": [_line(cell, engines) for cell in cells],
        "served": [_served(result) for result in results if result.ok and result.cell.workload.kind == "serve"],
        "memory": _memory([cell[0].cell for cell in cells]),
        "energy": [_energy(result) for result in results if result.energy is not None],
        "verdicts": list(dict.fromkeys(f"{r.engine}: {verdict_words(r.verdict)}" for r in results if r.ok)),
        "failures": list(
            dict.fromkeys(
                f"{r.engine}, {r.cell.workload.name}: {r.row.status}: {r.row.reason}" for r in results if not r.ok
            )
        ),
    }


def _line(cell: Sequence[Result], engines: Sequence[str]) -> dict[str, Any]:
    by_name = {result.engine: result for result in cell}
    winner, first = best(cell), cell[0]
    return {
        "name": first.cell.workload.name,
        "unit": first.unit,
        "columns": [_value(by_name.get(name), winner) for name in engines],
        "limit": "–" if first.limit is None else number(first.limit),
        "limited_by": first.limited_by,
        "versus": _versus(cell),
    }


def _value(result: Result | None, winner: Result | None) -> dict[str, Any]:
    if result is None or (result.value is None and result.row.status == "ok"):
        return {"text": "–", "detail": "", "problem": "", "best": False}
    if result.value is None:
        return {"text": result.row.status, "detail": "", "problem": result.row.reason, "best": False}
    parts = [f"{percent(result.share)} of limit"] if result.share is not None else []
    parts += [f"{joules(result.energy.gross_j)} J/token"] if result.energy is not None else []
    detail = " · ".join([*parts, f"{number(result.value.low)} – {number(result.value.high)}"])
    return {"text": number(result.middle), "detail": detail, "problem": "", "best": result is winner}


def _served(result: Result) -> dict[str, Any]:
    found = summary(result.row.samples[0].requests or [])
    return {
        "name": result.cell.workload.name,
        "server": result.engine,
        "requests": found.requests,
        "goodput": number(found.goodput),
        "speed": number(found.tok_s),
        "first": " / ".join(number(1e3 * t) for t in found.first) or "–",
        "gaps": " / ".join(number(1e3 * t) for t in found.gaps) or "–",
        "waiting": found.waiting,
        "failed": ", ".join(f"{count} × {reason}" for reason, count in found.errors.items()) or "0",
    }


def _memory(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    return [
        {"engine": name, "figures": [f"{told[key] / 1e6:,.1f}" if key in told else "–" for key in MEMORY]}
        for name, told in memory(cells).items()
    ]


def _energy(result: Result) -> dict[str, str]:
    cost = result.energy
    assert cost is not None
    return {
        "name": result.cell.workload.name,
        "engine": result.engine,
        "gross": joules(cost.gross_j),
        "empty": joules(cost.net_empty_j),
        "loaded": joules(cost.net_loaded_j),
        "per": joules(cost.tokens_per_j),
        "watts": joules(cost.watts),
        "counters": cost.counters,
    }


def _versus(cell: Sequence[Result]) -> str:
    own = ours(cell)
    rival = best([result for result in cell if own is not None and result is not own])
    found = ratio(own, rival) if own is not None and rival is not None else None
    if own is None or rival is None or found is None:
        return "–"
    text = f"{own.engine} {found.median:.2f} × [{found.low:.2f}, {found.high:.2f}] {rival.engine}"
    return text if found.shown else f"{text}: no difference shown"


def verdict_words(found: Verdict | None) -> str:
    """What is known of an engine's output."""
    if found is None:
        return "no verdict: its speeds stand without proof that the output is right"
    if found.error:
        return f"no verdict: {found.error}"
    parts = []
    if found.kl_mean is not None:
        more = [f"{n} {v:.1e}" for n, v in (("p99", found.kl_p99), ("max", found.kl_max)) if v is not None]
        least = "" if found.basis == "logits" else "at least "
        parts.append(
            f"KL {least}mean {found.kl_mean:.1e}{''.join(f', {m}' for m in more)} nats over {found.positions} positions"
        )
    shares = [f"{n} {100 * v:.1f} %" for n, v in (("top-1", found.top1), ("top-5", found.top5)) if v is not None]
    parts += [", ".join(shares)] if shares else []
    if found.perplexity is not None:
        error = "" if found.perplexity_error is None else f" ± {found.perplexity_error:.2g}"
        parts.append(f"perplexity {found.perplexity:.4g}{error}")
    if found.greedy_tokens:
        at = found.divergence
        parts.append(
            f"greedy text equal over {found.greedy_tokens} tokens"
            if at is None
            else f"greedy text parts after {at.position} tokens, where its choice is {at.margin:.1e} nats behind"
        )
    parts += found.flaws
    return "; ".join(parts) + ("" if found.basis == "logits" else f" ({BASES[found.basis].replace('; ', ', ')})")


def _warnings(data: Data) -> Iterator[str]:
    yield from data.warnings
    if data.busy is not None and data.busy > DISTURBED and not any("busy" in warning for warning in data.warnings):
        yield f"The machine was busy: {percent(data.busy)} of its processors' time was taken before the run began."
    disturbed, found = disturbances(data)
    if disturbed:
        yield (
            f"During {disturbed} of {len(found)} samples something else took more than {percent(DISTURBED)} of the "
            f"machine (median {percent(median(found))}, most {percent(max(found))})."
        )
    builds = dict.fromkeys(cell.native for cell in data.cells.values() if cell.native)
    if len(builds) > 1:
        yield f"finial's native module changed under the run: {', '.join(builds)}."


def _record(label: str, data: Data, many: bool) -> dict[str, Any]:
    lines = []
    for threads, peaks in sorted(data.peaks.items(), key=lambda item: int(item[0])):
        probes = [probe for cell in data.cells.values() if str(cell.threads) == threads for probe in readings(cell)]
        read = [probe.read_gb_s for probe in probes if probe.read_gb_s]
        span = (
            f"reads {min(read):.0f} – {median(read):.0f} – {max(read):.0f} GB/s (least, median, most of the probes)"
            if read
            else "read bandwidth unknown"
        )
        speeds = "".join(f"; {kind} {gops / 1000:.2f} T/s" for kind, gops in peaks.items())
        lines.append(f"{threads} thread{'s' * (threads != '1')}: {span}{speeds}")
    lines += [f"{name} ({version}): {'; '.join(kept)}" for (name, version), kept in precision_labels(data).items()]
    lines += [*note_lines(data), energy_line(data)]
    return {
        "started": data.started,
        "warnings": list(_warnings(data)),
        "machine": (f"{label}: " if many else "") + f"{machine_line(data.machine)}; finial {data.commit}.",
        "command": shlex.join(data.command),
        "lines": lines,
        "files": [
            f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items())}"
            for name, facts in data.files.items()
        ],
    }
