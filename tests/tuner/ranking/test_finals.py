"""The finals: who takes part, which run is due, and what is found; from the records alone, wherever a study stopped."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.record import Record
from pipetune.bench.spec import EffectivePlan, Plan, Protocol
from pipetune.tuner.config.schema import Constraint, SpaceConfig
from pipetune.tuner.ranking import finals
from pipetune.tuner.ranking.finals import Due, Finalists, choose, next_step
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.runs import BASELINE
from pipetune.tuner.ranking.values import Objective
from tests.record_factory import (
    make_baseline_measurement,
    make_effective,
    make_failure,
    make_measurement,
    make_plan,
    make_record,
)

THROUGHPUT, TTFT = Objective(metric="output_throughput"), Objective(metric="mean_ttft_ms")
BOUND = SpaceConfig(min_stages=2)
FAST, GOOD, SLOW = make_plan((17, 13), 16), make_plan((16, 14), 16), make_plan((10, 20), 16)


def searched(drifts: Mapping[Plan, float]) -> list[Record]:
    """A baseline, and a trial of each plan."""
    records = [make_record(0, "baseline", None, make_baseline_measurement(32))]
    for index, (plan, drift) in enumerate(drifts.items()):
        records.append(
            make_record(index + 1, "trial", plan, make_measurement(plan, drift=drift, noise=0.0), trial_number=index)
        )
    return records


def play(
    records: list[Record],
    drifts: Mapping[Plan, float],
    *,
    noise: float = 0.005,
    objectives: Sequence[Objective] = (THROUGHPUT,),
    constraints: Sequence[Constraint] = (),
    failing: Sequence[Plan] = (),
    rounds: tuple[int, int] = (3, 8),
    most: int = 99,
) -> str | None:
    """Runs finals, appending to the records, and gives what they found; None when stopped after `most` runs."""
    for _ in range(most):
        taking_part = choose(records, objectives, constraints, count=3)
        step = next_step(
            records,
            taking_part,
            objectives=objectives,
            constraints=constraints,
            min_rounds=rounds[0],
            max_rounds=rounds[1],
            seed=7,
        )
        if isinstance(step, str):
            return step
        rng = random.Random(f"{step.name} in round {step.round}")
        drift = (1 + 0.1 * (step.round % 3)) * (1 + rng.gauss(0, noise))
        if step.name == BASELINE:
            assert taking_part.baseline_batch_size == 32
            result = make_baseline_measurement(32, num_iters=1, drift=drift)
            records.append(make_record(len(records), "finalist", None, result, round_=step.round))
            continue
        plan = taking_part.plan(step.name).plan
        outcome = (
            make_failure()
            if plan in failing
            else make_measurement(plan, num_iters=1, drift=drift * drifts[plan], noise=0.0, seed=step.round)
        )
        records.append(make_record(len(records), "finalist", plan, outcome, round_=step.round))
    return None


def runs_of(records: Sequence[Record]) -> dict[str, int]:
    names = [
        BASELINE if record.spec is None else record.spec.plan.describe()
        for record in records
        if record.role == "finalist"
    ]
    return {name: names.count(name) for name in names}


def key(plan: Plan) -> str:
    return make_effective(plan).key


def test_a_clear_winner_takes_the_least_rounds_and_everybody_runs_in_each() -> None:
    records = searched({FAST: 0.5, GOOD: 0.7, SLOW: 0.9})
    assert play(records, {FAST: 0.5, GOOD: 0.7, SLOW: 0.9}) is not None
    ranking = rank(records)
    assert ranking.best is not None
    assert ranking.best.plan == FAST
    separation = ranking.separation
    assert (separation.separated, separation.tied, separation.rounds) == (True, (), 3)
    assert set(runs_of(records).values()) == {3}
    finals = records[4:]
    assert {record.round for record in finals[:4]} == {0}
    orders = {
        tuple(record.effective.key if record.effective else "" for record in finals[at : at + 4]) for at in (0, 4, 8)
    }
    assert len(orders) > 1


def test_rounds_go_on_for_those_that_are_close_and_who_is_behind_leaves() -> None:
    base = {plan: 1 / rank(searched({plan: 1.0})).rows[0].value for plan in (FAST, GOOD)}  # type: ignore[operator]
    drifts = {FAST: 0.5, GOOD: 0.5 * base[FAST] / base[GOOD] * 1.002, SLOW: 0.9}
    records = searched(drifts)
    verdict = play(records, drifts, noise=0.03)
    assert verdict is not None
    assert runs_of(records) == {FAST.describe(): 8, GOOD.describe(): 8, SLOW.describe(): 3, BASELINE: 8}
    ranking = rank(records)
    assert set(ranking.separation.tied) == {key(FAST), key(GOOD)}
    assert ranking.separation.text in verdict
    assert all(row.confirmed for row in ranking.rows)


@pytest.mark.slow
@given(stop=st.integers(1, 20))
def test_a_stop_anywhere_changes_nothing(stop: int) -> None:
    drifts = {FAST: 0.5, GOOD: 0.52, SLOW: 0.9}
    whole, stopped = searched(drifts), searched(drifts)
    verdict = play(whole, drifts, noise=0.02)
    play(stopped, drifts, noise=0.02, most=stop)
    assert play(stopped, drifts, noise=0.02) == verdict
    assert [record.effective for record in stopped] == [record.effective for record in whole]


def test_what_the_finals_measure_does_not_change_who_takes_part() -> None:
    drifts = {FAST: 0.5, GOOD: 0.7, SLOW: 0.9, make_plan((15, 15), 16): 1.0}
    records = searched(drifts)
    before = choose(records, [THROUGHPUT], [], count=2)
    assert [effective.plan for effective in before.plans] == [FAST, GOOD]
    slow = make_measurement(FAST, drift=9.0)
    assert choose([*records, make_record(5, "finalist", FAST, slow, round_=0)], [THROUGHPUT], [], count=2) == before


def test_plans_that_the_model_prefers_take_part_and_the_rest_as_measured() -> None:
    drifts = {FAST: 0.5, GOOD: 0.7, SLOW: 0.9}
    records = searched(drifts)
    preferred = (key(make_plan((15, 15), 16)), key(SLOW))  # the first did not run, or breaks a constraint
    taking_part = choose(records, [THROUGHPUT], [], count=2, preferred=preferred)
    assert [effective.plan for effective in taking_part.plans] == [SLOW, FAST]
    of_a_front = choose(records, [THROUGHPUT, TTFT], [], count=2, preferred=preferred)
    assert of_a_front == choose(records, [THROUGHPUT, TTFT], [], count=2)


def test_who_runs_in_the_finals_stays_in_whatever_was_learnt_since() -> None:
    drifts = {FAST: 0.5, GOOD: 0.7, SLOW: 0.9}
    records = searched(drifts)
    records.append(make_record(4, "finalist", SLOW, make_measurement(SLOW, drift=0.9), round_=0))
    taking_part = choose(records, [THROUGHPUT], [], count=2, preferred=(key(GOOD), key(FAST), key(SLOW)))
    assert {effective.plan for effective in taking_part.plans} == {SLOW, GOOD}


def test_a_trial_that_measured_nothing_leaves_the_finals_as_they_are() -> None:
    drifts = {FAST: 0.5, GOOD: 0.7}
    records = searched(drifts)
    verdict = play(records, drifts)
    assert verdict is not None
    late = make_record(len(records), "trial", make_plan((18, 12), 16), make_failure(), trial_number=9)
    assert play([*records, late], drifts) == verdict
    assert all(row.confirmed for row in rank([*records, late]).rows)


def test_trials_after_the_finals_call_for_new_finals() -> None:
    drifts = {FAST: 0.5, GOOD: 0.7}
    records = searched(drifts)
    assert play(records, drifts) is not None
    late = make_plan((18, 12), 16)
    records.append(make_record(len(records), "trial", late, make_measurement(late, drift=0.3), trial_number=9))
    taking_part = choose(records, [THROUGHPUT], [], count=2)
    assert late in [effective.plan for effective in taking_part.plans]
    step = next_step(records, taking_part, objectives=[THROUGHPUT], min_rounds=3, max_rounds=8, seed=7)
    assert isinstance(step, Due)
    assert (step.round, step.shown_round) == (3, 0)


def test_a_finalist_that_fails_twice_leaves() -> None:
    drifts = {FAST: 0.5, GOOD: 0.7, SLOW: 0.9}
    records = searched(drifts)
    assert play(records, drifts, failing=[FAST]) is not None
    ranking = rank(records)
    assert ranking.separation.separated
    assert ranking.best is not None
    assert ranking.best.plan == GOOD
    assert runs_of(records)[FAST.describe()] == 2
    everybody = searched(drifts)
    lost = play(everybody, drifts, failing=list(drifts))
    assert lost is not None
    assert "no finalist is left" in lost


@pytest.mark.parametrize("metric", ["p90_ttft_ms", "peak_memory_fraction"])
def test_a_finalist_that_breaks_a_constraint_in_the_finals_is_not_best(metric: str) -> None:
    drifts = {FAST: 0.5, GOOD: 0.7}
    records = searched(drifts)
    rows = {row.plan: row.metrics[metric] for row in rank(records).rows}
    limit = max(rows.values()) * 1.02
    constraint = Constraint.model_validate(f"{metric}<={limit}")
    if metric == "p90_ttft_ms":
        verdict = play(records, {FAST: 0.5, GOOD: 9.0}, constraints=[constraint])
        best = rank(records, constraints=[constraint]).best
        assert best is not None
        assert best.plan == FAST
    else:
        verdict = play(records, drifts, constraints=[Constraint.model_validate(f"{metric}<={min(rows.values()) / 2}")])
    assert verdict is not None
    assert ("no finalist is left" in verdict) == (metric != "p90_ttft_ms")


def test_with_several_objectives_each_finalist_gets_the_least_rounds() -> None:
    drifts = {make_plan((17, 13), size): 1.0 for size in (4, 8, 16, 32)}
    records = searched(drifts)
    verdict = play(records, drifts, objectives=[THROUGHPUT, TTFT])
    assert verdict is not None
    assert "front" in verdict
    assert set(runs_of(records).values()) == {3}


def test_without_plans_or_baseline_there_is_less_to_run() -> None:
    nobody = choose([], [THROUGHPUT], [], count=3)
    assert nobody == Finalists(plans=(), baseline_batch_size=None)
    assert choose(searched({FAST: 1.0}), [THROUGHPUT], [], count=0).plans == ()
    records = [make_record(0, "trial", FAST, make_measurement(FAST), trial_number=0)]
    verdict = play(records, {FAST: 1.0})
    assert verdict is not None
    assert "only one plan" in verdict
    assert runs_of(records) == {FAST.describe(): 3}


def test_rounds_have_orders_of_their_own() -> None:
    records = searched({FAST: 1.0, GOOD: 1.0, SLOW: 1.0})
    play(records, {FAST: 1.0, GOOD: 1.0, SLOW: 1.0}, rounds=(8, 8))
    order = [(record.round, record.effective.key if record.effective else BASELINE) for record in records[4:]]
    names = {name for _, name in order}
    assert len(names) == 4
    assert sorted(order) == sorted((round_, name) for round_ in range(8) for name in names)
    orders = {tuple(name for round_, name in order if round_ == number) for number in range(8)}
    assert len(orders) > 3


def test_a_round_is_one_repetition_without_a_check() -> None:
    protocol = finals.side_by_side(Protocol(num_iters=7))
    assert (protocol.num_iters, protocol.check_outputs) == (1, False)


def chosen(records: Sequence[Record], count: int) -> list[Plan]:
    taking_part: tuple[EffectivePlan, ...] = choose(records, [THROUGHPUT], [], count=count).plans
    return [effective.plan for effective in taking_part]


def test_the_last_of_three_places_goes_to_the_other_way_of_using_the_devices() -> None:
    copies = [make_plan((30,), size, replicas=2) for size in (4, 8, 16)]
    pipelines = [make_plan((17, 13), 16), make_plan((10, 20), 16)]
    drifts = dict(zip([*copies, *pipelines], (0.1, 0.1, 0.1, 0.5, 0.5), strict=True))
    records = [
        make_record(number, "trial", plan, make_measurement(plan, drift=drift), trial_number=number)
        for number, (plan, drift) in enumerate(drifts.items())
    ]
    three = chosen(records, 3)
    assert [plan.replicas for plan in three] == [2, 2, 1]
    assert three[2] == pipelines[0]
    assert [plan.replicas for plan in chosen(records, 2)] == [2, 2]
    assert [plan.replicas for plan in chosen(records, 5)] == [2, 2, 2, 1, 1]
    assert len(chosen(records[:3], 3)) == 3


def test_the_single_stage_takes_part_beside_the_finalists_and_competes_where_it_may_be_best() -> None:
    single, split, slow = make_plan((30,)), make_plan(), make_plan((10, 20))
    records = [
        make_record(0, "single_stage", single, make_measurement(single, drift=0.1)),
        make_record(1, "trial", split, make_measurement(split), trial_number=0),
        make_record(2, "trial", slow, make_measurement(slow), trial_number=1),
    ]
    assert chosen(records, 1) == [split, single]
    assert chosen(records, 2) == [split, slow, single]
    assert chosen(records, 0) == []
    bound = choose(records, [THROUGHPUT], [], count=2, space=BOUND)
    assert [effective.plan for effective in bound.plans] == [split, slow]
    assert bound.single_stage is not None
    assert bound.plan(bound.single_stage.key).plan == single


def test_the_single_stage_of_a_bounded_search_runs_in_every_round_and_is_a_reference() -> None:
    single, split = make_plan((30,)), make_plan()
    records = [
        make_record(0, "single_stage", single, make_measurement(single, drift=0.1)),
        make_record(1, "trial", split, make_measurement(split), trial_number=0),
    ]
    step: Due | str | None = None
    for number in range(2, 99):
        taking_part = choose(records, [THROUGHPUT], [], count=3, space=BOUND)
        step = next_step(records, taking_part, objectives=[THROUGHPUT], space=BOUND, min_rounds=3, max_rounds=8, seed=7)
        if isinstance(step, str):
            break
        plan = taking_part.plan(step.name).plan
        result = make_measurement(plan, num_iters=1, seed=step.round, drift=0.1 if plan == single else 1.0)
        records.append(make_record(number, "finalist", plan, result, round_=step.round))
    assert isinstance(step, str)
    assert "only one plan" in step
    assert set(runs_of(records).values()) == {3}
    ranking = rank(records, space=BOUND)
    assert ranking.best is not None
    assert (ranking.best.plan, ranking.best.in_finals) == (split, True)
    assert ranking.single_stage is not None
    assert (ranking.single_stage.rank, ranking.single_stage.is_reference) == (None, True)
    gain = ranking.best.speedup_over_single_stage
    assert gain is not None
    assert gain.rounds == 3
    assert gain.value < 1
    assert rank(records).best == rank(records).single_stage


def test_the_single_stage_without_the_cap_of_the_search_is_a_reference() -> None:
    single, split = make_plan((30,)), Plan.from_layer_counts((17, 13), ("cpu:0", "cpu:1"), 16, max_memory_bytes=2**30)
    records = [
        make_record(0, "single_stage", single, make_measurement(single, drift=0.1)),
        make_record(1, "trial", split, make_measurement(split), trial_number=0),
    ]
    capped = SpaceConfig(max_memory_per_device=2**30)
    taking_part = choose(records, [THROUGHPUT], [], count=2, space=capped)
    assert [effective.plan for effective in taking_part.plans] == [split]
    assert taking_part.single_stage is not None
    ranking = rank(records, space=capped)
    assert ranking.best is not None
    assert ranking.best.plan == split
    assert ranking.single_stage is not None
    assert ranking.single_stage.unranked_because == "it was measured without the search's cap"


def test_finals_from_before_the_single_stage_took_part_go_on_without_it() -> None:
    drifts = {FAST: 0.5, GOOD: 0.52}
    records = searched(drifts)
    play(records, drifts, most=4)
    single = make_plan((30,))
    late = make_record(99, "single_stage", single, make_measurement(single)).model_copy(update={"number": 0})
    records[0] = late
    assert single not in [effective.plan for effective in choose(records, [THROUGHPUT], [], count=3).plans]
    begun = [record for record in records if record.round in (None, 0)]
    assert single in [effective.plan for effective in choose(begun, [THROUGHPUT], [], count=3).plans]
