"""What all pictures share: a picture, the engines' marks, empty axes, and groups of bars.

Knows results and matplotlib's objects; nothing of any one picture.

    pen = Pen(study, LIGHT); figure, axes = pen.axes(3.3)
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finial.lab.report.results import Result, Study, weights
from finial.lab.report.theme import Mark, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.7  # inches, 338 points: a phone shows that at its full size
POINTS = 9


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        name: of its file; title, caption: beside it, in words; text: what it shows, for those who cannot see it.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def svg(self, text: bool = True) -> str:
        """As SVG; its letters as text, or as outlines that look the same everywhere."""
        return self._saved("svg", {"svg.fonttype": "none" if text else "path", "svg.hashsalt": self.name}).decode()

    def png(self) -> bytes:
        """As PNG, for 2× screens."""
        return self._saved("png", {})

    def _saved(self, kind: str, settings: dict[str, Any]) -> bytes:
        import matplotlib

        out = io.BytesIO()
        with matplotlib.rc_context(settings):
            # A date would make equal pictures differ.
            metadata = {"Date": None} if kind == "svg" else {"Software": "finial"}
            self.figure.savefig(out, format=kind, dpi=200, metadata=metadata, facecolor=self.figure.get_facecolor())
        return out.getvalue()


class Pen:
    """What all pictures share: the engines' marks, and an empty pair of axes."""

    def __init__(self, study: Study, theme: Theme) -> None:
        self.theme = theme
        self._order = {name: index for index, name in enumerate(study.engines)}
        self.many = study.many

    def mark(self, engine: str) -> Mark:
        """The same in every picture."""
        return self.theme.engine(self._order[engine])

    def axes(self, height: float, grid: Literal["x", "y", "both"] = "x") -> tuple[Figure, Axes]:
        """An empty drawing, `height` inches high, ruled along x, y or both."""
        # Not pyplot: it keeps every figure it made, and looks for a screen.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right", "left" if grid == "x" else ""):
            if side:
                axes.spines[side].set_visible(False)
        axes.grid(axis=grid, color=self.theme.grid, linewidth=0.6)
        axes.tick_params(length=0)
        return figure, axes

    def legend(self, figure: Figure, axes: Axes, columns: int = 3) -> None:
        """Names below the drawing."""
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=POINTS - 0.5,
            handlelength=2.2, columnspacing=1.4,
        )  # fmt: skip


def slug(*parts: object) -> str:
    """A file's name of some words and numbers."""
    text = "-".join(str(part) for part in parts).lower()
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in text).strip("-")


def bars(
    pen: Pen,
    cells: Sequence[Sequence[Result]],
    values: Callable[[Result], tuple[float, float, float] | None],
    *,
    name: str,
    heading: str,
    axis: str,
    caption: str,
    label: Callable[[Result], tuple[str, str]],
    limit: bool,
    room: float = 1.38,
) -> Chart:
    """Groups of bars, one group for each cell, named by format and, where that is not enough, by workload and record.

    Args:
        label: what stands in the two columns at the right; room: width with them over that of the longest bar.
    """
    from matplotlib.ticker import MaxNLocator

    shown = [found for cell in cells if (found := [result for result in cell if values(result) is not None])]
    rows = sum(len(cell) for cell in shown)
    figure, axes = pen.axes(0.75 + 0.24 * rows + 0.3 * len(shown))
    at, ticks, names, top = 0.0, [], [], 0.0
    formats = [cell[0].cell.format for cell in shown]
    for cell, format in zip(shown, formats, strict=True):
        start = at
        group = weights(format) if formats.count(format) == 1 else f"{weights(format)} · {cell[0].cell.workload.name}"
        group += f" · {cell[0].record}" if pen.many else ""
        axes.text(
            0, at - 0.78, group, transform=axes.get_yaxis_transform(), fontsize=POINTS, fontweight="bold",
            color=pen.theme.ink, va="center",
        )  # fmt: skip
        for result in cell:
            middle, low, high = values(result) or (0.0, 0.0, 0.0)
            mark = pen.mark(result.engine)
            axes.barh(at, middle, height=0.72, color=mark.colour, alpha=1.0, zorder=2)
            if high > low:
                axes.plot([low, high], [at, at], color=pen.theme.ink, linewidth=1.1, zorder=4, solid_capstyle="butt")
            top = max(top, middle, high)
            # The numbers stand in columns of their own at the right.
            for place, text in zip((0.87, 1.0), label(result), strict=True):
                axes.text(
                    place, at, text, transform=axes.get_yaxis_transform(), ha="right", va="center",
                    fontsize=POINTS - 0.5, color=pen.theme.ink, zorder=5,
                )  # fmt: skip
            ticks.append(at)
            names.append(result.engine)
            at += 1
        bound = cell[0].limit if limit else None
        if bound is not None:
            axes.plot([bound, bound], [start - 0.5, at - 0.5], color=pen.theme.limit, linewidth=1.6, zorder=3)
            top = max(top, bound)
        at += 1.25
    axes.set_yticks(ticks, names)
    for tick, engine in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_color(pen.theme.ink)
        if engine.startswith("finial"):
            tick.set_fontweight("bold")
    axes.set_ylim(at - 1.6, -1.2)
    axes.set_xlim(0, top * room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    marks = [float(tick) for tick in axes.get_xticks() if 0 <= tick <= top * 1.1]
    axes.set_xticks(marks, [f"{mark:,.10g}" for mark in marks])
    axes.set_xlabel(axis)
    return Chart(name, heading, caption, figure)


def log2(axes: Axes, values: Sequence[int]) -> None:
    """Powers of two along x, around sorted `values`."""
    axes.set_xscale("log", base=2)
    powers = [1 << power for power in range(int(math.log2(values[0])), math.ceil(math.log2(values[-1])) + 1)]
    while len(powers) > 9:
        powers = powers[::2]
    axes.set_xticks(powers, [f"{power:,}" for power in powers])
    axes.minorticks_off()
