"""Whole studies by several driver processes over one PostgreSQL database."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.errors import FleetError, StorageError, StudyError
from pipetune.bench.record import Failure, FailureKind, Machine, Measurement, Record
from pipetune.bench.spec import RunSpec
from pipetune.tuner.cli import run
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.progress import Reporter
from pipetune.tuner.search import database as database_module
from pipetune.tuner.search.driver import run_study
from pipetune.tuner.search.shared import participant as member
from pipetune.tuner.search.shared import shared_study
from pipetune.tuner.study.files import load_records, was_interrupted
from pipetune.tuner.study.search_log import SearchLog
from pipetune.tuner.study.store import StudyStore
from tests import postgres
from tests.tiny_models import save_tiny_model
from tests.tuner.fake_fleet import Lab, failure

SPAWN = multiprocessing.get_context("spawn")
LEASE_S = 2.0


def config(url: str | None, devices: str, **values: Any) -> TuneConfig:
    return TuneConfig.model_validate(
        {
            "model": {"name": "m"},
            "devices": devices,
            "storage": url,
            "shared_study": "nightly",
            "n_trials": 6,
            "space": {"micro_batch_sizes": [8, 16, 32], "prefill_micro_batch_sizes": [8, 16]},
            "stop_early": False,
            "profile": False,
            "baseline_batch_sizes": [32],
            "finalists": 2,
            "finalist_rounds": 1,
            "max_finalist_rounds": 1,
            **values,
        }
    )


def drive(folder: Path, wanted: TuneConfig, run_s: float, resume: bool = False, hang_at: int | None = None) -> None:
    """One driver process.

    Args:
        run_s: how long a run of a plan takes.
        hang_at: the run that never ends, counted from 0.
    """
    member.LEASE_S, member.BEAT_S, shared_study._POLL_S = LEASE_S, 0.2, 0.05
    lab = Lab()

    def take_time(spec: RunSpec, number: int) -> Failure | None:
        time.sleep(1e3 if number == hang_at else run_s)
        return None

    lab.fault = take_time
    with StudyStore.resume(folder, wanted) if resume else StudyStore.create(folder, wanted) as store:
        assert run_study(store, Reporter(), start_fleet=lab.start)


def start(*arguments: Any, **options: Any) -> BaseProcess:
    process = SPAWN.Process(target=drive, args=arguments, kwargs=options, daemon=True)
    process.start()
    return process


def finish(*processes: BaseProcess) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def trials(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.role == "trial" and not was_interrupted(record)]


def keys(records: Sequence[Record]) -> list[str]:
    """Effective plans, by places instead of devices."""
    found = [record.effective.key for record in trials(records) if record.effective]
    return sorted(key.replace("cpu:2", "cpu:0").replace("cpu:3", "cpu:1") for key in found)


def never_twice(*folders: Path) -> bool:
    """Whether plans ran once only, but for those that a process ran again on purpose."""
    records = trials(load_records(folders[0]))
    meant: set[int] = set()
    for folder in folders:
        entries = SearchLog.model_validate_json((folder / "search.json").read_text(encoding="utf-8")).entries
        meant |= {entry.trial_number for entry in entries if entry.kind == "replicate"}
    found = keys([record for record in records if record.trial_number not in meant])
    return len(found) == len(set(found))


def count(folder: Path) -> int:
    return len(list((folder / "records").glob("[0-9]*.json")))


@pytest.mark.e2e
def test_two_processes_search_one_space_and_both_end_with_all_of_it(tmp_path: Path, database: str) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    finish(
        start(a, config(database, "cpu:0-1"), 0.3),
        start(b, config(database, "cpu:2-3"), 0.3),
    )
    at_a, at_b = load_records(a), load_records(b)
    for records in (at_a, at_b):
        assert sorted(record.trial_number or 0 for record in trials(records)) == list(range(6))
        assert {record.source is None for record in trials(records)} == {True, False}
        own = [record for record in records if record.source is None]
        assert sum(record.role == "baseline" for record in own) == 1
        assert sum(record.role == "single_stage" for record in own) == 1
    assert keys(at_a) == keys(at_b)
    assert never_twice(a, b)
    finals = [{record.role for record in records if record.role == "finalist"} for records in (at_a, at_b)]
    assert sorted(map(len, finals)) == [0, 1]
    memberships = [json.loads((folder / "sharing.json").read_text(encoding="utf-8")) for folder in (a, b)]
    assert {one["process"] for one in memberships} == {1, 2}
    assert len({one["seed"] for one in memberships}) == 2
    spaces = [json.loads((folder / "space.json").read_text(encoding="utf-8")) for folder in (a, b)]
    assert [space.pop("devices") for space in spaces] == [["cpu:0", "cpu:1"], ["cpu:2", "cpu:3"]]
    assert spaces[0] == spaces[1]
    # The folder is whole without the others and their database.
    alone = config(None, "cpu:0-1", shared_study=None, n_trials=7)
    finish(start(a, alone, 0.0, resume=True))
    assert len(trials(load_records(a))) == 7
    assert never_twice(a, b)


@pytest.mark.e2e
def test_a_killed_process_costs_the_others_nothing_but_its_lease(tmp_path: Path, database: str) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    victim = start(a, config(database, "cpu:0-1"), 0.05, hang_at=4)
    # The baseline, the single stage and three trials; the fourth hangs.
    wait_for(lambda: count(a) == 5)
    survivor = start(b, config(database, "cpu:2-3"), 0.05)
    wait_for(lambda: b.exists() and count(b) >= 6)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(10)
    finish(survivor)
    at_b = load_records(b)
    assert len(keys(at_b)) == 6
    assert never_twice(b, a)
    assert any(record.role == "finalist" for record in at_b)
    # Whoever was killed goes on by a resume, and ends with all of it too.
    finish(start(a, config(database, "cpu:0-1", n_trials=7), 0.05, resume=True))
    at_a = load_records(a)
    assert len(keys(at_a)) == 7
    assert never_twice(a, b)
    assert set(keys(at_b)) <= set(keys(at_a))


def test_a_database_lost_on_the_way_ends_the_study_with_what_was_measured(
    tmp_path: Path, server: postgres.Server, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(database_module, "_RETRY_S", 0.05)
    lab = Lab()

    def fail(spec: RunSpec, number: int) -> Failure | None:
        if number == 3:
            server.stop()
        return None

    lab.fault = fail
    wanted = config(database, "cpu:0-1", n_trials=5, finalists=0)
    try:
        with (
            StudyStore.create(tmp_path / "a", wanted) as store,
            pytest.raises(StorageError, match=r"was lost: .*What was measured is kept"),
        ):
            run_study(store, Reporter(), start_fleet=lab.start)
    finally:
        server.start()
    before = load_records(tmp_path / "a")
    assert isinstance(before[-1].result, Measurement)
    assert len(trials(before)) == 3
    with StudyStore.resume(tmp_path / "a", wanted) as store:
        assert run_study(store, Reporter(), start_fleet=lab.start)
        assert store.records[: len(before)] == before
        assert len(trials(store.records)) == 5
    assert never_twice(tmp_path / "a")


def test_a_process_that_loses_a_device_twice_leaves_the_study_to_the_others(tmp_path: Path, database: str) -> None:
    lab, wanted = Lab(), config(database, "cpu:0-1", finalists=0)
    lab.fault = lambda spec, number: (
        failure(FailureKind.WORKER_DIED, device="cpu:1") if "cpu:1" in spec.plan.devices else None
    )
    with (
        StudyStore.create(tmp_path / "a", wanted) as store,
        pytest.raises(FleetError, match=r"cpu:1 was lost twice: .*the others of the shared study go on"),
    ):
        run_study(store, Reporter(), start_fleet=lab.start)
    assert not (tmp_path / "a/losses.json").exists()
    with StudyStore.create(tmp_path / "b", config(database, "cpu:2-3", finalists=0)) as store:
        assert run_study(store, Reporter(), start_fleet=Lab().start)
        ours = [record for record in trials(store.records) if record.source is None]
        assert any("cpu:3" in record.spec.plan.devices for record in ours if record.spec)


def test_a_study_is_collected_from_its_database_alone(
    tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, devices, n_trials in (("a", "cpu:0-1", 2), ("b", "cpu:2-3", 4)):
        wanted = config(database, devices, n_trials=n_trials, finalists=0)
        with StudyStore.create(tmp_path / folder, wanted) as store:
            assert run_study(store, Reporter(), start_fleet=Lab().start)
    out = tmp_path / "out"
    assert run(["collect", "nightly", "--storage", database, "-o", str(out), "--json"]) == 0
    found = trials(load_records(out))
    assert keys(found) == keys(load_records(tmp_path / "b"))
    assert {record.source_devices for record in found} == {("cpu:0", "cpu:1"), ("cpu:2", "cpu:3")}
    assert {device for record in found if record.spec for device in record.spec.plan.devices} <= {"cpu:0", "cpu:1"}
    assert json.loads(capsys.readouterr().out)["best"]["rank"] == 1
    assert database not in (out / "study.yaml").read_text(encoding="utf-8")
    monkeypatch.setenv("PIPETUNE_STORAGE", database)
    for name, place, message in (
        ("nightly", out, "holds a study already"),
        ("weekly", tmp_path / "new", "holds no shared study weekly; there are nightly"),
    ):
        assert run(["collect", name, "-o", str(place)]) == 2
        assert message in capsys.readouterr().err


def test_other_hardware_and_other_questions_are_refused_by_the_driver(tmp_path: Path, database: str) -> None:
    with StudyStore.create(tmp_path / "a", config(database, "cpu:0-1", n_trials=1, finalists=0)) as store:
        run_study(store, Reporter(), start_fleet=Lab().start)
    lab = Lab()
    lab.machine = _with_cores(lab.machine, 64)
    for folder, start_fleet, values, said in (
        ("b", lab.start, {}, "runs on other hardware"),
        ("c", Lab().start, {"objectives": ["mean_ttft_ms"]}, "asks something else"),
    ):
        with (
            StudyStore.create(tmp_path / folder, config(database, "cpu:2-3", **values)) as store,
            pytest.raises(StudyError, match=said),
        ):
            run_study(store, Reporter(), start_fleet=start_fleet)
        assert load_records(tmp_path / folder) == ()


def _with_cores(machine: Machine, cores: int) -> Machine:
    hardware = machine.hardware.model_copy(update={"cpu_cores": cores})
    return machine.model_copy(update={"hardware": hardware, "hardware_id": hardware.hardware_id})


@pytest.mark.e2e
def test_two_commands_share_a_study_on_real_workers(tmp_path: Path, database: str) -> None:
    model = save_tiny_model(tmp_path / "qwen3", "qwen3", 4)
    flags = (
        "--num-prompts 4 --input-len 8 --output-len 3 --num-iters 1 --num-iters-warmup 0 --baseline-batch-sizes 4 "
        "--micro-batch-sizes 1,2,4 --n-trials 4 --finalists 1 --finalist-rounds 1 --max-finalist-rounds 1 "
        "--no-stop-early --no-profile --no-progress --shared-study nightly"
    )
    common = ["--model", str(model), "--storage", database, *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, "-m", "pipetune", "tune", *common, "--devices", device, "-o", str(tmp_path / name)]
        for device, name in (("cpu:0", "a"), ("cpu:1", "b"))
    ]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
            for command in commands
        ]
        for process in running:
            stack.callback(process.kill)
        for process in running:
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said
    found = [load_records(tmp_path / name) for name in ("a", "b")]
    for records in found:
        assert len(trials(records)) == 4
        assert all(isinstance(record.result, Measurement) for record in trials(records))
    assert never_twice(tmp_path / "a", tmp_path / "b")
    assert sum(any(record.role == "finalist" for record in records) for records in found) == 1
