"""A plot for each metric of a question: nights as dots, levels as lines, changes as arrows (red: worse)."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
from pipetune.tuner.report.document import Picture
from pipetune.tuner.report.history.values import Question, Series
from pipetune.tuner.report.history.wording import span_of

_COLOURS = ((BLUE, "o"), (ORANGE, "s"), (SKY, "D"), (GREY, "P"))
_SCALES = {"_bytes": (2.0**-20, " in MiB"), "_ratio": (100.0, " in %")}


def draw_question(question: Question) -> dict[str, Picture]:
    """Figures by metric."""
    series = {metric: [one for one in question.series if one.metric == metric] for metric in question.metrics}
    return {
        metric: picture(f"{metric}, night by night", partial(draw, question, own), wide=True)
        for metric, own in series.items()
    }


def draw(question: Question, series: Sequence[Series], theme: Theme) -> Figure:
    """One metric of all subjects; of many plans the first few."""
    metric = series[0].metric
    shown = series[: len(_COLOURS)]
    scale, unit = next((value for end, value in _SCALES.items() if metric.endswith(end)), (1.0, ""))
    more = f" · the first {len(shown)} of {len(series)}" if len(series) > len(shown) else ""
    figure, axes = new_figure(f"{metric}{unit}{more}", theme, size=(8.4, 3.6))
    for (colour, mark), one in zip(_COLOURS, shown, strict=False):
        values = [scale * value for value in one.values]
        axes.plot(one.nights, values, mark, markersize=4, color=colour, alpha=0.75, label=one.subject)
        for first, end in itertools.pairwise((0, *(change.night for change in one.changes), len(values))):
            level = statistics.median(values[first:end])
            axes.hlines(level, one.nights[first] - 0.4, one.nights[end - 1] + 0.4, color=colour, linewidth=1.8)
        for change in one.changes:
            sign = "v" if change.after < change.before else "^"
            tint = VERMILION if change.is_worse else GREEN
            axes.plot([one.nights[change.night]], [scale * change.after], sign, markersize=10, color=tint, zorder=4)
    count = len(question.nights)
    places = sorted({round(place * (count - 1) / 5) for place in range(6)})
    axes.set_xticks(places, [question.nights[place].started_at[:10] for place in places], fontsize=8)
    axes.set_xlim(-0.8, count - 0.2)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    low, high = span_of([scale * value for one in shown for value in one.values])
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    add_legend(figure, theme, 2)
    return figure
