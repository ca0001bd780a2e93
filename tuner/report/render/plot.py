"""Charts as PNG; nothing in their text is read as mathematics.

Colours are those of Okabe and Ito, which people tell apart whatever their colour vision; marks differ in shape as well.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from pipetune.tuner.report.chart import Band, Bars, Chart, Colour, Dots, Line, Mark, Rule, Words

_DPI = 160
BLUE, ORANGE, GREEN, VERMILION, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#8C8C8C"
_PALETTE = {"blue": BLUE, "orange": ORANGE, "green": GREEN, "vermilion": VERMILION, "sky": SKY, "grey": GREY}


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours of paper and ink."""

    paper: str
    ink: str
    faint: str
    plan: str


LIGHT = Theme(paper="#ffffff", ink="#1f2328", faint="#d0d7de", plan=BLUE)
DARK = Theme(paper="#161b22", ink="#e6edf3", faint="#3d444d", plan=SKY)


@lru_cache(maxsize=64)
def render_png(chart: Chart, theme: Theme = LIGHT) -> bytes:
    """A chart's picture; one that a page and a file both hold is drawn once."""
    return to_png(draw(chart, theme))


def draw(chart: Chart, theme: Theme = LIGHT) -> Figure:
    """The figure before it is written."""
    figure, axes = new_figure(chart.title, theme, size=chart.size)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.margins(x=0.06, y=0.14)
    handles: dict[str, Artist] = {}
    for order, mark in enumerate(chart.marks, start=2):
        _draw(mark, axes, theme, order)
        if not isinstance(mark, Words) and mark.label and mark.label not in handles:
            handles[mark.label] = _handle(mark, theme)
    if chart.rows:
        axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=8, parse_math=False)
        axes.set_ylim(len(chart.rows) - 0.45, -0.55)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    if chart.x_ticks:
        axes.set_xticks(*zip(*chart.x_ticks, strict=True), fontsize=8, parse_math=False)
    elif not chart.rows and all(x == round(x) for mark in chart.marks if isinstance(mark, Dots) for x in mark.xs):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.x_range:
        axes.set_xlim(*chart.x_range)
    if chart.y_range:
        axes.set_ylim(*chart.y_range)
    for mark in chart.marks:
        if isinstance(mark, Bars):
            _label_bars(figure, axes, mark)
    if handles:
        # Below the axes, where it hides nothing.
        legend = figure.legend(
            handles=[*handles.values()], loc="outside lower center", ncols=chart.legend_columns, fontsize=9,
            labelcolor=theme.ink, frameon=False, handletextpad=0.5, columnspacing=1.4,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def new_figure(title: str, theme: Theme, *, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; its size in inches, wide and high."""
    figure = Figure(figsize=size, dpi=_DPI, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(theme.paper)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.ink, parse_math=False)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.faint)
    axes.tick_params(colors=theme.ink, labelsize=9)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.grid(visible=True, color=theme.faint, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def to_png(figure: Figure) -> bytes:
    """The bytes of a file; equal figures give equal bytes."""
    out = io.BytesIO()
    # `savefig` would lay it out and draw it twice.
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return out.getvalue()


def _draw(mark: Mark, axes: Axes, theme: Theme, order: int) -> None:
    match mark:
        case Dots():
            axes.plot(mark.xs, mark.ys, linestyle="", zorder=order, **_dots(mark, theme))
            if mark.x_errors:
                colour = _colour(mark.colour, theme)
                axes.errorbar(mark.xs, mark.ys, xerr=mark.x_errors, fmt="none", ecolor=colour, elinewidth=1.1)
            for name, x, y in zip(mark.names, mark.xs, mark.ys, strict=False):
                axes.annotate(
                    name, (x, y), xytext=(0, 4 + mark.size / 2), textcoords="offset points", ha="center", fontsize=8,
                    color=theme.ink, parse_math=False, zorder=order,
                )  # fmt: skip
        case Line():
            where = "steps-post" if mark.is_stepped else "default"
            axes.plot(mark.xs, mark.ys, drawstyle=where, zorder=order, **_line(mark, theme, mark.width))
        case Rule():
            rule = axes.axvline if mark.is_upright else axes.axhline
            rule(mark.at, zorder=order, **_line(mark, theme, 1.3))
        case Band():
            axes.fill_between(mark.xs, mark.lows, mark.highs, color=theme.faint, alpha=0.35, linewidth=0, zorder=0)
        case Bars():
            half = mark.height / 2
            patches = [Rectangle((start, row - half), end - start, mark.height) for row, start, end, _ in mark.spans]
            face = _colour(mark.colour, theme)
            axes.add_collection(PatchCollection(patches, facecolor=face, edgecolor=theme.paper, linewidth=0.5))
            axes.autoscale_view()
        case Words():
            for x, y, text in zip(mark.xs, mark.ys, mark.texts, strict=True):
                axes.text(x, y, text, va="bottom", fontsize=8, color=theme.ink, parse_math=False, zorder=order)


def _handle(mark: Dots | Line | Rule | Band | Bars, theme: Theme) -> Artist:
    """What stands for a mark in the legend."""
    match mark:
        case Dots():
            return Line2D([], [], linestyle="", label=mark.label, **(_dots(mark, theme) | {"markersize": 6}))
        case Line() | Rule():
            return Line2D([], [], label=mark.label, **_line(mark, theme, 1.8))
        case Band():
            return Patch(facecolor=theme.faint, alpha=0.35, label=mark.label)
        case Bars():
            return Patch(facecolor=_colour(mark.colour, theme), label=mark.label)


def _dots(mark: Dots, theme: Theme) -> dict[str, Any]:
    colour = _colour(mark.colour, theme)
    face = theme.paper if mark.is_hollow else colour
    return {
        "marker": mark.marker, "markersize": mark.size, "markerfacecolor": face, "markeredgecolor": colour,
        "markeredgewidth": 1.6 if mark.is_hollow or mark.marker == "x" else 0.6,
    }  # fmt: skip


def _line(mark: Line | Rule, theme: Theme, width: float) -> dict[str, Any]:
    style = "--" if mark.is_dashed else "-"
    return {"color": _colour(mark.colour, theme), "linestyle": style, "linewidth": width}


def _colour(name: Colour, theme: Theme) -> str:
    of_theme = {"plan": theme.plan, "ink": theme.ink, "faint": theme.faint}
    return of_theme[name] if name in of_theme else _PALETTE[name]


def _label_bars(figure: Figure, axes: Axes, mark: Bars) -> None:
    low, high = axes.get_xlim()
    inches_per_unit = figure.get_size_inches()[0] * 0.85 / (high - low)
    for row, start, end, text in mark.spans:
        if text and (end - start) * inches_per_unit > 0.085 * len(text):
            axes.text(
                (start + end) / 2, row, text, ha="center", va="center", fontsize=7,
                color="#000000" if mark.colour == "orange" else "#ffffff", parse_math=False, zorder=9,
            )  # fmt: skip
