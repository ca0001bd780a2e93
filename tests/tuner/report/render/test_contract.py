"""Who draws: tables, markup, cells and pages are made by the renderers of documents, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
RENDERERS = ROOT / "tuner/report/render"
READERS = {ROOT / "bench/load/traces.py": ["csv"]}
"""What reads tables of others."""
DRAWING = ("rich.table", "rich.padding", "rich.box", "jinja2", "csv", "matplotlib")
MARKDOWN_TABLE = re.compile(r"""["'](?:\| ?)?" ?\| "\.join|" \| "\.join|:---""")


def modules() -> list[Path]:
    return [path for half in ("bench", "tuner") for path in sorted((ROOT / half).rglob("*.py"))]


def drawing(path: Path) -> Iterator[str]:
    """What a module draws with."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
        yield from (name for name in names for one in DRAWING if f"{name}.".startswith(f"{one}."))
    if MARKDOWN_TABLE.search(text):
        yield "a Markdown table"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_renderers_draw(path: Path) -> None:
    if RENDERERS not in path.parents:
        assert list(drawing(path)) == READERS.get(path, []), f"{path.name} draws: build a Document"
