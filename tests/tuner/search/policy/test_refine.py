"""Partitions beyond the list: what a refit likes, as points that mean the same for ever and that Optuna takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.profile import TaskKind
from pipetune.bench.record import Record
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.policy.refine import Refiner
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.space.space import candidates
from pipetune.tuner.study.search_log import Proposal
from tests.evaluation.search.landscape import all_partitions
from tests.record_factory import make_measurement, make_record
from tests.tuner.search.simulated_study import make_strategy
from tests.tuner.search.space_factory import SHAPE, build

SPACE, COST, RESOLVE = build(4, min_stages=4, max_stages=4, replicas=(1,))
LISTED = set(SPACE.partitions)
SPLITTER = Refiner(SPACE, RESOLVE)
PARTITIONS = list(all_partitions(SHAPE.num_layers, min_stages=4, max_stages=4))


class SlowFirst:
    """The first device takes four times as long as was thought."""

    def __init__(self, known: Costs) -> None:
        self._known = known

    def layers_s(self, device: str, kind: TaskKind):  # type: ignore[no-untyped-def]
        return self._known.layers_s(device, kind) * (4.0 if device == "cpu:0" else 1.0)

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        return self._known.ends_s(device, kind, is_first=is_first, is_last=is_last)

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        return self._known.hop_s(source, target, num_bytes)


@given(index=st.integers(0, len(PARTITIONS) - 1))
def test_a_point_may_stand_for_any_partition(index: int) -> None:
    partition = PARTITIONS[index]
    start = next(SPACE.points())
    point = SPLITTER.point(start, partition)
    plan = SPACE.plan(point)
    assert plan.layer_counts == partition
    assert plan.micro_batch_size == SPACE.plan(start).micro_batch_size
    assert ("cut_1" in point) == (partition not in LISTED)
    # From there back to a listed one: nothing of the cuts is left.
    assert SPLITTER.point(point, SPACE.partitions[0]) == {**start, "partition_rank": 1}


def test_what_the_space_does_not_list_is_found_when_devices_turn_out_unlike() -> None:
    slow = dataclasses.replace(COST, costs=SlowFirst(COST.costs))
    start = candidates(SPACE, RESOLVE)[0]
    found = list(SPLITTER.best(start, slow, limit=10))
    assert found
    assert not SPLITTER.is_whole(start)
    assert all(isinstance(one.effective, EffectivePlan) for one in found)
    best = found[0].effective.plan
    assert best.layer_counts not in LISTED
    assert best.layer_counts[0] <= 3
    alike = [one for one in candidates(SPACE, RESOLVE) if SPLITTER.class_of(one) == SPLITTER.class_of(start)]
    listed = min(slow.predict(one.effective.plan).duration_s for one in alike)
    assert min(slow.predict(one.effective.plan).duration_s for one in found) < listed


def test_a_space_that_lists_all_needs_no_more() -> None:
    space, _, resolve = build(2, min_stages=2, replicas=(1,))
    splitter = Refiner(space, resolve)
    assert all(splitter.is_whole(one) for one in candidates(space, resolve))


@pytest.mark.slow
def test_a_search_leaves_the_list_when_a_device_is_slower_than_was_thought(tmp_path: Path) -> None:
    strategy = make_strategy((SPACE, COST, RESOLVE), n_trials=8)
    study = open_study(tmp_path)
    records: list[Record] = []
    counts = []
    for number in range(4):
        step = strategy.next(records)
        assert isinstance(step, Proposal)
        plan = SPACE.plan(step.point)
        counts.append(plan.layer_counts)
        assert study.ask(step.point) == number
        run = make_measurement(plan, seed=number, hop_s=1e-3, slow={"cpu:0": 4.0})
        record = make_record(number, "trial", plan, run, trial_number=number)
        records.append(record.model_copy(update={"params": dict(step.point), "effective": RESOLVE(plan)}))
        study.tell(records[-1])
    assert counts[0] in LISTED
    assert min(own[0] for own in counts) <= 4 < counts[0][0]
    tpe = TpePolicy(SPACE, objectives=("output_throughput",), seed=0, trials=study.trials)
    assert tpe.suggest(lambda point: True) is not None
    study.close()
    (tmp_path / "s.db").unlink()
    # The database is rebuilt from records whose points carry cuts.
    study = open_study(tmp_path)
    assert study.restore(records) == ()
    study.close()


def open_study(folder: Path) -> OptunaStudy:
    url = f"sqlite:///{folder / 's.db'}"
    return OptunaStudy.open(url, SPACE, objectives=("output_throughput",), constraints=())
