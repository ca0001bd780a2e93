"""Studies to compare: one plan run on two nights or machines, whose speed and best plan may change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipetune.bench.record import Machine, Record
from pipetune.bench.spec import Plan
from tests.record_factory import make_baseline_measurement, make_machine, make_measurement, make_plan, make_record
from tests.study_factory import write_study

EVEN, UNEVEN = make_plan((15, 15), 16), make_plan((17, 13), 16)


def write_night(
    folder: Path,
    drifts: Mapping[Plan, float] | None = None,
    *,
    seed: int = 0,
    rounds: int = 5,
    machine: Machine | None = None,
    started_at: str = "2026-01-02T03:00:00+00:00",
) -> Path:
    """A small study: a baseline, and finals of the plans given, each with a factor on all its times."""
    records: list[Record] = [
        make_record(0, "baseline", None, make_baseline_measurement(32, seed=seed)),
    ]
    for plan, drift in (drifts or {EVEN: 1.0, UNEVEN: 1.0}).items():
        for round_ in range(rounds):
            measurement = make_measurement(plan, seed=seed + len(records), drift=drift)
            records.append(make_record(len(records), "finalist", plan, measurement, round_=round_))
    machine = machine or make_machine()
    update = {"started_at": started_at, "hardware_id": machine.hardware_id}
    return write_study(folder, [record.model_copy(update=update) for record in records], machine=machine)
