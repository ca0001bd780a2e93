"""Metrics against numpy, against brute force, and against what the schedule says must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench import metrics
from pipetune.bench.record import Iteration, Measurement, StageTrace, TaskShape, Telemetry
from pipetune.bench.spec import Goodput, Plan, Workload
from tests.record_factory import make_baseline_measurement, make_measurement, make_plan

finite = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


@st.composite
def measured_plans(draw: st.DrawFn) -> tuple[Plan, Workload, Measurement]:
    workload = Workload(
        num_prompts=draw(st.integers(1, 12)),
        input_len=draw(st.integers(1, 40)),
        output_len=draw(st.integers(1, 5)),
        random_range_ratio=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 3)),
    )
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    micro_batch = draw(st.integers(1, 8))
    prefill = draw(st.none() | st.integers(1, micro_batch))
    plan = make_plan(counts, micro_batch, prefill)
    plan = plan.model_copy(update={"max_in_flight": draw(st.none() | st.integers(1, 3))})
    noise, seed = draw(st.sampled_from([0.0, 0.3])), draw(st.integers(0, 5))
    return plan, workload, make_measurement(plan, workload, num_iters=2, noise=noise, seed=seed)


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0.0, 1.0))
def test_percentile_is_numpys(samples: list[float], quantile: float) -> None:
    expected = float(np.percentile(samples, quantile * 100))
    assert metrics.percentile(samples, quantile) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(("quantile", "needed"), [(0.5, 2), (0.9, 10), (0.95, 20), (0.99, 100)])
def test_a_percentile_needs_a_sample_in_its_tail(quantile: float, needed: int) -> None:
    assert metrics.samples_needed(quantile) == needed


@given(measured_plans())
def test_bubble_is_the_sum_of_its_parts(case: tuple[Plan, Workload, Measurement]) -> None:
    measurement = case[2]
    for index in range(len(measurement.iterations)):
        bubble = metrics.bubble(measurement, index)
        parts = [bubble["bubble_fill_drain"], bubble["bubble_imbalance"], bubble["bubble_wait"]]
        assert sum(parts) == pytest.approx(bubble["bubble_ratio"], abs=1e-12)
        for part in (*parts, bubble["bubble_ratio"]):
            assert -1e-9 <= part <= 1.0
        assert 0.0 < bubble["steady_utilization"] <= 1.0 + 1e-9


def test_bubble_of_a_schedule_known_by_hand() -> None:
    # stage 0  [0,2)[2,4)            busy 4, idle 2 at the end
    # stage 1       [2,3)[4,5)       busy 2, idle 2 before, 1 between, 1 after
    traces = (
        StageTrace(compute_start_s=(0.0, 2.0), compute_end_s=(2.0, 4.0), recv_wait_s=(0, 0), send_wait_s=(0, 0)),
        StageTrace(compute_start_s=(2.0, 4.0), compute_end_s=(3.0, 5.0), recv_wait_s=(2, 1), send_wait_s=(0, 0)),
    )
    measurement = Measurement(
        prompt_lens=(4, 4),
        order=(0, 1),
        output_len=1,
        micro_batch_sizes=(1, 1),
        tasks=tuple(TaskShape(micro_batch=index, step=0, first_row=0, end_row=1) for index in range(2)),
        iterations=(Iteration(duration_s=6.0, token_times_s=(3.0, 6.0), stages=traces),),
    )
    bubble = metrics.bubble(measurement, 0)
    assert bubble["bubble_ratio"] == pytest.approx(1 - 6 / 12)
    assert bubble["bubble_fill_drain"] == pytest.approx((2 + 3) / 12)
    assert bubble["bubble_imbalance"] == pytest.approx(1 / 12)  # 2 by imbalance, of which only 1 is left
    assert bubble["bubble_wait"] == pytest.approx(0.0)
    assert bubble["steady_utilization"] == pytest.approx(6 / 7)
    assert metrics.stage_metrics(measurement)["comm_ms"] == (0.0, 3000.0)


@given(measured_plans())
def test_request_times_go_back_to_the_order_given(case: tuple[Plan, Workload, Measurement]) -> None:
    measurement = case[2]
    run = measurement.iterations[0]
    times = metrics.request_times_s(measurement)[0]
    ends = np.cumsum([0, *measurement.micro_batch_sizes])
    for row, prompt in enumerate(measurement.order):
        micro_batch = int(np.searchsorted(ends, row, side="right")) - 1
        own = [
            (task, at)
            for task, at in zip(measurement.tasks, run.token_times_s, strict=True)
            if task.micro_batch == micro_batch and task.first_row <= row - ends[micro_batch] < task.end_row
        ]
        assert len(own) == measurement.output_len
        assert times["ttft"][prompt] == own[0][1]
        assert times["e2el"][prompt] == own[-1][1]
        assert times["queue"][prompt] <= times["ttft"][prompt]
        if measurement.output_len > 1:
            steps = measurement.output_len - 1
            assert times["tpot"][prompt] == pytest.approx((own[-1][1] - own[0][1]) / steps)
    assert max(times["e2el"]) == pytest.approx(run.duration_s)
    assert ("tpot" in times) == (measurement.output_len > 1)


@given(measured_plans(), st.randoms())
def test_latencies_follow_their_prompts_when_rows_are_sorted_otherwise(
    case: tuple[Plan, Workload, Measurement], rng: object
) -> None:
    measurement = case[2]
    order = list(measurement.order)
    rng.shuffle(order)  # type: ignore[attr-defined]
    shuffled = measurement.model_copy(update={"order": tuple(order)})
    before, after = metrics.request_times_s(measurement)[0], metrics.request_times_s(shuffled)[0]
    for old, new in zip(measurement.order, order, strict=True):
        assert before["e2el"][old] == after["e2el"][new]


@given(measured_plans())
def test_every_promised_metric_is_there_and_no_other(case: tuple[Plan, Workload, Measurement]) -> None:
    _, workload, measurement = case
    values = metrics.derive(measurement)
    assert set(values) == set(metrics.metric_names(workload.num_prompts, workload.output_len))
    assert all(math.isfinite(value) for value in values.values())


def test_gpu_metrics_come_from_telemetry() -> None:
    telemetry = Telemetry(energy_j=300.0, gpu_utilization=0.8)
    measurement = make_measurement(make_plan(), num_iters=3, telemetry=telemetry)
    values = metrics.derive(measurement)
    assert set(values) == set(metrics.metric_names(32, 16, gpu=True))
    assert values["output_tokens_per_joule"] == pytest.approx(3 * 32 * 16 / 300.0)


def test_throughput_counts_generated_tokens_alone() -> None:
    measurement = make_measurement(make_plan(), num_iters=3)
    values = metrics.derive(measurement)
    durations = sorted(run.duration_s for run in measurement.iterations)
    assert values["output_throughput"] == pytest.approx(32 * 16 / durations[1])
    assert values["total_token_throughput"] == pytest.approx(32 * (16 + 64) / durations[1])
    assert values["request_throughput"] == pytest.approx(32 / durations[1])
    assert sorted(metrics.throughputs(measurement))[1] == pytest.approx(values["output_throughput"])


def test_percentiles_with_too_few_requests_are_absent() -> None:
    assert "p90_ttft_ms" not in metrics.derive(make_measurement(make_plan(), Workload(num_prompts=9)))
    with_ten = metrics.derive(make_measurement(make_plan(), Workload(num_prompts=10)))
    assert "p90_ttft_ms" in with_ten
    assert "p95_ttft_ms" not in with_ten


def test_without_spans_there_is_no_bubble_and_no_queue() -> None:
    for measurement in (make_measurement(make_plan(), instrument=False), make_baseline_measurement(16)):
        values = metrics.derive(measurement)
        assert not [name for name in values if "bubble" in name or "queue" in name or name == "comm_ms"]
        assert values["mean_ttft_ms"] > 0
        assert metrics.stage_metrics(measurement) == {}


def test_memory_fraction_leaves_out_what_the_process_took_before_the_model() -> None:
    measurement = make_measurement(make_plan())
    values = metrics.derive(measurement)
    fullest = max(measurement.memory, key=lambda stage: stage.peak_bytes)
    assert values["peak_memory_bytes"] == fullest.peak_bytes
    assert values["peak_memory_fraction"] == pytest.approx(
        (fullest.peak_bytes - fullest.baseline_bytes) / fullest.cap_bytes
    )


def test_good_requests_keep_every_limit() -> None:
    times = {"ttft": (0.1, 0.2, 0.3), "tpot": (0.05, 0.01, 0.01), "e2el": (1.0, 1.0, 2.0)}
    assert metrics.good_requests(times, {"ttft": 250.0}) == 2
    assert metrics.good_requests(times, {"ttft": 250.0, "tpot": 20.0}) == 1
    assert metrics.good_requests(times, {"ttft": 300.0, "tpot": 50.0, "e2el": 2000.0}) == 3
    assert metrics.good_requests(times, {"e2el": 10.0}) == 0


def test_of_unlike_outputs_each_ends_with_its_own_last_token() -> None:
    measurement = Measurement(
        prompt_lens=(4, 4, 4), order=(2, 0, 1), output_len=4, output_lens=(1, 2, 4), micro_batch_sizes=(2, 1),
        tasks=tuple(
            TaskShape(micro_batch=batch, step=step, first_row=0, end_row=rows)
            for batch, step, rows in ((0, 0, 2), (1, 0, 1), (0, 1, 2), (1, 1, 1), (0, 2, 2), (0, 3, 2))
        ),
        iterations=(Iteration(duration_s=6.0, token_times_s=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), stages=()),),
        goodput=Goodput(e2el=4000),
    )  # fmt: skip
    (times,) = metrics.request_times_s(measurement)
    assert times["ttft"] == (1.0, 2.0, 1.0)
    assert times["e2el"] == (1.0, 4.0, 6.0)
    assert times["tpot"] == pytest.approx((0.0, 2.0, 5 / 3))
    derived = metrics.derive(measurement)
    assert derived["output_throughput"] == pytest.approx(7 / 6)
    # Of one token there is no time per token.
    assert derived["mean_tpot_ms"] == pytest.approx(1e3 * (2 + 5 / 3) / 2)
    assert (derived["request_goodput"], derived["slo_attainment"]) == pytest.approx((2 / 6, 2 / 3))
