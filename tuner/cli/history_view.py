"""A history on the screen: changes of level first, then each series with a line of its nights."""

from __future__ import annotations

import itertools

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipetune.tuner.report.history.values import History, Series
from pipetune.tuner.report.history.wording import events_of, lines_of, span_of, trust_text

_BARS = "▁▂▃▄▅▆▇█"
_MOST_NIGHTS = 32
_MOST_EVENTS = 5


def show(history: History, console: Console) -> None:
    """Question by question."""
    for question in history.questions:
        console.print(Text(question.title, style="bold"))
        console.print(f"{len(question.nights)} nights on {question.machine}", markup=False)
        events = events_of(question)
        for event in events[:_MOST_EVENTS]:
            console.print(Text(f"· {event.when}", style="yellow" if event.is_worse else ""))
            for text in event.changes:
                console.print(Padding(Text(text), (0, 0, 0, 2)))
        if len(events) > _MOST_EVENTS:
            console.print(f"· and {len(events) - _MOST_EVENTS} earlier nights, on the page of --output-dir")
        if not events:
            console.print("no level has changed")
        console.print(Text(trust_text(question), style="dim"))
        width = max(len(series.metric) for series in question.series) if question.series else 0
        for subject, lines in itertools.groupby(
            zip(question.series, lines_of(question), strict=True), key=lambda pair: pair[0].subject
        ):
            console.print(Text(subject, style="bold"))
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            table.add_column("", min_width=width, no_wrap=True)
            table.add_column("first level", justify="right", min_width=11)
            table.add_column("last level", justify="right", min_width=11)
            table.add_column("nights", no_wrap=True)
            for series, (_, metric, _, first, last, _) in lines:
                table.add_row(metric, first, last, sparkline(series))
            console.print(table)
        console.print()
    for text in history.skipped:
        console.print(f"not read: {text}", markup=False)


def sparkline(series: Series) -> str:
    """The last nights as bars."""
    shown = series.values[-_MOST_NIGHTS:]
    low, high = span_of(shown)
    return "".join(_BARS[min(7, int(8 * (value - low) / (high - low)))] for value in shown)
