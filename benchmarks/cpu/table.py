"""A record as Markdown: every speed beside its share of the machine's limit, its ratio and its verdict.

Knows the record's shape; measures nothing.

    print(render(record.data))
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median as middle
from typing import Any

from finial.lab.roofline import Floor, peak_for
from finial.lab.runner import DISTURBED
from finial.lab.statistics import Ratio, median, paired_ratio, spread

OURS = "finial"
LOWER = ("first", "load", "memory")  # kinds where less is better


def ratio(cell: dict[str, Any], rival: str) -> Ratio | None:
    """How much better finial is than a rival, over the rounds that both have; above 1 is better in every kind."""
    ours, theirs = (by_round(cell, name) for name in (OURS, rival))
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds:
        return None
    pair = [ours[r] for r in rounds], [theirs[r] for r in rounds]
    return paired_ratio(*(reversed(pair) if cell["workload"]["kind"] in LOWER else pair))


def by_round(cell: dict[str, Any], name: str) -> dict[int, float]:
    """Samples of an engine by round."""
    return {s["round"]: s["value"] for s in cell["engines"].get(name, {}).get("samples", ())}


def best_rival(cell: dict[str, Any]) -> str | None:
    """The rival with the best median."""
    medians = {name: median([s["value"] for s in row["samples"]]) for name, row in _measured(cell) if name != OURS}
    if not medians:
        return None
    return (min if cell["workload"]["kind"] in LOWER else max)(medians, key=lambda name: medians[name])


def share(cell: dict[str, Any], name: str, peaks: dict[str, dict[str, float]]) -> float | None:
    """Median over samples of the time that the machine allowed, as it was around the sample, over the time taken.

    The bandwidth is the better of the two probes around a sample, so a share is never flattered by a bad one.
    """
    if cell["floor"] is None or cell["workload"]["kind"] not in ("decode", "prompt"):
        return None
    floor = Floor(**cell["floor"])
    peak = peak_for(cell["format"], peaks.get(str(cell["threads"]), {}))
    shares = []
    for sample in cell["engines"][name]["samples"]:
        read = [p["read_gb_s"] for p in (sample["before"], sample["after"]) if p["read_gb_s"] is not None]
        if read:
            shares.append(floor.seconds(max(read), peak) * sample["value"] / floor.tokens)
    return median(shares) if shares else None


def render(data: dict[str, Any]) -> str:
    """The whole page."""
    notes: list[str] = []
    parts = [f"# CPU benchmark, {data['started']}", "", *_head(data), ""]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in data["cells"].values():
        groups.setdefault((cell["model"], cell["format"]), []).append(cell)
    for (model, format), cells in groups.items():
        parts += [f"## {model}, {format}", "", *_group(data, cells, notes), "", *_verdict(data, model, format), ""]
    if notes:
        parts += ["## Not measured", "", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    return "\n".join([*parts, *_legend()]) + "\n"


def _head(data: dict[str, Any]) -> Iterator[str]:
    machine = data["machine"]
    cpu, memory = machine["cpu"], machine["memory"]
    total = memory["total_bytes"]
    yield (
        f"{cpu['model']}, {cpu['usable_cores']} cores, {cpu['usable_threads']} threads"
        + (f", {total / 2**30:.0f} GiB" if total else "")
        + f"; {machine['system']['name']}, kernel {machine['system']['kernel']}; finial {data['commit']}"
        + f"; instruction set {machine['native']['isa']}."
    )
    busy = data["busy"]
    if busy is not None and busy > 0.05:
        yield f"\n**The machine was busy: {busy:.0%} of its processors' time was taken before the run began.**"
    found = [
        s["others"]
        for cell in data["cells"].values()
        for row in cell["engines"].values()
        for s in row["samples"]
        if s.get("others") is not None
    ]
    disturbed = sum(others > DISTURBED for others in found)
    if disturbed:
        yield (
            f"\n**During {disturbed} of {len(found)} samples something else took more than {DISTURBED:.0%} of the "
            f"machine (median {middle(found):.0%}, most {max(found):.0%}), although each was measured again.**"
        )
    builds = dict.fromkeys(cell.get("native") for cell in data["cells"].values())
    if len(builds) > 1:
        yield f"\n**finial's native module changed under the run: {', '.join(map(str, builds))}.**"
    yield ""
    probes: dict[int, list[dict[str, Any]]] = {}
    for cell in data["cells"].values():
        for row in cell["engines"].values():
            probes.setdefault(cell["threads"], []).extend(s["after"] for s in row["samples"] if "after" in s)
    for threads, found in sorted(probes.items()):
        read = [p["read_gb_s"] for p in found if p["read_gb_s"]]
        latency = [p["core_to_core_ns"] for p in found if p["core_to_core_ns"]]
        peaks = data["peaks"].get(str(threads), {})
        if read:
            yield (
                f"- {threads} thread{'s' * (threads > 1)}: reads {min(read):.0f} – {middle(read):.0f} – {max(read):.0f}"
                " GB/s (least, median, most of the run's probes)"
                + (f"; core to core {min(latency):.0f} – {max(latency):.0f} ns" if latency else "")
                + "".join(f"; {kind} {gops / 1000:.2f} T/s" for kind, gops in peaks.items())
            )
    labels: dict[tuple[str, str], list[str]] = {}
    for cell in data["cells"].values():
        for name, row in cell["engines"].items():
            if "precision" in row:
                seen = labels.setdefault((name, row["version"]), [])
                label = f"{cell['format']}: {row['precision']}"
                if label not in seen:
                    seen.append(label)
    for (name, version), precisions in labels.items():
        yield f"- {name} ({version}) — {'; '.join(precisions)}"
    energy = [c for c in machine["energy"] if c.get("available")]
    yield f"- energy: {'not measured here' if energy else 'unavailable (no counter)'}"


def _group(data: dict[str, Any], cells: list[dict[str, Any]], notes: list[str]) -> Iterator[str]:
    present = dict.fromkeys(name for cell in cells for name in cell["engines"])
    rivals = [name for name in present if name != OURS]
    ours = [OURS] if OURS in present else []
    yield f"| | unit | {' | '.join([*ours, *rivals])} | limit | finial ÷ best rival |"
    yield "|---" * (len(ours) + len(rivals) + 4) + "|"
    for cell in cells:
        workload = cell["workload"]
        columns = [_value(data, cell, name, notes) for name in (*ours, *rivals)]
        best = best_rival(cell)
        versus = ratio(cell, best) if best is not None else None
        text = "–"
        if versus is not None:
            text = f"{versus.median:.2f} × [{versus.low:.2f}, {versus.high:.2f}] {best}"
            text = f"**{text}**" if versus.low > 1 else text if versus.shown else f"{text}: no difference shown"
        yield f"| {workload['name']} | {_unit(workload)} | {' | '.join(columns)} | {_limit(data, cell)} | {text} |"


def _value(data: dict[str, Any], cell: dict[str, Any], name: str, notes: list[str]) -> str:
    row = cell["engines"].get(name)
    if row is None:
        return "–"
    values = [s["value"] for s in row["samples"]]
    text = ""
    if row["status"] != "ok":
        note = f"{name}, {cell['format']}: {row['reason']}"
        if note not in notes:
            notes.append(note)
        text = f"failed ({notes.index(note) + 1})"
    if not values:
        return text or "–"
    kind = cell["workload"]["kind"]
    number = median(values)
    shown = f"{_number(number / 1e9 if kind == 'memory' else number)} ± {100 * spread(values):.0f} %"
    part = share(cell, name, data["peaks"])
    if part is not None:
        shown += f" ({100 * part:.0f} %)"
    elif cell["model"] == "demo" and kind == "decode":
        shown += f" ({1e6 / number:.0f} µs)"
    return f"{shown} {text}".strip()


def _limit(data: dict[str, Any], cell: dict[str, Any]) -> str:
    """What the floor comes to at the median of the cell's own probes."""
    if cell["floor"] is None:
        return "–"
    floor, kind = Floor(**cell["floor"]), cell["workload"]["kind"]
    if kind == "memory":
        return f"{_number((floor.weight_bytes + floor.kv_bytes) / 1e9)} (weights + KV)"
    read = [s["after"]["read_gb_s"] for _, row in _measured(cell) for s in row["samples"] if "after" in s]
    if kind not in ("decode", "prompt") or not read or None in read:
        return "–"
    peak = peak_for(cell["format"], data["peaks"].get(str(cell["threads"]), {}))
    seconds = floor.seconds(median(read), peak)
    by = "read" if seconds <= floor.bytes / median(read) / 1e9 else "compute"
    return f"{_number(floor.tokens / seconds)} ({by})"


def _verdict(data: dict[str, Any], model: str, format: str) -> Iterator[str]:
    verdict = data["verdicts"].get(f"{model}/{format}")
    if verdict is None:
        yield "**No verdict: these speeds stand without proof that the output is right.**"
    elif "error" in verdict:
        yield f"**No verdict: {verdict['error']}**"
    else:
        parted = verdict["divergence"]
        greedy = (
            f"equal over {verdict['greedy_tokens']} tokens"
            if parted is None
            else f"parts after {parted['position']} tokens, where its choice is {parted['margin']:.1e} nats behind"
        )
        yield (
            f"finial's verdict against its float32 reference on the same weights, {verdict['positions']} positions: KL "
            f"mean {verdict['kl_mean']:.1e}, p99 {verdict['kl_p99']:.1e}, max {verdict['kl_max']:.1e} nats; top-1 "
            f"{100 * verdict['top1']:.1f} %; greedy text {greedy}."
        )


def _legend() -> Iterator[str]:
    yield (
        "Median ± half the distance between the quartiles; in brackets the share of the limit, which is the same work "
        "for every engine: the bytes of finial's format over the read bandwidth measured around the sample, or for "
        "prompts the operations over the measured arithmetic peak. Ratios are medians of paired rounds with a 95 % "
        "bootstrap interval, above 1 where finial is better; bold where the interval leaves 1 out in its favour. "
        "Depths are of a filled cache; batches count all sequences' tokens."
    )


def _measured(cell: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, row in cell["engines"].items() if row["samples"]]


def _unit(workload: dict[str, Any]) -> str:
    return {"first": "decode steps", "load": "s", "memory": "GB"}.get(workload["kind"], "tok/s")


def _number(value: float) -> str:
    """Three significant digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"
