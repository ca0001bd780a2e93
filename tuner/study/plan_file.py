"""Writes a plan in the forms that people's stacks load: ours, transformers', vLLM's and SGLang's."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from pipetune.bench.engines.vllm_args import cores_of_workers, gpus_of, model_to_serve, vllm_arguments
from pipetune.bench.errors import PlanError, explain, harmless
from pipetune.bench.files import write_durably
from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Machine
from pipetune.bench.spec import ModelSpec, Plan, SchemaVersion, Value, Workload, device_index, device_kind
from pipetune.tuner.planning.partition.device_map import DeviceMap, hf_map, ranges_map

Format = Literal["hf", "ranges", "plan", "vllm", "vllm-yaml", "sglang", "trtllm", "llama.cpp"]
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


def render(
    plan_file: PlanFile,
    shape: ModelShape,
    form: Format,
    device_names: Sequence[str] = (),
    *,
    machine: Machine | None = None,
    prompt_lens: Sequence[int] = (),
) -> str:
    """One form of a plan as text, the last newline included. Maps describe one model: of several replicas the first.
    They call the stages' devices as `device_names` says; empty keeps their names. An engine's plan is exported as it
    ran, on `machine` with prompts of `prompt_lens`. ConfigError: fewer names than stages."""
    if form == "plan":
        return plan_file.model_dump_json(indent=1) + "\n"
    if form in MAPS:
        return json.dumps(MAPS[form](shape, plan_file.plan, device_names), indent=1) + "\n"
    own = plan_file.plan.engine
    if own is not None and own.name == "vllm" and machine is not None and form in ("vllm", "vllm-yaml"):
        return _vllm_as_measured(plan_file, machine, prompt_lens, is_yaml=form == "vllm-yaml")
    *first, last = plan_file.plan.layer_counts
    counts, stages = ",".join(map(str, (*first, last))), len(plan_file.plan.stages)
    engine, use, text = {
        "vllm": ("vLLM", f"--pipeline-parallel-size {stages}", f"VLLM_PP_LAYER_PARTITION={counts}"),
        "vllm-yaml": (
            "vLLM",
            f"VLLM_PP_LAYER_PARTITION={counts} vllm serve MODEL --config FILE.yaml",
            f"pipeline-parallel-size: {stages}",
        ),
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


def _vllm_as_measured(plan_file: PlanFile, machine: Machine, prompt_lens: Sequence[int], *, is_yaml: bool) -> str:
    """What starts vLLM as it was when the plan was measured: commands, or a file for `vllm serve --config`."""
    plan, workload, hardware = plan_file.plan, plan_file.workload, machine.hardware
    assert plan.engine is not None
    assert plan_file.model is not None
    assert workload is not None
    devices, model = plan_file.devices or plan.devices, model_to_serve(plan_file.model)
    on_cpus, each = device_kind(devices[0]) == "cpu", max(1, hardware.cpu_cores // len(devices))
    gpus = [gpu.memory_bytes or 0 for gpu in hardware.gpus]
    sizes = {name: hardware.memory_bytes // len(devices) if on_cpus else gpus[device_index(name)] for name in devices}
    longest = 1 + max(map(sum, zip(prompt_lens, workload.generated_lens, strict=True)))
    told: dict[str, object] = {"pipeline_parallel_size": len(plan.stages)}
    told |= vllm_arguments(plan_file.model, plan, max_model_len=longest, device_bytes=sizes)
    told["no_enable_prefix_caching"] = True
    version = machine.software.packages.get("engine's vllm", "of a version not known")
    what = f"{hardware.cpu_model}, {hardware.cpu_cores} cores"
    where = f"{machine.hostname} ({what if on_cpus else ', '.join(dict.fromkeys(gpu.name for gpu in hardware.gpus))})"
    how = "served over loopback" if plan.engine.served else "with its scheduler in process"
    head = [" ".join(harmless(f"Measured on vLLM {version} on {where}, {how}.").split())]
    head.append(f"Requests longer than {longest} tokens need another --max-model-len, and room for it.")
    if plan.engine.enforce_eager and on_cpus and len(plan.stages) > 1:
        # Without compilation vLLM 0.32 has no dummy run there, which makes the buffers for what other stages send.
        told = {**told, "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
        head.append(
            "Measured with --enforce-eager, which vllm serve fails in on CPUs: this traces once, and runs eagerly."
        )
    if None in (plan.engine.max_num_batched_tokens, plan.engine.max_num_seqs):
        head.append("What is not limited here was at vLLM's default for its LLM class; that of vllm serve is another.")
    if plan.replicas > 1:
        head.append(f"The plan runs {plan.replicas} engines side by side: share the requests out among their ports.")
    flags = {name.replace("_", "-"): value for name, value in told.items() if value is not False}
    texts = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in flags.items()}
    given = [f"--{name}" if value is True else f"--{name} {shlex.quote(texts[name])}" for name, value in flags.items()]
    serve = ["vllm serve --config FILE.yaml"] if is_yaml else [f"vllm serve {shlex.quote(model)}", *given]
    starts = []
    for index in range(plan.replicas):
        variables = [f"VLLM_PP_LAYER_PARTITION={','.join(map(str, plan.layer_counts))}"]
        if on_cpus:
            cores = cores_of_workers(plan.replica(index), devices, range(hardware.cpu_cores), each)
            variables.append(f"VLLM_CPU_OMP_THREADS_BIND={shlex.quote(cores)}")
        else:
            variables.append(f"CUDA_VISIBLE_DEVICES={gpus_of(plan.replica(index))}")
        starts.append([*variables, *serve, *([f"--port {8000 + index}"] if plan.replicas > 1 else [])])
    lines = list(map(" \\\n    ".join, starts))
    if is_yaml:
        head += map(" ".join, starts)
        lines = [f"{name}: {json.dumps(value)}" for name, value in {"model": model, **flags}.items()]
    return "\n".join([*(f"# {line}" for line in head), *lines, ""])


def engine_replicas(plan: Plan) -> dict[str, str]:
    """How other engines are told of a plan's replicas, by engine; empty where there is one pipeline."""
    if plan.replicas == 1:
        return {}
    return {"vLLM": f"--data-parallel-size {plan.replicas}", "SGLang": f"--dp-size {plan.replicas}"}


def read_plan(path: Path) -> PlanFile:
    """Reads a plan file: `best_plan.json`, or a bare plan.
    PlanError: the file cannot be read or holds no plan; says what is wrong where."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        bare = isinstance(value, dict) and "stages" in value
        return PlanFile.model_validate({"plan": value} if bare else value)
    except OSError as error:
        raise PlanError(f"{path}: cannot read the plan: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: no plan of this version: {explain(error)}") from None
