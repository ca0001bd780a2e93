"""The model's error over a landscape: small where the costs are right, smaller after runs where they are not."""

from __future__ import annotations

import pytest

from pipetune.bench.record import Record
from pipetune.bench.spec import Workload
from tests.evaluation.search.landscape import Landscape, LandscapeSpec
from tests.evaluation.search.model_error import ModelError, model_errors
from tests.record_factory import MODEL, make_effective, make_machine, make_measurement, make_record, make_shape
from tests.tuner.planning.factory_costs import FactoryCosts

WORKLOAD = Workload(num_prompts=16, input_len=64, output_len=4)


@pytest.fixture(scope="module")
def landscape() -> Landscape:
    return Landscape(
        spec=LandscapeSpec(
            name="made",
            about="made by the factory",
            model=MODEL,
            workload=WORKLOAD,
            device_orders=(("cpu:0", "cpu:1"),),
            micro_batch_sizes=(2, 4, 8),
            repeats=2,
        ),
        shape=make_shape(),
        machine=make_machine(),
        device_bytes={"cpu:0": 2**32, "cpu:1": 2**32},
        prompt_lens=(64,) * 16,
    )


@pytest.fixture(scope="module")
def runs(landscape: Landscape) -> dict[str, list[Record]]:
    plans = landscape.spec.plans(landscape.shape)[::2]
    return {
        make_effective(plan, WORKLOAD).key: [
            make_record(0, "trial", plan, make_measurement(plan, WORKLOAD, seed=seed, num_iters=1), workload=WORKLOAD)
            for seed in range(2)
        ]
        for plan in plans
    }


def test_costs_that_are_right_err_by_the_noise_alone(landscape: Landscape, runs: dict[str, list[Record]]) -> None:
    profiled = of(model_errors("made", landscape, runs, FactoryCosts()), "profile")
    assert profiled[0].plans == len(runs)
    assert profiled[8].plans == len(runs) - 8
    assert profiled[0].median < 0.02
    assert profiled[0].rank_correlation > 0.98
    assert profiled[8].median < 0.02


def test_runs_correct_costs_that_are_wrong(landscape: Landscape, runs: dict[str, list[Record]]) -> None:
    found = model_errors("made", landscape, runs, FactoryCosts(prefill=1.2, decode=0.95, head=1.2))
    profiled = of(found, "profile")
    assert profiled[0].median > 0.05 > profiled[4].median
    assert profiled[8].median < 0.03
    assert profiled[8].rank_correlation > 0.95


def of(errors: tuple[ModelError, ...], costs: str) -> dict[int, ModelError]:
    """By the runs learnt from."""
    return {error.learnt: error for error in errors if error.costs == costs}
