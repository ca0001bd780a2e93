"""A document of every kind of part, drawn in every medium: nothing is lost, and nothing in it is read as markup."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from pipetune.tuner.report import document as doc
from pipetune.tuner.report.chart import Band, Bars, Chart, Dots, Line, Rule, Words
from pipetune.tuner.report.render.csv import render_csv
from pipetune.tuner.report.render.html import render_html
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.report.render.plot import DARK, LIGHT, draw, render_png
from pipetune.tuner.report.render.rich import render_rich

EVIL = "<b>[red]x[/red]</b> | `y` _z_"
TABLE = doc.Table(
    columns=(doc.left("plan", "narrow"), doc.Column("tok/s"), doc.left("why", "prose")),
    rows=(
        doc.TableRow(("17+13", doc.Text("201", "strong"), "fast"), "good", ends_group=True),
        doc.TableRow((EVIL, "64.2", ""), "other"),
    ),
    legend="tok/s: tokens a second",
    ruled=True,
)
WEIGHTS = doc.Segment(label="weights", text="9 MiB", percent=50, colour=1)
CHART = Chart(
    title=EVIL,
    rows=("a $1 row", "another"),
    marks=(
        Rule(at=1.0, is_upright=True, label="even", is_dashed=True),
        Band(xs=(0.0, 1.0), lows=(0.0, 0.0), highs=(0.5, 0.5), label="near"),
        Bars(spans=((0, 0.0, 2.0, "m0"),), colour="plan", label="bars"),
        Line(xs=(0.0, 2.0), ys=(0.0, 1.0), colour="grey", is_stepped=True),
        Dots(xs=(1.5,), ys=(1.0,), colour="orange", label="$x$ dots", names=(r"$\frac{a$",), x_errors=(0.2,)),
        Words(xs=(0.0,), ys=(1.0,), texts=("words",)),
    ),
)
DOCUMENT = doc.Document(
    title=f"Title {EVIL}",
    facts=(("model", EVIL),),
    parts=(
        doc.Text("one line\nanother", "warning"),
        doc.Text("see", link="https://example.org/"),
        doc.Facts((("busy", "time in compute"),), stacked=True),
        doc.Bullets(("plain", doc.Bullet("changed", "bad", (EVIL, "below it")))),
        doc.Section("Hero", (doc.Cards((("speed", "3.1×", "over all"),)),), is_hero=True),
        doc.Section(
            "Inner",
            (
                TABLE,
                doc.Bar(label="stage 0", text="cpu:0", segments=(WEIGHTS,)),
                doc.Split((("cpu:0", "layers 0-16", 57.0), ("cpu:1", "layers 17-29", 43.0))),
                doc.Code("pipetune bench"),
                doc.Figures((doc.Figure("a figure", CHART),)),
            ),
        ),
    ),
)
SAID = (
    *("17+13", "201", "64.2", "fast", "tok/s: tokens a second", "one line", "another", "https://example.org/"),
    *("time in compute", "below it", "3.1×", "over all", "weights", "9 MiB", "layers 17-29", "pipetune bench"),
)


class Shown(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags = "", list[str]()
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def screen(document: doc.Document, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render_rich(document))
    return out.getvalue()


def test_every_medium_says_all_of_it_and_reads_no_markup() -> None:
    page = Shown(render_html(DOCUMENT))
    assert "b" in page.tags, "labels of bars"
    assert page.text.count(EVIL) == 5
    assert [tag for tag in page.tags if tag == "img"] == ["img"]
    body = Shown(MarkdownIt("commonmark").enable(["table"]).render(render_markdown(DOCUMENT)))
    assert "b" not in body.tags
    assert body.text.count(EVIL) == 4
    wide = screen(DOCUMENT, width=200)
    assert wide.count(EVIL) == 4
    for text in (page.text, body.text, wide):
        for said in SAID:
            assert said in text


def test_markdown_tables_are_aligned_and_bold_where_rows_are_best() -> None:
    lines = render_markdown(doc.Document(parts=(TABLE,))).splitlines()
    assert lines[:3] == ["| plan | tok/s | why |", "| :--- | ---: | :--- |", "| **17+13** | **201** | **fast** |"]
    assert len(re.findall(r"(?<!\\)\|", lines[3])) == 4
    assert lines[-2:] == ["", "tok/s: tokens a second"]


def test_a_screen_keeps_to_its_width_and_leaves_a_line_between_groups() -> None:
    lines = screen(DOCUMENT, width=60).splitlines()
    assert max(map(len, lines)) <= 60
    at = next(place for place, line in enumerate(lines) if line.startswith("17+13"))
    assert lines[at + 1].strip() == ""


def test_a_screen_draws_bars_to_scale_and_no_other_marks() -> None:
    bars = Bars(spans=((0, 0.0, 2.0, "m0"), (1, 2.0, 4.0, "m0"), (0, 2.0, 3.0, "m1")), colour="orange", label="do")
    dots = Dots(xs=(1.0,), ys=(1.0,), colour="plan", label="dot")
    drawn = Chart(title="all of it", x_label="seconds", marks=(bars, dots), rows=("a\nx", "b\ny"), x_range=(0, 4))
    shown = screen(doc.Document(parts=(doc.Figures((doc.Figure("bars", drawn),)),))).splitlines()
    assert shown[1].split() == ["a", "x", "0" * 28 + "1" * 14 + "·" * 14]
    assert shown[2].split() == ["b", "y", "·" * 28 + "0" * 28]
    assert "over 4 seconds" in shown[3]
    assert "dot" not in "".join(shown)


def test_a_table_of_fewer_columns_keeps_their_order() -> None:
    assert [column.title for column in TABLE.only({"why", "plan"}).columns] == ["plan", "why"]
    assert [row.cells for row in TABLE.only(["tok/s"]).rows] == [(doc.Text("201", "strong"),), ("64.2",)]
    assert [row.style for row in doc.rows_of([("a",), ("b",)], "faint")] == ["faint", "faint"]


@pytest.mark.parametrize(
    ("value", "cell"), [("=1+1", "'=1+1"), ("-x", "'-x"), (-0.5, "-0.5"), (True, "true"), (None, ""), ("a\nb", "a b")]
)
def test_cells_are_exact_and_never_formulas(value: str | float | bool | None, cell: str) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(("name", "other"), [{"name": value}]))))
    assert rows == [{"name": cell, "other": ""}]


def test_a_cell_of_no_column_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="extra"):
        render_csv(("name",), [{"extra": 1}])


def test_a_chart_draws_every_mark_and_names_those_with_labels() -> None:
    assert render_png(CHART, LIGHT).startswith(b"\x89PNG")
    assert render_png(CHART, LIGHT) != render_png(CHART, DARK)
    figure = draw(CHART)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["even", "near", "bars", "$x$ dots"]
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a $1 row", "another"]
    assert {"m0", "words", r"$\frac{a$"} <= {text.get_text() for text in axes.texts}
