"""The probe inside vLLM's workers on a GPU, over a stream whose clock is known: the device runs behind the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipetune.bench.engines.outcome import stage_trace
from pipetune.bench.engines.vllm_args import gpus_of
from pipetune.bench.engines.vllm_host import pipetune_vllm_probe
from pipetune.bench.spec import Plan


class Stream:
    """Work takes its time behind whatever was given before; the host only gives it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def run(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()

    class Event:
        at_s: float

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_s = stream.now_s

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at_s - self.at_s)

    for name, value in {
        "Event": Event,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 12345,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(pipetune_vllm_probe, "time", SimpleNamespace(monotonic=lambda: 100.0))
    return stream


class Runner:
    """A stage's runner: receives for 0.2 s, computes for 0.5 s, samples for 0.1 s."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def execute_model(self, batch: Any, received: Any) -> str:
        self.stream.run(0.5)
        return "hidden"

    def sample_tokens(self) -> str:
        self.stream.run(0.1)
        return "tokens"


def test_spans_are_the_devices_and_not_the_hosts(stream: Stream) -> None:
    probe, runner = pipetune_vllm_probe.StageProbe(), Runner(stream)
    probe.pipetune_spans, probe.pipetune_on = [], False
    probe.pipetune_device, probe.pipetune_entered, probe.pipetune_zero = "cuda", None, None
    probe._pipetune_wrap(runner, "execute_model", "compute", received=True)
    probe._pipetune_wrap(runner, "sample_tokens", "sample")
    stream.run(7.0)
    assert probe.pipetune_begin() is True
    batch = SimpleNamespace(num_scheduled_tokens={"a": 3, "b": 1}, total_num_scheduled_tokens=4)
    for _ in range(2):
        assert runner.execute_model(batch, SimpleNamespace(wait_for_comm=lambda: stream.run(0.2))) == "hidden"
        assert runner.sample_tokens() == "tokens"
    told = probe.pipetune_end()
    assert told["peak_bytes"] == 12345
    kinds = [kind for kind, *_ in told["spans"]]
    assert kinds == ["receive", "compute", "sample"] * 2
    trace = stage_trace(told["spans"], 100.0, is_last=True)
    assert trace.compute_start_s == pytest.approx((0.2, 0.7, 1.0, 1.5))
    assert trace.compute_end_s == pytest.approx((0.7, 0.8, 1.5, 1.6))
    assert trace.recv_wait_s == pytest.approx((0.2, 0.0, 0.2, 0.0))
    assert trace.step_tokens == (4, 0, 4, 0)


def test_engines_see_their_own_gpus() -> None:
    plan = Plan.from_layer_counts((2, 2), ("cuda:0", "cuda:1", "cuda:2", "cuda:3"), 1, replicas=2)
    assert (gpus_of(plan.replica(0)), gpus_of(plan.replica(1))) == ("0,1", "2,3")
    assert gpus_of(plan.replica(1), "GPU-a,GPU-b,GPU-c,GPU-d") == "GPU-c,GPU-d"
