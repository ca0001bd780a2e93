"""Writes whole study folders, as a study would leave them, from records of `tests.record_factory`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipetune.bench.files import write_durably
from pipetune.bench.metrics import derive
from pipetune.bench.profile import DeviceProfile, LayerTimes, LinkProfile, Profile, TaskTime
from pipetune.bench.record import Machine, Measurement, Record
from pipetune.bench.spec import Workload
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.study.files import RECORDS_FOLDER, StudyFile
from pipetune.tuner.study.search_log import LoggedTrial, Reason, SearchLog, Stop
from tests.record_factory import (
    DECODE_LAYER_ROW_S,
    DECODE_LAYER_S,
    HEAD_LAYERS,
    MODEL,
    NUM_LAYERS,
    PREFILL_LAYER_ROW_S,
    WORKLOAD,
    make_machine,
    make_shape,
    make_study_records,
)


def write_study(
    folder: Path,
    records: Sequence[Record] | None = None,
    *,
    machine: Machine | None = None,
    objectives: Sequence[str] | None = None,
    constraints: Sequence[str] = (),
    workload: Workload = WORKLOAD,
    devices: Sequence[str] = ("cpu:0", "cpu:1"),
    log: SearchLog | None = None,
    profile: Profile | None = None,
    space: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `study.yaml`, `machine.json`, `shape.json` and the records, the search log and the profile where given.

    No records are a whole study's.
    """
    config = TuneConfig.model_validate(
        {
            "model": MODEL,
            "workload": workload,
            "devices": tuple(devices),
            "constraints": tuple(constraints),
            "space": dict(space or {}),
            **({"objectives": tuple(objectives)} if objectives is not None else {}),
        }
    )
    (folder / RECORDS_FOLDER).mkdir(parents=True)
    write_durably(folder / StudyFile.CONFIG, sources.dump(config))
    write_durably(folder / StudyFile.MACHINE, (machine or make_machine()).model_dump_json())
    write_durably(folder / StudyFile.SHAPE, make_shape().model_dump_json())
    for record in make_study_records() if records is None else records:
        write_durably(folder / RECORDS_FOLDER / f"{record.number:04}.json", record.model_dump_json())
    if log is not None:
        write_durably(folder / StudyFile.SEARCH, log.model_dump_json())
    if profile is not None:
        write_durably(folder / StudyFile.PROFILE, profile.model_dump_json())
    return folder


def make_log(
    records: Sequence[Record] | None = None, errors: Sequence[float] = (0.06, -0.04, 0.02, -0.01)
) -> SearchLog:
    """The search log of a study whose predictions were off by `errors`, one after the other and over again."""
    entries = []
    for record in make_study_records() if records is None else records:
        if record.role != "trial" or record.trial_number is None:
            continue
        index = record.trial_number
        kind: Reason = "model" if index else "kind"
        predicted: dict[str, float] = {}
        if isinstance(record.result, Measurement):
            values, off = derive(record.result), 1 + errors[index % len(errors)]
            predicted = {name: values[name] * off for name in ("output_throughput", "mean_ttft_ms") if name in values}
        entries.append(
            LoggedTrial(
                trial_number=index,
                point={"partition_rank": index + 1},
                kind=kind,
                reason="it promises most" if kind == "model" else "no plan of this kind was measured",
                predicted=predicted,
                predicted_sd=dict.fromkeys(predicted, 0.05 / (1 + index)),
            )
        )
    return SearchLog(
        entries=tuple(entries),
        stop=Stop(kind="converged", text="no other plan is predicted to be better by more than the noise of 1.4 %"),
        seconds={
            "start": 4.1,
            "profile": 21.0,
            "reference": 3.3,
            "baseline": 55.2,
            "single_stage": 18.0,
            "trials": 160.7,
            "search": 1.9,
            "finals": 96.4,
        },
    )


def make_profile() -> Profile:
    """What the layers of `tests.record_factory` take on two devices."""

    def times(layers: float) -> tuple[TaskTime, ...]:
        prefill = [
            TaskTime(rows=rows, new_tokens=64, past_tokens=0, seconds=layers * (rows * PREFILL_LAYER_ROW_S + 2e-3))
            for rows in (1, 8, 16, 32)
        ]
        decode = [
            TaskTime(
                rows=rows, new_tokens=1, past_tokens=past, seconds=layers * (DECODE_LAYER_S + rows * DECODE_LAYER_ROW_S)
            )
            for rows in (1, 8, 16, 32)
            for past in (64, 79)
        ]
        return (*prefill, *decode)

    devices = tuple(
        DeviceProfile(
            device=device,
            layers=(LayerTimes(layers=tuple(range(NUM_LAYERS)), times=times(1.0)),),
            overhead=times(0.05),
            embedding=times(0.01),
            head=times(HEAD_LAYERS),
        )
        for device in ("cpu:0", "cpu:1")
    )
    return Profile(
        model=MODEL,
        shape=make_shape(),
        machine=make_machine(),
        device_bytes={"cpu:0": 4 * 2**30, "cpu:1": 4 * 2**30},
        devices=devices,
        links=tuple(
            LinkProfile(source=one, target=other, latency_s=1.5e-4, bytes_per_s=1.2e9)
            for one, other in (("cpu:0", "cpu:1"), ("cpu:1", "cpu:0"))
        ),
        measured_at="2026-01-02T03:00:00Z",
        took_s=21.0,
    )
