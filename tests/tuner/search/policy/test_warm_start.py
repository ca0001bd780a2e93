"""What earlier studies give: lessons on the same machine, plans from anywhere, and a word on what cannot be used."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.errors import StudyError
from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Machine, Record
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.progress import Reporter
from pipetune.tuner.search.driver import rank_study, run_study
from pipetune.tuner.search.policy.warm_start import BEST_PLANS, WarmStart, point_of_plan, warm_start
from pipetune.tuner.study.store import StudyStore
from tests.record_factory import make_machine, make_shape
from tests.tuner.fake_fleet import Lab
from tests.tuner.search.space_factory import build

SPACE, COST, RESOLVE = build(2)


def config(**values: Any) -> TuneConfig:
    usual = {"n_trials": 5, "finalists": 0, "profile": False}
    return TuneConfig.model_validate({"model": {"name": "m"}, "devices": "cpu:0-1", **usual, **values})


def run(folder: Path, lab: Lab, wanted: TuneConfig, *, resume: bool = False) -> tuple[Record, ...]:
    with StudyStore.resume(folder, wanted) if resume else StudyStore.create(folder, wanted) as store:
        assert run_study(store, Reporter(), start_fleet=lab.start)
        return store.records


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "earlier"
    run(folder, Lab(), config())
    return folder


def read(earlier: Path, *, machine: Machine | None = None, shape: ModelShape | None = None, **values: Any) -> WarmStart:
    resolve = RESOLVE if shape is None else build(2, shape=shape)[2]
    wanted = config(warm_start=[str(earlier)], **values)
    with tempfile.TemporaryDirectory() as kept:
        path = Path(kept) / "warm_start.json"
        return warm_start(path, wanted, wanted.model, machine or make_machine(), SPACE, resolve)


def test_on_the_same_machine_runs_teach_and_the_best_plans_run_first(earlier: Path) -> None:
    found = read(earlier)
    assert len(found.prior) >= 5
    assert 1 <= len(found.first) <= BEST_PLANS
    assert "teach the cost model" in found.said[0]
    assert "run first, measured anew" in found.said[0]
    with StudyStore.resume(earlier, config()) as store:
        best = rank_study(store).best
    assert best is not None
    plan = SPACE.plan(found.first[0])
    assert (plan.layer_counts, plan.micro_batch_size, plan.replicas) == (
        best.plan.layer_counts,
        best.plan.micro_batch_size,
        best.plan.replicas,
    )


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"workload": {"output_len": 32}}, "their workload has output_len=16"),
        ({"workload": {"num_prompts": 16}}, "their workload has num_prompts=32"),
        ({"model": {"name": "m", "dtype": "bfloat16"}}, "they are of model.dtype=float32"),
        ({"devices": "cpu:2-3"}, "they are of cpu:0, cpu:1"),
    ],
)
def test_another_question_takes_the_plans_alone(earlier: Path, values: dict[str, Any], why: str) -> None:
    found = read(earlier, **values)
    assert found.first
    assert found.prior == ()
    assert f"its records teach nothing here: {why}" in found.said[0]


def test_another_machine_takes_the_plans_alone(earlier: Path) -> None:
    found = read(earlier, machine=make_machine(gpus=1))
    assert found.first
    assert found.prior == ()
    assert "other hardware" in found.said[0]


def test_another_model_takes_nothing_and_says_so(earlier: Path) -> None:
    shape = make_shape()
    found = read(earlier, shape=shape.model_copy(update={"layers": shape.layers[:24]}))
    assert (found.prior, found.first) == ((), ())
    assert "a model of another shape" in found.said[0]


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"warm_start: .*nowhere"):
        read(tmp_path / "nowhere")


def test_devices_stand_for_each_other_by_their_places() -> None:
    point = next(SPACE.points())
    plan = SPACE.plan(point)
    names = {"cpu:0": "cuda:3", "cpu:1": "cuda:5"}
    stages = tuple(stage.model_copy(update={"device": names[stage.device]}) for stage in plan.stages)
    rows = tuple(tuple(names[device] for device in row) for row in plan.replica_devices)
    moved = plan.model_copy(update={"stages": stages, "replica_devices": rows})
    found = point_of_plan(SPACE, RESOLVE, moved, ("cuda:3", "cuda:5"))
    assert found is not None
    assert SPACE.plan(found).layer_counts == plan.layer_counts
    assert SPACE.plan(found).devices == plan.devices
    assert point_of_plan(SPACE, RESOLVE, moved, ("cuda:1", "cuda:2", "cuda:3", "cuda:5")) is None


def test_a_study_begins_warm_and_a_resume_needs_the_earlier_one_no_more(earlier: Path, tmp_path: Path) -> None:
    lab, wanted = Lab(), config(warm_start=[str(earlier)], n_trials=4)
    records = run(tmp_path / "s", lab, wanted)
    kept = WarmStart.model_validate_json((tmp_path / "s/warm_start.json").read_bytes())
    trials = [record for record in records if record.role == "trial"]
    assert [record.params for record in trials[: len(kept.first)]] == list(kept.first)
    earlier.rename(earlier.with_name("gone"))
    try:
        more = run(tmp_path / "s", lab, wanted.model_copy(update={"n_trials": 5}), resume=True)
    finally:
        earlier.with_name("gone").rename(earlier)
    assert more[: len(records)] == records
