"""Optuna as it is used: every constraint told, infeasible is not failed, and the database is only a copy."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from pipetune.bench.errors import StudyError
from pipetune.bench.record import FailureKind, Outcome, Record
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.config.storage_url import sqlite_path, sqlite_url
from pipetune.tuner.search.database import naming_losses
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.space.space import Point, SearchSpace
from tests.disks import fill, small_disk
from tests.record_factory import make_failure, make_measurement, make_plan, make_record
from tests.tuner.search.space_factory import build

SPACE = build()[0]
LIMITS = (Constraint.model_validate("p90_ttft_ms<=2000"), Constraint.model_validate("bubble_ratio<=0.9"))


said: list[str] = []


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def open_(url: str, space: SearchSpace = SPACE, objectives: tuple[str, ...] = ("output_throughput",)) -> OptunaStudy:
    return OptunaStudy.open(url, space, objectives=objectives, constraints=LIMITS, say=said.append, is_own=True)


@pytest.fixture
def study(url: str) -> Iterator[OptunaStudy]:
    opened = open_(url)
    yield opened
    opened.close()


def trials(url: str) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(url)
    found = optuna.load_study(study_name=None, storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    return found


def record(number: int | None, point: Point, result: Outcome | None = None) -> Record:
    assert number is not None
    plan = SPACE.plan(point)
    made = make_record(number, "trial", plan, result or make_measurement(plan), trial_number=number)
    return made.model_copy(update={"params": dict(point)})


POINTS: list[Point] = [{"partition_rank": 1 + i, "micro_batch_index": 4, "prefill_index": i % 5} for i in range(6)]


def test_a_measured_plan_is_complete_with_every_constraint(study: OptunaStudy, url: str) -> None:
    for index, point in enumerate(POINTS):
        assert study.ask(point) == index
        study.tell(record(index, point))
    found = trials(url)
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 6
    assert [trial.params for trial in found] == POINTS
    for trial in found:
        assert set(trial.constraints) == {"memory", "p90_ttft_ms<=2000", "bubble_ratio<=0.9"}
        assert trial.constraints["memory"] == 0
        assert trial.value is not None
        assert trial.value > 0


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (FailureKind.OUT_OF_MEMORY, TrialState.PRUNED),
        (FailureKind.OVER_MEMORY_CAP, TrialState.PRUNED),
        (FailureKind.WORKER_DIED, TrialState.FAIL),
        (FailureKind.WRONG_OUTPUT, TrialState.FAIL),
        (FailureKind.INTERRUPTED, TrialState.FAIL),
    ],
)
def test_infeasible_is_pruned_with_an_amount_and_broken_is_failed(
    study: OptunaStudy, url: str, kind: FailureKind, state: TrialState
) -> None:
    failure = make_failure(kind).model_copy(update={"bytes_wanted": 300, "bytes_had": 200})
    study.tell(record(study.ask(POINTS[0]), POINTS[0], failure))
    (trial,) = trials(url)
    assert trial.state == state
    amounts = {"memory": 0.5, "p90_ttft_ms<=2000": 0.0, "bubble_ratio<=0.9": 0.0}
    assert trial.constraints == (amounts if state == TrialState.PRUNED else {})


def test_a_study_can_be_read_by_others(url: str) -> None:
    with contextlib.closing(
        OptunaStudy.open(url, SPACE, objectives=("output_throughput",), constraints=(), name="night")
    ) as study:
        number = study.ask(next(SPACE.points()))
        assert number == 0
        study.note_best(make_record(0, "trial", make_plan(), make_measurement(make_plan()), trial_number=0))
    (name,) = optuna.get_all_study_names(url)
    assert name == f"night-{SPACE.study_id}"
    theirs = optuna.load_study(study_name=name, storage=url)
    assert theirs.metric_names == ["output_throughput"]
    assert theirs.user_attrs == {"best_trial": 0, "best_plan": make_plan().describe()}
    plan = SPACE.plan(next(SPACE.points()))
    told = theirs.trials[0].user_attrs
    assert (told["plan"], told["layer_counts"], told["replicas"]) == (
        plan.describe(),
        [*plan.layer_counts],
        plan.replicas,
    )
    # Under another name, as after its folder was renamed, it is the same study.
    OptunaStudy.open(url, SPACE, objectives=("output_throughput",), constraints=(), name="day").close()
    assert optuna.get_all_study_names(url) == [name]


def test_what_was_not_told_is_told_and_what_has_no_record_is_returned(study: OptunaStudy, url: str) -> None:
    for point in POINTS[:3]:
        study.ask(point)
    records = [record(0, POINTS[0]), record(1, POINTS[1], make_failure())]
    open_trials = study.restore(records)
    assert [trial.number for trial in open_trials] == [2]
    assert open_trials[0].params == POINTS[2]
    assert [trial.state for trial in trials(url)] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING]


@pytest.mark.parametrize("damage", ["lost", "torn"])
def test_a_database_is_rebuilt_from_the_records(url: str, damage: str) -> None:
    path = Path(url.removeprefix("sqlite:///"))
    said.clear()
    first = open_(url)
    records = [
        record(first.ask(point), point, make_failure(FailureKind.OUT_OF_MEMORY) if index == 1 else None)
        for index, point in enumerate(POINTS)
    ]
    for one in records:
        first.tell(one)
    first.close()
    before = [(trial.number, trial.state, trial.params, trial.values, trial.constraints) for trial in trials(url)]
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:3000] + b"\xff" * 500)
    second = open_(url)
    assert second.restore(records) == ()
    second.close()
    after = [(trial.number, trial.state, trial.params, trial.values, trial.constraints) for trial in trials(url)]
    assert after == before
    assert path.with_name("study.db.broken").exists() == (damage == "torn")
    assert [text for text in said if "study.db.broken" in text] == said
    assert bool(said) == (damage == "torn")


@pytest.mark.parametrize("content", ["tables", "text", "torn"])
def test_a_database_that_is_not_the_studys_own_stays_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "customers.db"
    if content == "tables":
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE studies (customer TEXT)")
            connection.execute("CREATE TABLE version_info (shoe_size INTEGER)")
    elif content == "text":
        path.write_text("no database at all, but somebody's notes\n" * 50)
    else:
        open_(f"sqlite:///{path}").close()
        path.write_bytes(path.read_bytes()[:3000] + b"\xff" * 500)
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"customers\.db") as caught:
        OptunaStudy.open(f"sqlite:///{path}", SPACE, objectives=("output_throughput",), constraints=())
    assert "another" in str(caught.value)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("state", ["tables", "busy"])
def test_a_database_of_ours_is_only_set_aside_when_it_is_damaged(
    url: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipetune.tuner.search.database.LOCKED_S", 0.5)
    path = Path(url.removeprefix("sqlite:///"))
    holder = sqlite3.connect(path)
    if state == "tables":
        holder.execute("CREATE TABLE studies (customer TEXT)")
        holder.commit()
    else:
        open_(url).close()
        holder.execute("BEGIN EXCLUSIVE")
    before = path.read_bytes()
    said.clear()
    with pytest.raises(StudyError, match=r"study\.db"):
        open_(url)
    holder.close()
    assert path.read_bytes() == before
    assert [text for text in said if "broken" in text] == []
    assert not path.with_name("study.db.broken").exists()


@pytest.mark.parametrize("state", ["busy", "killed", "wal", "view"])
def test_a_database_of_another_program_is_known_in_any_state(tmp_path: Path, state: str) -> None:
    path = tmp_path / "customers.db"
    holder = sqlite3.connect(path)
    if state == "wal":
        holder.execute("PRAGMA journal_mode=WAL")
    holder.execute("CREATE VIEW customers AS SELECT 1" if state == "view" else "CREATE TABLE customers (name TEXT)")
    holder.commit()
    if state == "busy":
        holder.execute("BEGIN EXCLUSIVE")
    elif state == "killed":
        holder.execute("PRAGMA cache_size=1")
        holder.executemany("INSERT INTO customers VALUES (?)", [("x" * 200,)] * 3000)
    if state != "busy":
        # What a writer leaves that is killed: its journal among them.
        left = {one: one.read_bytes() for one in tmp_path.iterdir()} if state == "killed" else {}
        holder.close()
        for one, content in left.items():
            one.write_bytes(content)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    assert ("customers.db-journal" in before) == (state == "killed")
    with pytest.raises(StudyError, match=r"customers\.db: holds tables of another program \(customers\)"):
        OptunaStudy.open(f"sqlite:///{path}", SPACE, objectives=("output_throughput",), constraints=())
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before
    holder.close()


def test_a_second_damaged_database_does_not_replace_the_first(url: str) -> None:
    path = Path(url.removeprefix("sqlite:///"))
    for content in (b"A" * 5000, b"B" * 5000):
        path.write_bytes(content)
        open_(url).close()
    assert path.with_name("study.db.broken").read_bytes() == b"A" * 5000
    assert path.with_name("study.db.broken-2").read_bytes() == b"B" * 5000


def test_a_rebuilt_database_keeps_trial_numbers_over_gaps(study: OptunaStudy, url: str) -> None:
    study.restore([record(2, POINTS[2])])
    assert [trial.state for trial in trials(url)] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]


def test_several_objectives_have_directions_of_their_own(url: str) -> None:
    opened = open_(url, objectives=("output_throughput", "mean_ttft_ms"))
    for point in POINTS:
        opened.tell(record(opened.ask(point), point))
    tpe = TpePolicy(SPACE, objectives=("output_throughput", "mean_ttft_ms"), seed=0, trials=opened.trials)
    assert tpe.suggest(lambda point: point not in POINTS) is not None
    opened.close()
    storage = optuna.storages.RDBStorage(url)
    loaded = optuna.load_study(study_name=None, storage=storage)
    assert [direction.name for direction in loaded.directions] == ["MAXIMIZE", "MINIMIZE"]
    storage.remove_session()
    storage.engine.dispose()


def test_a_foreign_database_that_fails_is_named_without_its_password() -> None:
    with pytest.raises(StudyError) as caught:
        open_("nosuchdialect://user:secret@host/db")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["a {b} c", "run?1", "run#1", "a%20b", "a@b:c", "file:x?mode=memory"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "study.db"
    path.parent.mkdir()
    opened = open_(sqlite_url(path))
    assert opened.ask(POINTS[0]) == 0
    opened.close()
    assert path.exists()
    assert sqlite_path(sqlite_url(path)) == path
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_the_database_is_whole_after_every_step(study: OptunaStudy, url: str) -> None:
    study.tell(record(study.ask(POINTS[0]), POINTS[0]))
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    connection.close()


HOLDER = """
import sqlite3, sys
holder = sqlite3.connect(sys.argv[1], isolation_level=None)
holder.execute(sys.argv[2])
holder.execute("SELECT count(*) FROM trials").fetchone()
print("held", flush=True)
input()
"""


@contextlib.contextmanager
def held(url: str, how: str) -> Iterator[subprocess.Popen[str]]:
    """Another program that holds the database until it is told something."""
    command = [sys.executable, "-c", HOLDER, url.removeprefix("sqlite:///"), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


@pytest.mark.parametrize("how", ["BEGIN EXCLUSIVE", "BEGIN IMMEDIATE", "BEGIN"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "user's"])
def test_a_database_that_another_program_holds_is_waited_for(url: str, how: str, own: bool) -> None:
    open_(url).close()
    said.clear()
    with held(url, how) as holder, ThreadPoolExecutor() as pool:
        assert holder.stdin is not None

        def release(text: str) -> None:
            said.append(text)
            pool.submit(holder.communicate, "go\n")

        study = OptunaStudy.open(url, SPACE, objectives=("output_throughput",), constraints=(), say=release, is_own=own)
        for index, point in enumerate(POINTS[:2]):
            assert study.ask(point) == index
            study.tell(record(index, point))
        study.close()
    assert said == [f"{url.removeprefix('sqlite:///')}: another program holds it; it is waited for, up to 600 s"]
    assert [trial.state for trial in trials(url)] == [TrialState.COMPLETE] * 2


def test_a_database_that_stays_held_is_named_and_loses_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipetune.tuner.search.database.LOCKED_S", 0.5)
    study = open_(url)
    number = study.ask(POINTS[0])
    with held(url, "BEGIN EXCLUSIVE"):
        with pytest.raises(OSError, match="database is locked") as caught, naming_losses(url):
            study.tell(record(number, POINTS[0]))
        assert caught.value.filename == url.removeprefix("sqlite:///")
        with pytest.raises(StudyError, match="database is locked"):
            open_(url)
    study.tell(record(number, POINTS[0]))
    study.close()
    assert [trial.state for trial in trials(url)] == [TrialState.COMPLETE]


def test_a_database_on_a_full_disk_is_named_and_goes_on_with_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        url = f"sqlite:///{disk / 'study.db'}"
        study = open_(url)
        number = study.ask(POINTS[0])
        filler = fill(disk)
        with pytest.raises(OSError, match="disk") as caught, naming_losses(url):
            study.tell(record(number, POINTS[0]))
        assert caught.value.filename == str(disk / "study.db")
        filler.unlink()
        study.tell(record(number, POINTS[0]))
        study.close()
        assert [trial.state for trial in trials(url)] == [TrialState.COMPLETE]
