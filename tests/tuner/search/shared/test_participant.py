"""Several processes on one study in a real PostgreSQL: nothing twice, nothing lost, nobody who asks something else."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from pipetune.bench.errors import ConfigError, StorageError, StudyError
from pipetune.bench.record import Failure, FailureKind, Machine, Measurement
from pipetune.tuner.search import database as database_module
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.shared import participant as member
from pipetune.tuner.search.shared import shared_study
from pipetune.tuner.search.space.space import Point
from pipetune.tuner.study.files import load_records
from pipetune.tuner.study.store import StudyStore
from tests import postgres
from tests.record_factory import make_failure, make_machine
from tests.tuner.search.shared.members import POINTS, Process, config, join


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_study, "_POLL_S", 0.02)
    monkeypatch.setattr(database_module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(database_module, "_RETRY_S", 0.05)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "LEASE_S", 0.6)
    monkeypatch.setattr(member, "BEAT_S", 0.1)


def trials(process: Process) -> list[optuna.trial.FrozenTrial]:
    return process.study.trials()


def suggestion(process: Process) -> Point | None:
    tpe = TpePolicy(
        process.space, objectives=("output_throughput",), seed=process.member.seed, trials=process.study.trials
    )
    return tpe.suggest(lambda point: True)


def test_what_one_measures_the_other_has(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database, "cpu:2-3") as b:
        first = a.run(POINTS[0])
        second = b.run(POINTS[1])
        (at_b,) = b.study.pull(b.store)
        (at_a,) = a.study.pull(a.store)
        assert a.study.pull(a.store) == ()
        names = a.sharing()["name"], b.sharing()["name"]
    assert (first.trial_number, second.trial_number) == (0, 1)
    assert at_b.source == f"{names[0]}/{first.number:04}"
    assert at_a.source == f"{names[1]}/{second.number:04}"
    # The plan is the same plan, under the reader's names; where it ran stays known.
    assert at_b.spec is not None
    assert at_b.effective is not None
    assert at_b.spec.plan.devices == at_b.effective.plan.devices == ("cpu:2", "cpu:3")
    assert at_b.source_devices == ("cpu:0", "cpu:1")
    assert isinstance(at_b.result, Measurement)
    assert isinstance(first.result, Measurement)
    assert at_b.result.iterations == first.result.iterations
    assert {stage.device for stage in at_b.result.memory} == {"cpu:2", "cpu:3"}
    a_records, b_records = load_records(tmp_path / "a"), load_records(tmp_path / "b")
    assert [record.source is None for record in a_records] == [True, False]
    assert sorted(record.trial_number or 0 for record in b_records) == [0, 1]
    a_keys = {record.effective.key for record in a_records if record.effective}
    b_keys = {record.effective.key for record in b_records if record.effective}
    assert {key.replace("cpu:0", "cpu:2").replace("cpu:1", "cpu:3") for key in a_keys} == b_keys


def test_a_plan_that_another_runs_or_ran_is_not_started(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database, "cpu:2-3") as b:
        number = a.study.ask(POINTS[0])
        assert number == 0
        assert b.study.ask(POINTS[0]) is None
        b.study.pull(b.store)
        assert list(b.study.taken) == [POINTS[0]]
        a.study.tell(a.write(0, POINTS[0]))
        # Measured, and not pulled yet.
        assert b.study.ask(POINTS[0]) is None
        b.study.pull(b.store)
        assert list(b.study.taken) == []
        # Whoever knows the record may run the plan again on purpose.
        assert b.study.ask(POINTS[0]) == 1


def test_one_of_many_gets_a_plan(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database) as b, join(tmp_path / "c", database) as c:
        got: list[tuple[int, int | None]] = []

        def claim_all(process: Process) -> None:
            for index, point in enumerate(POINTS):
                number = process.claim(point)
                got.append((index, number))
                if number is not None:
                    process.study.tell(process.write(number, point))

        threads = [threading.Thread(target=claim_all, args=(process,)) for process in (a, b, c)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for process in (a, b, c):
            process.study.pull(process.store)
        counts = [sum(record.role == "trial" for record in process.store.records) for process in (a, b, c)]
    won = [(index, number) for index, number in got if number is not None]
    assert sorted(index for index, _ in won) == list(range(len(POINTS)))
    assert sorted(number for _, number in won) == list(range(len(POINTS)))
    assert counts == [len(POINTS)] * 3


@pytest.mark.usefixtures("short_lease")
def test_what_a_dead_process_had_taken_is_free_again(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "b", database, "cpu:2-3") as b:
        with join(tmp_path / "a", database) as a:
            assert a.study.ask(POINTS[0]) == 0
            a.vanish()
            b.study.pull(b.store)
            assert list(b.study.taken) == [POINTS[0]]
            assert b.study.ask(POINTS[0]) is None
            b.study.wait()
            assert b.study.ask(POINTS[0]) == 1
            b.study.tell(b.write(1, POINTS[0]))
            assert [trial.state for trial in trials(b)] == [TrialState.FAIL, TrialState.COMPLETE]
            # It was alive after all: what it measured counts too.
            a.study.tell(a.write(0, POINTS[0]))
        assert [record.source is None for record in b.store.records] == [True]
        (late,) = b.study.pull(b.store)
        assert late.trial_number == 2
        assert late.replicate_of == 0


@pytest.mark.usefixtures("short_lease")
def test_a_busy_process_keeps_what_it_has(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database, "cpu:2-3") as b:
        a.study.ask(POINTS[0])
        time.sleep(1.0)
        assert b.study.ask(POINTS[0]) is None


def test_a_process_that_ends_leaves_nothing_taken(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "b", database) as b:
        with join(tmp_path / "a", database) as a:
            a.study.ask(POINTS[0])
            b.study.pull(b.store)
        b.study.wait()
        assert b.study.ask(POINTS[0]) == 1


def test_seeds_and_numbers_are_each_ones_own_and_stay(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database) as b:
        mine, other = a.sharing(), b.sharing()
        assert (mine["process"], other["process"]) == (1, 2)
        assert (mine["seed"], other["seed"]) == (a.member.seed, b.member.seed)
        assert mine["seed"] != other["seed"]
        assert suggestion(a) != suggestion(b)
    with join(tmp_path / "a", database, resume=True) as a, join(tmp_path / "c", database) as c:
        assert a.sharing() == mine
        assert c.sharing()["process"] == 3


def test_a_copy_of_a_folder_cannot_join_beside_it(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database):
        shutil.copytree(tmp_path / "a", tmp_path / "copy")
        with pytest.raises(StudyError, match="a copy cannot join"), join(tmp_path / "copy", database, resume=True):
            pass


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"workload": {"num_prompts": 16}}, r"workload\.num_prompts: 32 → 16"),
        ({"objectives": ["mean_ttft_ms"]}, r"objectives: "),
        ({"objectives": ["mean_ttft_ms", "output_throughput"]}, r"objectives: "),
        ({"constraints": ["mean_ttft_ms<=5"]}, r"constraints: "),
        ({"space": {"max_stages": 2}}, r"space\.max_stages: null → 2"),
        ({"protocol": {"num_iters": 9}}, r"protocol\.num_iters: 3 → 9"),
        ({"devices": "cpu:0-2"}, r"devices: "),
        ({"model": {"name": "other"}}, r"model\.name: smollm2-135m → other"),
    ],
)
def test_who_asks_something_else_is_refused(tmp_path: Path, database: str, values: dict[str, Any], named: str) -> None:
    with join(tmp_path / "a", database):
        pass
    refused = pytest.raises(StudyError, match=f"shared study nightly asks something else(.|\n)*{named}")
    with refused, join(tmp_path / "b", database, **values):
        pass


def test_what_each_may_choose_is_no_other_question(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database, n_trials=3, seed=7, finalists=0) as b:
        assert a.space == b.space


@pytest.mark.parametrize("gpus", [2, None])
def test_other_hardware_is_refused(tmp_path: Path, database: str, gpus: int | None) -> None:
    machine = make_machine(gpus=gpus) if gpus else _with_cores(make_machine(), 8)
    with join(tmp_path / "a", database):
        pass
    with (
        pytest.raises(StudyError, match=r"runs on other hardware(.|\n)*hardware\.(gpus|cpu_cores): "),
        join(tmp_path / "b", database, machine=machine),
    ):
        pass


def _with_cores(machine: Machine, count: int) -> Machine:
    hardware = machine.hardware.model_copy(update={"cpu_cores": count})
    return machine.model_copy(update={"hardware": hardware, "hardware_id": hardware.hardware_id})


def test_a_folder_with_points_of_another_space_is_refused(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database):
        pass
    with join(tmp_path / "b", database, shared_study="other"):
        pass
    # It has no points yet, and takes the space of the study it joins.
    with join(tmp_path / "b", database, resume=True) as b:
        b.run(POINTS[0])
    with join(tmp_path / "c", database, shared_study="other") as c:
        c.run(POINTS[0])
    with pytest.raises(StudyError, match="searches another space"), join(tmp_path / "c", database, resume=True):
        pass


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_lost_database_is_rebuilt_from_the_folders(
    tmp_path: Path, server: postgres.Server, database: str, first: str
) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database, "cpu:2-3") as b:
        a.run(POINTS[0])
        b.run(POINTS[1])
        a.run(POINTS[2])
        b.study.pull(b.store)
        b.run(POINTS[3])
        last = a.study.ask(POINTS[4])
        assert last is not None
        a.write(last, POINTS[4])
    name = database.partition("@/")[2].partition("?")[0]
    server.drop_database(name)
    server.create_database(name)
    devices = {"a": "cpu:0-1", "b": "cpu:2-3"}
    second = "b" if first == "a" else "a"
    with (
        join(tmp_path / first, database, devices[first], resume=True) as x,
        join(tmp_path / second, database, devices[second], resume=True) as y,
    ):
        x.study.pull(x.store)
        y.study.pull(y.store)
        for process in (x, y):
            points = [tuple((record.params or {}).values()) for record in process.store.records]
            assert sorted(points) == sorted(tuple(point.values()) for point in POINTS[:5])
            assert process.claim(POINTS[0]) is None
            sources = [record.source for record in process.store.records if record.source]
            assert len(set(sources)) == len(sources)
        complete = [trial for trial in trials(x) if trial.state == TrialState.COMPLETE]
        assert sorted(tuple(trial.params.values()) for trial in complete) == sorted(
            tuple(point.values()) for point in POINTS[:5]
        )
        assert x.run(POINTS[5]).trial_number == len(trials(x)) - 1


def test_a_record_that_was_not_told_is_told_by_the_resume(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a:
        assert a.study.ask(POINTS[0]) == 0
        a.write(0, POINTS[0])
    with join(tmp_path / "a", database, resume=True) as a, join(tmp_path / "b", database) as b:
        assert [trial.state for trial in trials(a)] == [TrialState.COMPLETE]
        assert len(b.study.pull(b.store)) == 1
        assert a.study.ask(POINTS[1]) == 1
    with join(tmp_path / "a", database, resume=True) as a:
        (lost,) = a.study.restore(a.store.records)
        assert (lost.number, lost.params) == (1, POINTS[1])


def test_failures_travel_with_their_amounts(tmp_path: Path, database: str) -> None:
    failure = make_failure(FailureKind.OUT_OF_MEMORY).model_copy(
        update={"bytes_wanted": 300, "bytes_had": 200, "device": "cpu:1", "detail": "log of cpu:1"}
    )
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database, "cpu:2-3") as b:
        number = a.study.ask(POINTS[0])
        assert number is not None
        a.study.tell(a.write(number, POINTS[0], failure))
        (pulled,) = b.study.pull(b.store)
        assert trials(b)[0].state == TrialState.PRUNED
        assert trials(b)[0].constraints == {"memory": 0.5}
    assert isinstance(pulled.result, Failure)
    assert (pulled.result.device, pulled.result.detail) == ("cpu:3", "log of cpu:1")


def test_the_last_one_holds_the_finals(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database) as b:
        a.run(POINTS[0])
        assert "process 2 on" in str(a.member.claim_finals())
        assert "still searches: the finals are left to it" in str(a.member.claim_finals())
        assert b.member.claim_finals() is None
        assert "runs the finals" in str(a.member.claim_finals())
        b.member.finish_finals()
        assert "ran the finals" in str(a.member.claim_finals())
        # More was measured since: there is something to decide again, which is not done when b ends its own.
        a.run(POINTS[1])
        assert a.member.claim_finals() is None
        b.member.finish_finals()
        assert "runs the finals" in str(b.member.claim_finals())


@pytest.mark.usefixtures("short_lease")
def test_the_finals_of_a_dead_process_are_held_by_another(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database) as b:
        b.member.claim_finals()
        assert a.member.claim_finals() is None
        a.vanish()
        assert "runs the finals" in str(b.member.claim_finals())
        time.sleep(0.8)
        assert b.member.claim_finals() is None


def test_neighbours_on_the_same_cores_are_named(tmp_path: Path, database: str) -> None:
    with join(tmp_path / "a", database) as a, join(tmp_path / "b", database, "cpu:2-3") as b:
        assert a.said == []
        assert len(b.said) == 1
        assert "taskset" in b.said[0]


def test_a_database_that_is_lost_is_an_error_and_keeps_the_record(
    tmp_path: Path, server: postgres.Server, database: str
) -> None:
    with join(tmp_path / "a", database) as a:
        number = a.study.ask(POINTS[0])
        assert number is not None
        record = a.write(number, POINTS[0])
        server.stop()
        try:
            with pytest.raises(StorageError, match=r"was lost: .*(What was measured is kept)") as caught:
                a.study.tell(record)
            assert "sqlalche.me" not in str(caught.value)
        finally:
            server.start()
        # A short outage costs nothing.
        a.study.tell(record)
        assert trials(a)[0].state == TrialState.COMPLETE
    assert load_records(tmp_path / "a") == (record,)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"storage": None}, r"the processes meet in a database; give --storage postgresql://"),
        ({"storage": "sqlite:///x.db"}, r"sqlite:///x\.db cannot be shared"),
        ({"storage": "postgres//nonsense"}, r"storage: cannot be read as a URL"),
        ({"shared_study": "a/b"}, r"'a/b' is no study name"),
    ],
)
def test_a_study_that_cannot_be_shared_is_refused_before_it_begins(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    wanted = config("postgresql://h/d").model_copy(update=values)
    with pytest.raises(ConfigError, match=said):
        StudyStore.create(tmp_path / "s", wanted)
    assert not (tmp_path / "s").exists()


def test_an_unreachable_database_is_named_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql://me:hunter2@/d?host={tmp_path}"
    with (
        pytest.raises(StudyError, match=r"storage postgresql://me:\*\*\*@/d: cannot be used: connection") as caught,
        join(tmp_path / "a", url),
    ):
        pass
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in (tmp_path / "a/study.yaml").read_text(encoding="utf-8")
