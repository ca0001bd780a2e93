"""A history as documents: what changed from each night on, newest first, each series in a line, and in a chart."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipetune.tuner.report import document as doc
from pipetune.tuner.report.chart import Chart, Colour, Dots, Line, Mark
from pipetune.tuner.report.history.values import History, LevelChange, Question, Series
from pipetune.tuner.report.wording import clean, count_text, metric_text
from pipetune.tuner.stats.change_points import LEAST_NIGHTS

_BARS = "▁▂▃▄▅▆▇█"
_MOST_NIGHTS, _MOST_EVENTS = 24, 5
"""What a screen has room for."""
_LOOKS: tuple[tuple[Colour, str], ...] = (("blue", "o"), ("orange", "s"), ("sky", "D"), ("grey", "P"))
_UNITS = {"_bytes": (2.0**-20, " in MiB"), "_ratio": (100.0, " in %")}


def screen_of(history: History) -> doc.Document:
    """For a terminal of 80 columns: changes of level first, then each series with a line of its nights."""
    parts: list[doc.Part] = []
    for question in history.questions:
        events = _events_of(question)
        parts += [doc.Text(question.title, "strong"), doc.Text(_nights_text(question))]
        parts.append(doc.Bullets(events[:_MOST_EVENTS]))
        if (more := len(events) - _MOST_EVENTS) > 0:
            parts.append(doc.Text(f"· and {count_text(more, 'earlier night')}, on the page of --output-dir"))
        parts += [] if events else [doc.Text("no level has changed")]
        parts.append(doc.Text(_trust_text(question), "faint"))
        columns = (
            doc.left("", min_width=max(map(len, question.metrics), default=0)),
            doc.Column("first level", wrap="narrow", min_width=11, spare=1),
            doc.Column("last level", wrap="narrow", min_width=11),
            doc.left("nights"),
        )
        for subject, series in itertools.groupby(question.series, key=lambda one: one.subject):
            lines = [(one.metric, *_levels(one), sparkline(one)) for one in series]
            parts += [doc.Text(subject, "strong"), doc.Table(columns=columns, rows=doc.rows_of(lines))]
        parts.append(doc.GAP)
    return doc.Document(parts=(*parts, *(doc.Text(clean(f"not read: {text}")) for text in history.skipped)))


def whole_of(history: History) -> doc.Document:
    """All of the history: what `history.md` holds."""
    sections = [_section(question, {}) for question in history.questions]
    skipped = doc.Bullets(tuple(f"not read: {text}" for text in history.skipped))
    return doc.Document(title="History", parts=(*sections, skipped))


def page_of(history: History) -> doc.Document:
    """The page: a section for each question, with its figures."""
    nights = sum(len(question.nights) for question in history.questions)
    changes = sum(len(_events_of(question)) for question in history.questions)
    facts = [("nights", str(nights))]
    facts.append(("changes of level", f"from {count_text(changes, 'night')} on" if changes else "none"))
    facts += [("not read", text) for text in history.skipped]
    sections = (_section(question, history_figures(question)) for question in history.questions)
    return doc.Document(title="History", facts=tuple(facts), parts=tuple(sections))


def _section(question: Question, figures: Mapping[str, doc.Figure]) -> doc.Section:
    events = _events_of(question)
    changes = doc.Bullets(events) if events else doc.Text("No level has changed.")
    nights, trust = doc.Text(_nights_text(question)), doc.Text(_trust_text(question))
    lines = [
        (one.subject, one.metric, str(len(one.values)), *_levels(one), str(len(one.changes))) for one in question.series
    ]
    titles = map(doc.Column, ("nights", "first level", "last level", "changes"))
    table = doc.Table(columns=(doc.left("subject"), doc.left("metric"), *titles), rows=doc.rows_of(lines))
    return doc.Section(question.title, (nights, changes, trust, table, doc.Figures(tuple(figures.values()))))


def sparkline(series: Series) -> str:
    """The last nights as bars."""
    shown = series.values[-_MOST_NIGHTS:]
    low, high = _scale_of(shown)
    return "".join(_BARS[min(7, int(8 * (value - low) / (high - low)))] for value in shown)


def _nights_text(question: Question) -> str:
    return f"{count_text(len(question.nights), 'night')} on {question.machine}"


def _levels(series: Series) -> tuple[str, str]:
    first = series.changes[0].before if series.changes else statistics.median(series.values)
    last = series.changes[-1].after if series.changes else first
    return metric_text(series.metric, first), metric_text(series.metric, last)


def _events_of(question: Question) -> tuple[doc.Bullet, ...]:
    """All changes of level, night by night, the newest first, with a line below it for each subject."""
    found: dict[int, list[tuple[Series, LevelChange]]] = defaultdict(list)
    for series in question.series:
        for change in series.changes:
            found[series.nights[change.night]].append((series, change))
    return tuple(_event(question, place, found[place]) for place in sorted(found, reverse=True))


def _event(question: Question, place: int, changes: Sequence[tuple[Series, LevelChange]]) -> doc.Bullet:
    """`from 2026-11-03 on (nightly-20261103); software: torch 2.12 → torch 2.13`, and what changed for whom."""
    night = question.nights[place]
    also = dict.fromkeys(text for _, change in changes for text in change.also_changed)
    by_subject: dict[str, list[str]] = defaultdict(list)
    for series, change in changes:
        by_subject[series.subject].append(_change_text(series, change))
    return doc.Bullet(
        clean("; ".join((f"from {night.started_at[:10]} on ({night.study})", *also))),
        "warning" if any(change.is_worse for _, change in changes) else "",
        tuple(clean(f"{subject}: {', '.join(texts)}") for subject, texts in by_subject.items()),
    )


def _change_text(series: Series, change: LevelChange) -> str:
    levels = f"{metric_text(series.metric, change.before)} → {metric_text(series.metric, change.after)}"
    notes = [f"{100 * change.share:+.1f} %"] if change.share is not None else []
    notes.append("worse" if change.is_worse else "better")
    if series.dependence is not None:
        notes.append(f"maybe a spell: its nights hang together, autocorrelation {series.dependence:.1f}")
    return f"{series.metric} {levels} ({', '.join(notes)})"


def _trust_text(question: Question) -> str:
    """How often this history is wrong."""
    if len(question.nights) < 2 * LEAST_NIGHTS:
        return f"A change of level takes {2 * LEAST_NIGHTS} nights to be seen."
    return (
        f"Where nothing changes, one look shows a change in a series with a chance of {100 * question.alpha:.2g} %, in "
        "any of them 5 %: if nights do not hang together, and more often over many looks."
    )


def history_figures(question: Question) -> dict[str, doc.Figure]:
    """A figure for each metric: nights as dots, levels as lines, changes as arrows (red: worse)."""
    figures = {}
    for metric in question.metrics:
        own = [one for one in question.series if one.metric == metric]
        figures[metric] = doc.Figure(f"{metric}, night by night", _metric_chart(question, own), wide=True)
    return figures


def _metric_chart(question: Question, series: Sequence[Series]) -> Chart:
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
            tint: Colour = "vermilion" if change.is_worse else "green"
            arrow = "v" if change.after < change.before else "^"
            at, height = (nights[change.night],), (unit * change.after,)
            marks.append(Dots(xs=at, ys=height, colour=tint, marker=arrow, size=10))
    count = len(question.nights)
    places = sorted({round(place * (count - 1) / 5) for place in range(6)})
    low, high = _scale_of([unit * value for one in shown for value in one.values])
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


def _scale_of(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a scale for a series: a fifth of its level at least, so that noise does not look like news."""
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * abs(high), 1e-9)
    return middle - half, middle + half
