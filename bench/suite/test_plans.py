"""Each plan as a benchmark: a round is a fleet of fresh processes, its time the workload's own."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.record import Machine
from bench.spec import Protocol
from bench.suite.case import PlanCase, run_fresh

_elapsed_s = [0.0]


def measured_s() -> float:
    """The suite's clock, which only workloads move: starting, loading and warming up take none of its time."""
    return _elapsed_s[0]


@pytest.mark.benchmark(timer=measured_s)
@pytest.mark.timeout(0)
def test_plan(benchmark: BenchmarkFixture, plan_case: PlanCase, request: pytest.FixtureRequest) -> None:
    """Rounds of one plan."""
    rounds: int = request.config.getoption("--plan-rounds")
    protocol = Protocol(num_iters=request.config.getoption("--plan-iters"), check_outputs=False)
    runs: list[dict[str, Any]] = []
    machines: list[Machine] = []

    def one_round() -> None:
        run, duration_s, machine = run_fresh(plan_case, protocol)
        runs.append(run)
        machines.append(machine)
        _elapsed_s[0] += duration_s

    benchmark.pedantic(one_round, rounds=rounds, iterations=1, warmup_rounds=0)  # type: ignore[no-untyped-call]
    benchmark.extra_info |= {
        "plan": plan_case.plan.describe(),
        "machine": machines[-1].model_dump(mode="json"),
        "model": plan_case.model.model_dump(mode="json"),
        "workload": plan_case.workload.model_dump(mode="json"),
        "runs": runs,
        **{name: statistics.median([run["metrics"][name] for run in runs]) for name in runs[0]["metrics"]},
    }

