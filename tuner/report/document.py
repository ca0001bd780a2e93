"""Documents: what is told to people, as frozen values that say nothing of how they are drawn.

Commands build documents, renderers draw them: `render.rich` for a terminal, `render.markdown`, `render.html`, and
`render.csv` for cells of machines. A document is a title, facts, and parts in the order in which they are read:

    Document(
        title="pipetune · nightly",
        facts=(("model", "smollm2-135m"),),
        parts=(
            Table(columns=(left("plan"), Column("tok/s")), rows=(TableRow(("17+13", "201 ±9")),), legend="±: …"),
            Bullets(("1 run was disturbed",)),
            Text("Best plan: 17+13", "good"),
        ),
    )

A part is drawn by every renderer in the way of its medium: a `Bar` is a line of text where no bar can be drawn, and
of `Figures` a screen draws bars alone. Where media differ in what they hold, the builder makes one document for each
from the same parts. All text is foreign to every renderer: none reads markup in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipetune.tuner.report.chart import Chart

Style = Literal["", "strong", "good", "warning", "bad", "faint", "other"]
"""What a text is to its reader; `other`: a row to compare with."""
Wrap = Literal["no", "narrow", "prose"]
"""Whether a column's cells may break over lines: never, on a narrow screen alone, everywhere."""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, or a cell that differs from its row; newlines break lines."""

    text: str
    style: Style = ""
    link: str = ""
    """An address that stands at its end, and leads there where it can."""


Cell = str | Text


@dataclass(frozen=True, slots=True)
class Bullet:
    """An item of a list, and what stands below it."""

    text: str
    style: Style = ""
    below: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list."""

    items: tuple[str | Bullet, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Labels and texts."""

    items: tuple[tuple[str, str], ...]
    stacked: bool = False
    """Whether a text stands below its label: explanations."""


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column: its title, and how its cells are set; where no column has a title there is no header."""

    title: str
    align: Literal["left", "right"] = "right"
    wrap: Wrap = "no"
    min_width: int = 0
    """Characters that a screen keeps for it."""
    spare: int = 0
    """Columns above 0 are left out of screens that are too narrow, the largest first."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A table's row."""

    cells: tuple[Cell, ...]
    style: Style = ""
    ends_group: bool = False
    """Whether a screen leaves a line below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Columns and rows, as text."""

    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    caption: str = ""
    """What stands above it."""
    legend: str = ""
    """What stands below it: units and signs."""
    ruled: bool = False
    """Whether a screen draws a line below the header, and leaves one between groups."""
    gap: int = 2
    """Spaces between columns of a screen."""

    def only(self, titles: Iterable[str]) -> "Table":
        """The table with the named columns alone, in the order they have."""
        wanted = frozenset(titles)
        return self._arranged([place for place, column in enumerate(self.columns) if column.title in wanted])

    def led_by(self, titles: Sequence[str]) -> "Table":
        """The table with the named columns in front, in this order."""
        last = len(titles)
        known = [titles.index(column.title) if column.title in titles else last for column in self.columns]
        return self._arranged(sorted(range(len(known)), key=known.__getitem__))

    def _arranged(self, kept: Sequence[int]) -> "Table":
        return replace(
            self,
            columns=tuple(self.columns[place] for place in kept),
            rows=tuple(replace(row, cells=tuple(row.cells[place] for place in kept)) for row in self.rows),
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a bar."""

    label: str
    text: str
    percent: float
    """Share of the bar's whole length."""
    colour: int
    """Number of its colour in the palette, from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A whole in pieces, to scale."""

    segments: tuple[Segment, ...]
    label: str = ""
    text: str = ""
    remark: str = ""
    has_legend: bool = True


@dataclass(frozen=True, slots=True)
class Cards:
    """Numbers side by side, each with a label and a remark."""

    cards: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Layers in a row, each part as wide as its share: device, layers, percent."""

    stages: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to copy."""

    text: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with the words that stand for it."""

    alt: str
    chart: Chart
    wide: bool = False
    """Whether it takes a page's whole width."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures side by side; of a screen, bars alone."""

    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """Parts that belong together, under a heading or under none."""

    heading: str
    parts: "tuple[Part, ...]"
    is_hero: bool = False
    """Whether it is what a page shows first: centred, its first text large."""
    is_folded: bool = False
    """Whether Markdown folds it away below its heading."""


Part = Text | Bullets | Facts | Table | Bar | Cards | Split | Code | Figures | Section


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """All that is told of one thing."""

    title: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    parts: tuple[Part, ...]


GAP = Text("")
"""An empty line of a screen; other media space their parts themselves."""


def left(title: str, wrap: Wrap = "no", min_width: int = 0) -> Column:
    """A column of words."""
    return Column(title, "left", wrap, min_width)


def rows_of(lines: Iterable[Sequence[Cell]], style: Style = "") -> tuple[TableRow, ...]:
    """Rows of one style."""
    return tuple(TableRow(tuple(line), style) for line in lines)
