"""Plans measured under arrivals, by real workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.metrics import derive, metric_names, request_times_s, stage_busy_s
from pipetune.bench.record import Measurement, Record
from pipetune.bench.spec import Arrivals, Goodput, ModelSpec, Plan, Protocol, Workload
from pipetune.tuner.planning.calibration.observation import observe
from tests.tiny_models import save_tiny_model

DEVICES = ("cpu:0", "cpu:1")
PROTOCOL = Protocol(num_iters=2, num_iters_warmup=1, timeout_s=120.0)
WORKLOAD = Workload(
    num_prompts=24,
    input_len=9,
    output_len=5,
    random_range_ratio=0.5,
    random_output_range_ratio=0.5,
    goodput=Goodput(ttft=1e6),
    arrivals=Arrivals(request_rate=60.0, max_concurrency=5),
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "llama", "llama", 4)
    logs = tmp_path_factory.mktemp("logs")
    with Experiment.start(ModelSpec(name=str(folder)), DEVICES, log_dir=logs) as started:
        yield started


PLANS = (
    Plan.from_layer_counts((1, 3), DEVICES, 4, prefill_chunk_size=4),
    Plan.from_layer_counts((4,), DEVICES, 4, prefill_chunk_size=4, replicas=2),
)


@pytest.fixture(scope="module", params=PLANS, ids=["pipeline", "replicas"])
def record(request: Any, experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Record:
    assert experiment.make_reference(tmp_path_factory.mktemp("reference") / "file", WORKLOAD, PROTOCOL) is None
    return experiment.measure(request.param, WORKLOAD, PROTOCOL)


def test_tokens_are_the_unsplit_models_and_every_request_is_told_of(record: Record) -> None:
    result = record.result
    assert isinstance(result, Measurement), result
    assert Record.model_validate_json(record.model_dump_json()) == record
    assert result.check is not None
    assert result.check.tokens_equal is True
    assert record.effective is not None
    # At most two slots a stage, and one of a stage alone.
    assert record.effective.in_flight == {2: 4, 1: 1}[len(record.effective.plan.stages)]
    for run in result.iterations:
        assert [len(one.token_times_s) for one in run.requests] == list(WORKLOAD.generated_lens)
        for one in run.requests:
            moments = [one.arrived_s, one.noticed_s, one.admitted_s, one.began_s, *one.token_times_s]
            assert moments == sorted(moments)  # type: ignore[type-var]
        # Never more in the system than were let in.
        spans = [(one.admitted_s, one.token_times_s[-1]) for one in run.requests]
        assert max(sum(a <= begin < b for a, b in spans if a is not None) for begin, _ in spans if begin) <= 5
    gaps = [[one.arrived_s for one in run.requests] for run in result.iterations]
    assert gaps[0] != gaps[1]
    # The last of n comes at n / rate, whatever was drawn.
    assert gaps[0][-1] == pytest.approx(24 / 60.0) == gaps[1][-1]


def test_stage_time_is_busy_bubble_or_idle(record: Record) -> None:
    result = record.result
    assert isinstance(result, Measurement)
    for index, run in enumerate(result.iterations):
        one = result.model_copy(update={"iterations": (run,)})
        values = derive(one)
        parts = ("fill_drain", "imbalance", "underfilled", "wait")
        bubble = sum(values[f"bubble_{part}"] for part in parts)
        area = 2 * run.duration_s
        assert sum(stage_busy_s(result, index)) + (bubble + values["idle_ratio"]) * area == pytest.approx(
            area, abs=1e-9
        )
        assert bubble == pytest.approx(values["bubble_ratio"], abs=1e-12)
        assert all(values[f"bubble_{part}"] >= -1e-9 for part in parts)
        assert values["idle_ratio"] >= 0.0
    values = derive(result)
    assert set(values) == set(metric_names(24, 7, goodput=True, arrivals=True))
    assert values["slo_attainment"] == 1.0


def test_every_stages_tasks_teach(record: Record) -> None:
    found = observe(record)
    assert found is not None
    assert {task.stage for task in found.tasks} == {0, 1}
    assert isinstance(record.result, Measurement)
    loads = [run.stage_loads for run in record.result.iterations]
    for stage in range(2):
        counted = sum(task.count for task in found.tasks if task.stage == stage)
        assert counted == sum(len(own[stage].load_tasks) for own in loads)
    seen = [(task.decode_rows, task.decode_past) for task in found.tasks]
    assert any(rows for rows, _ in seen), "prefills that took a step along are kinds of their own"
    assert all((rows > 0) == (past > 0) for rows, past in seen)


def test_latencies_count_from_the_scheduled_arrival(record: Record) -> None:
    result = record.result
    assert isinstance(result, Measurement)
    times = request_times_s(result)[0]
    first = result.iterations[0].requests[0]
    assert times["ttft"][0] == first.token_times_s[0] - first.arrived_s
    columns = (times[name] for name in ("client_queue_time", "queue", "ttft", "e2el"))
    assert all(0 <= client <= queue <= ttft <= e2el for client, queue, ttft, e2el in zip(*columns, strict=True))


def test_a_trace_says_when_requests_come_and_what_they_are(experiment: Experiment) -> None:
    arrivals = Arrivals(trace="recorded.jsonl", times_s=(0.0, 0.02, 0.02))
    workload = Workload(num_prompts=3, input_lens=(4, 11, 2), output_lens=(3, 1, 5), arrivals=arrivals)
    protocol = PROTOCOL.model_copy(update={"num_iters": 1, "check_outputs": False})
    result = experiment.measure(Plan.from_layer_counts((4,), DEVICES[:1], 2), workload, protocol).result
    assert isinstance(result, Measurement), result
    assert result.prompt_lens == (4, 11, 2)
    assert [one.arrived_s for one in result.iterations[0].requests] == [0.0, 0.02, 0.02]
    assert [len(one.token_times_s) for one in result.iterations[0].requests] == [3, 1, 5]
