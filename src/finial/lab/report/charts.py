"""The pictures of a report, in the order of the questions that people ask.

Knows which pictures there are and matplotlib's settings, not how any is drawn.

    draw([record.data], Path("charts"))                         # SVG and PNG files
    for chart in pictures(study, LIGHT): chart.name, chart.svg()
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finial.errors import FileError, RequestError
from finial.files.disk import atomic_file
from finial.lab.record import Data
from finial.lab.report.bars import energy, memory, speeds
from finial.lab.report.curves import cache_growth, depths, loads, pareto, ratios
from finial.lab.report.drawing import POINTS, Chart, Pen
from finial.lab.report.results import Study
from finial.lab.report.theme import FONT, LIGHT, Theme


def draw(records: Sequence[Data], directory: Path) -> list[Path]:
    """Every picture that the records allow, as SVG and PNG files in `directory`; returns what was written.

    Raises:
        RequestError: matplotlib is missing.
        FileError: the directory cannot be written.
    """
    drawn = pictures(Study.of(records), LIGHT)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{directory} cannot be made ({error.strerror})", fix="name another directory") from error
    written = []
    for chart in drawn:
        for suffix, content in (("svg", chart.svg(text=False).encode()), ("png", chart.png())):
            path = directory / f"{chart.name}.{suffix}"
            with atomic_file(path, len(content)) as write:
                write(content)
            written.append(path)
    return written


def pictures(study: Study, theme: Theme) -> list[Chart]:
    """Every picture that the results allow, in the order of the questions that people ask.

    Raises:
        RequestError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise RequestError("pictures need matplotlib", fix='pip install "finial[charts]"') from None

    pen = Pen(study, theme)
    settings = {
        "font.family": "sans-serif",
        "font.sans-serif": list(FONT),
        "font.size": POINTS,
        "axes.titlesize": POINTS,
        "axes.labelcolor": theme.faint,
        "axes.edgecolor": theme.grid,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.unicode_minus": True,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(settings):
        return [
            chart
            for kind in (speeds, loads, depths, ratios, cache_growth, memory, energy, pareto)
            for chart in kind(study, pen)
        ]
