"""What rehearsals share: small models and short runs, since a stubbed GPU takes tens of microseconds an operation."""

from __future__ import annotations

from pathlib import Path

from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import Failure, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Workload
from tests.tiny_models import save_tiny_model

LAYERS = 4
WORKLOAD = Workload(num_prompts=5, input_len=14, random_range_ratio=0.5, output_len=5)
PROTOCOL = Protocol(num_iters=1, num_iters_warmup=1, max_warmup=1, timeout_s=200.0)
MICRO_BATCH, IN_FLIGHT = 2, 3


def tiny_model(folder: Path, family: str, **changes: object) -> ModelSpec:
    """A random model of four layers, saved."""
    return ModelSpec(name=str(save_tiny_model(folder / family, family, LAYERS))).model_copy(update=changes)


def run(
    fleet: Fleet,
    counts: tuple[int, ...],
    *,
    graphs: bool = True,
    workload: Workload = WORKLOAD,
    protocol: Protocol = PROTOCOL,
    **changes: object,
) -> Measurement | Failure:
    """Measures a plan over the fleet's first devices; `changes` are of the plan."""
    plan = Plan.from_layer_counts(counts, fleet.devices, MICRO_BATCH)
    plan = Plan.model_validate({**plan.model_dump(), "cuda_graphs": graphs, **changes})
    spec = RunSpec(model=fleet.model, workload=workload, plan=plan, protocol=protocol)
    return fleet.measure(spec, EffectivePlan(plan=plan, in_flight=IN_FLIGHT))


def equal(outcome: Measurement | Failure) -> Measurement:
    """The measurement, whose tokens were those of the unsplit model."""
    assert isinstance(outcome, Measurement), outcome
    assert outcome.check is not None
    assert outcome.check.tokens_equal is True
    assert outcome.check.argmax_flips == 0
    return outcome
