"""Reads the studies of a history, and writes what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipetune.bench.errors import ConfigError, PipetuneError
from pipetune.bench.files import write_durably
from pipetune.bench.metrics import metric_names
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.history.series import StudyNight, history_of
from pipetune.tuner.report.history.values import History
from pipetune.tuner.report.history.wording import page_of, whole_of
from pipetune.tuner.report.render.html import render_html
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.study.files import CONFIG_FILE, load_study

RESULT_FILE, MARKDOWN_FILE, PAGE_FILE = "history.json", "history.md", "history.html"


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


def write_all(history: History, folder: Path) -> None:
    """Writes a history into a folder; an earlier one there is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    from pipetune.tuner.report.history.plots import draw_question

    pictures = [draw_question(question) for question in history.questions]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / RESULT_FILE, history.model_dump_json(indent=1) + "\n")
        write_durably(folder / MARKDOWN_FILE, render_markdown(whole_of(history)))
        write_durably(folder / PAGE_FILE, render_html(page_of(history, pictures)))
        for number, drawn in enumerate(pictures, start=1):
            for metric, picture in drawn.items():
                (folder / f"{number}-{metric}.png").write_bytes(picture.light)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None


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
