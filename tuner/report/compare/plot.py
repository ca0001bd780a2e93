"""Studies as bars at their own best, and shared plans as ratios with their intervals."""

from __future__ import annotations

import textwrap
from functools import partial

from matplotlib.figure import Figure

from pipetune.tuner.report.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILION,
    Theme,
    add_legend,
    new_figure,
    picture,
)
from pipetune.tuner.report.compare.values import StudyComparison
from pipetune.tuner.report.document import Picture

_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY)
_MOST = 12


def draw_comparison(comparison: StudyComparison) -> dict[str, Picture]:
    """Figures by file name without ending; what there is no data for is left out."""
    pictures = {}
    if any(one.best for one in comparison.contestants):
        pictures["own_best"] = picture("Each study at its own best", partial(draw_best, comparison), wide=True)
    if any(plan.ratios for plan in comparison.plans):
        alt = "The same plans, as ratios over the first study"
        pictures["same_plans"] = picture(alt, partial(draw_ratios, comparison), wide=True)
    return pictures


def draw_best(comparison: StudyComparison, theme: Theme) -> Figure:
    """Tokens per second of each study's best plan."""
    shown = [one for one in comparison.contestants if one.best is not None]
    figure, axes = new_figure("Each study at its own best", theme, size=(8.4, 1.2 + 0.7 * len(shown)))
    speeds = [one.best.throughput for one in shown if one.best is not None]
    axes.barh(
        [row + 0.14 for row in range(len(shown))], speeds, height=0.36,
        color=[_COLOURS[index % len(_COLOURS)] for index in range(len(shown))],
    )  # fmt: skip
    # Above its bar, where a long plan has room whatever the bar's length and colour.
    for row, (one, speed) in enumerate(zip(shown, speeds, strict=True)):
        assert one.best is not None
        axes.text(
            0.0, row - 0.1, f"{speed:.1f} · {one.best.plan.describe()}", va="bottom", fontsize=8,
            color=theme.ink, parse_math=False,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [_folded(one.name) for one in shown], fontsize=9, parse_math=False)
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.set_xlabel("tokens / s")
    axes.grid(visible=False, axis="y")
    return figure


def draw_ratios(comparison: StudyComparison, theme: Theme) -> Figure:
    """The fastest shared plans, each later study's throughput over the first one's."""
    plans = [plan for plan in comparison.plans if plan.ratios][:_MOST]
    later = [one.name for one in comparison.contestants[1:]]
    title = f"The same plans, over {comparison.contestants[0].name}"
    figure, axes = new_figure(title, theme, size=(8.4, 1.6 + 0.42 * len(plans) * max(1, len(later))))
    axes.axvline(1.0, color=GREY, linewidth=1.2, zorder=1)
    for index, name in enumerate(later):
        colour = _COLOURS[(index + 1) % len(_COLOURS)]
        rows = [(row, plan.ratios[name]) for row, plan in enumerate(plans) if name in plan.ratios]
        shift = 0.22 * (index - (len(later) - 1) / 2)
        axes.plot(
            [ratio.value for _, ratio in rows],
            [row + shift for row, _ in rows],
            "o",
            color=colour,
            label=name,
            zorder=3,
        )
        for row, ratio in rows:
            if ratio.low is not None and ratio.high is not None:
                axes.hlines(row + shift, ratio.low, ratio.high, color=colour, linewidth=1.8, zorder=2)
    axes.set_yticks(range(len(plans)), [_folded(plan.text, 40) for plan in plans], fontsize=8, parse_math=False)
    axes.set_ylim(len(plans) - 0.45, -0.55)
    axes.set_xlabel("throughput ratio, with 95 % intervals by runs")
    axes.grid(visible=False, axis="y")
    if later:
        add_legend(figure, theme, 3)
    return figure


def _folded(text: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(text, width))
