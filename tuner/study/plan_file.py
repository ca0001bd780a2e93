"""Writes a plan in the forms that people's stacks load: ours, transformers', vLLM's and SGLang's."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from pipetune.bench.errors import PlanError, explain
from pipetune.bench.files import write_durably
from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import ModelSpec, Plan, SchemaVersion, Value, Workload
from pipetune.tuner.planning.partition.device_map import DeviceMap, hf_map, ranges_map

Format = Literal["hf", "ranges", "plan", "vllm", "sglang", "trtllm", "llama.cpp"]
FORMATS: tuple[Format, ...] = get_args(Format)
MAPS: Mapping[Format, Callable[..., DeviceMap]] = {"hf": hf_map, "ranges": ranges_map}

PLAN_FILE = "best_plan.json"
DEVICE_MAP_FILE = "best_device_map.json"


class PlanFile(Value):
    """`best_plan.json`: a plan, the model it is for, and what was measured, or predicted, of it."""

    schema_version: SchemaVersion = 1
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
    They call the stages' devices as `device_names` says; empty keeps their names.

    Raises:
        ConfigError: fewer names than stages.
    """
    if form == "plan":
        return plan_file.model_dump_json(indent=1) + "\n"
    if form in MAPS:
        return json.dumps(MAPS[form](shape, plan_file.plan, device_names), indent=1) + "\n"
    *first, last = plan_file.plan.layer_counts
    counts, stages = ",".join(map(str, (*first, last))), len(plan_file.plan.stages)
    engine, use, text = {
        "vllm": ("vLLM", f"--pipeline-parallel-size {stages}", f"VLLM_PP_LAYER_PARTITION={counts}"),
        "sglang": ("SGLang", f"--pp-size {stages}", f"SGLANG_PP_LAYER_PARTITION={counts}"),
        "trtllm": (
            "TensorRT-LLM",
            "trtllm-serve --extra_llm_api_options FILE",
            f"pipeline_parallel_size: {stages}\npp_partition: [{counts}]",
        ),
        # The output layer is one more position of the last device.
        "llama.cpp": ("llama.cpp", "--n-gpu-layers all", f"--tensor-split {','.join(map(str, (*first, last + 1)))}"),
    }[form]
    lines = [f"# Not measured on {engine}, whose kernels and schedule differ. Use it with {use}."]
    if (copies := engine_replicas(plan_file.plan).get(engine)) is not None:
        lines.append(f"# The plan runs {plan_file.plan.replicas} replicas side by side: {copies}, not measured either.")
    return "\n".join([*lines, text, ""])


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
        value = json.loads(path.read_text(encoding="utf-8"))
        bare = isinstance(value, dict) and "stages" in value
        return PlanFile.model_validate({"plan": value} if bare else value)
    except OSError as error:
        raise PlanError(f"{path}: cannot read the plan: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: no plan of this version: {explain(error)}") from None
