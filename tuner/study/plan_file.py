"""Writes a plan in the forms that people's stacks load: ours, transformers', vLLM's and SGLang's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from pipetune.bench.errors import PlanError, explain
from pipetune.bench.files import write_durably
from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import SCHEMA_VERSION, ModelSpec, Plan, Value, Workload
from pipetune.tuner.planning.partition.device_map import hf_map, seed_map

Format = Literal["plan", "hf", "seed", "vllm", "sglang"]
FORMATS: tuple[Format, ...] = get_args(Format)

PLAN_FILE = "best_plan.json"
DEVICE_MAP_FILE = "best_device_map.json"


class PlanFile(Value):
    """`best_plan.json`: a plan, the model it is for, and what was measured, or predicted, of it."""

    schema_version: int = SCHEMA_VERSION
    plan: Plan
    model: ModelSpec | None = None
    workload: Workload | None = None
    """What it was measured with; a prompts file lies beside this one."""
    devices: tuple[str, ...] = ()
    """All devices of that fleet, those without a stage as well: they took their share of the cores."""
    in_flight: int | None = None
    """Micro-batches resident at once when it was measured."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Medians, by the names that `results/README.md` defines; empty where nothing was measured."""
    predicted: dict[str, float] = Field(default_factory=dict)
    """By the same names, of a plan that was chosen without running it."""
    predicted_from: str | None = None
    """What the prediction was made from, in words."""


def write_best(folder: Path, plan_file: PlanFile, shape: ModelShape, device_names: Sequence[str] = ()) -> None:
    """Writes `best_plan.json` and `best_device_map.json` into a study."""
    write_durably(folder / PLAN_FILE, plan_file.model_dump_json(indent=1) + "\n")
    write_durably(folder / DEVICE_MAP_FILE, render(plan_file, shape, "hf", device_names))


def render(plan_file: PlanFile, shape: ModelShape, form: Format, device_names: Sequence[str] = ()) -> str:
    """One form of a plan as text, the last newline included. Maps describe one model: of several replicas the first.

    Args:
        device_names: what to call the stages' devices in maps; empty keeps their names.

    Raises:
        ConfigError: fewer names than stages.
    """
    if form == "plan":
        return plan_file.model_dump_json(indent=1) + "\n"
    if form == "hf":
        return json.dumps(hf_map(shape, plan_file.plan, device_names), indent=1) + "\n"
    if form == "seed":
        return json.dumps(seed_map(shape, plan_file.plan, device_names), indent=1) + "\n"
    counts = ",".join(str(count) for count in plan_file.plan.layer_counts)
    stages = len(plan_file.plan.stages)
    engine, flag = ("vLLM", "--pipeline-parallel-size") if form == "vllm" else ("SGLang", "--pp-size")
    lines = [f"# Not measured on {engine}, whose kernels and schedule differ. Use it with {flag} {stages}."]
    copies = engine_replicas(plan_file.plan).get(engine)
    if copies is not None:
        lines.append(f"# The plan runs {plan_file.plan.replicas} replicas side by side: {copies}, not measured either.")
    return "\n".join([*lines, f"{engine.upper()}_PP_LAYER_PARTITION={counts}", ""])


def engine_replicas(plan: Plan) -> dict[str, str]:
    """How other engines are told of a plan's replicas, by engine; empty where there is one pipeline."""
    if plan.replicas == 1:
        return {}
    return {"vLLM": f"--data-parallel-size {plan.replicas}", "SGLang": f"--dp-size {plan.replicas}"}


def read_plan(path: Path) -> PlanFile:
    """Reads a plan file: `best_plan.json`, or a bare plan.

    Raises:
        PlanError: the file cannot be read or holds no plan; says what is wrong where.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot read the plan: {error.strerror or error}") from None
    except ValueError as error:
        raise PlanError(f"{path}: the plan is not JSON: {error}") from None
    if isinstance(value, dict) and "stages" in value:
        value = {"plan": value}
    try:
        return PlanFile.model_validate(value)
    except ValidationError as error:
        raise PlanError(f"{path}: {explain(error)}") from None
