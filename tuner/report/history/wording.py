"""A history in words: what changed from each night on, newest first, and each series in a line."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipetune.tuner.report.history.values import History, LevelChange, Question, Series
from pipetune.tuner.report.markdown import escaped
from pipetune.tuner.report.wording import clean, metric_text
from pipetune.tuner.stats.change_points import LEAST_NIGHTS

COLUMNS = ("subject", "metric", "nights", "first level", "last level", "changes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """All that changed from one night on."""

    when: str
    """`from 2026-11-03 on (nightly-20261103); software: torch 2.12 → torch 2.13`."""
    changes: tuple[str, ...]
    """A line a subject: `best plan: output_throughput 201 → 180 tok/s (-10.4 %, worse), …`."""
    is_worse: bool

    @property
    def text(self) -> str:
        """In one line."""
        return f"{self.when}: {'; '.join(self.changes)}"


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


def span_of(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a scale for a series: a fifth of its level at least, so that noise does not look like news."""
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * abs(high), 1e-9)
    return middle - half, middle + half


def lines_of(question: Question) -> list[tuple[str, ...]]:
    """Cells along `COLUMNS`, a line a series."""
    return [_line(series) for series in question.series]


def render_markdown(history: History) -> str:
    """GitHub-flavoured Markdown, last newline included."""
    out = ["# History", ""]
    for question in history.questions:
        out += [
            f"## {escaped(question.title)}",
            "",
            f"{len(question.nights)} nights on {escaped(question.machine)}",
            "",
        ]
        for event in events_of(question):
            out += [f"- {escaped(event.when)}", *(f"  - {escaped(text)}" for text in event.changes)]
        if out[-1] == "":
            out.append("No level has changed.")
        out += ["", trust_text(question)]
        out += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "|".join([" :--- ", " :--- ", *[" ---: "] * 4]) + "|"]
        out += ["| " + " | ".join(map(escaped, line)) + " |" for line in lines_of(question)]
        out.append("")
    out += [f"- not read: {escaped(text)}" for text in history.skipped]
    return "\n".join([*out, ""])


def _line(series: Series) -> tuple[str, ...]:
    first = series.changes[0].before if series.changes else statistics.median(series.values)
    last = series.changes[-1].after if series.changes else first
    return (
        series.subject,
        series.metric,
        str(len(series.values)),
        metric_text(series.metric, first),
        metric_text(series.metric, last),
        str(len(series.changes)),
    )
