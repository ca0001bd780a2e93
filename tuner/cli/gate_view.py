"""A gate on the screen, in 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipetune.tuner.gate.outputs.wording import LEGEND, TEXT_COLUMNS, story_of
from pipetune.tuner.gate.values import GateResult, Verdict

_STYLES = {Verdict.OK: "bold green", Verdict.FAIL: "bold red", Verdict.INCONCLUSIVE: "bold yellow"}
_SHOWN = ("metric", "verdict", "worse by", "95 % interval", "baseline", "candidate")


def show(result: GateResult, console: Console) -> None:
    """Prints the table of each case, what is to be said of it, and the verdict last, where the eye is."""
    story = story_of(result)
    places = [story.columns.index(name) for name in _SHOWN]
    for case in dict.fromkeys(line.case for line in story.lines):
        lines = [line for line in story.lines if line.case == case]
        if len(lines) < len(story.lines):
            console.print(Text(case, style="bold"))
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for name in _SHOWN:
            left, folds = name in TEXT_COLUMNS, name == "metric"
            table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not folds)
        for line in lines:
            cells = [Text(line.cells[place]) for place in places]
            cells[_SHOWN.index("verdict")].stylize(_STYLES[line.verdict])
            table.add_row(*cells)
        console.print(table)
        console.print()
    if story.lines:
        console.print(LEGEND, markup=False)
    for label, text in story.facts:
        console.print(f"{label}: {text}", markup=False, highlight=False)
    for remark in story.remarks:
        console.print(f"· {remark}", markup=False, highlight=False)
    console.print()
    console.print(Text(story.headline, style=_STYLES[result.verdict]))
