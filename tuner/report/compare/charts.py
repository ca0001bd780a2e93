"""The charts of a comparison: studies as bars at their own best, and shared plans as ratios with their intervals."""

from __future__ import annotations

import textwrap

from pipetune.tuner.report.chart import SERIES, Bars, Chart, Dots, Line, Mark, Rule, Words
from pipetune.tuner.report.compare.values import StudyComparison
from pipetune.tuner.report.document import Figure

_MOST = 12


def comparison_figures(comparison: StudyComparison) -> dict[str, Figure]:
    """Figures by file name without ending; what there is no data for is left out."""
    figures = {}
    if any(one.best for one in comparison.contestants):
        figures["own_best"] = Figure("Each study at its own best", best_chart(comparison), wide=True)
    if any(plan.ratios for plan in comparison.plans):
        alt = "The same plans, as ratios over the first study"
        figures["same_plans"] = Figure(alt, ratios_chart(comparison), wide=True)
    return figures


def best_chart(comparison: StudyComparison) -> Chart:
    """Tokens per second of each study's best plan."""
    shown = [(one.name, one.best) for one in comparison.contestants if one.best is not None]
    rows = range(len(shown))
    bars = [
        Bars(spans=((row + 0.14, 0.0, best.throughput, ""),), colour=SERIES[row % len(SERIES)], height=0.36)
        for row, (_, best) in enumerate(shown)
    ]
    # Above its bar, where a long plan has room whatever the bar's length and colour.
    words = Words(
        xs=(0.0,) * len(shown),
        ys=tuple(row - 0.1 for row in rows),
        texts=tuple(f"{best.throughput:.1f} · {best.plan.describe()}" for _, best in shown),
    )
    return Chart(
        title="Each study at its own best",
        x_label="tokens / s",
        marks=(*bars, words),
        rows=tuple(_folded(name) for name, _ in shown),
        size=(8.4, 1.2 + 0.7 * len(shown)),
        x_range=(0.0, 1.06 * max(best.throughput for _, best in shown)),
    )


def ratios_chart(comparison: StudyComparison) -> Chart:
    """The fastest shared plans, each later study's throughput over the first one's."""
    plans = [plan for plan in comparison.plans if plan.ratios][:_MOST]
    later = [one.name for one in comparison.contestants[1:]]
    marks: list[Mark] = [Rule(at=1.0, is_upright=True)]
    for index, name in enumerate(later):
        colour = SERIES[(index + 1) % len(SERIES)]
        shift = 0.22 * (index - (len(later) - 1) / 2)
        found = [(row + shift, plan.ratios[name]) for row, plan in enumerate(plans) if name in plan.ratios]
        for row, ratio in found:
            if ratio.low is not None and ratio.high is not None:
                marks.append(Line(xs=(ratio.low, ratio.high), ys=(row, row), colour=colour))
        if found:
            xs, ys = tuple(ratio.value for _, ratio in found), tuple(row for row, _ in found)
            marks.append(Dots(xs=xs, ys=ys, colour=colour, label=name))
    return Chart(
        title=f"The same plans, over {comparison.contestants[0].name}",
        x_label="throughput ratio, with 95 % intervals by runs",
        marks=tuple(marks),
        rows=tuple(_folded(plan.text, 40) for plan in plans),
        size=(8.4, 1.6 + 0.42 * len(plans) * max(1, len(later))),
    )


def _folded(text: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(text, width))
