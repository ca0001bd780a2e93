"""Reports of a study, written into its folder: tables, figures, a page and a trace, all derived from the records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipetune.bench.files import write_durably
from pipetune.bench.spec import Value
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.document import Document, Figure, Section
from pipetune.tuner.report.page import page_of
from pipetune.tuner.report.ranking import whole_of
from pipetune.tuner.report.render.csv import render_csv
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.report.spreadsheet import columns_of, entries_of
from pipetune.tuner.report.study_charts import study_figures
from pipetune.tuner.report.trace import render_trace
from pipetune.tuner.study.files import refuse_links

PLOTS_FOLDER = "plots"
TRACE_FILE = "trace.json.gz"


def write_report(report: Report, sections: Sequence[Section] = ()) -> None:
    """Writes `ranking.csv`, `ranking.md`, `report.html`, `plots/*.png` and `trace.json.gz` into the study's folder.
    What the records do not yield (no plan ran, no run was instrumented) is said in the texts, and its file of an
    earlier report is taken away. `sections` are further ones of the page, such as a comparison with other studies."""
    # matplotlib takes half a second to import: those who only print a table need not wait for it.
    from pipetune.tuner.report.render.html import render_html
    from pipetune.tuner.report.render.plot import render_png

    folder, figures = report.folder, study_figures(report)
    refuse_links([folder / PLOTS_FOLDER])
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    for name, figure in figures.items():
        if figure is None:
            (folder / PLOTS_FOLDER / f"{name}.png").unlink(missing_ok=True)
        else:
            write_durably(folder / PLOTS_FOLDER / f"{name}.png", render_png(figure.chart))
    if (trace := render_trace(report)) is None:
        (folder / TRACE_FILE).unlink(missing_ok=True)
    else:
        write_durably(folder / TRACE_FILE, trace)
    write_durably(folder / "ranking.csv", render_csv(columns_of(report), entries_of(report)))
    write_durably(folder / "report.html", render_html(page_of(report, sections)))
    write_durably(folder / "ranking.md", render_markdown(whole_of(report)))


def write_documents(
    folder: Path,
    name: str,
    value: Value,
    *,
    whole: Document,
    page: Document,
    figures: Mapping[str, Figure],
    cells: str | None = None,
) -> None:
    """Writes a value's `.json`, `.md`, `.html` and `.csv`, and a picture of each figure; earlier ones are replaced."""
    # Who only looks at the screen need not wait for matplotlib.
    from pipetune.tuner.report.render.html import render_html
    from pipetune.tuner.report.render.plot import render_png

    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / f"{name}.json", value.model_dump_json(indent=1) + "\n")
    if cells is not None:
        write_durably(folder / f"{name}.csv", cells)
    write_durably(folder / f"{name}.md", render_markdown(whole))
    write_durably(folder / f"{name}.html", render_html(page))
    for stem, figure in figures.items():
        write_durably(folder / f"{stem}.png", render_png(figure.chart))
