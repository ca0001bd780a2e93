"""Documents on a terminal, made for 80 columns; nothing in their text is read as markup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich import box
from rich import table as rich
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text as RichText

from pipetune.tuner.report.document import (
    Bar,
    Bullet,
    Bullets,
    Cards,
    Cell,
    Code,
    Document,
    Facts,
    Figures,
    Part,
    Section,
    Split,
    Style,
    Table,
    Text,
)

_STYLES: dict[Style, str] = {
    "": "",
    "strong": "bold",
    "good": "bold green",
    "warning": "yellow",
    "bad": "bold red",
    "faint": "dim",
    "other": "cyan",
}


def render_rich(document: Document) -> RenderableType:
    """A document as rich prints it."""
    parts: list[RenderableType] = [RichText(document.title, style="bold")] if document.title else []
    parts += [_facts(Facts(document.facts))] if document.facts else []
    return Group(*parts, *_drawn(document.parts))


def _drawn(parts: tuple[Part, ...]) -> Iterator[RenderableType]:
    for part in parts:
        match part:
            case Text():
                yield _text(replace(part, text=f"{part.text} {part.link}") if part.link else part)
            case Facts():
                yield _facts(part)
            case Table():
                yield _table(part)
                if part.legend:
                    yield RichText(part.legend, style="dim")
            case Bullets():
                for item in part.items:
                    bullet = item if isinstance(item, Bullet) else Bullet(item)
                    yield RichText(f"· {bullet.text}", style=_STYLES[bullet.style])
                    yield from (Padding(RichText(text), (0, 0, 0, 2)) for text in bullet.below)
            case Section():
                if part.heading:
                    yield RichText(part.heading, style="bold")
                yield from _drawn(part.parts)
            case Bar():
                pieces = ", ".join(f"{segment.label} {segment.text}" for segment in part.segments)
                yield RichText(" ".join(text for text in (part.label, part.text, pieces) if text))
            case Cards():
                yield _facts(Facts(tuple((card.label, f"{card.number} {card.remark}") for card in part.cards)))
            case Split():
                yield RichText(" | ".join(f"{device}: {layers}" for device, layers, _ in part.stages))
            case Code():
                yield RichText(part.text)
            case Figures():
                pass


def _text(cell: Cell) -> RichText:
    return RichText(cell) if isinstance(cell, str) else RichText(cell.text, style=_STYLES[cell.style])


def _facts(facts: Facts) -> rich.Table:
    grid = rich.Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts.items:
        grid.add_row(RichText(label), RichText(text))
    return grid


def _table(table: Table) -> rich.Table:
    grid = rich.Table(
        box=box.SIMPLE_HEAD if table.ruled else None, padding=(0, table.gap, 0, 0), pad_edge=False, show_edge=False
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
