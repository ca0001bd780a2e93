"""Reads stored sessions: the runs of a study's best plan, or those of each benchmark in a file of pytest-benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.errors import StudyError
from bench.record import Machine, Measurement, Record
from tuner.gate.side import sample_of
from tuner.gate.values import Sample, Session
from tuner.report.data import Report
from tuner.study_files import StudyContents, load_study

NOW = "now"


def is_benchmark_file(place: Path) -> bool:
    """Whether the place is a file; else it is a study's folder."""
    return place.is_file()


def read_study(folder: Path, *, key: str | None = None) -> tuple[StudyContents, str | None, Session]:
    """A stored study, the effective plan's key, and its runs.

    Args:
        key: of the plan; None takes the study's best one.

    Returns:
        The study; the key, None where no plan of it has a rank; and the session, empty where the plan has no run.

    Raises:
        StudyError: the folder holds no study, or a file of it is cut off.
    """
    study = load_study(folder)
    if key is None:
        best = Report.of(study).ranking.best
        key = best.key if best is not None else None
    samples = tuple(
        sample_of(
            record.result,
            hardware_id=study.machine.hardware.hardware_id,
            started_at=record.started_at,
            wall_s=record.wall_s,
        )
        for record in study.records
        if _is_run_of(record, key)
    )
    return study, key, Session(place=str(folder), case="", samples=samples, machine=study.machine)


def read_benchmarks(path: Path) -> dict[str, Session]:
    """Sessions of a file that `pytest bench/suite --benchmark-json` wrote, by the benchmark's name.

    Raises:
        StudyError: the file cannot be read, is cut off, or was written by another suite.
    """
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        entries = document["benchmarks"]
        return {str(entry["name"]): _session(path, entry) for entry in entries}
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise StudyError(f"{path}: is cut off, or no JSON: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        what = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise StudyError(
            f"{path}: is no file of `pytest bench/suite --benchmark-json` of this version: {what}"
        ) from None


def _session(path: Path, entry: dict[str, Any]) -> Session:
    extra = entry["extra_info"]
    machine = Machine.model_validate(extra["machine"])
    hardware_id = machine.hardware.hardware_id
    samples = tuple(Sample.model_validate({**run, "hardware_id": hardware_id}) for run in extra["runs"])
    return Session(place=str(path), case=str(entry["name"]), samples=samples, machine=machine)


def _is_run_of(record: Record, key: str | None) -> bool:
    return record.effective is not None and record.effective.key == key and isinstance(record.result, Measurement)

