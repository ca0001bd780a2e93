"""Documents on a terminal, made for 80 columns; nothing in their text is read as markup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich import box
from rich import table as rich
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text as RichText

from pipetune.tuner.report import document as doc

_STYLES: dict[doc.Style, str] = {
    "": "",
    "strong": "bold",
    "good": "bold green",
    "warning": "yellow",
    "bad": "bold red",
    "faint": "dim",
    "other": "cyan",
}


def render_rich(document: doc.Document) -> RenderableType:
    """A document as rich prints it."""
    parts: list[RenderableType] = [RichText(document.title, style="bold")] if document.title else []
    parts += [_facts(doc.Facts(document.facts))] if document.facts else []
    return Group(*parts, *_drawn(document.parts))


def _drawn(parts: tuple[doc.Part, ...]) -> Iterator[RenderableType]:
    for part in parts:
        match part:
            case doc.Text():
                yield _text(replace(part, text=f"{part.text} {part.link}") if part.link else part)
            case doc.Facts():
                yield _facts(part)
            case doc.Table():
                yield _table(part)
                if part.legend:
                    yield RichText(part.legend, style="dim")
            case doc.Bullets():
                for item in part.items:
                    bullet = item if isinstance(item, doc.Bullet) else doc.Bullet(item)
                    yield RichText(f"· {bullet.text}", style=_STYLES[bullet.style])
                    yield from (Padding(RichText(text), (0, 0, 0, 2)) for text in bullet.below)
            case doc.Section():
                if part.heading:
                    yield RichText(part.heading, style="bold")
                yield from _drawn(part.parts)
            case doc.Bar():
                pieces = ", ".join(f"{segment.label} {segment.text}" for segment in part.segments)
                yield RichText(" ".join(text for text in (part.label, part.text, pieces) if text))
            case doc.Cards():
                yield _facts(doc.Facts(tuple((card.label, f"{card.number} {card.remark}") for card in part.cards)))
            case doc.Split():
                yield RichText(" | ".join(f"{device}: {layers}" for device, layers, _ in part.stages))
            case doc.Code():
                yield RichText(part.text)
            case doc.Figures():
                pass


def _text(cell: doc.Cell) -> RichText:
    return RichText(cell) if isinstance(cell, str) else RichText(cell.text, style=_STYLES[cell.style])


def _facts(facts: doc.Facts) -> rich.Table:
    grid = rich.Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts.items:
        grid.add_row(RichText(label), RichText(text))
    return grid


def _table(table: doc.Table) -> rich.Table:
    grid = rich.Table(
        box=box.SIMPLE_HEAD if table.ruled else None,
        padding=(0, table.gap, 0, 0),
        pad_edge=False,
        show_edge=False,
        show_header=any(column.title for column in table.columns),
    )
    for column in table.columns:
        grid.add_column(
            RichText(column.title),
            justify=column.align,
            no_wrap=column.wrap == "no",
            overflow="fold",
            min_width=column.min_width or None,
        )
    for row in table.rows:
        grid.add_row(*map(_text, row.cells), style=_STYLES[row.style], end_section=row.ends_group)
    return grid
