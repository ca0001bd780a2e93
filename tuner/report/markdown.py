"""`ranking.md`: the ranking's table as GitHub-flavoured Markdown."""

from __future__ import annotations

import re

from pipetune.tuner.report.search import SearchStory
from pipetune.tuner.report.tables import RankingTable
from pipetune.tuner.report.wording import sentence


def render_markdown(table: RankingTable) -> str:
    """Draws the table as GitHub-flavoured Markdown."""
    out = [f"# {escaped(table.title)}", ""]
    out += [f"- **{escaped(label)}**: {escaped(text)}" for label, text in table.facts]
    if table.lines:
        out += ["", "| " + " | ".join(escaped(column) for column in table.columns) + " |"]
        out += ["|" + "|".join(" :--- " if column == "plan" else " ---: " for column in table.columns) + "|"]
        for line in table.lines:
            cells = [escaped(cell) for cell in line.cells]
            if line.kind == "best":
                cells = [f"**{cell}**" for cell in cells]
            out.append("| " + " | ".join(cells) + " |")
        out += ["", escaped(table.legend)]
    if table.remarks:
        out += ["", *(f"- {escaped(remark)}" for remark in table.remarks)]
    if table.search:
        out += ["", *_search(table.search)]
    if table.failures:
        out += ["", "## Runs without a measurement", "", "| record | plan | kind | where | what happened |"]
        out += ["| ---: | :--- | :--- | :--- | :--- |"]
        out += [
            f"| {line.record:04} | {escaped(line.plan)} | {line.kind} | {escaped(line.where)} "
            f"| {escaped(line.message)} |"
            for line in table.failures
        ]
    return "\n".join([*out, "", *(f"{escaped(line)}  " for line in table.closing), ""])


def _search(story: SearchStory) -> list[str]:
    out = ["## How the search went", "", "| " + " | ".join(story.columns) + " |"]
    out += ["|" + "|".join(" :--- " if name in ("plan", "why") else " ---: " for name in story.columns) + "|"]
    for cells, leads in zip(story.lines, story.leaders, strict=True):
        texts = [escaped(cell) for cell in cells]
        shown = [
            f"**{text}**" if leads and name == "measured" else text
            for name, text in zip(story.columns, texts, strict=True)
        ]
        out.append("| " + " | ".join(shown) + " |")
    for text in (story.legend, story.summary, story.phases and sentence(story.phases)):
        out += ["", escaped(text)] if text else []
    return out


_MARKUP = re.compile(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)|~(?=~)|(?<=~)~")


def escaped(text: str) -> str:
    """Text in which Markdown finds no markup, table cells included; underscores within words are none."""
    return _MARKUP.sub(r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
