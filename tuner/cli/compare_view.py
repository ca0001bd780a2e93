"""A comparison of studies on the screen, in 80 columns."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipetune.bench.errors import ConfigError
from pipetune.tuner.report.compare.values import StudyComparison
from pipetune.tuner.report.compare.wording import story_of

_MOST = 12


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """`DEVICE=PRICE` of each.

    Raises:
        ConfigError: one is not of that form, or its price is no amount.
    """
    prices = {}
    for text in texts:
        device, _, amount = text.partition("=")
        try:
            price = float(amount)
        except ValueError:
            price = math.nan
        if not device or not (math.isfinite(price) and price > 0):
            raise ConfigError(f"--price {text!r}: write DEVICE=PRICE of an hour, as in cuda=2.5 or cuda:0=2.5")
        prices[device] = price
    return prices


def show(comparison: StudyComparison, console: Console) -> None:
    """Each study at its own best, then the same plans, then what is to be said."""
    story = story_of(comparison)
    # A study has more figures than a line has room for: they stand below each other.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    # Names are long, and ratios must not be torn: below, letters stand for them.
    letters = [_letter(index) for index in range(len(comparison.contestants))]
    for letter, one in zip(letters, comparison.contestants, strict=True):
        table.add_column(Text(f"{letter}: {one.name}"), justify="right", overflow="fold")
    for name, *cells in zip(story.study_columns, *story.studies, strict=True):
        if name != "study":
            table.add_row(name, *map(Text, cells))
    console.print(table)
    console.print()
    if story.plans:
        plans = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        plans.add_column("plan", overflow="fold")
        for letter in letters:
            plans.add_column(letter, justify="right", no_wrap=True)
        for letter in letters[1:]:
            plans.add_column(f"{letter} / first", justify="right", no_wrap=True)
        for line in story.plans[:_MOST]:
            plans.add_row(*map(Text, line[: 1 + len(letters)]), *(_below(cell) for cell in line[1 + len(letters) :]))
        console.print(plans)
        if len(story.plans) > _MOST:
            console.print(f"and {len(story.plans) - _MOST} plans more, in the CSV of --output-dir")
        console.print()
    for remark in story.remarks:
        console.print(f"· {remark}", markup=False)


def _letter(index: int) -> str:
    return string.ascii_uppercase[index] if index < len(string.ascii_uppercase) else str(index + 1)


def _below(cell: str) -> Text:
    """A ratio with its interval in a second line: side by side, two of them fill a screen."""
    return Text(cell.replace(" ", "\n", 1))
