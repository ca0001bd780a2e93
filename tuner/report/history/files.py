"""Reads the studies of a history, and writes what it leaves behind."""

import gc
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pipetune.bench.errors import ConfigError, PipetuneError
from pipetune.bench.metrics import metric_names
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.files import write_documents
from pipetune.tuner.report.history.series import StudyNight, history_of
from pipetune.tuner.report.history.values import History
from pipetune.tuner.report.history.wording import history_figures, page_of, whole_of
from pipetune.tuner.study.files import StudyFile, load_study, written_by

_MANY = 40
"""Studies that are read in less time by several processes."""


def read_history(places: Sequence[Path], metrics: Sequence[str] = ()) -> History:
    """The history of the studies at some places: studies, or folders of studies. One that cannot be read, such as one
    that still runs, is named in the history and does not end it. Metrics are by default those that most people watch.
    ConfigError: a metric that there is not, or a place that is no folder."""
    known = metric_names(10**6, 2, gpu=True, goodput=True, arrivals=True, rates=True)
    if unknown := [name for name in metrics if name not in known]:
        raise ConfigError(f"--metric {unknown[0]}: there are {', '.join(known)}")
    found = list(_read_all(_studies(places)))
    nights = [night for night, _ in found if night is not None]
    return history_of(nights, tuple(metrics), [text for _, texts in found for text in texts])


def _read_all(folders: Sequence[Path]) -> Iterable[tuple[StudyNight | None, list[str]]]:
    """What `_read` gives of each, by all cores where there are many."""
    cores = len(os.sched_getaffinity(0))
    if cores < 2 or len(folders) < _MANY:
        return map(_read, folders)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    # What a study leaves behind is freed by reference counts.
    with ProcessPoolExecutor(min(cores, 8), mp_context=processes, initializer=gc.disable) as pool:
        return list(pool.map(_read, folders, chunksize=4))


def _read(folder: Path) -> tuple[StudyNight | None, list[str]]:
    """A study's night, if it can be shown; and what of it cannot be read, and why."""
    try:
        report = Report.of(load_study(folder))
        night = StudyNight.of(report)
    except PipetuneError as error:
        return None, [str(error) if str(folder) in str(error) else f"{folder}: {error}"]
    texts = list(report.unread)
    if night is None:
        texts += [f"{folder}: nothing was measured"] if report.machine is not None else []
    elif report.log is not None and report.log.stop is None:
        texts.append(f"{folder}: its search has not ended, so that its best plan is not known; --resume ends it")
        night = None
    return night, texts


def write_history(history: History, folder: Path) -> None:
    """Writes a history into a folder; an earlier one there is replaced."""
    figures = {
        f"{number}-{metric}": figure
        for number, question in enumerate(history.questions, start=1)
        for metric, figure in history_figures(question).items()
    }
    write_documents(folder, "history", history, whole=whole_of(history), page=page_of(history), figures=figures)


def _studies(places: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place}{written_by(place)}: is no folder; name studies, or a folder of studies")
        own = place / StudyFile.CONFIG
        configs = [own] if own.exists() else sorted(place.glob(f"*/{StudyFile.CONFIG}"))
        known = {one.resolve() for one in found}
        found += [path.parent for path in configs if path.parent.resolve() not in known]
    return found
