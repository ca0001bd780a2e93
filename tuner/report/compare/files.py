"""Reads studies to compare, and writes what a comparison leaves behind."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from pipetune.bench.errors import ConfigError, StudyError
from pipetune.bench.spec import device_index, device_kind
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.report.compare.values import StudyComparison
from pipetune.tuner.report.compare.wording import CSV_COLUMNS, comparison_figures, entries_of, page_of, whole_of
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.files import write_documents
from pipetune.tuner.report.render.csv import render_csv
from pipetune.tuner.study.files import load_study, read_records


def read_reports(folders: Sequence[Path]) -> tuple[list[Report], list[str]]:
    """Studies, or files of records as `pipetune bench -o` writes them, ranked, and names that tell them apart.
    ConfigError: fewer than two, or one given twice; StudyError: a folder that holds no study, a file that holds no
    records of one question, or one that is cut off."""
    places = [folder.resolve() for folder in folders]
    if len(places) < 2:
        raise ConfigError(f"compare: {len(places)} study given; name two or more")
    if doubled := sorted({str(place) for place in places if places.count(place) > 1}):
        raise ConfigError(f"compare: {doubled[0]} is given twice")
    reports = [_records_file(path) if path.is_file() else Report.of(load_study(path)) for path in folders]
    return reports, _names(places)


def write_comparison(comparison: StudyComparison, folder: Path) -> None:
    """Writes a comparison into a folder."""
    write_documents(
        folder,
        "compare",
        comparison,
        whole=whole_of(comparison),
        page=page_of(comparison),
        figures=comparison_figures(comparison),
        cells=render_csv(CSV_COLUMNS, entries_of(comparison)),
    )


def _records_file(path: Path) -> Report:
    """Records as a study without a search: what was asked is known from their specs, the machine by its id alone."""
    records = read_records(path)
    if not (specs := [record.spec for record in records if record.spec is not None]):
        raise StudyError(f"{path}: holds no record of a plan")
    first = specs[0]
    asked = {(spec.model.digest(), spec.workload.digest()) for spec in specs}
    if len(asked) > 1 or len({record.hardware_id for record in records}) > 1:
        raise StudyError(f"{path}: holds records of several models, workloads or machines; give a file of each")
    devices = list({device for spec in specs for device in spec.plan.devices})
    devices.sort(key=lambda device: (device_kind(device), device_index(device)))
    config = TuneConfig(model=first.model, workload=first.workload, protocol=first.protocol, devices=tuple(devices))
    # Files that were joined by hand count from 0 more than once.
    numbered = tuple(record.model_copy(update={"number": number}) for number, record in enumerate(records))
    ranking = rank(numbered, [Objective(metric=name) for name in config.objectives])
    return Report(folder=path, config=config, machine=None, shape=None, records=numbered, ranking=ranking)


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' names; as much of their paths as tells them apart where these are alike."""
    candidates = (["/".join(place.parts[-depth:]) for place in places] for depth in itertools.count(1))
    return next(names for names in candidates if len(set(names)) == len(names))
