"""A device that is lost twice: the study goes on over those that are left, or stops; records and reports say which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.errors import FleetError
from pipetune.bench.record import Failure, FailureKind, Measurement, Record
from pipetune.bench.spec import RunSpec
from pipetune.tuner.commands.conclude import conclude, document
from pipetune.tuner.progress import Reporter
from pipetune.tuner.report.data import Report
from pipetune.tuner.search.driver import rank_study, run_study
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import load_study, read, read_config
from pipetune.tuner.study.losses import Losses
from pipetune.tuner.study.store import StudyStore
from tests.tuner.fake_fleet import Lab, failure
from tests.tuner.search.test_driver import config

THREE = ("cpu:0", "cpu:1", "cpu:2")


class Told(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def loses(*devices: str, kind: FailureKind = FailureKind.WORKER_DIED, after: int = 0) -> Callable[..., Failure | None]:
    """A fault of every plan that uses one of these devices, once so many plans were asked for."""

    def fault(spec: RunSpec, number: int) -> Failure | None:
        lost = next((device for device in devices if device in spec.plan.devices), None)
        return failure(kind, device=lost) if lost and number >= after else None

    return fault


def study(folder: Path, lab: Lab, *, resume: bool = False, **values: Any) -> tuple[tuple[Record, ...], list[str]]:
    wanted, told = config(**{"devices": ",".join(THREE), **values}), Told()
    with StudyStore.resume(folder, wanted) if resume else StudyStore.create(folder, wanted) as store:
        assert run_study(store, told, start_fleet=lab.start)
        return store.records, told.said


def losing(*devices: str, **values: Any) -> Lab:
    lab = Lab()
    lab.fault = loses(*devices, **values)
    return lab


def test_a_study_goes_on_without_a_device_that_was_lost_twice(tmp_path: Path) -> None:
    lab = losing("cpu:2")
    records, said = study(tmp_path / "s", lab, finalists=1)
    lost = [record for record in records if isinstance(record.result, Failure)]
    # Once, and again on new workers.
    assert [record.number for record in lost] == [lost[0].number, lost[0].number + 1]
    assert lost[0].params == lost[1].params
    (loss,) = read(tmp_path / "s/losses.json", Losses).losses
    assert (loss.device, loss.devices, loss.left) == ("cpu:2", THREE, THREE[:2])
    assert loss.first_record == lost[1].number + 1
    assert loss.failure == lost[1].result
    assert any("cpu:2 was lost twice" in text and "to cpu:0, cpu:1" in text for text in said)
    after = records[loss.first_record :]
    assert list(dict.fromkeys(record.role for record in after)) == ["baseline", "single_stage", "trial", "finalist"]
    assert not any("cpu:2" in record.spec.plan.devices for record in after if record.spec)
    assert sum(record.role == "trial" for record in after) == 5
    # The count of trials goes on, and every set of devices has a space of its own.
    numbers = [record.trial_number for record in records if record.role == "trial"]
    assert numbers == list(range(len(numbers)))
    assert read(tmp_path / "s/space.json", SearchSpace).devices == THREE
    assert read(tmp_path / "s/space-2.json", SearchSpace).devices == THREE[:2]
    assert load_study(tmp_path / "s").records == after


def test_reports_say_on_which_devices_a_degraded_study_ran(tmp_path: Path) -> None:
    # Plans on all devices worked before, and would win.
    study(tmp_path / "s", losing("cpu:2", after=5), n_trials=8)
    contents = load_study(tmp_path / "s")
    report = Report.of(contents)
    assert contents.config.concrete_devices == THREE[:2]
    assert read_config(tmp_path / "s").concrete_devices == THREE
    first = contents.losses.first_record
    ranking = report.ranking
    assert ranking.best is not None
    assert ranking.baseline is not None
    used = [number for row in (*ranking.rows, ranking.baseline) for number in row.records]
    assert min(used) >= first
    marked = [row for row in ranking.unranked if min(row.records) < first]
    assert any("cpu:2" in row.plan.devices for row in marked)
    for row in marked:
        assert row.unranked_because == "ran on cpu:0, cpu:1, cpu:2, before cpu:2 was lost"
        assert (row.rank, row.speedup_over_baseline, row.in_finals) == (None, None, False)
    assert [row.record for row in ranking.failures] == [first - 2, first - 1]
    conclude(tmp_path / "s", lambda report: 0)
    told = f"cpu:2 was lost twice: the study is degraded from {', '.join(THREE)} to cpu:0, cpu:1 from record {first:04}"
    for name in ("ranking.md", "report.html"):
        text = " ".join((tmp_path / "s" / name).read_text(encoding="utf-8").split())
        assert told in text
        assert "before cpu:2 was lost" in text
    assert json.loads((tmp_path / "s/best_plan.json").read_bytes())["devices"] == ["cpu:0", "cpu:1"]
    values = document(report)
    assert values["devices"] == ["cpu:0", "cpu:1"]
    assert [(loss["device"], loss["first_record"]) for loss in values["losses"]] == [("cpu:2", first)]


def test_a_degraded_study_is_gone_on_with_over_the_devices_left(tmp_path: Path) -> None:
    lab = losing("cpu:2")
    records, _ = study(tmp_path / "s", lab, finalists=0)
    fleets = Lab()
    again, said = study(tmp_path / "s", fleets, resume=True, n_trials=7, finalists=0)
    assert again[: len(records)] == records
    added = [record for record in again[len(records) :] if record.role == "trial"]
    assert len(added) == 2
    assert not any("cpu:2" in record.spec.plan.devices for record in added if record.spec)
    assert any("cpu:2 was lost twice" in text for text in said)
    # Without its database as well.
    (tmp_path / "s/study.db").unlink()
    assert study(tmp_path / "s", fleets, resume=True, n_trials=7, finalists=0)[0] == again


def test_a_study_that_shall_stop_names_the_device_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"^cpu:2 was lost twice: made worker_hung; .*--on-device-loss degrade") as e:
        study(tmp_path / "s", losing("cpu:2", kind=FailureKind.WORKER_HUNG), on_device_loss="stop")
    assert e.value.exit_code == 4
    kept = load_study(tmp_path / "s").records
    assert any(isinstance(record.result, Measurement) for record in kept)
    records, _ = study(tmp_path / "s", losing("cpu:2"), resume=True, on_device_loss="degrade", n_trials=2)
    assert records[: len(kept)] == kept
    assert load_study(tmp_path / "s").config.concrete_devices == THREE[:2]


@pytest.mark.parametrize(("space", "says"), [({}, "no device is left"), ({"min_stages": 2}, "1 of the 2 devices")])
def test_a_study_with_too_few_devices_left_ends_and_keeps_its_records(
    space: dict[str, int], says: str, tmp_path: Path
) -> None:
    with pytest.raises(FleetError, match=says):
        study(tmp_path / "s", losing(*THREE), space=space)
    contents = load_study(tmp_path / "s")
    assert contents.earlier
    assert {loss.device for loss in contents.losses.losses} < set(THREE)


def test_a_study_ends_once_host0_has_no_device_left(tmp_path: Path) -> None:
    """Its reference is there, and the first of the other hosts would look for it on its own disk."""
    lab = losing("host0/cpu:0")
    lost = "^host0/cpu:0 was lost twice: .* no device of host0 is left, where the reference is kept: what was measured"
    with pytest.raises(FleetError, match=lost):
        study(tmp_path / "s", lab, devices="host0/cpu:0,host1/cpu:0,host1/cpu:1")
    assert load_study(tmp_path / "s").records
    other = losing("host1/cpu:0")
    study(tmp_path / "other", other, devices="host0/cpu:0,host1/cpu:0", finalists=0, space={"min_stages": 1})
    assert load_study(tmp_path / "other").config.concrete_devices == ("host0/cpu:0",)


def test_a_fleet_that_cannot_start_is_started_again_and_then_without_its_device(tmp_path: Path) -> None:
    lab, broken = Lab(), Lab()

    def start(model: Any, devices: tuple[str, ...], **options: Any) -> Any:
        broken.starts += 1
        if "cpu:1" in devices:
            raise FleetError(Failure(kind=FailureKind.WORKER_ERROR, message="no", device="cpu:1", phase="start"))
        return lab.start(model, devices, **options)

    wanted = config(devices=",".join(THREE), n_trials=2)
    with StudyStore.create(tmp_path / "s", wanted) as store:
        assert run_study(store, Reporter(), start_fleet=start)
        assert store.config.concrete_devices == ("cpu:0", "cpu:2")
        assert rank_study(store).best is not None
    assert broken.starts == lab.starts + 2


def test_where_no_device_ever_starts_none_is_struck_off(tmp_path: Path) -> None:
    def start(model: Any, devices: tuple[str, ...], **options: Any) -> Any:
        raise FleetError(failure(FailureKind.WORKER_DIED, device=devices[0]))

    with (
        StudyStore.create(tmp_path / "s", config(devices=",".join(THREE))) as store,
        pytest.raises(FleetError, match="no device is left"),
    ):
        run_study(store, Reporter(), start_fleet=start)
    assert not (tmp_path / "s/losses.json").exists()


def test_losses_that_are_not_of_one_device_in_a_row_strike_none_off(tmp_path: Path) -> None:
    lab, turn = Lab(), iter(["cpu:1", None, "cpu:2", None])
    lab.fault = lambda spec, number: (
        failure(FailureKind.WORKER_DIED, device=lost) if number and (lost := next(turn, None)) else None
    )
    study(tmp_path / "s", lab, finalists=0)
    assert not (tmp_path / "s/losses.json").exists()
