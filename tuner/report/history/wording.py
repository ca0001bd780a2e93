"""A history in words: what changed from each night on, newest first, and each series in a line."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipetune.tuner.report import document as doc
from pipetune.tuner.report.history.values import History, LevelChange, Question, Series
from pipetune.tuner.report.wording import clean, metric_text
from pipetune.tuner.stats.change_points import LEAST_NIGHTS

_BARS = "▁▂▃▄▅▆▇█"
_MOST_NIGHTS, _MOST_EVENTS = 32, 5
"""What a screen has room for."""


def screen_of(history: History) -> doc.Document:
    """For a terminal of 80 columns: changes of level first, then each series with a line of its nights."""
    parts: list[doc.Part] = []
    for question in history.questions:
        events = events_of(question)
        parts += [doc.Text(question.title, "strong"), doc.Text(_nights_text(question))]
        parts += [doc.Bullets(tuple(event.bullet for event in events[:_MOST_EVENTS]))]
        if len(events) > _MOST_EVENTS:
            parts.append(doc.Text(f"· and {len(events) - _MOST_EVENTS} earlier nights, on the page of --output-dir"))
        parts += [] if events else [doc.Text("no level has changed")]
        parts.append(doc.Text(trust_text(question), "faint"))
        width = max(map(len, question.metrics), default=0)
        columns = (
            doc.left("", min_width=width),
            *(doc.Column(title, wrap="narrow", min_width=11) for title in ("first level", "last level")),
            doc.left("nights"),
        )
        for subject, series in itertools.groupby(question.series, key=lambda one: one.subject):
            lines = [(one.metric, *_levels(one), sparkline(one)) for one in series]
            parts += [doc.Text(subject, "strong"), doc.Table(columns=columns, rows=doc.rows_of(lines))]
        parts.append(doc.GAP)
    return doc.Document(parts=(*parts, *(doc.Text(f"not read: {text}") for text in history.skipped)))


def whole_of(history: History) -> doc.Document:
    """All of the history: what `history.md` holds."""
    sections = [_section(question, {}) for question in history.questions]
    skipped = doc.Bullets(tuple(f"not read: {text}" for text in history.skipped))
    return doc.Document(title="History", parts=(*sections, skipped))


def page_of(history: History, figures: Sequence[Mapping[str, doc.Figure]]) -> doc.Document:
    """The page: a section for each question.

    Args:
        figures: of each question, by metric.
    """
    nights = sum(len(question.nights) for question in history.questions)
    changes = sum(len(events_of(question)) for question in history.questions)
    facts = [("nights", str(nights)), ("changes of level", f"from {changes} nights on" if changes else "none")]
    facts += [("not read", text) for text in history.skipped]
    sections = (_section(question, own) for question, own in zip(history.questions, figures, strict=True))
    return doc.Document(title="History", facts=tuple(facts), parts=tuple(sections))


def _section(question: Question, figures: Mapping[str, doc.Figure]) -> doc.Section:
    events = events_of(question)
    changes = doc.Bullets(tuple(event.bullet for event in events)) if events else doc.Text("No level has changed.")
    drawn = doc.Figures(tuple(figures.values()))
    nights, trust = doc.Text(_nights_text(question)), doc.Text(trust_text(question))
    return doc.Section(question.title, (nights, changes, trust, series_table(question), drawn))


def series_table(question: Question) -> doc.Table:
    """A row for each series: its first and its last level."""
    lines = [
        (one.subject, one.metric, str(len(one.values)), *_levels(one), str(len(one.changes))) for one in question.series
    ]
    titles = ("nights", "first level", "last level", "changes")
    return doc.Table(
        columns=(doc.left("subject"), doc.left("metric"), *map(doc.Column, titles)), rows=doc.rows_of(lines)
    )


def sparkline(series: Series) -> str:
    """The last nights as bars."""
    shown = series.values[-_MOST_NIGHTS:]
    low, high = scale_of(shown)
    return "".join(_BARS[min(7, int(8 * (value - low) / (high - low)))] for value in shown)


def _nights_text(question: Question) -> str:
    return f"{len(question.nights)} nights on {question.machine}"


def _levels(series: Series) -> tuple[str, str]:
    first = series.changes[0].before if series.changes else statistics.median(series.values)
    last = series.changes[-1].after if series.changes else first
    return metric_text(series.metric, first), metric_text(series.metric, last)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """All that changed from one night on."""

    when: str
    """`from 2026-11-03 on (nightly-20261103); software: torch 2.12 → torch 2.13`."""
    changes: tuple[str, ...]
    """A line a subject: `best plan: output_throughput 201 → 180 tok/s (-10.4 %, worse), …`."""
    is_worse: bool

    @property
    def bullet(self) -> doc.Bullet:
        """An item of a list, with a line below it for each subject."""
        return doc.Bullet(self.when, "warning" if self.is_worse else "", self.changes)


def events_of(question: Question) -> tuple[Event, ...]:
    """All changes of level, night by night, the newest first."""
    found: dict[int, list[tuple[Series, LevelChange]]] = defaultdict(list)
    for series in question.series:
        for change in series.changes:
            found[series.nights[change.night]].append((series, change))
    return tuple(_event(question, place, found[place]) for place in sorted(found, reverse=True))


def _event(question: Question, place: int, changes: Sequence[tuple[Series, LevelChange]]) -> Event:
    night = question.nights[place]
    also = dict.fromkeys(text for _, change in changes for text in change.also_changed)
    by_subject: dict[str, list[str]] = defaultdict(list)
    for series, change in changes:
        by_subject[series.subject].append(_change_text(series, change))
    return Event(
        when=clean("; ".join((f"from {night.started_at[:10]} on ({night.study})", *also))),
        changes=tuple(clean(f"{subject}: {', '.join(texts)}") for subject, texts in by_subject.items()),
        is_worse=any(change.is_worse for _, change in changes),
    )


def _change_text(series: Series, change: LevelChange) -> str:
    levels = f"{metric_text(series.metric, change.before)} → {metric_text(series.metric, change.after)}"
    notes = [f"{100 * change.share:+.1f} %"] if change.share is not None else []
    notes.append("worse" if change.is_worse else "better")
    if series.dependence is not None:
        notes.append(f"maybe a spell: its nights hang together, autocorrelation {series.dependence:.1f}")
    return f"{series.metric} {levels} ({', '.join(notes)})"


def trust_text(question: Question) -> str:
    """How often this history is wrong."""
    if len(question.nights) < 2 * LEAST_NIGHTS:
        return f"A change of level takes {2 * LEAST_NIGHTS} nights to be seen."
    return (
        f"Where nothing changes, one look shows a change in a series with a chance of {100 * question.alpha:.2g} %, in "
        "any of them 5 %: if nights do not hang together, and more often over many looks."
    )


def scale_of(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a scale for a series: a fifth of its level at least, so that noise does not look like news."""
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * abs(high), 1e-9)
    return middle - half, middle + half
