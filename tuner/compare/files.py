"""Reads studies to compare, and writes what a comparison leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.errors import ConfigError
from bench.record import write_durably
from tuner.compare.values import StudyComparison
from tuner.compare.wording import render_csv, render_markdown
from tuner.report.data import Report
from tuner.study_files import load_study

RESULT_FILE, CSV_FILE, MARKDOWN_FILE, PAGE_FILE = "compare.json", "compare.csv", "compare.md", "compare.html"


def read_reports(folders: Sequence[Path]) -> tuple[list[Report], list[str]]:
    """Studies, ranked, and names that tell them apart.

    Raises:
        ConfigError: fewer than two, or one given twice.
        StudyError: a folder that holds no study, or one that is cut off.
    """
    places = [folder.resolve() for folder in folders]
    if len(places) < 2:
        raise ConfigError(f"compare: {len(places)} study given; name two or more")
    doubled = sorted({str(place) for place in places if places.count(place) > 1})
    if doubled:
        raise ConfigError(f"compare: {doubled[0]} is given twice")
    reports = [Report.of(load_study(folder)) for folder in folders]
    return reports, _names(places)


def write_all(comparison: StudyComparison, folder: Path) -> None:
    """Writes a comparison into a folder.

    Raises:
        ConfigError: it cannot be written.
    """
    # matplotlib takes half a second to import: who only looks at the screen need not wait for it.
    from tuner.compare.page import render_html
    from tuner.compare.plot import render_plots

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / RESULT_FILE, comparison.model_dump_json(indent=1) + "\n")
        write_durably(folder / CSV_FILE, render_csv(comparison))
        write_durably(folder / MARKDOWN_FILE, render_markdown(comparison))
        write_durably(folder / PAGE_FILE, render_html(comparison))
        for name, png in render_plots(comparison).items():
            (folder / f"{name}.png").write_bytes(png)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' names; as much of their paths as tells them apart where these are alike."""
    depth = 1
    while True:
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
        depth += 1
