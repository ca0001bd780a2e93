"""`pipetune compare`: studies side by side, on one machine or on several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
        typer.Option("--price", metavar="DEVICE=PRICE", help="Of an hour, by kind or name: cuda=2.5; may be repeated."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="FOLDER", help="JSON, CSV, Markdown, a page and plots."),
    ] = None,
    json: o.Json = False,
) -> int:
    """Compare studies: what changed in the machine, the same plans, and each at its own best."""
    from pipetune.tuner.cli import common, compare_view
    from pipetune.tuner.report.compare import files
    from pipetune.tuner.report.compare.join import compare_studies

    reports, names = files.read_reports([common.study_at(study) for study in studies])
    comparison = compare_studies(reports, names, compare_view.parse_prices(price or []) if price else None)
    if output_dir is not None:
        files.write_all(comparison, output_dir)
    if json:
        common.print_json(comparison.model_dump(mode="json"))
    else:
        compare_view.show(comparison, common.out())
    return 0
