"""Cells as CSV: full precision for machines, and safe to open in a spreadsheet."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from pipetune.tuner.report.wording import clean

Cell = str | int | float | bool | None

_FORMULA_STARTS = ("=", "+", "-", "@")


def render_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Cell]]) -> str:
    """A header and a line for each row; what a row does not hold is empty.
    ValueError: a row holds what is no column."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: safe_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def safe_cell(value: Cell) -> Cell:
    """A number as it is; text on one line, and never one that a spreadsheet would take for a formula."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
