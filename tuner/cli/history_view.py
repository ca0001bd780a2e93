"""A history on the screen: changes of level first, then each series with a line of its nights."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner.history.values import History, Series
from tuner.history.wording import COLUMNS, changes_of, lines_of

_BARS = "▁▂▃▄▅▆▇█"
_MOST_NIGHTS = 20
_MOST_CHANGES = 10


def show(history: History, console: Console) -> None:
    """Question by question."""
    for question in history.questions:
        console.print(Text(question.title, style="bold"))
        console.print(f"{len(question.nights)} nights on {question.machine}", markup=False)
        changes = changes_of(question)
        for text in changes[:_MOST_CHANGES]:
            console.print(f"· {text}", markup=False)
        if not changes:
            console.print("no level has changed")
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for name in (*COLUMNS[:2], *COLUMNS[3:5], "nights"):
            table.add_column(name, justify="right" if name.endswith("level") else "left", overflow="fold")
        for line, series in zip(lines_of(question), question.series, strict=True):
            table.add_row(*(Text(cell) for cell in (*line[:2], *line[3:5])), Text(sparkline(series)))
        console.print(table)
        console.print()
    for text in history.skipped:
        console.print(f"not read: {text}", markup=False)


def sparkline(series: Series) -> str:
    """The last nights as bars from 0 to the largest."""
    shown = series.values[-_MOST_NIGHTS:]
    most = max(shown)
    return "".join(_BARS[min(7, int(8 * value / most))] if most > 0 else _BARS[0] for value in shown)
