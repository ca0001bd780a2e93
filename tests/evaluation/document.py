"""Tables that a command writes into a document, between two marks of its own."""

from __future__ import annotations

from pathlib import Path

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import write_durably


def begin_mark(command: str) -> str:
    """`<!-- bench-search: begin, written by `make bench-search` -->`."""
    return f"<!-- {command}: begin, written by `make {command}` -->"


def end_mark(command: str) -> str:
    return f"<!-- {command}: end -->"


def put_between_marks(path: Path, command: str, text: str) -> None:
    """Replaces what stands between a command's marks.

    Raises:
        ConfigError: the document lacks the marks, in this order.
    """
    before, begun, rest = path.read_text(encoding="utf-8").partition(begin_mark(command))
    _, ended, after = rest.partition(end_mark(command))
    if not begun or not ended:
        raise ConfigError(
            f"{path}: has no place for these tables: put {begin_mark(command)} and {end_mark(command)} there"
        )
    write_durably(path, f"{before}{begin_mark(command)}\n\n{text}\n\n{end_mark(command)}{after}")
