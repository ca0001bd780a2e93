"""Reads the studies of a history, and writes what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipetune.bench.errors import ConfigError, PipetuneError
from pipetune.bench.metrics import metric_names
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.files import write_folder
from pipetune.tuner.report.history.charts import history_figures
from pipetune.tuner.report.history.series import StudyNight, history_of
from pipetune.tuner.report.history.values import History
from pipetune.tuner.report.history.wording import page_of, whole_of
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.study.files import CONFIG_FILE, load_study


def read_history(places: Sequence[Path], metrics: Sequence[str] = ()) -> History:
    """The history of the studies at some places.

    A study that cannot be read, such as one that still runs, is named in the history and does not end it.

    Args:
        places: studies, or folders of studies.
        metrics: by default those that most people watch.

    Raises:
        ConfigError: a metric that there is not, or a place that is no folder.
    """
    known = metric_names(10**6, 2, gpu=True)
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise ConfigError(f"--metric {unknown[0]}: there are {', '.join(known)}")
    nights, skipped = [], []
    for folder in _studies(places):
        try:
            report = Report.of(load_study(folder))
            night = StudyNight.of(report)
        except PipetuneError as error:
            skipped.append(str(error) if str(folder) in str(error) else f"{folder}: {error}")
            continue
        if night is None:
            skipped.append(f"{folder}: nothing was measured")
        elif report.log is not None and report.log.stop is None:
            skipped.append(f"{folder}: its search has not ended, so that its best plan is not known; --resume ends it")
        else:
            nights.append(night)
    return history_of(nights, tuple(metrics), skipped)


def write_history(history: History, folder: Path) -> None:
    """Writes a history into a folder; an earlier one there is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    # matplotlib takes half a second to import: who only looks at the screen need not wait for it.
    from pipetune.tuner.report.render.html import render_html
    from pipetune.tuner.report.render.plot import render_png

    figures = [history_figures(question) for question in history.questions]
    texts = {
        "history.json": history.model_dump_json(indent=1) + "\n",
        "history.md": render_markdown(whole_of(history)),
        "history.html": render_html(page_of(history, figures)),
    }
    pictures = {
        f"{number}-{metric}.png": render_png(figure.chart)
        for number, own in enumerate(figures, start=1)
        for metric, figure in own.items()
    }
    write_folder(folder, texts, pictures)


def _studies(places: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place}: is no folder; name studies, or a folder of studies")
        inner = (
            [place]
            if (place / CONFIG_FILE).exists()
            else sorted(path.parent for path in place.glob(f"*/{CONFIG_FILE}"))
        )
        found += [folder for folder in inner if folder.resolve() not in {one.resolve() for one in found}]
    return found
