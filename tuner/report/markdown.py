"""`ranking.md`: the ranking's table as GitHub-flavoured Markdown."""

from __future__ import annotations

import re

from tuner.report.search import SearchStory
from tuner.report.tables import RankingTable
from tuner.report.wording import sentence


def render_markdown(table: RankingTable) -> str:
    """Draws the table as GitHub-flavoured Markdown."""
    out = [f"# {_md(table.title)}", ""]
    out += [f"- **{_md(label)}**: {_md(text)}" for label, text in table.facts]
    if table.lines:
        out += ["", "| " + " | ".join(_md(column) for column in table.columns) + " |"]
        out += ["|" + "|".join(" :--- " if column == "plan" else " ---: " for column in table.columns) + "|"]
        for line in table.lines:
            cells = [_md(cell) for cell in line.cells]
            if line.kind == "best":
                cells = [f"**{cell}**" for cell in cells]
            out.append("| " + " | ".join(cells) + " |")
        out += ["", _md(table.legend)]
    if table.remarks:
        out += ["", *(f"- {_md(remark)}" for remark in table.remarks)]
    if table.search:
        out += ["", *_search(table.search)]
    if table.failures:
        out += ["", "## Runs without a measurement", "", "| record | plan | kind | where | what happened |"]
        out += ["| ---: | :--- | :--- | :--- | :--- |"]
        out += [
            f"| {line.record:04} | {_md(line.plan)} | {line.kind} | {_md(line.where)} | {_md(line.message)} |"
            for line in table.failures
        ]
    return "\n".join([*out, "", *(f"{_md(line)}  " for line in table.closing), ""])


def _search(story: SearchStory) -> list[str]:
    out = ["## How the search went", "", "| " + " | ".join(story.columns) + " |"]
    out += ["|" + "|".join(" :--- " if name in ("plan", "why") else " ---: " for name in story.columns) + "|"]
    for cells, leads in zip(story.lines, story.leaders, strict=True):
        texts = [_md(cell) for cell in cells]
        shown = [
            f"**{text}**" if leads and name == "measured" else text
            for name, text in zip(story.columns, texts, strict=True)
        ]
        out.append("| " + " | ".join(shown) + " |")
    for text in (story.legend, story.summary, story.phases and sentence(story.phases)):
        out += ["", _md(text)] if text else []
    return out


def _md(text: str) -> str:
    """Escapes what Markdown would read as markup, table cells included."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
