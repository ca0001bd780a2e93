"""What is run next: the same for the same records, the promising first, each kind once, and an end with a reason."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from pipetune.bench import metrics
from pipetune.bench.record import FailureKind, Measurement, Outcome, Record
from pipetune.bench.spec import Arrivals, EffectivePlan, Goodput, Plan
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.planning.calibration.observation import observe
from pipetune.tuner.planning.simulation.load import under_load
from pipetune.tuner.search.policy.history import kinds_of
from pipetune.tuner.search.policy.strategy import MOST_REPLICATES, PROMISING_FIRST
from pipetune.tuner.search.space.space import candidates
from pipetune.tuner.study.search_log import Proposal, Stop
from tests.record_factory import make_measurement, make_plan, make_record
from tests.tuner.search.simulated_study import as_measured, failed, make_strategy, play, trial
from tests.tuner.search.space_factory import build

FIRST_TPE: dict[str, int] = {"partition_rank": 5, "micro_batch_index": 0, "prefill_index": 0}


@cache
def pipelines() -> Any:
    """Cuts and sizes alone."""
    return build(2, min_stages=2, replicas=(1,))


@cache
def small() -> Any:
    return build(2, min_stages=2, replicas=(1,), micro_batch_sizes=(16,), prefill_micro_batch_sizes=(8,))


@cache
def kinds() -> Any:
    return build(
        4, num_prompts=16, input_len=512, min_stages=1, max_stages=2, compile="search", micro_batch_sizes=(4, 8)
    )


def single_stage(built: Any) -> Record:
    plan = make_plan((30,), 32)
    return make_record(0, "single_stage", plan, as_measured(plan, 0))


def throughput(record: Record) -> float:
    assert isinstance(record.result, Measurement)
    return metrics.derive(record.result)["output_throughput"]


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [("output_throughput",), ("output_throughput", "mean_ttft_ms")])
def test_replayed_records_give_the_same_proposals(objectives: tuple[str, ...]) -> None:
    options: dict[str, Any] = {"objectives": objectives, "n_trials": 9, "stop_early": False, "seed": 3}
    records, steps, stop = play(make_strategy(pipelines(), **options), pipelines(), before=[single_stage(pipelines())])
    assert stop is not None
    assert stop.kind == "budget"
    # One by one from the start, by a strategy that never saw anything else; and anew at every length.
    again = make_strategy(pipelines(), **options)
    assert [again.next(records[: 1 + count]) for count in range(len(steps))] == steps
    for count in (0, 3, 8, 5):
        assert make_strategy(pipelines(), **options).next(records[: 1 + count]) == steps[count]
    # A strategy that was given other records in between is not led astray.
    again.next(records[:1])
    assert again.next(records[:5]) == steps[4]


def test_the_first_trials_are_the_most_promising_and_each_says_what_it_promises() -> None:
    records, steps, _ = play(make_strategy(pipelines()), pipelines(), before=[single_stage(pipelines())])
    space, _, resolve = pipelines()
    best = max(throughput(trial(space, resolve, Proposal(point=c.point, kind="all", reason=""), 0)) for c in CHEAP)
    assert max(map(throughput, records[1 : 1 + PROMISING_FIRST])) > 0.97 * best
    for step in steps:
        assert step.predicted["output_throughput"] > 0
        assert 0 < step.predicted_sd["output_throughput"] < 1
        assert step.reason


CHEAP = [one for one in candidates(pipelines()[0], pipelines()[2]) if 12 <= one.effective.plan.layer_counts[0] <= 20]


def test_a_search_that_nothing_can_better_ends_and_says_so() -> None:
    _, steps, stop = play(make_strategy(pipelines(), n_trials=50), pipelines(), before=[single_stage(pipelines())])
    assert stop is not None
    assert stop.kind == "converged"
    assert "half the noise of a run" in stop.text
    assert 6 <= len(steps) < 25
    assert sum(step.kind == "replicate" for step in steps) <= MOST_REPLICATES


def test_a_search_told_to_go_on_spends_its_budget_and_never_repeats_by_accident() -> None:
    strategy = make_strategy(pipelines(), n_trials=18, stop_early=False)
    records, steps, stop = play(strategy, pipelines())
    assert stop == Stop(kind="budget", text="18 trials have run, as many as were asked for")
    keys = [record.effective.key for record in records if record.effective]
    assert len(keys) - len(set(keys)) == sum(step.kind == "replicate" for step in steps) <= MOST_REPLICATES


@pytest.mark.parametrize("options", [{"n_trials": 50}, {"n_trials": 18, "stop_early": False}])
def test_what_another_process_runs_is_proposed_by_no_rule(options: dict[str, Any]) -> None:
    before = [single_stage(pipelines())]
    records, steps, _ = play(make_strategy(pipelines(), **options), pipelines(), before=before)
    assert {step.kind for step in steps} == {"model", "replicate"}
    strategy = make_strategy(pipelines(), **options)
    for count, step in enumerate(steps, start=1):
        other = strategy.next(records[:count], taken=[step.point])
        assert isinstance(other, Stop) or other.point != step.point


def test_a_space_within_the_budget_is_tried_whole_the_promising_first() -> None:
    records, steps, stop = play(make_strategy(small(), n_trials=40), small())
    assert stop is not None
    assert stop.kind == "exhausted"
    assert {step.kind for step in steps} == {"all"}
    assert len({record.effective.key for record in records if record.effective}) == len(steps) == 29
    best = max(map(throughput, records))
    assert max(map(throughput, records[:4])) > 0.98 * best
    assert throughput(records[-1]) < 0.7 * best


@pytest.mark.slow
def test_every_kind_within_reach_runs_once_and_not_before_the_most_promising() -> None:
    _, steps, _ = play(make_strategy(kinds(), n_trials=14, stop_early=False), kinds(), world=other_workload, most=14)
    space = kinds()[0]
    plans = [space.plan(step.point) for step in steps]
    seen = {kind for plan in plans for kind in kinds_of(plan, 4)}
    assert {("replicas", 2), ("replicas", 4), ("compile", 0), ("compile", 1)} <= seen
    assert all(step.kind != "kind" for step in steps[:1])


def other_workload(plan: Plan, number: int) -> Outcome:
    workload = make_record(0, "trial", plan, as_measured(plan, 0)).spec
    assert workload is not None
    changed = workload.workload.model_copy(update={"num_prompts": 16, "input_len": 512})
    return make_measurement(plan, changed, seed=number, hop_s=1e-3)


def test_what_an_earlier_study_liked_runs_first() -> None:
    first = [{"partition_rank": 7, "micro_batch_index": 1, "prefill_index": 0}, FIRST_TPE]
    _, steps, _ = play(make_strategy(pipelines(), first=first), pipelines(), most=3)
    assert [step.point for step in steps[:2]] == first
    assert [step.kind for step in steps] == ["first", "first", "model"]


def test_what_earlier_runs_taught_is_known_from_the_start() -> None:
    records, *_ = play(make_strategy(pipelines()), pipelines())
    prior = [lesson for record in records if (lesson := observe(record))]
    step = make_strategy(pipelines(), prior=prior).next([])
    ignorant = make_strategy(pipelines()).next([])
    assert isinstance(step, Proposal)
    assert isinstance(ignorant, Proposal)
    assert step.predicted_sd["output_throughput"] < ignorant.predicted_sd["output_throughput"]
    plan = pipelines()[0].plan(step.point)
    assert step.predicted["output_throughput"] == pytest.approx(
        metrics.derive(as_measured(plan, 99))["output_throughput"], rel=0.04
    )


def test_a_plan_that_lost_its_workers_has_a_second_chance_and_no_third() -> None:
    def dies(plan: Plan, number: int) -> Outcome:
        return failed(FailureKind.WORKER_DIED) if number in (1, 2) else as_measured(plan, number)

    records, steps, _ = play(make_strategy(pipelines(), n_trials=4), pipelines(), world=dies)
    assert [step.kind for step in steps[:4]] == ["model", "model", "again", "model"]
    assert steps[1].point == steps[2].point != steps[3].point
    assert "lost its workers" in steps[2].reason
    # The first loss is no trial, the second is.
    assert sum(isinstance(record.result, Measurement) for record in records) == 3


def test_a_run_that_was_stopped_is_run_again_first() -> None:
    strategy = make_strategy(pipelines())
    records, *_ = play(strategy, pipelines(), most=1)
    stopped = records[-1].model_copy(update={"result": failed(FailureKind.INTERRUPTED)})
    step = strategy.next([*records[:-1], stopped])
    assert isinstance(step, Proposal)
    assert (step.kind, step.point, step.reason) == ("again", stopped.params, "it was stopped")


def test_plans_larger_than_one_that_ran_out_of_memory_are_avoided() -> None:
    def too_large(plan: Plan, number: int) -> Outcome:
        if plan.micro_batch_size > 8:
            return failed(FailureKind.OUT_OF_MEMORY, device="cpu:1")
        return as_measured(plan, number)

    records, *_ = play(make_strategy(pipelines(), n_trials=12, stop_early=False), pipelines(), world=too_large)
    resolve = pipelines()[2]
    edge: list[int] = []
    for record in records:
        assert isinstance(record.effective, EffectivePlan)
        needed = resolve.needed_bytes(record.effective)["cpu:1"]
        assert all(needed < wanted for wanted in edge)
        if not isinstance(record.result, Measurement):
            edge.append(needed)
    assert 0 < len(edge) < 6


def test_what_breaks_again_and_again_gives_way_to_what_works() -> None:
    def compiled_breaks(plan: Plan, number: int) -> Outcome:
        return failed(FailureKind.WORKER_ERROR) if plan.compile else as_measured(plan, number)

    built = build(2, min_stages=2, replicas=(1,), compile="search", micro_batch_sizes=(8, 16))
    records, *_ = play(make_strategy(built, n_trials=12, stop_early=False), built, world=compiled_breaks)
    assert sum(isinstance(record.result, Measurement) for record in records) >= 8


def test_constraints_decide_what_is_promising() -> None:
    limit = Constraint.model_validate("mean_ttft_ms<=2250")
    fast = metrics.derive(as_measured(make_plan((16, 14), 16, prefill=8), 0))
    assert limit.excess(fast["mean_ttft_ms"]) > 0
    records, *_ = play(make_strategy(pipelines(), constraints=[limit], n_trials=10, stop_early=False), pipelines())
    kept = [limit.excess(metrics.derive(record.result)["mean_ttft_ms"]) <= 0 for record in records]  # type: ignore[arg-type]
    assert sum(kept) >= 4


def test_memory_may_be_a_constraint_though_no_schedule_tells_it() -> None:
    limit = Constraint.model_validate("peak_memory_fraction<=0.13")
    records, steps, _ = play(make_strategy(pipelines(), constraints=[limit], n_trials=8, stop_early=False), pipelines())
    fractions = [metrics.derive(record.result)["peak_memory_fraction"] for record in records]  # type: ignore[arg-type]
    assert min(fractions) <= 0.13
    assert all("peak_memory_fraction" in step.predicted for step in steps if step.kind == "model")


def test_several_objectives_are_weighed_anew_for_every_trial() -> None:
    options: dict[str, Any] = {"objectives": ("output_throughput", "mean_tpot_ms"), "n_trials": 12, "stop_early": False}
    records, *_ = play(make_strategy(pipelines(), **options), pipelines())
    found = [metrics.derive(record.result) for record in records]  # type: ignore[arg-type]
    fastest = max(found, key=lambda values: values["output_throughput"])
    quickest = min(found, key=lambda values: values["mean_tpot_ms"])
    assert fastest["output_throughput"] > 1.03 * quickest["output_throughput"]
    assert fastest["mean_tpot_ms"] > 1.03 * quickest["mean_tpot_ms"]
    assert len({record.effective.key for record in records if record.effective}) >= 9


def test_an_objective_that_nothing_predicts_is_left_to_tpe_after_the_fast_plans() -> None:
    asked: list[int] = []

    def suggest(is_new: Any) -> dict[str, int] | None:
        asked.append(1)
        return next((point for point in pipelines()[0].points() if is_new(point)), None)

    strategy = make_strategy(pipelines(), objectives=("energy_j",), n_trials=9, stop_early=False, suggest=suggest)
    _, steps, stop = play(strategy, pipelines())
    assert [step.kind for step in steps] == ["model"] * 3 + ["tpe"] * 6
    assert len(asked) == 6
    assert stop is not None


def test_luck_in_a_run_is_smoothed_out_of_what_is_preferred() -> None:
    strategy = make_strategy(pipelines(), n_trials=12, stop_early=False)
    records, _, _ = play(strategy, pipelines(), before=[single_stage(pipelines())])
    trials = [record for record in records if record.role == "trial"]
    told = make_strategy(pipelines()).preferred(records)
    assert len(told) == len({record.effective.key for record in records if record.effective})
    slowest = min(trials, key=throughput)
    assert slowest.effective is not None
    assert slowest.spec is not None
    lucky = slowest.model_copy(update={"result": make_measurement(slowest.spec.plan, seed=1, hop_s=1e-3, drift=0.87)})
    once = [lucky if record is slowest else record for record in records]
    assert throughput(lucky) > max(map(throughput, trials))
    assert make_strategy(pipelines()).preferred(once)[0] == told[0]
    many = [*once, *(lucky.model_copy(update={"number": 100 + again}) for again in range(8))]
    assert make_strategy(pipelines()).preferred(many)[0] == slowest.effective.key


def test_nothing_is_preferred_where_nothing_predicts_the_objective_or_there_are_several() -> None:
    records, _, _ = play(make_strategy(pipelines()), pipelines(), before=[single_stage(pipelines())], most=4)
    assert make_strategy(pipelines(), objectives=("output_throughput", "mean_ttft_ms")).preferred(records) == ()
    assert make_strategy(pipelines(), objectives=("energy_j",)).preferred(records) == ()


def test_tpe_has_a_say_now_and_then() -> None:
    def suggest(is_new: Any) -> dict[str, int] | None:
        return next((point for point in pipelines()[0].points() if is_new(point)), None)

    strategy = make_strategy(pipelines(), n_trials=14, stop_early=False, suggest=suggest)
    _, steps, _ = play(strategy, pipelines())
    assert 1 <= sum(step.kind == "tpe" for step in steps) <= 8
    assert all(step.kind != "tpe" for step in steps[:4])


def test_runs_without_spans_still_lead() -> None:
    def blind(plan: Plan, number: int) -> Outcome:
        return make_measurement(plan, seed=number, hop_s=1e-3, instrument=False)

    records, *_ = play(make_strategy(pipelines(), n_trials=8, stop_early=False), pipelines(), world=blind)
    assert len({record.effective.key for record in records if record.effective}) >= 5


def test_a_calm_while_others_hold_the_promising_plans_is_not_remembered() -> None:
    points = [one.point for one in candidates(pipelines()[0], pipelines()[2])]
    hopeless = [
        one.point for one in candidates(pipelines()[0], pipelines()[2]) if one.effective.plan.layer_counts[0] <= 2
    ]
    held = [point for point in points if point not in hopeless]
    options: dict[str, Any] = {"n_trials": len(points) - 1}
    records, *_ = play(make_strategy(pipelines(), **options), pipelines(), before=[single_stage(pipelines())], most=2)
    strategy = make_strategy(pipelines(), **options)
    strategy.next(records, taken=held)
    assert strategy.next(records) == make_strategy(pipelines(), **options).next(records)


def test_plans_that_others_run_are_left_to_them_and_count() -> None:
    strategy = make_strategy(pipelines(), n_trials=3)
    first = strategy.next([])
    assert isinstance(first, Proposal)
    second = strategy.next([], taken=[first.point])
    assert isinstance(second, Proposal)
    assert second.point != first.point
    third = strategy.next([], taken=[first.point, second.point, FIRST_TPE])
    assert isinstance(third, Stop)
    assert strategy.next([]) == first


@pytest.mark.slow
def test_under_arrivals_what_serves_most_requests_well_is_proposed_first() -> None:
    built = build(
        2,
        lens=[16] * 24 + [512] * 6,
        arrivals=Arrivals(request_rate=4.0),
        goodput=Goodput(ttft=2000, tpot=400),
        micro_batch_sizes=(2, 4, 8),
        prefill_micro_batch_sizes=(1, 2),
    )
    space, model, resolve = built
    strategy = make_strategy(built, objectives=("request_goodput",))
    assert strategy.mode == "model"
    step = strategy.next([])
    assert isinstance(step, Proposal)
    plan = resolve(space.plan(step.point))
    assert isinstance(plan, EffectivePlan)
    assert step.predicted["request_goodput"] == under_load(model, plan.plan, plan.in_flight)["request_goodput"]
    # Of as many plans by chance few are as good.
    others = [one.effective for one in candidates(space, resolve)[::50]]
    values = [under_load(model, one.plan, one.in_flight)["request_goodput"] for one in others]
    assert len(values) > 40
    assert min(values) < 0.7 * step.predicted["request_goodput"]
    assert max(values) <= 1.02 * step.predicted["request_goodput"]
    assert make_strategy(built, objectives=("mean_itl_ms",)).mode == "blind"
