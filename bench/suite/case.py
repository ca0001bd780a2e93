"""A plan as the suite runs it, read from a `best_plan.json`, and one round of it."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from pipetune.bench import metrics
from pipetune.bench.errors import PlanError, explain
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.prompts.file import read_text, sha256_of
from pipetune.bench.record import Failure, Machine, Outcome, timestamp
from pipetune.bench.spec import ModelSpec, Plan, Protocol, Workload


class PlanCase(BaseModel):
    """What the suite needs of the file; a study writes more into it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    plan: Plan
    model: ModelSpec
    workload: Workload
    devices: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a file; PlanError where it cannot be read, or lacks the plan, the model or the workload."""
        try:
            case = cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            remedy = "take the best_plan.json of a study, or write plan, model and workload into one file"
            raise PlanError(f"{path}: {explain(error)}; {remedy}") from None
        if (prompts := case.workload.prompts_file) is None:
            return case
        file = (path.parent / prompts).absolute()
        prompts_of = {"prompts_file": str(file), "prompts_sha256": sha256_of(read_text(file))}
        return case.model_copy(update={"workload": case.workload.model_copy(update=prompts_of)})


@dataclass(frozen=True, kw_only=True)
class Round:
    """One fleet's run."""

    run: dict[str, Any]
    """Our `metrics` and what they were derived from, as `extra_info` holds them."""
    machine: Machine
    model: ModelSpec
    """With the revision that it was resolved to."""


def run_fresh(case: PlanCase, protocol: Protocol, folder: Path) -> Round:
    """Starts a fleet, measures the plan once, and ends it; the unsplit model's output, if compared, goes to `folder`.
    PipetuneError says why where the plan did not run, or its output is wrong."""
    started_at, began = timestamp(), time.monotonic()
    devices = case.devices or case.plan.devices
    with Experiment.start(case.model, devices, hang_timeout_s=protocol.hang_timeout_s) as experiment:
        machine, model = experiment.fleet.machine, experiment.fleet.model
        outcome: Outcome | None = None
        if protocol.check_outputs:
            outcome = experiment.make_reference(folder / "reference.safetensors", case.workload, protocol)
        if outcome is None:
            outcome = experiment.measure(case.plan, case.workload, protocol).result
    if isinstance(outcome, Failure):
        raise PlanError(f"{case.plan.describe()}: {outcome.kind.value}: {outcome.message}")
    run = {
        "metrics": metrics.derive(outcome),
        "durations_s": [iteration.duration_s for iteration in outcome.iterations],
        "steady": outcome.steady,
        "disturbances": list(outcome.telemetry.disturbances),
        "started_at": started_at,
        "wall_s": round(time.monotonic() - began, 3),
    }
    return Round(run=run, machine=machine, model=model)
