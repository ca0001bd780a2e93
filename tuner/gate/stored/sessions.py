"""Reads stored sessions: the runs of a study's best plan, or those of each benchmark in a file of pytest-benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Machine, Measurement, Record
from pipetune.bench.spec import ModelSpec, Plan, Workload
from pipetune.tuner.gate.fresh_process import sample_of
from pipetune.tuner.gate.values import Sample, Session
from pipetune.tuner.report.data import Report
from pipetune.tuner.study.files import load_study

NOW = "now"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A session and the work that it did."""

    session: Session
    """Empty where the plan has no run."""
    model: ModelSpec
    workload: Workload
    plan: Plan | None = None
    """None where no plan of a study has a rank."""
    key: str | None = None
    """Of the effective plan, in a study."""
    of_study: bool = False
    empty_because: str | None = None
    """Why the session is empty; None where it is not."""


def is_benchmark_file(place: Path) -> bool:
    """Whether the place is a file; else it is a study's folder."""
    return place.is_file()


def read_study(folder: Path, *, key: str | None = None) -> Stored:
    """A stored study's session.

    A plan's finals are taken where it has any: luck helped to choose it by its other runs, and they flatter it.

    Args:
        key: of the plan; None takes the study's best one.

    Raises:
        StudyError: the folder holds no study, or a file of it is cut off.
    """
    study = load_study(folder)
    if key is None:
        best = Report.of(study).ranking.best
        key = best.key if best is not None else None
    runs = [record for record in study.records if _is_run_of(record, key)]
    runs = [record for record in runs if record.role == "finalist"] or runs
    samples = tuple(
        sample_of(
            record.result,
            hardware_id=record.hardware_id,
            started_at=record.started_at,
            wall_s=record.wall_s,
        )
        for record in runs
    )
    return Stored(
        session=Session(place=str(folder), case="", samples=samples, machine=study.machine),
        model=study.config.model,
        workload=study.config.workload,
        plan=runs[0].spec.plan if runs and runs[0].spec is not None else None,
        key=key,
        of_study=True,
        empty_because=None if samples else _empty_because(study.records, key),
    )


def read_benchmarks(path: Path) -> dict[str, Stored]:
    """Sessions of a file that `pytest pipetune/bench/suite --benchmark-json` wrote, by the benchmark's name.

    Raises:
        StudyError: the file cannot be read, is cut off, was written by another suite, or has two benchmarks of one
            name.
    """
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        found = [_stored(path, entry) for entry in document["benchmarks"]]
    except json.JSONDecodeError as error:
        raise StudyError(f"{path}: is cut off, or no JSON: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(
            f"{path}: is no file of `pytest pipetune/bench/suite --benchmark-json` of this version: {_what(error)}"
        ) from None
    names = [one.session.case for one in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise StudyError(f"{path}: two benchmarks are called {doubled[0]}; give each plan a name of its own")
    return dict(zip(names, found, strict=True))


def _stored(path: Path, entry: dict[str, Any]) -> Stored:
    extra = entry["extra_info"]
    machine = Machine.model_validate(extra["machine"])
    hardware_id = machine.hardware.hardware_id
    samples = tuple(Sample.model_validate({**run, "hardware_id": hardware_id}) for run in extra["runs"])
    return Stored(
        session=Session(place=str(path), case=str(entry["name"]), samples=samples, machine=machine),
        model=ModelSpec.model_validate(extra["model"]),
        workload=Workload.model_validate(extra["workload"]),
        plan=Plan.model_validate(extra["plan"]),
        empty_because=None if samples else "there is no run in it",
    )


def _what(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _empty_because(records: Sequence[Record], key: str | None) -> str:
    if key is None:
        return "no plan of it has a rank"
    tried = sum(record.effective is not None and record.effective.key == key for record in records)
    return f"every run of {key} failed there ({tried})" if tried else f"it has no run of {key}"


def _is_run_of(record: Record, key: str | None) -> bool:
    return record.effective is not None and record.effective.key == key and isinstance(record.result, Measurement)
