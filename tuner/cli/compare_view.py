"""A comparison of studies on the screen, in 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.errors import ConfigError
from tuner.compare.values import StudyComparison
from tuner.compare.wording import STUDY_COLUMNS, story_of

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
    for one in comparison.contestants:
        table.add_column(Text(one.name), justify="right", overflow="fold")
    for index, name in enumerate(STUDY_COLUMNS[1:], start=1):
        cells = [line[index] for line in story.studies]
        if any(cell != "–" for cell in cells):
            table.add_row(name, *map(Text, cells))
    console.print(table)
    console.print()
    if story.plans:
        plans = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for index, name in enumerate(story.plan_columns):
            plans.add_column(Text(name), justify="right" if index else "left", overflow="fold")
        for line in story.plans[:_MOST]:
            plans.add_row(*map(Text, line))
        console.print(plans)
        if len(story.plans) > _MOST:
            console.print(f"and {len(story.plans) - _MOST} plans more, in the CSV of --output-dir")
        console.print()
    for remark in story.remarks:
        console.print(f"· {remark}", markup=False)
