"""A plot for each metric of a question: nights as dots, levels as lines, changes as marks."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tuner.history.values import Question, Series
from tuner.report.canvas import BLUE, GREEN, LIGHT, ORANGE, SKY, VERMILION, Theme, add_legend, new_figure, to_png

_COLOURS = (BLUE, ORANGE, GREEN, SKY)
_SCALES = {"_bytes": (2.0**-20, " in MiB"), "_ratio": (100.0, " in %")}


def render_plots(question: Question, theme: Theme = LIGHT) -> dict[str, bytes]:
    """PNGs by metric."""
    metrics = dict.fromkeys(series.metric for series in question.series)
    return {
        metric: to_png(draw(question, [one for one in question.series if one.metric == metric], theme))
        for metric in metrics
    }


def draw(question: Question, series: Sequence[Series], theme: Theme) -> Figure:
    """One metric of all subjects; of many plans the first few."""
    metric = series[0].metric
    scale, unit = next((value for end, value in _SCALES.items() if metric.endswith(end)), (1.0, ""))
    figure, axes = new_figure(f"{metric}{unit}", theme, size=(8.4, 3.6))
    for colour, one in zip(_COLOURS, series, strict=False):
        axes.plot(
            one.nights, [scale * value for value in one.values], "o", markersize=4, color=colour, label=one.subject
        )
        edges = [0, *(change.night for change in one.changes), len(one.values)]
        for first, end in itertools.pairwise(edges):
            level = scale * statistics.median(one.values[first:end])
            axes.hlines(level, one.nights[first], one.nights[end - 1], color=colour, linewidth=1.6)
        for change in one.changes:
            mark, tint = ("v", VERMILION) if change.is_worse else ("^", GREEN)
            axes.plot(
                [one.nights[change.night]], [scale * one.values[change.night]], mark, markersize=9, color=tint, zorder=4
            )
    count = len(question.nights)
    places = sorted({round(place * (count - 1) / 5) for place in range(6)})
    axes.set_xticks(places, [question.nights[place].started_at[:10] for place in places], fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylim(bottom=0)
    add_legend(figure, theme, 2)
    return figure
