"""vLLM as an engine, over a host that speaks the protocol without vLLM: moves, measurements, and every failure."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.errors import ConfigError, PlanError
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.metrics import derive
from pipetune.bench.record import Failure, FailureKind, Measurement, Record
from pipetune.bench.spec import Arrivals, Goodput, ModelSpec, Plan, RunSpec, Sampling
from tests.bench.engines.conftest import PROTOCOL, WORKLOAD, Make, make_plan
from tests.bench.engines.fake_host import BASELINE_BYTES, KV_BYTES, STEP_S

Told = Callable[[], list[dict[str, Any]]]


def spec_of(plan: Plan, **changes: Any) -> RunSpec:
    workload, protocol = changes.pop("workload", WORKLOAD), PROTOCOL.model_copy(update=changes)
    return RunSpec(model=ModelSpec(name="m"), workload=workload, plan=plan, protocol=protocol)


def measured(engine: VllmEngine, plan: Plan, **changes: Any) -> Measurement:
    outcome = engine.measure(spec_of(plan, **changes))
    assert isinstance(outcome, Measurement), outcome
    return outcome


def failed(engine: VllmEngine, plan: Plan, **changes: Any) -> Failure:
    outcome = engine.measure(spec_of(plan, **changes))
    assert isinstance(outcome, Failure), outcome
    return outcome


def test_a_plan_is_measured_with_requests_spans_memory_and_check(make_engine: Make, told: Told) -> None:
    outcome = measured(make_engine(), make_plan())
    assert (outcome.method, len(outcome.iterations), len(outcome.warmup_s)) == ("engine", 2, 2)
    assert outcome.prompt_lens == (8,) * 5
    first, last = outcome.iterations[0].stages
    # Sampling is the last stage's alone; what the first one waits for is not among the spans.
    assert (len(first.compute_start_s), len(last.compute_start_s)) == (4, 8)
    assert sum(first.recv_wait_s) == 0.0
    assert sum(last.recv_wait_s) == pytest.approx(0.004)
    assert (first.step_requests, first.step_tokens) == ((5,) * 4, (64,) * 4)
    assert last.step_tokens == (64, 0) * 4
    memory = outcome.memory[1]
    assert (memory.kv_bytes, memory.baseline_bytes, memory.peak_bytes - BASELINE_BYTES) == (
        KV_BYTES,
        BASELINE_BYTES,
        2**29,
    )
    assert outcome.check is not None
    assert (outcome.check.tokens_equal, outcome.check.argmax_flips, outcome.check.positions) == (True, 0, 6)
    assert outcome.check.max_logit_error < 1e-5
    metrics = derive(outcome)
    assert metrics["output_throughput"] == pytest.approx(20 / (4 * STEP_S))
    assert metrics["bubble_ratio"] == pytest.approx(1 - (4 * 0.010 + 4 * 0.012) / (2 * 4 * STEP_S))
    assert metrics["mean_ttft_ms"] == pytest.approx(20.0)
    assert metrics["median_itl_ms"] == pytest.approx(20.0)
    assert [one["do"] for one in told()] == ["start", "logprobs", "run", "run", "run", "run"]


def test_a_start_says_what_the_plan_says_and_leaves_the_rest_to_vllm(make_engine: Make, told: Told) -> None:
    engine = make_engine()
    measured(engine, make_plan(max_num_seqs=None, kv_cache_memory_bytes=None, enforce_eager=True))
    settings = told()[0]["args"]
    assert settings["layers"] == [16, 14]
    assert settings["max_num_batched_tokens"] == 256
    assert settings["max_model_len"] == 8 + 4 + 1
    assert settings["enforce_eager"] is True
    # 0.9 of a device, of which there are four.
    assert settings["gpu_memory_utilization"] == 0.225
    assert "max_num_seqs" not in settings
    assert "kv_cache_memory_bytes" not in settings


def test_splits_and_smaller_limits_are_taken_in_place_and_what_is_larger_needs_a_start(
    make_engine: Make, told: Told
) -> None:
    engine = make_engine()
    for plan in (make_plan(), make_plan((20, 10)), make_plan((20, 10), max_num_batched_tokens=128)):
        measured(engine, plan)
    assert [one["do"] for one in told() if one["do"] not in ("run", "logprobs")] == [
        *("start", "repartition", "limits", "limits"),
    ]
    assert told()[-1]["do"] == "run"
    for plan in (make_plan(max_num_batched_tokens=512), make_plan((10, 10, 10)), make_plan(enforce_eager=True)):
        before = len(told())
        measured(engine, plan)
        assert told()[before]["do"] == "start"


def test_a_split_is_not_taken_in_place_where_nothing_would_tell_that_it_is_wrong(make_engine: Make, told: Told) -> None:
    engine = make_engine(reference=False)
    measured(engine, make_plan())
    assert measured(engine, make_plan((20, 10))).check is None
    assert [one["do"] for one in told() if one["do"] != "run"] == ["start", "start"]


def test_a_wrong_output_in_place_is_put_right_by_a_start_and_said(make_engine: Make, told: Told) -> None:
    engine = make_engine(wrong_in_place=True)
    assert measured(engine, make_plan()).notes == ()
    outcome = measured(engine, make_plan((20, 10)))
    assert outcome.notes == ("re-partitioned in place its output was wrong; the engine was started anew",)
    assert [one["do"] for one in told() if one["do"] != "run"][2:] == [
        "repartition",
        "limits",
        "logprobs",
        "start",
        "logprobs",
    ]


def test_a_split_that_fails_in_place_is_started_anew(make_engine: Make) -> None:
    engine = make_engine(
        repartition="error:AttributeError: this version of vLLM has no EngineCore._initialize_kv_caches"
    )
    measured(engine, make_plan())
    (note,) = measured(engine, make_plan((20, 10))).notes
    assert "started anew" in note
    assert "_initialize_kv_caches" in note


def test_replicas_share_the_prompts_and_shards_a_stage(make_engine: Make, told: Told) -> None:
    outcome = measured(make_engine(), make_plan(replicas=2))
    # The two hosts are told at once.
    assert sorted([len(one["args"]["prompts"]) for one in told() if one["do"] == "run"][:2]) == [2, 3]
    assert len(outcome.iterations[0].stages) == len(outcome.memory) == 4
    assert [len(one.token_times_s) for one in outcome.iterations[0].requests] == [4] * 5
    assert outcome.check is not None
    assert outcome.check.tokens_equal
    shards = measured(make_engine(), make_plan(tensor_parallel_size=2))
    assert [one.device for one in shards.memory] == ["cpu:0", "cpu:2"]
    # The fuller one of the two.
    assert shards.memory[0].peak_bytes == BASELINE_BYTES + 2**29 + 1


def test_requests_come_over_time_and_latencies_count_from_when_they_came(make_engine: Make, told: Told) -> None:
    arrivals = Arrivals(request_rate=100.0, seed=3)
    workload = WORKLOAD.model_copy(update={"arrivals": arrivals, "goodput": Goodput(ttft=25.0)})
    outcome = measured(make_engine(), make_plan(), workload=workload)
    warm, *came = [one["args"]["at_s"] for one in told() if one["do"] == "run"][1:]
    assert warm == [0.0] * 5
    # Each timed pass has gaps of its own.
    assert [one == sorted(one) and one[-1] == pytest.approx(0.05) for one in came] == [True, True]
    assert came[0] != came[1]
    assert [one.arrived_s for one in outcome.iterations[0].requests] == pytest.approx(came[0], abs=1e-5)
    metrics = derive(outcome)
    assert metrics["mean_ttft_ms"] == pytest.approx(1e3 * STEP_S, rel=1e-3)
    assert metrics["mean_queue_ms"] == pytest.approx(1.0, rel=1e-2)
    assert metrics["slo_attainment"] == 1.0
    assert outcome.steady


def test_a_served_engine_is_started_anew_for_every_other_plan(make_engine: Make, told: Told) -> None:
    engine = make_engine()
    plans = [make_plan(), make_plan(served=True), make_plan(served=True), make_plan((20, 10), served=True)]
    plans.append(make_plan((20, 10), served=True, max_num_batched_tokens=128))
    for plan in plans:
        measured(engine, plan)
    does = [(one["do"], one["args"].get("served")) for one in told() if one["do"] not in ("run", "logprobs")]
    assert does == [("start", False), *[("start", True)] * 3]
    assert len({engine_plan.describe() for engine_plan in plans}) == 4


def test_draws_of_other_software_are_not_compared(make_engine: Make, told: Told) -> None:
    workload = WORKLOAD.model_copy(update={"sampling": Sampling(temperature=0.7, top_k=5)})
    outcome = measured(make_engine(wrong_tokens=1), make_plan(), workload=workload)
    assert outcome.check is not None
    assert outcome.check.tokens_equal is None
    assert told()[-1]["args"]["sampling"] == {"temperature": 0.7, "top_k": 5, "top_p": 1.0, "seed": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [({"wrong_logprobs": 0.5}, "log-probabilities are off by 0.5"), ({"wrong_tokens": 1}, "tokens of 5 of 5 prompts")],
)
def test_wrong_output_is_refused(make_engine: Make, options: dict[str, Any], said: str) -> None:
    failure = failed(make_engine(**options), make_plan())
    assert failure.kind is FailureKind.WRONG_OUTPUT
    assert said in failure.message


KV_ERROR = (
    "error:Exception: WorkerProc initialization failed|"
    "(Worker pid=1) ERROR 11-29 [x.py:1] ValueError: No available memory for the cache blocks. Try more"
)


@pytest.mark.parametrize(
    ("options", "kind", "said", "place"),
    [
        ({"start": KV_ERROR}, FailureKind.OVER_MEMORY_CAP, "No available memory for the cache blocks", None),
        ({"start": "error:RuntimeError: not enough memory: you tried"}, FailureKind.OUT_OF_MEMORY, "not enough", None),
        (
            {"start": "error:ValueError: Model architectures ['X'] are not supported for now."},
            FailureKind.UNSUPPORTED_MODEL,
            "['X']",
            None,
        ),
        (
            {"start": "error:Exception: WorkerProc initialization failed|KeyError: 'rope'"},
            FailureKind.WORKER_ERROR,
            "KeyError: 'rope'",
            None,
        ),
        ({"start": "exit"}, FailureKind.WORKER_DIED, "exited with code 3 during start", None),
        ({"ignores_layers": True}, FailureKind.WORKER_ERROR, "did not take the split", None),
        ({"run": "died:-9"}, FailureKind.WORKER_DIED, "stage 1 on cpu:1: was killed by SIGKILL", (1, "cpu:1")),
        ({"run": "died:1"}, FailureKind.WORKER_DIED, "exited with code 1 during warmup", (1, "cpu:1")),
        ({"run": "kill"}, FailureKind.WORKER_DIED, "the engine's host: was killed by SIGKILL", None),
        ({"run": "hang"}, FailureKind.WORKER_HUNG, "no sign of life for 1 s", None),
        ({"run": "garbage"}, FailureKind.WORKER_ERROR, "Traceback (most recent", None),
        ({"run": "stranger"}, FailureKind.WORKER_ERROR, "it answered command 99, not", None),
        ({"peak_bytes": 2**40}, FailureKind.OVER_MEMORY_CAP, "peaked at", (0, "cpu:0")),
    ],
)
def test_every_failure_is_named_and_leaves_an_engine_that_starts_again(
    make_engine: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: dict[str, Any],
    kind: FailureKind,
    said: str,
    place: tuple[int, str] | None,
) -> None:
    engine = make_engine(**options)
    failure = failed(engine, make_plan())
    assert failure.kind is kind, failure
    assert said in failure.message
    assert ((failure.stage, failure.device) if failure.stage is not None else None) == place
    monkeypatch.setenv("FAKE_HOST", f'{{"told": "{tmp_path / "told"}"}}')
    engine.interrupt()
    measured(engine, make_plan())


def test_a_start_that_takes_too_long_is_a_timeout(make_engine: Make) -> None:
    failure = failed(make_engine(start="slow"), make_plan(), timeout_s=1.0)
    assert (failure.kind, failure.phase) == (FailureKind.TIMEOUT, "start")


@pytest.mark.parametrize(
    ("plan", "bytes_had"),
    [(make_plan(kv_cache_memory_bytes="1MiB"), 2**20), (make_plan(kv_cache_memory_bytes="2TiB"), None)],
)
def test_what_cannot_fit_is_refused_before_it_is_started(
    make_engine: Make, told: Told, plan: Plan, bytes_had: int | None
) -> None:
    engine = make_engine()
    failure = failed(engine, plan)
    assert failure.kind is FailureKind.OVER_MEMORY_CAP
    assert failure.bytes_had == (bytes_had or int(0.9 * engine.device_bytes["cpu:0"]))
    assert told() == []


@pytest.mark.parametrize(
    ("versions", "said"),
    [({"vllm": "0.40.1"}, r"has vLLM 0.40.1; install vllm>=0.32,<0.33 there"), ({"torch": "2"}, "has no vLLM")],
)
def test_another_version_is_refused_by_name(make_engine: Make, versions: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_engine(versions=versions)


def test_a_python_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine_python: .*nowhere cannot be run: No such file"):
        VllmEngine(ModelSpec(name="m"), ["cpu:0"], python=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("model", "devices", "said"),
    [
        (ModelSpec(name="m"), ["cpu:0", "cuda:0"], "devices: vLLM is measured on CPUs .* not on cuda:0"),
        (ModelSpec(name="m", load_format="dummy"), ["cpu:0"], "model.load_format=dummy"),
    ],
)
def test_what_vllm_is_not_driven_with_is_refused(model: ModelSpec, devices: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        VllmEngine(model, devices, python=Path(sys.executable))


def test_plans_that_are_not_its_own_are_refused(make_engine: Make) -> None:
    engine = make_engine(devices=2)
    with pytest.raises(PlanError, match=r"plan\.engine: there is none"):
        engine.resolve(make_plan().model_copy(update={"engine": None}), WORKLOAD)
    with pytest.raises(PlanError, match="layer 29 is missing"):
        engine.resolve(make_plan((15, 14)), WORKLOAD)
    with pytest.raises(PlanError, match="cpu:2 is not among the devices"):
        engine.resolve(make_plan((10, 10, 10)), WORKLOAD)
    with pytest.raises(ConfigError, match="kind=score"):
        engine.resolve(make_plan(), WORKLOAD.model_copy(update={"kind": "score"}))
    arrivals = Arrivals(request_rate=2.0, max_concurrency=3)
    with pytest.raises(ConfigError, match=r"max_concurrency: not kept for vLLM"):
        engine.resolve(make_plan(), WORKLOAD.model_copy(update={"arrivals": arrivals}))


def test_an_experiment_drives_it_and_its_records_are_read_again(make_engine: Make) -> None:
    engine = make_engine()
    with Experiment.start(engine.model, engine.devices, start_fleet=lambda *_: engine) as experiment:
        plan = make_plan()
        record = experiment.measure(plan, WORKLOAD, PROTOCOL)
        baseline = experiment.baseline(16, WORKLOAD, PROTOCOL)
    assert record.effective is not None
    assert record.effective.key == "cpu:0[0:16],cpu:1[16:30] vllm budget=256 seqs=64 KV=64MiB"
    for one in (record, baseline):
        assert isinstance(one.result, Measurement)
        assert Record.model_validate_json(one.model_dump_json()) == one
    assert isinstance(baseline.result, Measurement)
    assert (baseline.result.batch_size, len(baseline.result.memory)) == (16, 1)
    assert engine.machine.software.packages["engine's vllm"] == "0.32.0"
