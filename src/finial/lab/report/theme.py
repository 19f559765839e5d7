"""Colours, marks and type of the pictures: for paper and files in light, for the page as names that it fills in.

Knows nothing of what is drawn.  Colours are Okabe & Ito's (2008, "Color universal design"), which eight kinds of sight
tell apart; no two engines differ by colour alone: each has its own mark and its own dash too.

    theme = LIGHT; theme.engine(0).colour; inline(svg, "depth")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

FONT = ("Inter", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans")


@dataclass(frozen=True)
class Mark:
    """How one engine is drawn."""

    colour: str
    marker: str
    dash: tuple[float, ...]  # points on and off; empty is a full line

    @property
    def line(self) -> str | tuple[float, tuple[float, ...]]:
        """matplotlib's linestyle."""
        return (0, self.dash) if self.dash else "-"


_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (3, 1), (8, 2), (1, 3))
_SERIES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#8C6D00")


@dataclass(frozen=True)
class Theme:
    """A set of colours.

    Attributes:
        ink, faint, grid, paper: text, secondary text, rules, background.
        limit: the machine's limit.
        series: of engines, in order; the first is finial's.
    """

    ink: str = "#1b1e23"
    faint: str = "#5d6570"
    grid: str = "#dfe3e8"
    paper: str = "#ffffff"
    limit: str = "#1b1e23"
    series: tuple[str, ...] = _SERIES
    names: Mapping[str, str] = field(default_factory=dict)  # colour -> custom property of the page

    def engine(self, index: int) -> Mark:
        """Mark of the index-th engine."""
        return Mark(
            self.series[index % len(self.series)], _MARKERS[index % len(_MARKERS)], _DASHES[index % len(_DASHES)]
        )


LIGHT = Theme()

# Colours that nothing else has, so that they can be found in the drawing and replaced by the page's own properties,
# which change with the reader's light or dark.
_MARKED = {name: f"#0{index:x}fe0{index:x}" for index, name in enumerate(("ink", "faint", "grid", "paper", "limit"))}
_MARKED_SERIES = tuple(f"#1{index:x}fe1{index:x}" for index in range(len(_SERIES)))
PAGE = Theme(
    **_MARKED,
    series=_MARKED_SERIES,
    names={
        **{colour: name for name, colour in _MARKED.items()},
        **{colour: f"series-{index}" for index, colour in enumerate(_MARKED_SERIES)},
    },
)

# On dark paper the same hues, lighter where the originals would sink into it.
DARK_SERIES = ("#FF8A3D", "#4DA6E8", "#2CC79A", "#E59AC6", "#F0B840", "#8ACBF5", "#A9AFB7", "#C9A53A")
LIGHT_SERIES = _SERIES


def inline(svg: str, prefix: str) -> str:
    """An SVG file drawn with PAGE as an element of the page: its colours named, its ids its own, its size fluid.

    Args:
        prefix: unlike that of any other picture on the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for colour, name in PAGE.names.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    # The element scales with its column; the drawing's own size would not.
    head, rest = svg.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest
