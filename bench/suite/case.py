"""A plan as the suite runs it, read from a `best_plan.json`, and one round of it."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipetune.bench import metrics
from pipetune.bench.errors import PlanError, explain
from pipetune.bench.fleet.experiment import Experiment
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
        """Reads a file.

        Raises:
            PlanError: it cannot be read, or lacks the plan, the model or the workload.
        """
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            case = cls.model_validate(values)
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan: {error.strerror or error}") from None
        except ValidationError as error:
            raise PlanError(
                f"{path}: {explain(error)}; take the best_plan.json of a study, or write plan, model and "
                "workload into one file"
            ) from None
        except ValueError as error:
            raise PlanError(f"{path}: the plan is not JSON: {error}") from None
        prompts = case.workload.prompts_file
        if prompts is None:
            return case
        file = (path.parent / prompts).absolute()
        try:
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise PlanError(f"{path}: workload.prompts_file: {file}: {error.strerror or error}") from None
        workload = case.workload.model_copy(update={"prompts_file": str(file), "prompts_sha256": sha256})
        return case.model_copy(update={"workload": workload})


@dataclass(frozen=True, kw_only=True)
class Round:
    """One fleet's run."""

    run: dict[str, Any]
    """Our metrics and what they were derived from, as `extra_info` holds them."""
    metrics: dict[str, float]
    duration_s: float
    """Seconds of the workload, the median over the round's iterations."""
    machine: Machine
    model: ModelSpec
    """With the revision that it was resolved to."""


def run_fresh(case: PlanCase, protocol: Protocol, folder: Path) -> Round:
    """Starts a fleet, measures the plan once, and ends it.

    Args:
        folder: where the unsplit model's output goes, if that is compared.

    Raises:
        PipetuneError: the plan did not run, or its output is wrong; says why.
    """
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
    derived = metrics.derive(outcome)
    run = {
        "metrics": derived,
        "durations_s": [iteration.duration_s for iteration in outcome.iterations],
        "steady": outcome.steady,
        "disturbances": list(outcome.telemetry.disturbances),
        "started_at": started_at,
        "wall_s": round(time.monotonic() - began, 3),
    }
    return Round(run=run, metrics=derived, duration_s=derived["duration_s"], machine=machine, model=model)
