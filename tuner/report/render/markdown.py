"""Documents as GitHub-flavoured Markdown; nothing in their text is read as markup."""

import re
from collections.abc import Iterable, Iterator

from pipetune.bench.errors import harmless
from pipetune.tuner.report import document as doc

_MARKUP = re.compile(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)|~(?=~)|(?<=~)~")
_BOLD: frozenset[doc.Style] = frozenset({"strong", "good"})


def escaped(text: str) -> str:
    """Text on one line in which Markdown finds no markup, table cells included; underscores within words are none."""
    text = harmless(text).replace("\n", " ")
    return _MARKUP.sub(r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def render_markdown(document: doc.Document, *, level: int = 1) -> str:
    """The whole text, last newline included; its title is a heading of this level."""
    blocks = [f"{'#' * level} {escaped(document.title)}"] if document.title else []
    blocks += [_facts(document.facts)] if document.facts else []
    return "\n\n".join((*blocks, *_blocks(document.parts, level + 1))) + "\n"


def _blocks(parts: Iterable[doc.Part], level: int) -> Iterator[str]:
    """Blocks that empty lines part from each other."""
    for part in parts:
        match part:
            case doc.Text() if part.text:
                lines = [escaped(line) for line in part.text.split("\n")]
                lines[-1] += f" <{part.link}>" if part.link else ""
                yield lines[0] if len(lines) == 1 else "\n".join(f"{line}  " for line in lines)
            case doc.Facts():
                yield _facts(part.items)
            case doc.Bullets() if part.items:
                yield "\n".join(line for item in part.items for line in _bullet(item))
            case doc.Table():
                if part.caption:
                    yield f"**{escaped(part.caption)}**"
                yield _table(part)
                if part.legend:
                    yield escaped(part.legend)
            case doc.Section():
                if part.heading:
                    folded = f"<details><summary>{escaped(part.heading)}</summary>"
                    yield folded if part.is_folded else f"{'#' * level} {escaped(part.heading)}"
                yield from _blocks(part.parts, level + 1)
                if part.is_folded:
                    yield "</details>"
            case doc.Bar():
                pieces = ", ".join(f"{segment.label} {segment.text}" for segment in part.segments)
                yield escaped(" ".join(text for text in (part.label, part.text, pieces) if text))
            case doc.Cards():
                yield _facts((label, f"{number} {remark}") for label, number, remark in part.cards)
            case doc.Split():
                yield escaped(" · ".join(f"{device}: {layers}" for device, layers, _ in part.stages))
            case doc.Code():
                yield f"```\n{harmless(part.text)}\n```"
            case doc.Text() | doc.Bullets() | doc.Figures():
                pass


def _facts(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- **{escaped(label)}**: {escaped(text)}" for label, text in items)


def _bullet(item: str | doc.Bullet) -> list[str]:
    bullet = item if isinstance(item, doc.Bullet) else doc.Bullet(item)
    return [f"- {escaped(bullet.text)}", *(f"  - {escaped(text)}" for text in bullet.below)]


def _table(table: doc.Table) -> str:
    rules = " | ".join(":---" if column.align == "left" else "---:" for column in table.columns)
    lines = [_line(escaped(column.title) for column in table.columns), f"| {rules} |"]
    return "\n".join([*lines, *(_line(_cell(cell, row) for cell in row.cells) for row in table.rows)])


def _cell(cell: doc.Cell, row: doc.TableRow) -> str:
    text, style = (cell, row.style) if isinstance(cell, str) else (cell.text, cell.style)
    return f"**{escaped(text)}**" if text and style in _BOLD else escaped(text)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
