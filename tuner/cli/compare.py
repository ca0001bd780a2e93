"""`pipetune compare`: studies side by side, on one machine or on several."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipetune.bench.errors import ConfigError
from pipetune.tuner.cli import options as o


def compare(
    studies: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY STUDY…", help="Folders, names under results/, or records of bench -o; the first is the base."
        ),
    ],
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE=PRICE", help="Price of an hour, by kind or name: cuda=2.5; may be repeated."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="FOLDER", help="Write JSON, CSV, Markdown, a page and plots there."),
    ] = None,
    json: o.Json = False,
) -> int:
    """Compare studies: what changed in the machine, the same plans, and each at its own best."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.report.compare import files
    from pipetune.tuner.report.compare.join import compare_studies
    from pipetune.tuner.report.compare.wording import screen_of
    from pipetune.tuner.study.files import study_at

    reports, names = files.read_reports([study_at(study) for study in studies])
    common.warn_unread(*reports)
    comparison = compare_studies(reports, names, parse_prices(price or []) if price else None)
    common.give(comparison.model_dump(mode="json"), screen_of(comparison), json=json)
    if output_dir is not None:
        files.write_comparison(comparison, output_dir)
    return 0


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """`DEVICE=PRICE` of each. ConfigError: one is not of that form, or its price is no amount."""
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
