"""A landscape really measured on a tiny model: interrupted, gone on with, packed, read back; and its torn last line."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Measurement, Telemetry
from pipetune.bench.spec import ModelSpec, Protocol, Workload
from tests.evaluation.search.landscape import LandscapeFolder, LandscapeSpec, cell_of, is_undisturbed, usable_runs
from tests.evaluation.search.measure import measure_landscape, profile_landscape
from tests.evaluation.search.methods import OURS
from tests.evaluation.search.replay import search
from tests.evaluation.search.world import MeasuredWorld
from tests.tiny_models import save_tiny_model

DEVICES = ("cpu:0", "cpu:1")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> LandscapeSpec:
    model = save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", num_layers=4)
    return LandscapeSpec(
        name="tiny",
        about="a tiny llama",
        model=ModelSpec(name=str(model)),
        workload=Workload(num_prompts=4, input_len=6, output_len=3),
        device_orders=(DEVICES,),
        micro_batch_sizes=(2, 4),
        protocol=Protocol(num_iters=1, num_iters_warmup=0),
        repeats=2,
        near=0.9,
        near_repeats=3,
    )


@pytest.fixture(scope="module")
def folder(spec: LandscapeSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landscapes") / "tiny"
    assert not measure_landscape(spec, folder, timeout_s=0.0, say=print)
    assert measure_landscape(spec, folder, timeout_s=600.0, most_visits=1, say=print)
    profile_landscape(spec, folder, say=print)
    return folder


def test_every_plan_is_measured_in_every_repeat_and_checked_in_the_first(spec: LandscapeSpec, folder: Path) -> None:
    files = LandscapeFolder(folder)
    records = files.records()
    assert files.is_complete
    assert not (folder / "runs.jsonl").exists()
    cells = {cell_of(record) for record in records}
    assert {(cell, repeat) for cell in range(6) for repeat in range(2)} <= cells
    assert {repeat for _, repeat in cells} == {0, 1, 2}
    assert {record.spec.plan for record in records if record.spec} == set(spec.plans(files.read().shape))
    assert all(isinstance(record.result, Measurement) for record in records)
    firsts = collections.Counter(
        record.result.check is not None
        for record in records
        if isinstance(record.result, Measurement) and cell_of(record)[1] == 0
    )
    assert set(firsts) == {True}
    orders = [[cell_of(record)[0] for record in records if cell_of(record)[1] == repeat] for repeat in range(2)]
    assert orders[0] != sorted(orders[0]) or orders[1] != sorted(orders[1])


def test_a_complete_landscape_is_a_world_that_can_be_searched(folder: Path) -> None:
    world = MeasuredWorld(folder)
    assert world.num_plans == 6
    assert world.auto_counts is not None
    assert sum(world.auto_counts) == 4
    for method in (OURS, "TPE, default", 'device_map="auto", sizes swept'):
        curve = search(world, method, seed=3, budget=6)
        assert curve.scores
        assert all(score > 0 for score in curve.scores)
        assert list(curve.device_seconds) == sorted(curve.device_seconds)
    ours = search(world, OURS, seed=3, budget=6)
    assert ours == search(world, OURS, seed=3, budget=6)
    assert ours.device_seconds[0] > world.profile_s


def test_a_disturbed_run_gives_way_to_a_quiet_one(folder: Path) -> None:
    records = LandscapeFolder(folder).records()
    first = records[0]
    assert isinstance(first.result, Measurement)
    assert first.effective is not None
    noisy = first.model_copy(
        update={"result": first.result.model_copy(update={"telemetry": Telemetry(disturbances=("somebody else",))})}
    )
    quiet = first.model_copy(update={"result": first.result.model_copy(update={"telemetry": Telemetry()})})
    assert not is_undisturbed(noisy)
    assert is_undisturbed(quiet)
    cell, repeat = cell_of(first)
    for order in ((noisy, quiet), (quiet, noisy)):
        chosen = usable_runs((*order, *records[1:]))
        assert chosen[cell][repeat] is quiet


def test_a_complete_landscape_that_is_to_be_finer_goes_on(spec: LandscapeSpec, folder: Path, tmp_path: Path) -> None:
    there = LandscapeFolder(folder)
    fewer = LandscapeFolder(tmp_path)
    fewer.begin(there.read())
    fewer.pack([record for record in there.records() if cell_of(record)[1] < 2])
    assert measure_landscape(spec, tmp_path, timeout_s=600.0, most_visits=1, say=print)
    assert fewer.is_complete
    assert any(cell_of(record)[1] == 2 for record in fewer.records())


def test_a_torn_last_line_is_not_read_and_the_next_run_stands_on_its_own_line(folder: Path, tmp_path: Path) -> None:
    record = LandscapeFolder(folder).records()[0]
    files = LandscapeFolder(tmp_path)
    files.append(record)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"number": 1, "ro')
    assert files.records() == (record,)
    files.append(record)
    assert files.records() == (record, record)


def test_another_question_is_refused(spec: LandscapeSpec, folder: Path) -> None:
    files = LandscapeFolder(folder)
    other = files.read().model_copy(update={"spec": spec.model_copy(update={"seed": 7})})
    with pytest.raises(StudyError, match="another question"):
        files.begin(other)
    with pytest.raises(StudyError, match="holds no landscape"):
        LandscapeFolder(folder / "nowhere").read()
