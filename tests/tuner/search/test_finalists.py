"""The finals' schedule: everybody once a round, in changing order, and after a stop the rest of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.spec import Protocol
from tests.record_factory import make_baseline_measurement, make_measurement, make_plan, make_record
from tuner.ranking import rank
from tuner.search import finalists

NAMES = ("a", "b", "c", finalists.BASELINE)


@given(rounds=st.integers(1, 6), seed=st.integers(0, 99), stop=st.integers(0, 24))
def test_a_stopped_schedule_goes_on_where_it_was(rounds: int, seed: int, stop: int) -> None:
    whole = finalists.schedule(NAMES, rounds=rounds, seed=seed)
    assert sorted(whole) == sorted((round_, name) for round_ in range(rounds) for name in NAMES)
    done = frozenset(whole[:stop])
    assert finalists.schedule(NAMES, rounds=rounds, seed=seed, done=done) == whole[stop:]


def test_rounds_have_orders_of_their_own() -> None:
    whole = finalists.schedule(NAMES, rounds=8, seed=0)
    orders = {tuple(name for round_, name in whole if round_ == number) for number in range(8)}
    assert len(orders) > 3


def test_trials_after_the_finals_call_for_new_finals() -> None:
    plan = make_plan()
    trial = make_record(0, "trial", plan, make_measurement(plan), trial_number=0)
    first = make_record(1, "finalist", plan, make_measurement(plan), round_=0)
    base = make_record(2, "finalist", None, make_baseline_measurement(32), round_=0)
    assert trial.effective is not None
    assert finalists.finished([trial]) == (0, frozenset())
    key = trial.effective.key
    assert finalists.finished([trial, first, base]) == (0, frozenset({(0, key), (0, finalists.BASELINE)}))
    later = make_record(3, "trial", make_plan((16, 14)), make_measurement(make_plan((16, 14))), trial_number=1)
    assert finalists.finished([trial, first, base, later]) == (1, frozenset())


def test_a_round_is_one_repetition_without_a_check() -> None:
    protocol = finalists.side_by_side(Protocol(num_iters=7))
    assert (protocol.num_iters, protocol.check_outputs) == (1, False)


def test_the_last_of_three_places_goes_to_the_other_way_of_using_the_devices() -> None:
    copies = [make_plan((30,), size, replicas=2) for size in (4, 8, 16)]
    pipelines = [make_plan((17, 13), 16), make_plan((10, 20), 16)]
    moods = dict(zip([*copies, *pipelines], (0.1, 0.1, 0.1, 0.5, 0.5), strict=True))
    records = [
        make_record(number, "trial", plan, make_measurement(plan, mood=mood), trial_number=number)
        for number, (plan, mood) in enumerate(moods.items())
    ]
    ranking = rank(records)
    chosen = [one.plan for one in finalists.choose(ranking, 3)]
    assert [plan.replicas for plan in chosen] == [2, 2, 1]
    assert chosen[2] == pipelines[0]
    assert [one.plan.replicas for one in finalists.choose(ranking, 2)] == [2, 2]
    assert [one.plan.replicas for one in finalists.choose(ranking, 5)] == [2, 2, 2, 1, 1]
    assert len(finalists.choose(rank(records[:3]), 3)) == 3


def test_the_single_stage_is_no_finalist_where_the_search_is_bound_to_more() -> None:
    single, split = make_plan((30,)), make_plan()
    records = [
        make_record(0, "single_stage", single, make_measurement(single, mood=0.1)),
        make_record(1, "trial", split, make_measurement(split), trial_number=0),
    ]
    ranking = rank(records)
    assert [len(one.plan.stages) for one in finalists.choose(ranking, 2)] == [1, 2]
    assert [len(one.plan.stages) for one in finalists.choose(ranking, 2, min_stages=2)] == [2]
