"""Cases and pairs as a gate would have them, from the differences wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipetune.bench.record import Failure, FailureKind
from pipetune.bench.spec import ModelSpec, Plan, Protocol, Workload
from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.values import Case, Pair, Sample, Side, SideName

PLAN = Plan.from_layer_counts((2, 2), ("cpu:0", "cpu:1"), 2)


def make_case(name: str = "small", metrics: dict[str, Tolerance] | None = None, noise_floor: float = 0.0) -> Case:
    """Equal sides of a tiny model."""

    def side(which: SideName) -> Side:
        return Side(name=which, model=ModelSpec(name="tiny"), plan=PLAN, devices=PLAN.devices)

    return Case(
        name=name,
        workload=Workload(num_prompts=4, input_len=8, output_len=4),
        protocol=Protocol(),
        baseline=side("baseline"),
        candidate=side("candidate"),
        metrics=metrics or {"mean_ttft_ms": Tolerance()},
        noise_floor=noise_floor,
    )


def make_sample(metrics: dict[str, float] | None = None, **fields: Any) -> Sample:
    """One unit; without metrics, a failure."""
    failure = None if metrics is not None else Failure(kind=FailureKind.WORKER_DIED, message="worker 1 died")
    values: dict[str, Any] = {"started_at": "2026-01-01T00:00:00+00:00", "wall_s": 12.0, "hardware_id": "abc"}
    return Sample(metrics=metrics or {}, **({"failure": failure} | values | fields))


def make_pairs(differences: Sequence[float], metric: str = "mean_ttft_ms", *, case: str = "small") -> list[Pair]:
    """Pairs whose candidate is so much worse, by the logarithm; of latencies more is worse."""
    return [
        Pair(
            case=case,
            number=number,
            first="baseline",
            baseline=make_sample({metric: 100.0}),
            candidate=make_sample({metric: 100.0 * math.exp(difference)}),
        )
        for number, difference in enumerate(differences)
    ]
