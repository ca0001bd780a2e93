"""Charts: what a figure shows, as frozen values; `render.plot` draws them, on light paper or on dark.

A chart is marks in a pair of axes, drawn in their order; where `rows` are given, y counts them from the top. Marks of
one label share a line of the legend, and those without one have none.
"""

from dataclasses import dataclass
from typing import Literal

Colour = Literal["plan", "ink", "faint", "blue", "orange", "green", "vermilion", "sky", "grey"]
"""`plan`, `ink` and `faint` are of the paper's theme; the others people tell apart whatever their colour vision."""
SERIES: tuple[Colour, ...] = ("blue", "orange", "green", "vermilion", "sky")
"""Colours of things that stand side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots:
    """Points."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    colour: Colour
    label: str = ""
    marker: str = "o"
    size: float = 6.0
    """Points in diameter."""
    is_hollow: bool = False
    names: tuple[str, ...] = ()
    """Texts above the points."""
    x_errors: tuple[float, ...] = ()
    """Half the length of each point's bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line through points."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    colour: Colour
    label: str = ""
    width: float = 1.8
    is_dashed: bool = False
    is_stepped: bool = False
    """Whether it keeps each value up to the next point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A line from edge to edge."""

    at: float
    is_upright: bool = False
    colour: Colour = "grey"
    label: str = ""
    is_dashed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """The area between two lines."""

    xs: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Bars along x: the row, start, end and text of each; a text is drawn where it fits."""

    spans: tuple[tuple[float, float, float, str], ...]
    colour: Colour
    height: float = 0.72
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Texts that begin at points."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    texts: tuple[str, ...]


Mark = Dots | Line | Rule | Band | Bars | Words


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A figure."""

    title: str
    marks: tuple[Mark, ...]
    x_label: str = ""
    y_label: str = ""
    size: tuple[float, float] = (6.4, 4.6)
    """Width and height in inches."""
    rows: tuple[str, ...] = ()
    x_ticks: tuple[tuple[float, str], ...] = ()
    """Places and texts; chosen by the scale where there are none."""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    legend_columns: int = 3
