"""A history in words: changes of level, newest first, and each series in a line."""

from __future__ import annotations

import statistics

from tuner.history.values import History, LevelChange, Question, Series
from tuner.report.markdown import escaped
from tuner.report.wording import metric_text

COLUMNS = ("subject", "metric", "nights", "first level", "last level", "changes")


def change_text(question: Question, series: Series, change: LevelChange) -> str:
    """`best plan, output_throughput: 201 → 180 (-10.4 %, worse) from 2026-11-03 on (study …); software: …`."""
    night = question.nights[series.nights[change.night]]
    levels = f"{metric_text(series.metric, change.before)} → {metric_text(series.metric, change.after)}"
    verdict = "worse" if change.is_worse else "better"
    text = (
        f"{series.subject}, {series.metric}: {levels} ({100 * change.share:+.1f} %, {verdict}) "
        f"from {night.started_at[:10]} on ({night.study})"
    )
    return f"{text}; {'; '.join(change.also_changed)}" if change.also_changed else text


def changes_of(question: Question) -> list[str]:
    """All changes, the newest night first."""
    found = [
        (series.nights[change.night], change_text(question, series, change))
        for series in question.series
        for change in series.changes
    ]
    return [text for _, text in sorted(found, key=lambda one: -one[0])]


def lines_of(question: Question) -> list[tuple[str, ...]]:
    """Cells along `COLUMNS`, a line a series."""
    return [_line(series) for series in question.series]


def render_markdown(history: History) -> str:
    """GitHub-flavoured Markdown, last newline included."""
    out = ["# History", ""]
    for question in history.questions:
        out += [f"## {escaped(question.title)}", "", f"{len(question.nights)} nights on {escaped(question.machine)}", ""]
        changes = changes_of(question)
        out += [f"- {escaped(text)}" for text in changes] or ["No level has changed."]
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
