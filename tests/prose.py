"""Words and width of what people read: `python -m tests.prose`, which `make lint` runs.

No word that `words.txt` lists as old stands in code, messages or documents. Documents wrap at 100 columns; tables,
code blocks, and lines that hold one long word or link alone are as long as they must be. No docstring begins with
"Of", as if it went on with its neighbour's sentence.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = Path(__file__).with_name("words.txt")
WIDTH = 100
DOCUMENTS = ("README.md", "CHANGELOG.md", "results/README.md", "docs/*.md", "docs/decisions/*.md")
CODE = ("bench", "tuner", "pipetune", "tests")
EXEMPT = ("tests/words.txt", "tests/test_prose.py", "tests/golden/", "tests/data/", "CHANGELOG.md")
"""Files that must name old words: their list, recordings of earlier commits, and what changed."""


def read_words(text: str) -> dict[re.Pattern[str], str]:
    """Old words, as patterns of whole words, and what to write instead; `#` begins a comment."""
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            old, arrow, new = line.partition(" → ")
            assert arrow, f"no arrow in {line!r}"
            found[re.compile(rf"\b{old}\b")] = new
    return found


def old_words(name: str, text: str, words: dict[re.Pattern[str], str]) -> Iterator[str]:
    """Places of old words in a file."""
    for number, line in enumerate(text.splitlines(), start=1):
        for old, new in words.items():
            if match := old.search(line):
                yield f"{name}:{number}: {match[0]!r} is an old word; say {new!r}"


def wrapped(text: str) -> str:
    """Text that a command writes into a document: lines outside of tables broken at `WIDTH` columns."""
    return "\n".join(
        line
        if line.startswith("|")
        else textwrap.fill(
            line, WIDTH, subsequent_indent="  " * line.startswith("- "), break_long_words=False, break_on_hyphens=False
        )
        for line in text.splitlines()
    )


def wide_lines(name: str, text: str) -> Iterator[str]:
    """Lines of a document's prose that are wider than `WIDTH` columns and could be broken."""
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        start = line.lstrip(" >")
        if start.startswith(("```", "~~~")):
            in_code = not in_code
        elif len(line) > WIDTH and not in_code and _can_be_broken(start):
            yield f"{name}:{number}: {len(line)} columns, at most {WIDTH}"


def _can_be_broken(line: str) -> bool:
    """Whether a line is no table's, comment's or picture's, and more than a bullet with one long word or link."""
    return not line.startswith(("|", "<!--", "![")) and " " in line.strip().lstrip("-*#0123456789. ")


def continued_docstrings(name: str, source: str) -> Iterator[str]:
    """Docstrings, of fields as well, that begin with "Of"."""
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.startswith("Of "):
            yield f"{name}:{value.lineno}: a docstring that begins with 'Of' does not stand by itself"


def faults(names: Iterable[str], words: dict[re.Pattern[str], str]) -> Iterator[str]:
    """All that is wrong in the files named, as `path:line: what`."""
    for name in names:
        path = ROOT / name
        if path.is_symlink() or not path.is_file() or path.suffix not in (".py", ".md", ".txt", ".yaml", ".j2"):
            continue
        text = path.read_text(encoding="utf-8")
        if not name.startswith(EXEMPT):
            yield from old_words(name, text, words)
        if path.suffix == ".md":
            yield from wide_lines(name, text)
        if path.suffix == ".py" and not name.startswith("tests/"):
            yield from continued_docstrings(name, text)


def main() -> int:
    """Prints what is wrong; 1 if anything is."""
    listing = subprocess.run(
        ["git", "ls-files", *CODE, *DOCUMENTS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    names = sorted(set(listing.splitlines()))
    found = list(faults(names, read_words(WORDS.read_text(encoding="utf-8"))))
    print("".join(f"{fault}\n" for fault in found) + f"prose: {len(names)} files, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
