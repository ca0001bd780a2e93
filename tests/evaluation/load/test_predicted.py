"""Costs scaled by phase, and the factors that runs tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipetune.bench.load.online import OnlineRun
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.profile import TaskKind
from pipetune.bench.record import LoadTask, StageTrace
from pipetune.tuner.planning.costs.nominal import NominalCosts
from pipetune.tuner.planning.simulation.model import CostModel
from tests.evaluation.load.estimates import Limits
from tests.evaluation.load.lab import DUMMY, SUBJECTS
from tests.evaluation.load.predicted import ScaledCosts, factors, simulated_share
from tests.evaluation.load.sides import Trace

SETTING = SUBJECTS[DUMMY].pair


@pytest.fixture(scope="module")
def model() -> CostModel:
    """Nominal costs of the dummy."""
    shape = describe_model(resolve_model(SUBJECTS[DUMMY].model))
    return CostModel(shape=shape, prompt_lens=(8,) * 20, output_lens=(4,) * 20, costs=NominalCosts(shape))


def test_tasks_that_took_twice_as_long_tell_a_factor_of_two(model: CostModel) -> None:
    tasks = (
        LoadTask(kind="prefill", slot=0, rows=2, tokens=8, past=0),
        LoadTask(kind="decode", slot=0, rows=2, tokens=1, past=8),
    )
    kinds = [TaskKind(task.rows, task.tokens, task.past) for task in tasks]
    busy_s = [model.task_s(SETTING.plan, kind)[0] for kind in kinds]
    stages = tuple(
        StageTrace(
            compute_start_s=(0.0, 1.0),
            compute_end_s=(2 * busy_s[0][stage], 1.0 + busy_s[1][stage]),
            recv_wait_s=(0.0, 0.0),
            send_wait_s=(0.0, 0.0),
        )
        for stage in range(2)
    )
    run = OnlineRun(
        requests=(), duration_s=1.0, load_tasks=tasks, stages=stages, idle_s=(), underfilled_s=(), transport="gloo"
    )
    found = factors(model, SETTING.plan, [run])
    assert found == pytest.approx({"prefill": 2.0, "decode": 1.0})
    scaled = ScaledCosts(base=model.costs, **found)
    first, then = kinds
    assert scaled.layers_s("cpu:0", first) == pytest.approx(2 * model.costs.layers_s("cpu:0", first))
    assert scaled.layers_s("cpu:0", then) == pytest.approx(model.costs.layers_s("cpu:0", then))


def test_a_crowd_keeps_fewer_limits_than_single_requests(model: CostModel) -> None:
    trace = Trace.drawn([(0,) * 8] * 200, [4] * 200, max_len=0, seed=0)
    limits = Limits(ttft=20.0, tpot=1000.0)
    assert simulated_share(model, SETTING, trace, limits, 0.5) == 1.0
    assert simulated_share(model, SETTING, trace, limits, 1e5) < 1.0


def test_the_models_are_there() -> None:
    assert (Path(SUBJECTS[DUMMY].model.name) / "config.json").is_file()
