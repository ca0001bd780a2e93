"""Records come back from disk as they went, and a file is either whole or not there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipetune.bench.files import read_text, write_durably
from pipetune.bench.record import (
    DeviceState,
    Failure,
    FailureKind,
    GpuInfo,
    Hardware,
    Iteration,
    Measurement,
    OutputCheck,
    Record,
    StageMemory,
    StageTrace,
    TaskShape,
    Telemetry,
)
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, RunSpec, Workload
from tests.record_factory import make_measurement, make_plan

SECONDS = st.floats(1e-6, 1e6, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)

PLAN = Plan.from_layer_counts((1, 1), ("cpu:0", "cpu:1"), 2)
SPEC = RunSpec(model=ModelSpec(name="tiny"), workload=Workload(num_prompts=2, output_len=2), plan=PLAN)


def measurement(seconds: list[float]) -> Measurement:
    """Two prompts, two tokens, two stages; every time is drawn from `seconds`, at least 4 of them."""
    times = tuple(sorted(seconds[:2]))
    trace = StageTrace(compute_start_s=times, compute_end_s=times, recv_wait_s=times, send_wait_s=times)
    return Measurement(
        prompt_lens=(3, 5),
        order=(1, 0),
        output_len=2,
        micro_batch_sizes=(2,),
        tasks=(
            TaskShape(micro_batch=0, step=0, first_row=0, end_row=2),
            TaskShape(micro_batch=0, step=1, first_row=0, end_row=2),
        ),
        iterations=(Iteration(duration_s=seconds[2], token_times_s=times, stages=(trace, trace)),),
        warmup_s=(seconds[3],),
        memory=tuple(
            StageMemory(
                device=device,
                weights_bytes=10,
                kv_bytes=5,
                activation_bytes=1,
                peak_bytes=20,
                peak_source="vm_hwm",
                cap_bytes=30,
            )
            for device in PLAN.devices
        ),
        check=OutputCheck(reference="unsplit", max_logit_error=1e-6, tolerance=1e-4, compared_logits=8, argmax_flips=0),
        telemetry=Telemetry(before=(DeviceState(device="cpu:0", load_average=0.5),)),
    )


def record(result: Measurement | Failure, **more: Any) -> Record:
    values: dict[str, Any] = {
        "number": 7,
        "role": "trial",
        "spec": SPEC,
        "effective": EffectivePlan(plan=PLAN, in_flight=1),
        "hardware_id": "ab" * 8,
        "started_at": "2026-01-01T00:00:00Z",
        "wall_s": 1.5,
        "result": result,
    }
    return Record(**{**values, **more})


FAILURES = st.builds(
    Failure,
    kind=st.sampled_from(list(FailureKind)),
    message=TEXT,
    stage=st.none() | st.integers(0, 9),
    bytes_wanted=st.none() | st.integers(0, 2**60),
    detail=st.none() | TEXT,
)
MEASUREMENTS = st.lists(SECONDS, min_size=4, max_size=4).map(measurement)
PARAMS = st.none() | st.dictionaries(TEXT, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT)


@given(result=FAILURES | MEASUREMENTS, params=PARAMS)
def test_records_round_trip_through_json(result: Measurement | Failure, params: dict[str, Any] | None) -> None:
    before = record(result, params=params)
    after = Record.model_validate_json(before.model_dump_json(indent=1))
    assert after == before
    assert type(after.result) is type(result)
    if params is not None:
        assert after.params is not None
        assert {name: type(value) for name, value in after.params.items()} == {
            name: type(value) for name, value in params.items()
        }


def test_a_record_of_the_baseline_has_no_plan() -> None:
    result = measurement([0.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValidationError, match="a pipeline that was measured has its plan in both"):
        record(result, spec=None)
    run = result.model_copy(update={"method": "hf_generate"})
    before = record(run, role="baseline", spec=None, effective=None)
    assert Record.model_validate_json(before.model_dump_json()).spec is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_time_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        measurement([0.0, 1.0, value, 1.0])


def test_the_outcome_is_told_by_its_tag() -> None:
    dumped = record(Failure(kind=FailureKind.TIMEOUT, message="too slow")).model_dump(mode="json")
    assert dumped["result"]["outcome"] == "failure"
    dumped["result"]["outcome"] = "success"
    with pytest.raises(ValidationError, match="outcome"):
        Record.model_validate(dumped)


def test_a_measurement_needs_an_iteration() -> None:
    dumped = measurement([0.0, 1.0, 1.0, 1.0]).model_dump()
    with pytest.raises(ValidationError, match="iterations"):
        Measurement.model_validate({**dumped, "iterations": ()})


def hardware(uuid: str, **more: Any) -> Hardware:
    gpu = GpuInfo(name="NVIDIA H200", memory_bytes=2**37, uuid=uuid)
    return Hardware(**{"cpu_model": "x", "cpu_cores": 2, "memory_bytes": 2**33, "gpus": (gpu,), **more})


def test_hardware_id_ignores_uuids_and_numa_nodes_and_nothing_else() -> None:
    assert hardware("GPU-1").hardware_id == hardware("GPU-2").hardware_id
    elsewhere = GpuInfo(name="NVIDIA H200", memory_bytes=2**37, uuid="GPU-1", numa_node=1)
    assert hardware("GPU-1", gpus=(elsewhere,)).hardware_id == hardware("GPU-1").hardware_id
    others: list[dict[str, Any]] = [
        {"cpu_cores": 4},
        {"memory_bytes": 2**34},
        {"links": ("0-1:NV18",)},
        {"gpus": ()},
        {"cpu_model": "y"},
    ]
    assert len({hardware("GPU-1", **other).hardware_id for other in [{}, *others]}) == 6


def test_write_durably_replaces_no_device(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="is no file, and is not replaced"):
        write_durably(pipe, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(tmp_path: Path) -> None:
    pipe, link, sparse = tmp_path / "pipe", tmp_path / "link", tmp_path / "sparse"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    with sparse.open("wb") as file:
        file.truncate(2**40)
    for path in (pipe, link, tmp_path, sparse):
        with pytest.raises(OSError, match=r"is no regular file|Is a directory|more than any file"):
            read_text(path)


def test_write_durably_writes_through_no_link(tmp_path: Path) -> None:
    own, path = tmp_path / "own", tmp_path / "0001.json"
    own.write_text("mine", encoding="utf-8")
    path.symlink_to(own)
    (tmp_path / f".0001.json.{os.getpid()}.tmp").symlink_to(own)
    write_durably(path, "new")
    assert own.read_text(encoding="utf-8") == "mine"
    assert path.read_text(encoding="utf-8") == "new"


def test_write_durably_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "0001.json"
    write_durably(path, '{"a": "×"}\n')
    write_durably(path, '{"b": 2}\n')
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["0001.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "0001.json"
    write_durably(path, "old")

    def disk_full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, "new")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["0001.json"]


def test_readers_see_the_old_file_until_the_new_one_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0001.json"
    write_durably(path, "old")
    seen: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        seen.append(f"fsync, readers see {path.read_text(encoding='utf-8')}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        seen.append(f"replace by {source.read_text(encoding='utf-8')}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_durably(path, "new")
    assert seen == ["fsync, readers see old", "replace by new", "fsync, readers see new"]


def test_an_iteration_of_no_time_is_no_measurement() -> None:
    measured = make_measurement(make_plan((30,), 32))
    raw = measured.model_dump(mode="json")
    raw["iterations"][0]["duration_s"] = 0.0
    with pytest.raises(ValidationError, match=r"iterations.0.duration_s"):
        Measurement.model_validate(raw)


def test_an_engines_measurement_has_each_prompts_tokens_and_ours_has_none() -> None:
    result = measurement([0.0, 1.0, 1.0, 1.0])
    dumped = result.model_dump()
    with pytest.raises(ValidationError, match="requests: does not fit"):
        Measurement.model_validate(dumped | {"method": "engine"})
    times = [round(0.1 * place, 1) for place in range(1, result.output_len + 1)]
    requests = [{"began_s": 0.0, "token_times_s": times}] * len(result.prompt_lens)
    iterations = [run | {"requests": requests} for run in dumped["iterations"]]
    with pytest.raises(ValidationError, match="tasks: does not fit"):
        Measurement.model_validate(dumped | {"iterations": iterations})
    assert Measurement.model_validate(dumped | {"iterations": iterations, "method": "engine"}).method == "engine"
    iterations[0]["requests"] = [requests[0] | {"token_times_s": [*times, 9.0]}, *requests[1:]]
    with pytest.raises(ValidationError, match="requests: does not fit"):
        Measurement.model_validate(dumped | {"iterations": iterations, "method": "engine"})
