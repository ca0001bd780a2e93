"""A plan as the suite runs it, read from a `best_plan.json`: the plan, the model, the workload and the fleet's devices."""

from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from bench import metrics
from bench.errors import PlanError
from bench.launch import Fleet
from bench.record import Failure, Machine
from bench.spec import ModelSpec, Plan, Protocol, RunSpec, Workload


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
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlanError(
                f"{path}: {where}: {first['msg']}; take the best_plan.json of a study, or write plan, model and "
                "workload into one file"
            ) from None
        except ValueError as error:
            raise PlanError(f"{path}: the plan is not JSON: {error}") from None
        prompts = case.workload.prompts_file
        if prompts is None:
            return case
        workload = case.workload.model_copy(update={"prompts_file": str(path.parent / prompts)})
        return case.model_copy(update={"workload": workload})


def run_fresh(case: PlanCase, protocol: Protocol) -> tuple[dict[str, Any], float, Machine]:
    """Starts a fleet, measures the plan once, and ends it.

    Returns:
        What the round gave, as `extra_info` holds it; the workload's duration in seconds, the median over its
        iterations; and the machine.

    Raises:
        PlanError: the plan did not run; says why.
    """
    started_at, began = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.monotonic()
    with Fleet.start(
        case.model, case.devices or case.plan.devices, hang_timeout_s=protocol.hang_timeout_s
    ) as fleet:
        machine = fleet.machine
        outcome = fleet.resolve(case.plan, case.workload)
        if not isinstance(outcome, Failure):
            spec = RunSpec(model=fleet.model, workload=case.workload, plan=case.plan, protocol=protocol)
            measured = fleet.measure(spec, outcome)
        else:
            measured = outcome
    if isinstance(measured, Failure):
        raise PlanError(f"{case.plan.describe()}: {measured.kind.value}: {measured.message}")
    derived = metrics.derive(measured)
    run = {
        "metrics": derived,
        "durations_s": [iteration.duration_s for iteration in measured.iterations],
        "steady": measured.steady,
        "disturbances": list(measured.telemetry.disturbances),
        "started_at": started_at,
        "wall_s": round(time.monotonic() - began, 3),
    }
    return run, derived["duration_s"], machine
