"""Paper, colours and frames that all our plots share.

Colours are those of Okabe and Ito, which people tell apart whatever their colour vision; marks differ in shape as well.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

DPI = 160
BLUE, ORANGE, GREEN, VERMILION, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#8C8C8C"
PALETTE = {"blue": BLUE, "orange": ORANGE, "green": GREEN, "vermilion": VERMILION, "sky": SKY, "grey": GREY}


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours of paper and ink."""

    paper: str
    ink: str
    faint: str
    plan: str


LIGHT = Theme(paper="#ffffff", ink="#1f2328", faint="#d0d7de", plan=BLUE)
DARK = Theme(paper="#161b22", ink="#e6edf3", faint="#3d444d", plan=SKY)


def new_figure(title: str, theme: Theme, *, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure with one pair of axes.

    Args:
        size: in inches, wide and high.
    """
    figure = Figure(figsize=size, dpi=DPI, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(theme.paper)
    heading: Text = axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.ink)
    heading.set_parse_math(False)
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
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
