"""A chart for each metric of a history: nights as dots, levels as lines, changes as arrows (red: worse)."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from pipetune.tuner.report.chart import Chart, Colour, Dots, Line, Mark
from pipetune.tuner.report.document import Figure
from pipetune.tuner.report.history.values import Question, Series
from pipetune.tuner.report.history.wording import scale_of

_LOOKS: tuple[tuple[Colour, str], ...] = (("blue", "o"), ("orange", "s"), ("sky", "D"), ("grey", "P"))
_UNITS = {"_bytes": (2.0**-20, " in MiB"), "_ratio": (100.0, " in %")}


def history_figures(question: Question) -> dict[str, Figure]:
    """Figures by metric."""
    series = {metric: [one for one in question.series if one.metric == metric] for metric in question.metrics}
    return {
        metric: Figure(f"{metric}, night by night", metric_chart(question, own), wide=True)
        for metric, own in series.items()
    }


def metric_chart(question: Question, series: Sequence[Series]) -> Chart:
    """One metric of all subjects; of many plans the first few."""
    metric, shown = series[0].metric, series[: len(_LOOKS)]
    unit, unit_text = next((value for end, value in _UNITS.items() if metric.endswith(end)), (1.0, ""))
    marks: list[Mark] = []
    for (colour, marker), one in zip(_LOOKS, shown, strict=False):
        values = tuple(unit * value for value in one.values)
        nights = tuple(map(float, one.nights))
        marks.append(Dots(xs=nights, ys=values, colour=colour, marker=marker, size=4, label=one.subject))
        for first, end in itertools.pairwise((0, *(change.night for change in one.changes), len(values))):
            level = statistics.median(values[first:end])
            marks.append(Line(xs=(nights[first] - 0.4, nights[end - 1] + 0.4), ys=(level, level), colour=colour))
        for change in one.changes:
            marks.append(
                Dots(
                    xs=(nights[change.night],),
                    ys=(unit * change.after,),
                    colour="vermilion" if change.is_worse else "green",
                    marker="v" if change.after < change.before else "^",
                    size=10,
                )
            )
    count = len(question.nights)
    places = sorted({round(place * (count - 1) / 5) for place in range(6)})
    low, high = scale_of([unit * value for one in shown for value in one.values])
    pad = 0.06 * (high - low)
    more = f" · the first {len(shown)} of {len(series)}" if len(series) > len(shown) else ""
    return Chart(
        title=f"{metric}{unit_text}{more}",
        marks=tuple(marks),
        size=(8.4, 3.6),
        x_ticks=tuple((place, question.nights[place].started_at[:10]) for place in places),
        x_range=(-0.8, count - 0.2),
        y_range=(low - pad, high + pad),
        legend_columns=2,
    )
