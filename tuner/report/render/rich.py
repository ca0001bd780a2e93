"""Documents on a terminal, made for 80 columns; nothing in their text is read as markup."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rich import box
from rich import table as rich
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.text import Text as RichText

from pipetune.bench.errors import harmless
from pipetune.tuner.report import document as doc
from pipetune.tuner.report.chart import Bars, Chart

_STYLES: dict[doc.Style, str] = {
    "": "",
    "strong": "bold",
    "good": "bold green",
    "warning": "yellow",
    "bad": "bold red",
    "faint": "dim",
    "other": "cyan",
}
_BAR_CELLS, _BAR_STYLES = 56, ("bold magenta", "cyan")


def render_rich(document: doc.Document) -> RenderableType:
    """A document as rich prints it."""
    parts: list[RenderableType] = [_line(document.title, style="bold")] if document.title else []
    parts += [_facts(document.facts)] if document.facts else []
    return Group(*parts, *_drawn(document.parts))


def _drawn(parts: tuple[doc.Part, ...]) -> Iterator[RenderableType]:
    for part in parts:
        match part:
            case doc.Text():
                yield _text(replace(part, text=f"{part.text} {part.link}") if part.link else part)
            case doc.Facts():
                yield _facts(part.items)
            case doc.Table():
                if part.caption:
                    yield _line(part.caption, style="bold")
                yield _Grid(part)
                if part.legend:
                    yield _line(part.legend, style="dim")
            case doc.Bullets():
                for item in part.items:
                    bullet = item if isinstance(item, doc.Bullet) else doc.Bullet(item)
                    yield _line(f"· {bullet.text}", style=_STYLES[bullet.style])
                    yield from (Padding(_line(text), (0, 0, 0, 2)) for text in bullet.below)
            case doc.Section():
                if part.heading:
                    yield _line(part.heading, style="bold")
                yield from _drawn(part.parts)
            case doc.Bar():
                pieces = ", ".join(f"{segment.label} {segment.text}" for segment in part.segments)
                yield _line(" ".join(text for text in (part.label, part.text, pieces) if text))
            case doc.Cards():
                yield _facts((label, f"{number} {remark}") for label, number, remark in part.cards)
            case doc.Split():
                yield RichText(" | ".join(f"{device}: {layers}" for device, layers, _ in part.stages))
            case doc.Code():
                yield RichText(harmless(part.text))
            case doc.Figures():
                for figure in part.figures:
                    yield from _bars(figure.chart)


def _bars(chart: Chart) -> Iterator[RenderableType]:
    """A chart's bars as a line of cells for each row, which bear the bars' last letters; nothing of other charts."""
    marks = [mark for mark in chart.marks if isinstance(mark, Bars)]
    if not marks or chart.x_range is None:
        return
    low, high = chart.x_range
    rows = [[("·", "dim")] * _BAR_CELLS for _ in chart.rows]
    for mark, style in zip(marks, itertools.cycle(_BAR_STYLES), strict=False):
        for row, start, end, text in mark.spans:
            first, last = (round((at - low) / (high - low) * _BAR_CELLS) for at in (start, end))
            for cell in range(first, min(max(last, first + 1), _BAR_CELLS)):
                rows[int(row)][cell] = (text[-1:], style)
    names = [" ".join(name.splitlines()[:2]) for name in chart.rows]
    yield _line(chart.title, style="bold")
    for name, cells in zip(names, rows, strict=True):
        yield RichText.assemble(f"{harmless(name):<{max(map(len, names))}}  ", *cells)
    labels = ((f"{mark.label} ", style) for mark, style in zip(marks, itertools.cycle(_BAR_STYLES), strict=False))
    yield RichText.assemble(*labels, (f"by micro-batch, over {high - low:.3g} {chart.x_label}; ·: waits", "dim"))


def _text(cell: doc.Cell) -> RichText:
    return _line(cell) if isinstance(cell, str) else RichText(harmless(cell.text), style=_STYLES[cell.style])


def _line(text: str, style: str = "") -> RichText:
    return RichText(harmless(text).replace("\n", " "), style=style)


def _facts(items: Iterable[tuple[str, str]]) -> rich.Table:
    grid = rich.Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in items:
        grid.add_row(_line(label), _line(text))
    return grid


class _Grid:
    """A table that leaves out columns where a screen is too narrow, then breaks cells; it cuts none."""

    def __init__(self, table: doc.Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table
        for spare in sorted((column for column in table.columns if column.spare), key=lambda column: -column.spare):
            if _width(table) > options.max_width:
                table = table.only(column.title for column in table.columns if column is not spare)
        is_narrow, breaks_titles = (_width(table, whole_titles=own) > options.max_width for own in (False, True))
        yield _table(table, is_narrow=is_narrow, breaks_titles=breaks_titles)


def _width(table: doc.Table, *, whole_titles: bool = False) -> int:
    """Characters that it takes where only those cells break that may, and titles of numbers where they may."""
    gap = table.gap + table.ruled
    width = -gap
    for place, column in enumerate(table.columns):
        fixed = 0 if column.wrap != "no" and column.align == "left" else _cells_width(table, place)
        if column.wrap == "no" or (column.align == "right" and whole_titles):
            fixed = max(fixed, cell_len(column.title))
        width += max(fixed, column.min_width) + gap
    return width


def _cells_width(table: doc.Table, place: int) -> int:
    cells = (row.cells[place] for row in table.rows)
    return max((cell_len(cell if isinstance(cell, str) else cell.text) for cell in cells), default=0)


def _table(table: doc.Table, *, is_narrow: bool, breaks_titles: bool = False) -> rich.Table:
    grid = rich.Table(
        box=box.SIMPLE_HEAD if table.ruled else None,
        padding=(0, table.gap, 0, 0),
        pad_edge=False,
        show_edge=False,
        show_header=any(column.title for column in table.columns),
    )
    for place, column in enumerate(table.columns):
        # Of numbers none is cut so that a title stays whole.
        is_cells = breaks_titles and column.wrap == "narrow" and column.align == "right"
        grid.add_column(
            _line(column.title),
            justify=column.align,
            max_width=_cells_width(table, place) if is_cells else None,
            no_wrap=column.wrap == "no" and not is_narrow,
            overflow="fold",
            min_width=column.min_width or None,
        )
    for row in table.rows:
        grid.add_row(*map(_text, row.cells), style=_STYLES[row.style], end_section=row.ends_group)
    return grid
