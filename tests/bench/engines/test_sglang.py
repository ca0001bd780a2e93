"""SGLang as an engine: what the driver tells its host, and host, probe and guard over a stand-in for SGLang."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.engines.sglang import NEVER_RUN, SglangEngine
from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.errors import ConfigError, PlanError
from pipetune.bench.metrics import derive
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import ModelSpec, Plan, RunSpec, Sampling
from tests.bench.engines import fake_sglang
from tests.bench.engines.conftest import PROTOCOL, WORKLOAD, Make, make_plan
from tests.bench.engines.test_host import session

Told = Callable[[], list[dict[str, Any]]]
MODULES = ("entrypoints.engine", "managers.scheduler", "managers.tp_worker", "plugins.hook_registry", "runtime_context")


def sglang_plan(counts: tuple[int, ...] = (16, 14), **settings: Any) -> Plan:
    return make_plan(counts, name="sglang", **settings)


def measure(engine: VllmEngine, plan: Plan, **changes: Any) -> Measurement | Failure:
    workload = WORKLOAD.model_copy(update=changes)
    return engine.measure(RunSpec(model=ModelSpec(name="m"), workload=workload, plan=plan, protocol=PROTOCOL))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The host's files beside something that stands in for SGLang."""
    folder = tmp_path / "host"
    shutil.copytree(SglangEngine.HOST.parent, folder)
    for name in MODULES:
        path = folder / "sglang" / "srt" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from sglang.fake import *\n", encoding="utf-8")
    shutil.copy(fake_sglang.__file__, folder / "sglang" / "fake.py")
    info = folder / "sglang-0.5.23.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n", encoding="utf-8")
    (info / "top_level.txt").write_text("sglang\n", encoding="utf-8")
    return folder / SglangEngine.HOST.name


def test_the_real_host_and_its_probe_measure_over_the_stand_in(make_engine: Make, script: Path) -> None:
    engine = make_engine(name="sglang", script=script)
    outcome = measure(engine, sglang_plan(tensor_parallel_size=2))
    assert isinstance(outcome, Measurement), outcome
    assert (outcome.notes, outcome.transport) == ((NEVER_RUN,), "sglang")
    assert outcome.check is not None
    assert (outcome.check.tokens_equal, outcome.check.positions) == (True, 6)
    assert outcome.check.max_logit_error < 1e-5
    for run in outcome.iterations:
        # Every stage has a batch of one for each token of each request; the first is the prompt.
        assert [len(stage.compute_start_s) for stage in run.stages] == [5 * 4] * 2
        for stage in run.stages:
            assert sorted(stage.step_tokens) == [1] * 15 + [8] * 5
            spans = zip(stage.compute_start_s, stage.compute_end_s, strict=True)
            assert all(0.0 <= start < end for start, end in spans)
        assert [len(one.token_times_s) for one in run.requests] == [4] * 5
        assert all(one.began_s and one.began_s <= one.token_times_s[0] for one in run.requests)
    first, second = outcome.memory
    assert (first.device, second.device, first.peak_source) == ("cuda:0", "cuda:2", "cuda_allocator")
    assert (first.kv_bytes, first.peak_bytes, first.baseline_bytes) == (2**28, fake_sglang.PEAK_BYTES, 0)
    assert 0.0 < derive(outcome)["bubble_ratio"] < 1.0
    leader = engine._hosts[0].hello["hello"]
    # The host, four schedulers, the detokenizer, and multiprocessing's own.
    assert len(session(leader)) >= 6
    engine.interrupt()
    assert session(leader) == []


def test_wrong_log_probabilities_are_refused(make_engine: Make, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SGLANG", "wrong")
    outcome = measure(make_engine(name="sglang", script=script), sglang_plan())
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.WRONG_OUTPUT


@pytest.mark.parametrize(
    ("what", "kind", "said", "place"),
    [
        ("dies", FailureKind.WORKER_DIED, "exited with code 7 during warmup", (1, "cuda:1")),
        ("no memory", FailureKind.OVER_MEMORY_CAP, fake_sglang.NO_MEMORY, (None, None)),
    ],
)
def test_a_scheduler_that_ends_is_named_with_its_cause(
    make_engine: Make,
    script: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    kind: FailureKind,
    said: str,
    place: tuple[int | None, str | None],
) -> None:
    monkeypatch.setenv("FAKE_SGLANG", what)
    failure = measure(make_engine(name="sglang", script=script), sglang_plan())
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.stage, failure.device) == (kind, *place)
    assert said in failure.message


def test_a_start_says_what_the_plan_says_by_sglangs_names(make_engine: Make, told: Told) -> None:
    engine = make_engine(name="sglang")
    measure(engine, sglang_plan((20, 10), enforce_eager=True))
    settings = told()[0]["args"]
    assert settings["layers"] == [20, 10]
    assert (settings["chunked_prefill_size"], settings["max_running_requests"], settings["tp_size"]) == (256, 64, 1)
    assert (settings["disable_cuda_graph"], settings["random_seed"]) == (True, 0)
    # The first stage's KV cache is the larger one, and every stage holds as many tokens.
    each = sum(layer.kv_bytes_per_token for layer in engine.shape.layers[:20])
    assert settings["max_total_tokens"] == 64 * 2**20 // each
    assert "mem_fraction_static" not in settings
    measure(engine, sglang_plan(max_num_batched_tokens=None, max_num_seqs=None, kv_cache_memory_bytes=None))
    settings = [one["args"] for one in told() if one["do"] == "start"][1]
    assert settings["mem_fraction_static"] == pytest.approx(0.81, abs=1e-3)
    assert settings.keys() & {"chunked_prefill_size", "max_running_requests", "max_total_tokens"} == set()


def test_every_other_plan_is_a_new_start_and_the_same_one_is_not(make_engine: Make, told: Told) -> None:
    engine = make_engine(name="sglang")
    plans = [sglang_plan(), sglang_plan(), sglang_plan((20, 10)), sglang_plan((20, 10), max_num_batched_tokens=128)]
    outcomes = [measure(engine, plan) for plan in plans]
    assert [one["do"] for one in told() if one["do"] not in ("run", "logprobs")] == ["start"] * 3
    assert {one.notes for one in outcomes if isinstance(one, Measurement)} == {(NEVER_RUN,)}
    assert len(outcomes) == sum(isinstance(one, Measurement) for one in outcomes)


def test_a_replica_sees_its_own_gpus(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(name="sglang")
    assert isinstance(engine, SglangEngine)
    plan = sglang_plan(tensor_parallel_size=2)
    assert engine._environment(plan)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-ab,1")
    assert engine._environment(plan)["CUDA_VISIBLE_DEVICES"] == "7,5,GPU-ab,1"
    halves = make_plan((30,), replicas=2, name="sglang")
    assert [engine._environment(halves.replica(one))["CUDA_VISIBLE_DEVICES"] for one in range(2)] == ["7", "5"]


def test_draws_are_told_by_sglangs_names(make_engine: Make, script: Path) -> None:
    outcome = measure(make_engine(name="sglang", script=script), sglang_plan(), sampling=Sampling(temperature=0.7))
    assert isinstance(outcome, Measurement), outcome
    assert outcome.check is not None
    assert outcome.check.tokens_equal is None


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"sglang": "0.5.22"}, r"has SGLang 0.5.22; install sglang>=0.5.23,<0.5.24 there"),
        ({"vllm": "0.32.0"}, "has no SGLang"),
    ],
)
def test_another_version_is_refused_by_name(make_engine: Make, versions: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_engine(name="sglang", versions=versions)


def test_what_sglang_is_not_driven_with_is_refused(make_engine: Make) -> None:
    with pytest.raises(ConfigError, match="devices: SGLang is measured on GPUs of this host"):
        SglangEngine(ModelSpec(name="m"), ["cpu:0"], python=Path(sys.executable))
    engine = make_engine(name="sglang")
    with pytest.raises(PlanError, match=r"plan.engine: it is vllm, and SGLang is to run it"):
        engine.resolve(make_plan(), WORKLOAD)
    with pytest.raises(PlanError, match=r"plan.engine.served: SGLang"):
        engine.resolve(sglang_plan(served=True), WORKLOAD)
