"""What a ranking must not get wrong: order, pooling, pairing, constraints, the front, and how sure it is."""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipetune.bench import metrics
from pipetune.bench.record import SHARED_DEVICE_NOTE, FailureKind, Measurement, Record
from pipetune.bench.spec import Plan, StagePlan
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.study.files import load_records
from tests.record_factory import (
    WORKLOAD,
    make_baseline_measurement,
    make_check,
    make_failure,
    make_measurement,
    make_plan,
    make_record,
    make_study_records,
)

THROUGHPUT = Objective(metric="output_throughput")
TTFT = Objective(metric="mean_ttft_ms")
STUDY = make_study_records()


def throughput(record: Record) -> float:
    assert isinstance(record.result, Measurement)
    return metrics.derive(record.result)["output_throughput"]


def finalists(rounds: int, drifts: dict[Plan | None, list[float]]) -> list[Record]:
    """Interleaved rounds in which a plan's times are multiplied by its drift of that round."""
    records: list[Record] = []
    for round_, (plan, factors) in itertools.product(range(rounds), drifts.items()):
        drift = factors[round_]
        result = (
            make_measurement(plan, noise=0.0, drift=drift)
            if plan
            else make_baseline_measurement(32, noise=0.0, drift=drift)
        )
        records.append(make_record(len(records), "finalist", plan, result, round_=round_))
    return records


@settings(max_examples=20)
@given(st.permutations(STUDY), st.booleans())
def test_the_order_of_records_does_not_matter(records: list[Record], several: bool) -> None:
    objectives = [THROUGHPUT, TTFT] if several else [THROUGHPUT]
    constraints = [Constraint.model_validate("p90_ttft_ms<=4700")]
    assert rank(records, objectives, constraints) == rank(STUDY, objectives, constraints)


def test_a_study_is_ranked_whole() -> None:
    ranking = rank(STUDY)
    plans = {record.effective.key for record in STUDY if record.effective and isinstance(record.result, Measurement)}
    assert {row.key for row in ranking.rows} == plans
    assert [row.rank for row in ranking.rows] == list(range(1, len(plans) + 1))
    assert [row.batch_size for row in ranking.baseline_sweep] == [8, 16, 32]
    assert ranking.baseline is not None
    assert ranking.baseline.batch_size == 32
    assert ranking.single_stage is not None
    assert ranking.single_stage.plan.layer_counts == (30,)
    assert [failure.failure.kind for failure in ranking.failures] == ["worker_died", "over_memory_cap"]


def test_confirmed_rows_come_first_each_group_by_value() -> None:
    rows = rank(STUDY).rows
    assert [row.confirmed for row in rows] == sorted((row.confirmed for row in rows), reverse=True)
    searched = [row.value or 0.0 for row in rows if not row.confirmed]
    assert len(searched) > 1
    assert searched == sorted(searched, reverse=True)
    # Finalists are ordered by their common rounds, from which medians of different rounds may part by a little.
    confirmed = [row.value or 0.0 for row in rows if row.confirmed]
    assert len(confirmed) > 1
    assert confirmed == pytest.approx(sorted(confirmed, reverse=True), rel=0.02)


def test_replicates_are_pooled_over_their_iterations() -> None:
    plan = make_plan()
    runs = [make_measurement(plan, seed=seed, noise=0.1) for seed in range(3)]
    row = rank([make_record(index, "trial", plan, run) for index, run in enumerate(runs)]).rows[0]
    pooled = sorted(value for run in runs for value in metrics.throughputs(run))
    assert row.records == (0, 1, 2)
    assert row.value == pytest.approx(statistics.median(pooled))
    assert row.spread is not None
    assert (row.spread.samples, row.spread.runs) == (9, 3)
    assert row.spread.q1 <= row.spread.median <= row.spread.q3


def test_finalist_rounds_take_the_place_of_the_search() -> None:
    plan = make_plan()
    records = [make_record(0, "trial", plan, make_measurement(plan, drift=0.5))]
    records += [make_record(n, "finalist", plan, make_measurement(plan, seed=n), round_=n) for n in (1, 2, 3)]
    row = rank(records).rows[0]
    assert row.confirmed
    assert row.records == (0, 1, 2, 3)
    assert row.used_records == (1, 2, 3)
    assert row.value is not None
    assert row.value < 0.6 * throughput(records[0])


def test_a_lucky_search_value_is_not_called_best_once_finalists_were_measured() -> None:
    lucky, sound = make_plan((10, 20)), make_plan((17, 13))
    records = [make_record(0, "trial", lucky, make_measurement(lucky, drift=0.1))]
    records += [make_record(n, "finalist", sound, make_measurement(sound, seed=n), round_=n) for n in (1, 2, 3)]
    best = rank(records).best
    assert best is not None
    assert best.plan == sound


def test_trials_after_the_finals_may_outrank_their_winner() -> None:
    old, new = make_plan((20, 10)), make_plan((17, 13))
    records = [make_record(n, "finalist", old, make_measurement(old, seed=n), round_=n) for n in range(3)]
    records.append(make_record(3, "trial", new, make_measurement(new)))
    rows = rank(records).rows
    assert [row.plan for row in rows] == [new, old]
    assert not any(row.confirmed for row in rows)
    records += [make_record(n, "finalist", new, make_measurement(new, drift=2.0), round_=n) for n in (4, 5, 6)]
    rows = rank(records).rows
    assert [(row.plan, row.confirmed) for row in rows] == [(new, True), (old, False)]


def test_disturbed_search_runs_give_way_to_undisturbed_ones() -> None:
    plan = make_plan()
    disturbed = make_measurement(plan, drift=3.0, disturbances=("cpu:0 was shared with 'make'",))
    only = rank([make_record(0, "trial", plan, disturbed)]).rows[0]
    assert (only.used_records, only.disturbed_runs) == ((0,), 1)
    both = rank([make_record(0, "trial", plan, disturbed), make_record(1, "trial", plan, make_measurement(plan))])
    assert (both.rows[0].used_records, both.rows[0].disturbed_runs) == ((1,), 0)


def test_speedup_is_told_by_common_rounds_whatever_the_machine_does() -> None:
    # The machine gets slower over the rounds, which unpaired medians would mix up.
    plan = make_plan()
    machine = [1.0, 1.5, 2.0]
    records = finalists(3, {plan: [0.9 * machine[0], 1.0 * machine[1], 1.1 * machine[2]], None: machine})
    ratio = rank(records).rows[0].speedup_over_baseline
    assert ratio is not None
    steady = throughput(make_record(0, "trial", plan, make_measurement(plan, noise=0.0)))
    base = throughput(make_record(0, "baseline", None, make_baseline_measurement(32, noise=0.0)))
    assert ratio.rounds == 3
    assert ratio.value == pytest.approx(steady / base, rel=0.01)
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < ratio.value < ratio.high


def test_without_common_rounds_a_speedup_is_marked_unpaired() -> None:
    plan = make_plan()
    records = [
        make_record(0, "baseline", None, make_baseline_measurement(32)),
        make_record(1, "trial", plan, make_measurement(plan)),
    ]
    ratio = rank(records).rows[0].speedup_over_baseline
    assert ratio is not None
    assert not ratio.paired
    assert (ratio.low, ratio.high) == (None, None)
    assert ratio.value == pytest.approx(throughput(records[1]) / throughput(records[0]))


def test_values_of_the_search_are_not_set_against_those_of_the_finals() -> None:
    # The machine is half as fast during the finals, in which `late` takes no part.
    plan, late = make_plan(), make_plan((10, 20))
    quiet = [
        make_record(0, "baseline", None, make_baseline_measurement(32, noise=0.0)),
        make_record(1, "trial", late, make_measurement(late, noise=0.0)),
    ]
    finals = finalists(3, {plan: [2.0] * 3, None: [2.0] * 3})
    ranking = rank([*quiet, *(record.model_copy(update={"number": record.number + 2}) for record in finals)])
    ratios = {row.plan: row.speedup_over_baseline for row in ranking.rows}
    expected = throughput(quiet[1]) / throughput(quiet[0])
    assert ratios[late] is not None
    assert ratios[late].value == pytest.approx(expected)  # type: ignore[union-attr]
    assert ranking.baseline is not None
    assert ranking.baseline.throughput.median == pytest.approx(throughput(quiet[0]) / 2)
    assert ranking.baseline_sweep[0].throughput.median == pytest.approx(throughput(quiet[0]))


def test_the_gain_of_a_latency_is_above_one_when_it_falls() -> None:
    plan = make_plan()
    records = [
        make_record(0, "baseline", None, make_baseline_measurement(32)),
        make_record(1, "trial", plan, make_measurement(plan)),
    ]
    row = rank(records, [TTFT]).rows[0]
    assert row.speedup_over_baseline is not None
    assert row.metrics["mean_ttft_ms"] < metrics.derive(records[0].result)["mean_ttft_ms"]  # type: ignore[arg-type]
    assert row.speedup_over_baseline.value > 1


def test_the_baseline_is_the_un_pipelined_model_at_its_best_batch() -> None:
    records = [
        make_record(index, "baseline", None, make_baseline_measurement(size)) for index, size in enumerate((8, 32, 16))
    ]
    baseline = rank(records).baseline
    assert baseline is not None
    assert baseline.value == max(throughput(record) for record in records)


def test_over_the_single_stage_counts_what_pipelining_gained() -> None:
    single, plan = make_plan((30,), 32), make_plan()
    records = [
        make_record(0, "single_stage", single, make_measurement(single)),
        make_record(1, "trial", plan, make_measurement(plan)),
    ]
    rows = {row.plan: row for row in rank(records).rows}
    own, over = rows[single].speedup_over_single_stage, rows[plan].speedup_over_single_stage
    assert own is not None
    assert own.value == 1.0
    assert over is not None
    assert over.value == pytest.approx(throughput(records[1]) / throughput(records[0]))


def test_copies_are_no_single_stage() -> None:
    single, copies = make_plan((30,), 32), make_plan((30,), 16, replicas=2)
    records = [
        make_record(0, "trial", copies, make_measurement(copies)),
        make_record(1, "single_stage", single, make_measurement(single)),
    ]
    ranking = rank(records)
    assert ranking.best is not None
    assert ranking.best.plan == copies
    assert ranking.single_stage is not None
    assert ranking.single_stage.plan == single
    assert ranking.rival is None
    gain = ranking.best.speedup_over_single_stage
    assert gain is not None
    assert gain.value > 1


def test_the_rival_is_the_best_plan_of_the_other_kind() -> None:
    copies, pipeline, worse = make_plan((30,), 16, replicas=2), make_plan((17, 13), 8), make_plan((10, 20), 8)
    plans: dict[Plan | None, list[float]] = {copies: [0.5] * 3, pipeline: [1.0] * 3, worse: [1.0] * 3}
    ranking = rank(finalists(3, plans))
    assert ranking.rival is not None
    assert ranking.rival.row.plan == pipeline
    assert ranking.rival.gain is not None
    assert ranking.rival.gain.rounds == 3
    turned = rank(finalists(3, {**plans, copies: [5.0] * 3}))
    assert turned.best is not None
    assert turned.best.plan == pipeline
    assert turned.rival is not None
    assert turned.rival.row.plan == copies
    assert turned.rival.gain is not None
    assert turned.rival.gain.value > 1


def test_two_replicas_on_one_gpu_have_no_rank() -> None:
    plan = Plan(
        stages=(StagePlan(device="cuda:0", first_layer=0, end_layer=30),),
        micro_batch_size=16,
        replicas=2,
        replica_devices=(("cuda:0",),),
    )
    assert rank([make_record(0, "trial", plan, make_measurement(plan))]).rows == ()


def test_scored_texts_are_ranked_by_all_their_tokens() -> None:
    scored = WORKLOAD.model_copy(update={"kind": "score"})
    plan = make_plan()
    records = [
        make_record(0, "baseline", None, make_baseline_measurement(32, scored), workload=scored),
        make_record(1, "trial", plan, make_measurement(plan, scored), workload=scored),
    ]
    ranking = rank(records, [Objective(metric="total_token_throughput")])
    assert ranking.baseline is not None
    row = ranking.rows[0]
    assert row.value == row.throughput.median > 0
    assert row.speedup_over_baseline is not None
    assert rank(records).rows == ()
    assert rank(records).unranked[0].unranked_because == "output_throughput was not measured"


def test_records_of_before_replicas_rank_as_they_did() -> None:
    records = load_records(Path("tests/data/study-before-replicas"))
    ranking = rank(records)
    assert ranking.best is not None
    assert ranking.best.plan.describe() == "16+14 · micro-batch 8 (prefill 4)"
    assert ranking.best.speedup_over_baseline is not None
    assert round(ranking.best.speedup_over_baseline.value, 2) == 1.49


def test_the_single_stage_is_the_best_plan_of_one_stage() -> None:
    small, large = make_plan((30,), 8), make_plan((30,), 32)
    records = [
        make_record(0, "single_stage", small, make_measurement(small)),
        make_record(1, "trial", large, make_measurement(large)),
    ]
    single = rank(records).single_stage
    assert single is not None
    assert single.plan == large


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (make_measurement(make_plan(), check=make_check(argmax_flips=1)), "wrong output"),
        (make_measurement(make_plan(), check=make_check(max_logit_error=1.0)), "wrong output"),
        (make_measurement(make_plan(), notes=(f"{SHARED_DEVICE_NOTE}: all on cuda:0",)), "share a GPU"),
    ],
)
def test_what_proves_no_speed_is_listed_without_a_rank(result: Measurement, why: str) -> None:
    ranking = rank([make_record(0, "trial", make_plan(), result)])
    assert ranking.rows == ()
    assert ranking.best is None
    assert why in (ranking.unranked[0].unranked_because or "")
    assert ranking.unranked[0].speedup_over_baseline is None


def test_a_few_positions_where_experts_were_nearly_tied_do_not_cost_the_rank() -> None:
    few = make_check(max_logit_error=1.0, argmax_flips=1).model_copy(
        update={"typical_error": 1e-5, "typical_tolerance": 1e-4, "positions": 64, "outliers": 1}
    )
    most = few.model_copy(update={"typical_error": 1e-3})
    for check, ranked in ((few, 1), (most, 0)):
        record = make_record(0, "trial", make_plan(), make_measurement(make_plan(), check=check))
        assert len(rank([record]).rows) == ranked


def test_two_stages_on_one_gpu_have_no_rank() -> None:
    stages = tuple(StagePlan(device="cuda:0", first_layer=first, end_layer=first + 15) for first in (0, 15))
    plan = Plan(stages=stages, micro_batch_size=16)
    assert rank([make_record(0, "trial", plan, make_measurement(plan))]).rows == ()


def test_a_plan_that_breaks_a_constraint_has_no_rank_and_says_why() -> None:
    limit = 4300
    ranking = rank(STUDY, constraints=[Constraint.model_validate(f"p90_ttft_ms<={limit}")])
    for row in ranking.rows:
        keeps = row.metrics["p90_ttft_ms"] <= limit
        assert row.feasible == keeps
        assert (row.rank is not None) == keeps
    broken = [row for row in ranking.rows if not row.feasible]
    assert broken
    assert all("p90_ttft_ms" in row.broken_constraints[0] for row in broken)
    assert ranking.rows[-len(broken) :] == tuple(broken)


def test_a_metric_that_was_not_measured_keeps_no_constraint() -> None:
    plan = make_plan()
    records = [make_record(0, "trial", plan, make_measurement(plan, instrument=False))]
    row = rank(records, constraints=[Constraint.model_validate("bubble_ratio<=0.9")]).rows[0]
    assert row.broken_constraints == ("bubble_ratio was not measured",)
    assert (
        rank(records, [Objective(metric="bubble_ratio")]).unranked[0].unranked_because
        == "bubble_ratio was not measured"
    )


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_the_front_is_what_brute_force_finds(seed: int, count: int) -> None:
    rng = random.Random(seed)
    records = []
    for index in range(count):
        cut = rng.randint(1, 29)
        plan = make_plan((cut, 30 - cut), rng.choice([4, 8, 16, 32]))
        result = make_measurement(plan, num_iters=1, drift=rng.uniform(0.8, 1.2), seed=index)
        records.append(make_record(index, "trial", plan, result))
    objectives = [THROUGHPUT, TTFT, Objective(metric="peak_memory_bytes")]
    rows = rank(records, objectives).rows

    def no_worse(one: dict[str, float], other: dict[str, float]) -> bool:
        return all(goal.cost(one[goal.metric]) <= goal.cost(other[goal.metric]) for goal in objectives)

    for row in rows:
        dominated = any(
            no_worse(other.metrics, row.metrics) and not no_worse(row.metrics, other.metrics) for other in rows
        )
        assert row.on_front == (not dominated)
    assert [row.on_front for row in rows] == sorted((row.on_front for row in rows), reverse=True)
    assert [row.recommended for row in rows] == [row.rank == 1 for row in rows]


def test_best_is_separated_when_the_rounds_say_so() -> None:
    ours, theirs = make_plan((17, 13)), make_plan((16, 14))
    clear = rank(finalists(3, {ours: [1.0, 1.1, 1.0], theirs: [2.0, 2.1, 2.1]})).separation
    assert clear.separated
    assert (clear.rounds, clear.tied) == (3, ())
    assert "beats 16+14" in clear.text
    ranking = rank(finalists(8, {ours: [1.0, 1.0, 1.6] * 3, theirs: [1.2] * 8}))
    assert not ranking.separation.separated
    assert ranking.separation.text.startswith("tie: ")
    assert ranking.separation.tied == tuple(row.key for row in ranking.rows)


def test_a_drift_of_the_machine_does_not_order_the_finalists() -> None:
    # Every round has another drift; ours is 2 % better in each, and the medians of the two lie in different rounds.
    ours, theirs = make_plan((17, 13)), make_plan((16, 14))
    drifts = [1.0, 1.3, 1.6, 0.8, 1.1]
    equal = throughput(make_record(0, "trial", ours, make_measurement(ours, noise=0.0))) / throughput(
        make_record(0, "trial", theirs, make_measurement(theirs, noise=0.0))
    )
    ranking = rank(finalists(5, {ours: drifts, theirs: [1.02 * drift / equal for drift in drifts]}))
    assert ranking.best is not None
    assert ranking.best.plan == ours
    assert ranking.separation.separated


def test_a_plan_that_left_the_finals_stays_confirmed_and_behind() -> None:
    ours, theirs, slow = make_plan((17, 13)), make_plan((16, 14)), make_plan((10, 20))
    records = finalists(3, {ours: [1.0, 1.1, 1.2], theirs: [1.01, 1.1, 1.21], slow: [1.5, 1.6, 1.7]})
    more = finalists(2, {ours: [9.0, 9.0], theirs: [9.1, 9.1]})
    records += [
        record.model_copy(update={"number": len(records) + index, "round": 3 + (record.round or 0)})
        for index, record in enumerate(more)
    ]
    rows = rank(records).rows
    assert all(row.confirmed for row in rows)
    assert rows[-1].plan == slow
    assert rows[-1].value is not None
    assert rows[0].value is not None
    gains = [row.spread.runs for row in rows if row.spread]
    assert gains == [5, 5, 3]


def test_of_plans_that_tie_the_one_that_takes_less_is_best() -> None:
    fast, small = make_plan((17, 13), 32), make_plan((30,), 32)
    equal = throughput(make_record(0, "trial", small, make_measurement(small, noise=0.0))) / throughput(
        make_record(0, "trial", fast, make_measurement(fast, noise=0.0))
    )
    noise = [0.97, 1.03, 0.99, 1.02, 0.98, 1.0, 1.01, 1.0]
    ranking = rank(finalists(8, {fast: [1.0] * 8, small: [equal * 1.003 * factor for factor in noise]}))
    assert not ranking.separation.separated
    assert [row.plan for row in ranking.rows] == [small, fast]
    assert [row.recommended for row in ranking.rows] == [True, False]
    assert "on fewer devices" in (ranking.recommended_because or "")


def test_the_knee_of_a_front_is_best_and_said_to_be() -> None:
    plans = [make_plan((17, 13), size) for size in (4, 8, 16, 32)]
    records = []
    for index, (plan, speed, wait) in enumerate(zip(plans, (1.0, 0.7, 0.65, 0.6), (1.0, 1.1, 3.0, 6.0), strict=True)):
        result = make_measurement(plans[0], noise=0.0)
        run = result.iterations[0]
        # Throughput and first token are set apart from each other.
        last = max(run.token_times_s) * speed
        times = tuple(last if task.step else wait for task in result.tasks)
        result = result.model_copy(
            update={"iterations": (run.model_copy(update={"duration_s": last, "token_times_s": times}),)}
        )
        records.append(make_record(index, "trial", plan, result, trial_number=index))
    ranking = rank(records, [THROUGHPUT, TTFT])
    assert sum(row.on_front for row in ranking.rows) == 4
    assert ranking.best is not None
    assert ranking.best.plan == plans[1]
    assert [row.plan for row in ranking.rows] == [plans[1], plans[3], plans[2], plans[0]]
    assert "knee of 4 plans" in (ranking.recommended_because or "")
    two = rank(records[::3], [THROUGHPUT, TTFT])
    assert two.best is not None
    assert two.best.plan == plans[3]
    assert two.recommended_because is None


@pytest.mark.parametrize("metric", ["peak_memory_fraction", "p90_ttft_ms"])
def test_a_constraint_is_held_by_the_confirmed_values(metric: str) -> None:
    # It was kept in the search; in the finals, with the machine slower or memory fuller, it is not.
    plan, other = make_plan((17, 13)), make_plan((10, 20))
    within, beyond = make_measurement(plan, noise=0.0), make_measurement(plan, noise=0.0, drift=2.0)
    memory = tuple(stage.model_copy(update={"peak_bytes": 2 * stage.peak_bytes}) for stage in beyond.memory)
    beyond = beyond.model_copy(update={"memory": memory})
    limit = metrics.derive(within)[metric] * 1.05
    records = [
        make_record(0, "trial", plan, within, trial_number=0),
        make_record(1, "trial", other, make_measurement(other, noise=0.0, drift=0.5), trial_number=1),
    ]
    constraint = Constraint.model_validate(f"{metric}<={limit}")
    before = {row.plan: row.feasible for row in rank(records, constraints=[constraint]).rows}
    assert before[plan]
    finals = [make_record(2 + round_, "finalist", plan, beyond, round_=round_) for round_ in range(3)]
    after = rank([*records, *finals], constraints=[constraint])
    row = next(row for row in after.rows if row.plan == plan)
    assert row.rank is None
    assert metric in row.broken_constraints[0]
    assert after.best is None or after.best.plan == other


def test_two_rounds_are_too_few_and_none_is_no_comparison() -> None:
    ours, theirs = make_plan((17, 13)), make_plan((16, 14))
    few = rank(finalists(2, {ours: [1.0, 1.0], theirs: [2.0, 2.0]})).separation
    assert not few.separated
    assert "too few" in few.text
    apart = rank([make_record(n, "trial", plan, make_measurement(plan)) for n, plan in enumerate((ours, theirs))])
    assert not apart.separation.separated
    assert "not measured side by side" in apart.separation.text


def test_failed_runs_of_a_measured_plan_are_counted_but_not_interrupted_ones() -> None:
    plan = make_plan()
    records = [
        make_record(0, "trial", plan, make_failure()),
        make_record(1, "trial", plan, make_failure(FailureKind.INTERRUPTED)),
        make_record(2, "trial", plan, make_measurement(plan)),
    ]
    ranking = rank(records)
    assert ranking.rows[0].failed_runs == 1
    assert [failure.record for failure in ranking.failures] == [0, 1]


def test_nothing_at_all_is_a_ranking_too() -> None:
    ranking = rank([])
    assert ranking.best is None
    assert ranking.baseline is None
    assert not ranking.separation.separated


def test_a_ranking_survives_json() -> None:
    ranking = rank(STUDY, [THROUGHPUT, TTFT], [Constraint.model_validate("p90_ttft_ms<=4700")])
    assert type(ranking).model_validate_json(ranking.model_dump_json()) == ranking
