"""Writes whole study folders, as a study would leave them, from records of `tests.record_factory`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.record import Machine, Record, write_durably
from bench.spec import Workload
from tests.record_factory import MODEL, WORKLOAD, make_machine, make_shape, make_study_records
from tuner import settings
from tuner.config import TuneConfig
from tuner.study_files import CONFIG_FILE, MACHINE_FILE, RECORDS_FOLDER, SHAPE_FILE


def write_study(
    folder: Path,
    records: Sequence[Record] | None = None,
    *,
    machine: Machine | None = None,
    objectives: Sequence[str] | None = None,
    constraints: Sequence[str] = (),
    workload: Workload = WORKLOAD,
    devices: Sequence[str] = ("cpu:0", "cpu:1"),
) -> Path:
    """Writes `study.yaml`, `machine.json`, `shape.json` and the records; no records are a whole study's."""
    config = TuneConfig.model_validate(
        {
            "model": MODEL,
            "workload": workload,
            "devices": tuple(devices),
            "constraints": tuple(constraints),
            **({"objectives": tuple(objectives)} if objectives is not None else {}),
        }
    )
    (folder / RECORDS_FOLDER).mkdir(parents=True)
    write_durably(folder / CONFIG_FILE, settings.dump(config))
    write_durably(folder / MACHINE_FILE, (machine or make_machine()).model_dump_json())
    write_durably(folder / SHAPE_FILE, make_shape().model_dump_json())
    for record in make_study_records() if records is None else records:
        write_durably(folder / RECORDS_FOLDER / f"{record.number:04}.json", record.model_dump_json())
    return folder
