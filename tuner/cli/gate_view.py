"""A gate on the screen, in 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner.gate.outputs.wording import COLUMNS, story_of
from tuner.gate.values import GateResult, Verdict

_STYLES = {Verdict.OK: "bold green", Verdict.FAIL: "bold red", Verdict.INCONCLUSIVE: "bold yellow"}
_SHOWN = ("metric", "baseline", "candidate", "worse by", "95 % interval", "pairs", "verdict")
_LEFT = ("metric", "verdict")


def show(result: GateResult, console: Console) -> None:
    """Prints the table of each case, then what is to be said of it."""
    story = story_of(result)
    places = [COLUMNS.index(name) for name in _SHOWN]
    cases = list(dict.fromkeys(line.cells[0] for line in story.lines))
    for case in cases:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="")
        table.title = Text(case) if len(cases) > 1 else None
        for name in _SHOWN:
            table.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
        for line in story.lines:
            if line.cells[0] == case:
                cells = [Text(line.cells[place]) for place in places]
                cells[-1].stylize(_STYLES[line.verdict])
                table.add_row(*cells)
        console.print(table)
        console.print()
    for label, text in story.facts:
        console.print(f"{label}: {text}", markup=False)
    for remark in story.remarks:
        console.print(f"· {remark}", markup=False)
    console.print()
    console.print(Text(story.headline, style=_STYLES[result.verdict]))
