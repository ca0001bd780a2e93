"""`pipetune history`: what nights measured, and where a level changed."""

from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o


def history(
    places: Annotated[list[Path], typer.Argument(metavar="PLACE…", help="Studies, or folders of studies.")],
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Show this one; may be repeated.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="FOLDER", help="Write a page, Markdown, JSON and plots there."),
    ] = None,
    json: o.Json = False,
) -> int:
    """Show the trend of each metric over many studies, and the nights at which its level changed."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.report.history import files
    from pipetune.tuner.report.history.wording import screen_of

    found = files.read_history(places, metric or [])
    common.give(found.model_dump(mode="json"), screen_of(found), json=json)
    if output_dir is not None:
        files.write_history(found, output_dir)
    if not found.questions:
        common.warn(f"no study of {', '.join(map(str, places))} can be shown; name studies, or folders of studies")
    return 0 if found.questions else 3
