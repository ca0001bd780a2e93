"""What a record teaches: every task counted, nothing from runs that show nothing, and few bytes."""

from __future__ import annotations

from collections import Counter

import pytest

from pipetune.bench.metrics import derive, stage_busy_s
from pipetune.bench.profile import TaskKind
from pipetune.bench.record import (
    SHARED_DEVICE_NOTE,
    Failure,
    Iteration,
    LoadTask,
    Measurement,
    RequestTimes,
    StageTrace,
)
from pipetune.bench.spec import Plan, Workload
from pipetune.tuner.planning.calibration.observation import Observation, observe
from tests.record_factory import (
    WORKLOAD,
    make_baseline_measurement,
    make_failure,
    make_measurement,
    make_plan,
    make_record,
)
from tests.tuner.planning.factory_costs import HOP_S, make_model


def observed(plan: Plan, **options: object) -> tuple[Measurement, Observation]:
    measurement = make_measurement(plan, **options)  # type: ignore[arg-type]
    workload = options.get("workload", WORKLOAD)
    assert isinstance(workload, Workload)
    observation = observe(make_record(0, "trial", plan, measurement, workload=workload))
    assert observation is not None
    return measurement, observation


@pytest.mark.parametrize(
    "plan",
    [
        make_plan((17, 13), 16),
        make_plan((30,), 8),
        make_plan((10, 12, 8), 8, prefill=2),
        make_plan((16, 14), 16, chunk=24),
        make_plan((16, 14), 12, replicas=2),
    ],
    ids=lambda plan: plan.describe(),
)
def test_every_task_is_counted_and_nothing_of_its_time_is_lost(plan: Plan) -> None:
    measurement, observation = observed(plan, noise=0.0)
    for stage in range(len(plan.devices)):
        own = [span for span in observation.tasks if span.stage == stage]
        counts = measurement.replica_tasks or (len(measurement.tasks),)
        assert sum(span.count for span in own) == 3 * counts[stage // len(plan.stages)]
        busy = sum(stage_busy_s(measurement, index)[stage] for index in range(3))
        assert sum(span.count * span.seconds for span in own) == pytest.approx(busy, rel=1e-3)
    assert observation.metrics == derive(measurement)


def test_kinds_are_those_of_the_cost_model() -> None:
    plan = make_plan((16, 14), 16, prefill=8, chunk=24)
    _, observation = observed(plan)
    seen = Counter[tuple[int, bool, bool]]()
    for span in observation.tasks:
        if span.stage == 0:
            seen[span.rows, span.kind.is_decode, span.samples] += span.count // 3
    expected = Counter[tuple[int, bool, bool]]()
    for kind, count in make_model().kinds(plan).items():
        expected[kind.rows, kind.is_decode, kind.samples] += count
    assert seen == expected


def test_long_runs_and_many_lengths_stay_small() -> None:
    workload = Workload(num_prompts=64, input_len=200, output_len=64, random_range_ratio=0.5)
    _, observation = observed(make_plan((17, 13), 4), workload=workload)
    text = observation.model_dump_json()
    assert Observation.model_validate_json(text) == observation
    assert len(text) < 12_000


def test_hand_overs_to_stages_that_wait_take_a_hop() -> None:
    _, observation = observed(make_plan((25, 5), 16), noise=0.0)
    forward = [one for one in observation.hand_overs if one.new_tokens == 1]
    assert forward
    assert all((one.source, one.target) == (0, 1) for one in forward)
    assert all(one.seconds == pytest.approx(HOP_S, rel=0.05) for one in forward)
    _, back = observed(make_plan((15, 15), 32), noise=0.0)
    returns = [one for one in back.hand_overs if one.target == 0]
    assert [(one.source, one.rows, one.new_tokens) for one in returns] == [(1, 32, 0)]
    assert returns[0].seconds == pytest.approx(HOP_S, rel=0.05)


def test_a_stage_that_has_work_goes_on_at_once() -> None:
    _, observation = observed(make_plan((17, 13), 8), noise=0.0)
    assert observation.gap_s[0] == pytest.approx(0.0, abs=1e-6)


def test_tasks_beside_a_busy_device_stand_apart() -> None:
    _, observation = observed(make_plan((15, 15), 32))
    assert {round(span.others) for span in observation.tasks} == {0}  # a single micro-batch: one stage at a time
    _, busy = observed(make_plan((15, 15), 2), noise=0.0)
    decodes = [span for span in busy.tasks if span.kind.is_decode]
    assert max(span.others for span in decodes) > 0.8
    assert all(0.0 <= span.others <= 1.0 for span in busy.tasks)


def test_iterations_give_a_spread_and_disturbances_are_marked() -> None:
    _, observation = observed(make_plan((17, 13), 16), noise=0.05)
    assert observation.iterations == 3
    assert observation.spread is not None
    assert 0.0 < observation.spread < 0.1
    assert not observation.disturbed
    _, single = observed(make_plan((17, 13), 16), num_iters=1, disturbances=("somebody else ran",))
    assert single.spread is None
    assert single.disturbed


def test_runs_that_show_no_tasks_teach_nothing() -> None:
    plan = make_plan((17, 13), 16)
    outcomes: list[Measurement | Failure] = [
        make_failure(),
        make_baseline_measurement(16),
        make_measurement(plan, instrument=False),
        make_measurement(plan, notes=(f"{SHARED_DEVICE_NOTE}: stages share a GPU",)),
    ]
    for outcome in outcomes:
        baseline = isinstance(outcome, Measurement) and outcome.method != "pipeline"
        assert observe(make_record(0, "trial", None if baseline else plan, outcome)) is None


def loaded(steps: int) -> Iteration:
    """Two requests: a prompt in two chunks, then steps; the second stage waits for each task by 2 ms."""
    chunks = [
        LoadTask(kind="prefill", slot=0, rows=2, tokens=6, past=0, samples=False),
        LoadTask(kind="prefill", slot=0, rows=2, tokens=2, past=6),
    ]
    both = LoadTask(kind="prefill", slot=0, rows=3, tokens=5, past=0, decode_rows=2, decode_past=9)
    step = LoadTask(kind="decode", slot=0, rows=2, tokens=1, past=8)
    tasks = (*chunks, both, *(step.model_copy(update={"past": 8 + place}) for place in range(steps)))
    starts = [0.1 * place for place in range(len(tasks))]
    took = [(0.02, 0.04) if task.kind == "prefill" else (0.02, 0.01) for task in tasks]
    begun = starts, [start + own[0] + 0.002 for start, own in zip(starts, took, strict=True)]
    traces = tuple(
        StageTrace(
            compute_start_s=tuple(own),
            compute_end_s=tuple(start + times[stage] for start, times in zip(own, took, strict=True)),
            recv_wait_s=(0.0,) * len(tasks),
            send_wait_s=(0.0,) * len(tasks),
        )
        for stage, own in enumerate(begun)
    )
    times = RequestTimes(began_s=0.0, token_times_s=(0.2, 0.3, 0.4, 0.5))
    return Iteration(
        duration_s=starts[-1] + 0.1, token_times_s=(), stages=traces, requests=(times, times), load_tasks=tasks
    )


def test_a_load_teaches_what_its_tasks_took_and_what_stages_waited_for() -> None:
    measurement = Measurement(
        prompt_lens=(8, 7),
        order=(0, 1),
        output_len=4,
        micro_batch_sizes=(),
        tasks=(),
        iterations=(loaded(3), loaded(5)),
    )
    observation = observe(make_record(0, "trial", make_plan((16, 14), 4), measurement))
    assert observation is not None
    seen = {(one.stage, one.kind.is_decode, one.samples): one for one in observation.tasks}
    assert (seen[0, False, False].seconds, seen[0, False, False].count) == pytest.approx((0.02, 2))
    assert (seen[1, False, True].seconds, seen[1, False, True].count) == pytest.approx((0.04, 2))
    assert {(one.rows, one.new_tokens) for one in observation.tasks if not one.decode_rows} == {(2, 6), (2, 2), (2, 1)}
    joined = {(one.rows, one.new_tokens, one.step, one.count) for one in observation.tasks if one.decode_rows}
    assert joined == {(3, 5, TaskKind(2, 1, 9), 2)}
    assert sum(one.count for one in observation.tasks if one.kind.is_decode and one.stage) == 8
    assert {(one.source, one.target, one.seconds) for one in observation.hand_overs} == {(0, 1, 0.002)}
    assert observation.gap_s == (None, None)
    assert observation.spread is None
    assert observation.metrics == derive(measurement)
