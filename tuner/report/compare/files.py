"""Reads studies to compare, and writes what a comparison leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from pipetune.bench.errors import ConfigError, StudyError, explain
from pipetune.bench.record import Record
from pipetune.bench.spec import device_index, device_kind
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.report.compare.charts import comparison_figures
from pipetune.tuner.report.compare.values import StudyComparison
from pipetune.tuner.report.compare.wording import CSV_COLUMNS, entries_of, page_of, whole_of
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.files import write_folder
from pipetune.tuner.report.render.csv import render_csv
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.study.files import load_study


def read_reports(folders: Sequence[Path]) -> tuple[list[Report], list[str]]:
    """Studies, ranked, and names that tell them apart.

    Args:
        folders: of studies, or files of records as `pipetune bench -o` writes them.

    Raises:
        ConfigError: fewer than two, or one given twice.
        StudyError: a folder that holds no study, a file that holds no records of one question, or one that is cut off.
    """
    places = [folder.resolve() for folder in folders]
    if len(places) < 2:
        raise ConfigError(f"compare: {len(places)} study given; name two or more")
    doubled = sorted({str(place) for place in places if places.count(place) > 1})
    if doubled:
        raise ConfigError(f"compare: {doubled[0]} is given twice")
    reports = [_records_file(path) if path.is_file() else Report.of(load_study(path)) for path in folders]
    return reports, _names(places)


def write_comparison(comparison: StudyComparison, folder: Path) -> None:
    """Writes a comparison into a folder.

    Raises:
        ConfigError: it cannot be written.
    """
    # matplotlib takes half a second to import: who only looks at the screen need not wait for it.
    from pipetune.tuner.report.render.html import render_html
    from pipetune.tuner.report.render.plot import render_png

    texts = {
        "compare.json": comparison.model_dump_json(indent=1) + "\n",
        "compare.csv": render_csv(CSV_COLUMNS, entries_of(comparison)),
        "compare.md": render_markdown(whole_of(comparison)),
        "compare.html": render_html(page_of(comparison)),
    }
    figures = comparison_figures(comparison)
    write_folder(folder, texts, {f"{name}.png": render_png(figure.chart) for name, figure in figures.items()})


def _records_file(path: Path) -> Report:
    """Records as a study without a search: what was asked is known from their specs, the machine by its id alone."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        records = [Record.model_validate_json(line) for line in lines]
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise StudyError(
            f"{path}: is no file of records, as pipetune bench -o writes them ({explain(error)})"
        ) from None
    specs = [record.spec for record in records if record.spec is not None]
    if not specs:
        raise StudyError(f"{path}: holds no record of a plan")
    first = specs[0]
    asked = {(spec.model.digest(), spec.workload.digest()) for spec in specs}
    if len(asked) > 1 or len({record.hardware_id for record in records}) > 1:
        raise StudyError(f"{path}: holds records of several models, workloads or machines; give a file of each")
    devices = sorted({device for spec in specs for device in spec.plan.devices}, key=_device_order)
    config = TuneConfig(model=first.model, workload=first.workload, protocol=first.protocol, devices=tuple(devices))
    # Files that were joined by hand count from 0 more than once.
    numbered = tuple(record.model_copy(update={"number": number}) for number, record in enumerate(records))
    return Report(
        folder=path,
        config=config,
        machine=None,
        shape=None,
        records=numbered,
        ranking=rank(numbered, [Objective(metric=name) for name in config.objectives]),
    )


def _device_order(device: str) -> tuple[str, int]:
    return device_kind(device), device_index(device)


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' names; as much of their paths as tells them apart where these are alike."""
    depth = 1
    while True:
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
        depth += 1
