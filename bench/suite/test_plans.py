"""Each plan as a benchmark: a round is a fleet of fresh processes, its time the workload's own."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipetune.bench.errors import PipetuneError
from pipetune.bench.spec import Protocol
from pipetune.bench.suite.case import PlanCase, Round, run_fresh

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

_elapsed_s = [0.0]


def measured_s() -> float:
    """The suite's clock, which only workloads move: starting, loading and warming up take none of its time."""
    return _elapsed_s[0]


@pytest.mark.benchmark(timer=measured_s)
@pytest.mark.timeout(0)
def test_plan(
    benchmark: "BenchmarkFixture", plan_case: PlanCase, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A rehearsal, whose output is compared with the unsplit model's and which is not counted; then the rounds."""
    check = not request.config.getoption("--plan-no-check")
    num_iters: int = request.config.getoption("--plan-iters")
    rounds: list[Round] = []

    def one_round() -> None:
        now = run_fresh(plan_case, Protocol(num_iters=num_iters, check_outputs=check and not rounds), tmp_path)
        rounds.append(now)
        _elapsed_s[0] += now.run["metrics"]["duration_s"]

    count: int = request.config.getoption("--plan-rounds")
    try:
        benchmark.pedantic(one_round, rounds=count, iterations=1, warmup_rounds=1)  # type: ignore[no-untyped-call]
    except PipetuneError as error:
        # Within `pedantic` it must be an exception of the common kind: these alone keep a benchmark out of the JSON.
        pytest.fail(str(error), pytrace=False)
    counted = rounds[1:] or rounds
    last = counted[-1]
    benchmark.extra_info |= {
        "describes": plan_case.plan.describe(),
        "plan": plan_case.plan.model_dump(mode="json"),
        "machine": last.machine.model_dump(mode="json"),
        "model": last.model.model_dump(mode="json"),
        "workload": plan_case.workload.model_dump(mode="json"),
        "runs": [one.run for one in counted],
        **{name: statistics.median([one.run["metrics"][name] for one in counted]) for name in last.run["metrics"]},
    }
