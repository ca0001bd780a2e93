"""Reports of a study, written into its folder: tables, figures, a page and a trace, all derived from the records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import write_durably
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.document import Section
from pipetune.tuner.report.page import page_of
from pipetune.tuner.report.ranking import whole_of
from pipetune.tuner.report.render.csv import render_csv
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.report.spreadsheet import columns_of, entries_of
from pipetune.tuner.report.study_charts import study_figures
from pipetune.tuner.report.trace import render_trace

PLOTS_FOLDER = "plots"
TRACE_FILE = "trace.json.gz"


def write_report(report: Report, sections: Sequence[Section] = ()) -> None:
    """Writes `ranking.csv`, `ranking.md`, `report.html`, `plots/*.png` and `trace.json.gz` into the study's folder.

    What the records do not yield (no plan ran, no run was instrumented) is said in the texts, and its file of an
    earlier report is taken away.

    Args:
        sections: further ones of the page, such as a comparison with other studies.
    """
    # matplotlib takes half a second to import: those who only print a table need not wait for it.
    from pipetune.tuner.report.render.html import render_html
    from pipetune.tuner.report.render.plot import render_png

    folder, figures = report.folder, study_figures(report)
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    for stale in (folder / PLOTS_FOLDER).glob("*.png"):
        if stale.stem not in figures:
            stale.unlink()
    for name, figure in figures.items():
        _replace(folder / PLOTS_FOLDER / f"{name}.png", render_png(figure.chart))
    trace = render_trace(report)
    if trace is None:
        (folder / TRACE_FILE).unlink(missing_ok=True)
    else:
        _replace(folder / TRACE_FILE, trace)
    write_durably(folder / "ranking.csv", render_csv(columns_of(report), entries_of(report)))
    write_durably(folder / "report.html", render_html(page_of(report, sections)))
    write_durably(folder / "ranking.md", render_markdown(whole_of(report)))


def write_folder(folder: Path, texts: Mapping[str, str], pictures: Mapping[str, bytes]) -> None:
    """Writes files into a folder, which is made where it is not there; earlier ones of these names are replaced.

    Args:
        texts: by file name; `pictures` the same.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_durably(folder / name, text)
        for name, picture in pictures.items():
            (folder / name).write_bytes(picture)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None


def _replace(path: Path, content: bytes) -> None:
    """Writes a file that is whole or not there; it can be made again, so it need not outlive a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
