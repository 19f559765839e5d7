"""Pictures of points and lines: cost by depth, ratios, growth without a cache, quality against speed.

Knows results; each function yields the pictures that they allow.

    list(depths(study, pen))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from finial.lab.analysis import growth
from finial.lab.open_loop import summary
from finial.lab.report.drawing import POINTS, Chart, Pen, log2, slug
from finial.lab.report.results import Result, Study, ours, ratio, title
from finial.lab.statistics import Ratio

LEAST_DEPTHS = 3  # of a curve

# Two ways to look at a decode step: name, axis, and what tokens per second become.
VIEWS: tuple[tuple[str, str, Callable[[float], float]], ...] = (
    ("step", "milliseconds of a decode step", lambda speed: 1e3 / speed),
    ("rate", "tokens per second", lambda speed: speed),
)
MOST_RATIOS = 40  # workloads in one picture


def depths(study: Study, pen: Pen) -> Iterator[Chart]:
    """Milliseconds of a step and tokens per second against the cache's position, on a log2 axis."""
    for group, cells in study.groups.items():
        curves = _curves(
            cells, lambda r: r.cell.workload.kind == "decode" and r.cell.workload.sequences == 1 and r.row.cache
        )
        if len({x for points in curves.values() for x, _ in points}) < LEAST_DEPTHS:
            continue
        for name, axis, value in VIEWS:
            figure, axes = pen.axes(3.3, "both")
            for engine, points in curves.items():
                mark = pen.mark(engine)
                xs = [x for x, _ in points]
                axes.plot(
                    xs, [value(r.middle) for _, r in points], color=mark.colour, marker=mark.marker,
                    linestyle=mark.line, markersize=4, linewidth=1.5, label=engine, zorder=3,
                )  # fmt: skip
                ends = [sorted((value(min(r.values)), value(max(r.values)))) for _, r in points]
                axes.fill_between(
                    xs, [e[0] for e in ends], [e[1] for e in ends], color=mark.colour, alpha=0.15, linewidth=0
                )
            bounds = sorted({(x, r.limit) for points in curves.values() for x, r in points if r.limit})
            if bounds:
                axes.plot(
                    [x for x, _ in bounds], [value(limit) for _, limit in bounds], color=pen.theme.limit, linewidth=1.6,
                    linestyle=(0, (1, 1.2)), label="limit of the machine", zorder=4,
                )  # fmt: skip
            log2(axes, sorted({x for points in curves.values() for x, _ in points}))
            axes.set_ylim(bottom=0)
            axes.set_xlabel("position in the cache")
            axes.set_ylabel(axis)
            pen.legend(figure, axes)
            yield Chart(
                slug("depth", name, *(group if pen.many else group[1:])),
                f"{axis[0].upper()}{axis[1:]} by depth: {title(group, pen.many)}",
                "Medians; the band runs from the least to the most sample; dotted is the limit for that depth's bytes.",
                figure,
            )


def ratios(study: Study, pen: Pen) -> Iterator[Chart]:
    """How many times faster one engine is than each other, workload by workload, with intervals."""
    for group, cells in study.groups.items():
        lines: list[tuple[Result, list[tuple[str, Ratio]]]] = []
        for cell in cells:
            own = ours(cell)
            if own is None or cell[0].cell.workload.kind in ("load", "memory") or len(lines) > MOST_RATIOS:
                continue
            pairs = [(other.engine, found) for other in cell if other is not own and (found := ratio(own, other))]
            if pairs:
                lines.append((own, pairs))
        if not lines or len({own.engine for own, _ in lines}) > 1:
            continue
        rows = sum(len(pairs) for _, pairs in lines)
        figure, axes = pen.axes(0.9 + 0.19 * rows + 0.26 * len(lines))
        at, ticks, names, seen = 0.0, [], [], set()
        ends = [1.0]
        for own, pairs in lines:
            first = at
            for engine, found in pairs:
                mark = pen.mark(engine)
                axes.plot([found.low, found.high], [at, at], color=mark.colour, linewidth=1.6, zorder=3)
                axes.plot(
                    found.median, at, marker=mark.marker, color=mark.colour, markersize=5.5, linestyle="none", zorder=4,
                    markerfacecolor=mark.colour if found.shown else pen.theme.paper,
                    label="" if engine in seen else engine,
                )  # fmt: skip
                axes.annotate(
                    f"{found.median:.2f} ×", (found.high, at), xytext=(6, 0), textcoords="offset points", va="center",
                    fontsize=POINTS - 1.5, color=pen.theme.ink if found.shown else pen.theme.faint,
                )  # fmt: skip
                seen.add(engine)
                ends += [found.low, found.high]
                at += 1
            ticks.append((first + at - 1) / 2)
            names.append(own.cell.workload.name)
            at += 0.9
        axes.axvline(1, color=pen.theme.limit, linewidth=1.2, zorder=2)
        axes.set_xscale("log")
        low, high = min(ends) / 1.15, max(ends) * 1.45
        axes.set_xlim(low, high)
        marks = _marks(low, high)
        axes.set_xticks(marks, [f"{x:g} ×" for x in marks])
        axes.minorticks_off()
        axes.set_yticks(ticks, names)
        for tick in axes.get_yticklabels():
            tick.set_color(pen.theme.ink)
        axes.set_ylim(at - 0.6, -1)
        axes.set_xlabel(f"{lines[0][0].engine} ÷ the other; right of the line {lines[0][0].engine} is better")
        pen.legend(figure, axes)
        yield Chart(
            slug("ratio", *(group if pen.many else group[1:])),
            f"Ratios: {title(group, pen.many)}",
            "Medians of paired rounds with 95 % intervals; hollow where the interval holds 1: no difference shown.",
            figure,
        )


def loads(study: Study, pen: Pen) -> Iterator[Chart]:
    """A server's goodput, and its time to the first token, against what was asked of it."""
    for group, cells in study.groups.items():
        runs = [
            (result, summary(result.row.samples[0].requests or []))
            for cell in cells
            for result in cell
            if result.ok and result.cell.workload.kind == "serve" and result.cell.workload.rate
        ]
        runs.sort(key=lambda run: run[0].cell.workload.rate)
        if not runs:
            continue
        rates = [result.cell.workload.rate for result, _ in runs]
        mark = pen.mark(runs[0][0].engine)
        name = group if pen.many else group[1:]
        figure, axes = pen.axes(2.6, "both")
        axes.plot([0, max(rates)], [0, max(rates)], color=pen.theme.limit, linewidth=1.2, linestyle=(0, (1, 1.2)))
        axes.plot(rates, [found.goodput for _, found in runs], color=mark.colour, marker="o", linewidth=1.5, zorder=3)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests a second that were due")
        axes.set_ylabel("requests a second in time")
        yield Chart(
            slug("load", "goodput", *name),
            f"Goodput: {title(group, pen.many)}",
            "Whole answers with the first token within 1 s and gaps within 0.2 s; dotted: everything that was asked.",
            figure,
        )
        figure, axes = pen.axes(2.9, "both")
        for place, which in enumerate(("p50", "p95", "p99")):
            points = [(x, 1e3 * found.first[place]) for x, (_, found) in zip(rates, runs, strict=True) if found.first]
            style = pen.theme.engine(place)
            axes.plot(
                [x for x, _ in points], [y for _, y in points], color=style.colour, marker=style.marker,
                linestyle=style.line, linewidth=1.5, label=which,
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests a second that were due")
        axes.set_ylabel("ms to the first token")
        pen.legend(figure, axes)
        yield Chart(
            slug("load", "first", *name),
            f"Time to the first token: {title(group, pen.many)}",
            "Counted from when a request was due, so that waiting in a queue is part of it.",
            figure,
        )


def _marks(low: float, high: float) -> list[float]:
    """Round ratios on a logarithmic axis, no closer than a twelfth of it, with 1 among them."""
    marks = [1.0]
    for mark in sorted((0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500), key=_rank):
        apart = min(abs(math.log(mark / other)) for other in marks)
        if low <= mark <= high and apart > math.log(high / low) / 9:
            marks.append(mark)
    return [mark for mark in sorted(marks) if low <= mark <= high]


def _rank(mark: float) -> tuple[int, float]:
    """The rounder first: powers of ten, then twos and fives, then the rest."""
    digits = f"{mark:e}"[0:3]
    return ({"1.0": 0, "2.0": 1, "5.0": 1}.get(digits, 2), mark)


def cache_growth(study: Study, pen: Pen) -> Iterator[Chart]:
    """A step's time with a cache and without, both axes logarithmic, so that a power law is a line and its slope."""
    for group, cells in study.groups.items():
        both = [
            cell for cell in cells if False in cell[0].cell.workload.caches and cell[0].cell.workload.kind == "decode"
        ]
        curves = _curves(both, lambda result: True)
        if not any(not points[0][1].row.cache for points in curves.values()):
            continue
        figure, axes = pen.axes(3.3, "both")
        for engine, points in curves.items():
            mark, cached = pen.mark(engine), points[0][1].row.cache
            xs, ys = [x for x, _ in points], [1e3 * r.step_s for _, r in points]
            law = growth([r.cell for _, r in points], engine)
            label = engine if law is None else f"{engine}: depth^{law.exponent.median:.2f}"
            axes.plot(
                xs, ys, color=mark.colour, marker=mark.marker, markersize=4, linewidth=1.5, label=label,
                linestyle="-" if cached else (0, (3, 1.5)), markerfacecolor=mark.colour if cached else pen.theme.paper,
            )  # fmt: skip
        log2(axes, sorted({x for points in curves.values() for x, _ in points}))
        axes.set_yscale("log")
        axes.set_xlabel("position")
        axes.set_ylabel("milliseconds of a step")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        pen.legend(figure, axes, 2)
        yield Chart(
            slug("cache", *(group if pen.many else group[1:])),
            f"With and without a KV cache: {title(group, pen.many)}",
            "Without a cache every token is computed again at each step; the exponent is the slope of the line.",
            figure,
        )


def pareto(study: Study, pen: Pen) -> Iterator[Chart]:
    """Divergence from the reference against speed, all formats and engines of a model in one picture."""
    found: dict[tuple[str, str, int], list[Result]] = {}
    for cell in study.cells():
        for result in cell:
            workload = result.cell.workload
            if workload.kind not in ("decode", "generate") or workload.sequences != 1:
                continue
            if result.ok and result.row.cache and result.verdict is not None and result.verdict.kl_mean is not None:
                record, model, format, threads = result.group
                points = found.setdefault((record, model, threads), [])
                same = [p for p in points if (p.engine, p.cell.format) == (result.engine, format)]
                if not same:  # the first workload of the kind stands for all
                    points.append(result)
    for (record, model, threads), points in found.items():
        if len(points) < 2:
            continue
        from matplotlib.ticker import LogLocator

        figure, axes = pen.axes(3.4, "both")
        least = min((p.verdict.kl_mean for p in points if p.verdict and p.verdict.kl_mean), default=1e-9)
        placed = [(p, p.middle, max((p.verdict and p.verdict.kl_mean) or 0.0, least / 3)) for p in points]
        front = [
            (x, y) for p, x, y in placed if not any((a > x and b <= y) or (a >= x and b < y) for _, a, b in placed)
        ]
        front.sort()
        axes.plot(
            [x for x, _ in front],
            [y for _, y in front],
            color=pen.theme.limit,
            linewidth=1,
            linestyle=(0, (1, 2)),
            zorder=2,
        )
        seen = set()
        for p, x, y in placed:
            mark = pen.mark(p.engine)
            axes.plot(
                x, y, marker=mark.marker, color=mark.colour, markersize=7, linestyle="none", zorder=3,
                label="" if p.engine in seen else p.engine,
            )  # fmt: skip
            axes.annotate(p.cell.format, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=POINTS - 1.5)
            seen.add(p.engine)
        axes.set_yscale("log")
        axes.set_xlim(0, max(x for _, x, _ in placed) * 1.15)
        axes.margins(y=0.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.minorticks_off()
        axes.set_xlabel(f"tokens per second ({points[0].cell.workload.name})")
        axes.set_ylabel("mean KL, nats (lower is nearer)")
        pen.legend(figure, axes)
        yield Chart(
            slug("quality", record if pen.many else "", model, threads),
            f"Quality against speed: {model}" + (f" ({record})" if pen.many else ""),
            "Down and right is better; dotted: nothing beats these in both. Teacher-forced, float32 reference.",
            figure,
        )


def _curves(cells: Sequence[Sequence[Result]], wanted: Callable[[Result], bool]) -> dict[str, list[tuple[int, Result]]]:
    curves: dict[str, list[tuple[int, Result]]] = {}
    for cell in cells:
        for result in cell:
            if result.ok and wanted(result):
                curves.setdefault(result.engine, []).append((result.cell.workload.depth, result))
    # One depth can stand in two families: the first is as good.
    return {
        engine: [(x, dict(reversed(points))[x]) for x in sorted({x for x, _ in points})]
        for engine, points in curves.items()
    }
