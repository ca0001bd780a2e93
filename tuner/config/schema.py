"""All settings of a study as one frozen value; its defaults are the only ones, its dump is `study.yaml`."""

import difflib
import os
import re
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_serializer, model_validator

from pipetune.bench.errors import ConfigError
from pipetune.bench.metrics import LATENCIES, PERCENTILES, metric_names, metrics_of_workload, samples_needed
from pipetune.bench.spec import (
    Bytes,
    Device,
    EngineSettings,
    Flag,
    ModelSpec,
    Plan,
    Protocol,
    Value,
    Workload,
    device_kind,
    parse_devices,
)
from pipetune.tuner.config.gate import GateConfig
from pipetune.tuner.config.settings import KeyPath

TASK_VARIABLES = ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "RANK")
"""Where Slurm, Kubernetes and torchrun say which task of a job this is, in the order in which they are asked."""
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NO_NAME = "is no study name: up to 64 letters, digits, dots, dashes and underscores, the first a letter or a digit"
_CONSTRAINT = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=)\s*([-+0-9.eE]+)\s*")


class Constraint(Value):
    """A limit that a plan must keep: `p90_ttft_ms<=500`; written and read as that text."""

    metric: str
    operator: Literal["<=", ">="]
    limit: float

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not (match := _CONSTRAINT.fullmatch(value)):
            raise ValueError(f"{value!r} is no constraint; write metric<=number, as in p90_ttft_ms<=500")
        return {"metric": match[1], "operator": match[2], "limit": match[3]}

    @model_serializer
    def _text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:.12g}"

    def excess(self, value: float) -> float:
        """How far a value breaks the limit, as a share of it; zero or less when it is kept."""
        distance = value - self.limit if self.operator == "<=" else self.limit - value
        return distance / max(abs(self.limit), 1e-9)


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _parse_chunks(value: Any) -> Any:
    """`whole` and null, the prompt in one go, are one choice; so `64,whole` is a list of two."""
    parts = _split(value)
    if not isinstance(parts, (list, tuple)):
        return parts
    chunks = [None if isinstance(part, str) and part.lower() == "whole" else part for part in parts]
    for chunk in chunks:
        if isinstance(chunk, str) and not chunk.isdecimal():
            raise ValueError(f"{chunk!r} is neither a number of tokens nor whole")
    return tuple(chunks)


def _parse_compile(value: Any) -> Any:
    words = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
    value = words.get(value.lower(), value.lower()) if isinstance(value, str) else value
    if not isinstance(value, bool) and value != "search":
        raise ValueError("neither true nor false nor search")
    return value


def _count_seconds(value: Any) -> Any:
    """Seconds of `90`, `90s`, `5m` (or `5min`) or `2h`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", value) if isinstance(value, str) else None
    if isinstance(value, str) and match is None:
        raise ValueError(f"{value!r} is no time; write 90s, 5m or 2h")
    return value if match is None else float(match[1]) * {"m": 60, "h": 3600}.get((match[2] or "s")[0], 1)


Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Sizes = Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(_split)]
_split_one = BeforeValidator(lambda value: (value,) if isinstance(value, int) else _split(value))
ByteSizes = Annotated[tuple[Bytes, ...], Field(min_length=1), _split_one]
Fractions = Annotated[tuple[Fraction, ...], Field(min_length=1), BeforeValidator(_split)]
Chunks = Annotated[tuple[Positive | None, ...], Field(min_length=1), BeforeValidator(_parse_chunks)]
Compile = Annotated[bool | Literal["search"], BeforeValidator(_parse_compile)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]

GENERATE_OBJECTIVE, SCORE_OBJECTIVE = "output_throughput", "total_token_throughput"
"""What is made better when nothing is said: where texts are scored, nothing is put out."""
GPU_DEFAULTS: dict[KeyPath, object] = {
    ("model", "dtype"): "auto",
    ("workload", "num_prompts"): 64,
    ("workload", "input_len"): 512,
    ("workload", "output_len"): 128,
}
"""What is other than the fields' defaults where all devices are GPUs: what fits CPU workers would not fill them."""


class SpaceConfig(Value):
    """Bounds of what the search may propose."""

    micro_batch_sizes: Annotated[Sizes | None, Flag("Search", "Sizes to choose among: 4,8. [even divisions]")] = None
    """Sequences of a micro-batch; None: even divisions of the prompts, and powers of two."""
    prefill_micro_batch_sizes: Annotated[Sizes | None, Flag("Search", "Sizes to choose among. [the same]")] = None
    """Sequences prefilled together, never more than are decoded together; None: the same sizes as for decoding."""
    prefill_chunk_sizes: Annotated[Chunks | None, Flag("Search", "Tokens of a prompt at a time: 64,whole.")] = None
    """Tokens of a prompt prefilled at a time, `whole` among them; None: whole prompts, and where they are long and
    few also a half, a quarter and an eighth of the longest."""
    replicas: Annotated[Sizes | None, Flag("Search", "Pipelines side by side: 1,2. [what fits]")] = None
    """Pipelines side by side; None: every division of the devices whose pipelines fit into memory."""
    min_stages: Annotated[Positive, Flag("Search", "Fewest stages of a pipeline.")] = 1
    max_stages: Annotated[Positive | None, Flag("Search", "Most stages of a pipeline. [one a device]")] = None
    """Most stages of one pipeline; None: as many as there are devices."""
    memory_fractions: Annotated[Fractions, Flag("Search", "Caps, shares of each device.")] = (0.5, 0.7, 0.9)
    """Memory caps; those that let the same number of micro-batches be in flight are one plan."""
    max_memory_per_device: Annotated[Bytes | None, Flag("Search", "Cap in bytes: 600MiB.", metavar="SIZE")] = None
    """Most that a plan may take of each device, beside the caps; the un-pipelined model and, where it does not fit, the
    single stage are measured without it, to compare with."""
    compile: Annotated[Compile, Flag("Search", "torch.compile: true, false or search (both).", metavar="WHEN")] = False
    cuda_graphs: Annotated[bool, Flag("Search", "GPU: capture decode steps.")] = True
    packed_weights: Annotated[bool, Flag("Search", "CPU: lay weights out for oneDNN.")] = True
    device_order: Annotated[
        Literal["auto", "given"], Flag("Search", "given, or auto: unlike devices in any order.", before="profile")
    ] = "auto"
    """`auto`: where devices are unlike, also in which order they hold the stages."""

    def why_outside(self, plan: Plan) -> str | None:
        """Why a plan lies outside the bounds, as one to compare with may; None where it does not."""
        if len(plan.stages) < self.min_stages:
            return f"the search is bound to {self.min_stages} stages or more"
        capped = self.max_memory_per_device in (None, plan.stages[0].max_memory_bytes)
        return None if capped else "it was measured without the search's cap"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_stages is not None and self.max_stages < self.min_stages:
            raise ValueError(f"max_stages={self.max_stages} is less than min_stages={self.min_stages}")
        return self


class EngineConfig(Value):
    """Another engine that runs the plans, and what the search may set of it; None is left open."""

    name: Annotated[Literal["vllm"], Flag("Engine", "vllm, in place of our own runtime.", name="engine")] = "vllm"
    python: Annotated[str, Flag("Engine", "Python that has the engine.", name="engine_python", metavar="FILE")] = ""
    max_num_batched_tokens: Annotated[Sizes | None, Flag("Engine", "Token budgets: 256,512. [halves of all]")] = None
    max_num_seqs: Annotated[Sizes | None, Flag("Engine", "Sequences at once: 16,32. [halves of all]")] = None
    tensor_parallel_sizes: Annotated[Sizes | None, Flag("Engine", "Workers of a stage: 1,2. [what fits]")] = None
    """Workers that share each stage; None: every division of the devices that divides the attention heads."""
    kv_cache_memory_bytes: Annotated[
        ByteSizes | None,
        Flag("Engine", "KV cache of a worker: 2GiB,4GiB. [what the caps leave]", metavar="SIZES"),
    ] = None
    enforce_eager: Annotated[bool, Flag("Engine", "Compile nothing.")] = False
    served: Annotated[bool, Flag("Engine", "By its HTTP server, asked over loopback.")] = False
    served_finals: Annotated[bool, Flag("Engine", "The finals alone by its HTTP server.")] = False

    @property
    def settings(self) -> EngineSettings:
        """What is the same for all plans, and of several sizes of the KV cache the largest."""
        own = {name: getattr(self, name) for name in ("name", "enforce_eager", "served")}
        return EngineSettings(**own, kv_cache_memory_bytes=max(self.kv_cache_memory_bytes or (0,)) or None)

    @model_validator(mode="after")
    def _has_python(self) -> Self:
        if not self.python:
            raise ValueError(f"engine.python: which Python has {self.name}? Give it by --engine-python")
        return self


def in_task(folder: str) -> str:
    """A folder's name with this task's number for `{task}`; ValueError where nothing says which task this is."""
    number = next((os.environ[name] for name in TASK_VARIABLES if os.environ.get(name, "").isdigit()), None)
    if "{task}" in folder and number is None:
        raise ValueError(f"{folder!r}: no task of a job runs this; of {', '.join(TASK_VARIABLES)} none is a number")
    return folder.replace("{task}", number or "")


class TuneConfig(Value):
    """What `pipetune tune` needs to know."""

    schema_version: Literal[1] = 1
    """Version of the config's format."""
    name: Annotated[str | None, Flag("Study", "Name of the folder under results/.", name="study_name")] = None
    """The study lands in `results/<name>`; None makes one of the model and the time."""
    output_dir: Annotated[
        str | None,
        AfterValidator(lambda folder: folder and in_task(folder)),
        Flag(
            "Study",
            "Where it goes; {task}: a job's task. [results/MODEL-TIME]",
            metavar="FOLDER",
            short="-o",
            before="study_name",
        ),
    ] = None
    """Any folder, instead of `results/<name>`; `{task}` in it is this task's number in a job of several."""
    model: ModelSpec
    workload: Workload = Workload()
    protocol: Protocol = Protocol()
    devices: Annotated[Literal["auto"] | tuple[Device, ...], Flag("Workload", "cpu:0-1, cuda:0,cuda:1 or auto.")] = (
        "auto"
    )
    """`auto`: all GPUs of the machine, or else two CPU workers."""
    profile: Annotated[bool, Flag("Search", "Time layers and links first.")] = True
    """Layers and links are timed first, or their times taken from this machine's cache; else nominal rates serve."""
    warm_start: Annotated[
        Names, Flag("Search", "An earlier study to learn from; may repeat.", metavar="STUDY", repeats=True)
    ] = ()
    """Folders of earlier studies: on equal hardware their records teach the cost model, and from anywhere their best
    plans run first. Nothing counts that was not measured anew."""
    n_trials: Annotated[int, Flag("Search", "Plans to run.")] = Field(default=20, ge=1)
    """Plans to run; refusals of plans that cannot fit and interrupted ones are not counted."""
    timeout_s: Annotated[
        float | None,
        BeforeValidator(_count_seconds),
        Flag("Search", "Start no trial after so long: 90s, 5m, 2h.", name="timeout", metavar="TIME"),
    ] = Field(default=None, gt=0.0)
    """No further trial starts after so many seconds of search; the baseline and the finalists come on top."""
    stop_early: Annotated[bool, Flag("Search", "End when nothing better is predicted.")] = True
    """The search ends when no plan is predicted to be better than the best by more than the noise."""
    slo_attainment: Annotated[float, Flag("Load", "Share of requests that must be good ones.")] = Field(
        default=0.9, gt=0.0, lt=1.0
    )
    """What `max_request_rate` is the highest rate for."""
    objectives: Annotated[
        Names,
        Field(min_length=1),
        Flag("Search", "What to make better; may be repeated.", name="objective", metavar="METRIC", repeats=True),
    ] = (GENERATE_OBJECTIVE,)
    """Metrics to make better; by default `total_token_throughput` where texts are scored."""
    constraints: Annotated[
        tuple[Constraint, ...],
        BeforeValidator(_split),
        Flag(
            "Search", 'Such as "p90_ttft_ms<=500"; may be repeated.', name="constraint", metavar="LIMIT", repeats=True
        ),
    ] = ()
    """Limits that a plan must keep to be ranked."""
    seed: Annotated[
        int, Flag("Workload", "Seed of search, random prompts and dummy weights.", also=("workload.seed", "model.seed"))
    ] = Field(default=0, ge=0)
    """Seed of the search; the workload and dummy weights have their own."""
    space: SpaceConfig = SpaceConfig()
    engine: EngineConfig | None = None
    """Another engine that runs the plans in place of our own runtime."""
    baseline_batch_sizes: Annotated[Sizes | None, Flag("Search", "Un-pipelined, to try: 8,16. [all, 1/2, 1/4]")] = None
    """Prompts that the un-pipelined model takes at once; None: all of them, a half and a quarter."""
    finalists: Annotated[int, Flag("Search", "Best plans to measure again.")] = Field(default=3, ge=0)
    """Best plans that are measured again beside the baseline; 0 leaves the finals out."""
    finalist_rounds: Annotated[Positive, Flag("Search", "Least rounds of the finals.")] = 3
    """Least rounds of the finals; more follow until the best is told from the next."""
    max_finalist_rounds: Annotated[Positive, Flag("Search", "Most rounds of the finals.")] = 8
    """Most rounds of the finals; plans that cannot be told apart by then are tied."""
    on_device_loss: Annotated[Literal["degrade", "stop"], Flag("Study", "A device lost twice: degrade or stop.")] = (
        "degrade"
    )
    """What `tune` does once a device was lost twice in a row: `degrade` searches anew over those that are left."""
    storage: Annotated[str | None, Flag("Study", "Optuna database. [SQLite in the folder]", metavar="URL")] = None
    """Optuna storage URL; None is SQLite in the study's folder."""
    shared_study: Annotated[
        str | None,
        BeforeValidator(lambda value: value or None),
        Flag("Study", "Study in --storage that several processes search.", metavar="NAME"),
    ] = None
    """Name of a study in `storage` that several processes search together, each with its own folder and devices; empty
    as none."""
    gate: GateConfig = GateConfig()
    """What `pipetune gate` compares, and how much worse it may become."""
    prices: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)
    """What an hour of one device costs, by kind or name: `{cuda: 2.5}`; in any currency, the same for all."""
    device_names: Annotated[Names, Flag("Study", "Names in device maps: cuda:0,cuda:1. [the devices']")] = ()
    """Names that stand in device maps in place of the devices, in their order; empty keeps theirs."""

    @model_validator(mode="before")
    @classmethod
    def _suit_the_workload(cls, values: Any) -> Any:
        """The default objective of scored texts, where nothing is put out, is another."""
        workload = values.get("workload") if isinstance(values, dict) else None
        kind = workload.get("kind") if isinstance(workload, dict) else getattr(workload, "kind", None)
        return {"objectives": (SCORE_OBJECTIVE,), **values} if kind == "score" else values

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and not STUDY_NAME.fullmatch(value):
            raise ValueError(f"{value!r} {NO_NAME}; for any other folder use output_dir")
        return value

    @field_validator("devices", mode="before")
    @classmethod
    def _parse_devices(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
            value = ",".join(value)
        if isinstance(value, str) and value != "auto":
            return parse_devices(value)
        return value

    @field_validator("objectives")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"an objective is given twice: {', '.join(value)}")
        return value

    @model_validator(mode="after")
    def _stages_have_devices(self) -> Self:
        if self.devices == "auto":
            return self
        space, replicas = self.space, self.space.replicas or (1,)
        given = f"given are {len(self.devices)}: {', '.join(self.devices)}"
        wanted = {"min_stages": space.min_stages, "max_stages": space.max_stages or 0, "replicas": max(replicas)}
        for key, count in wanted.items():
            if count > len(self.devices):
                raise ValueError(f"space.{key}={count} needs as many devices; {given}")
        if self.workload.arrivals is not None and self.engine is None and space.compile:
            raise ValueError("space.compile: requests over time run uncompiled; leave it out")
        if self.engine is not None and (self.shared_study or self.space.compile):
            raise ValueError("engine: it is searched by one process; space.compile is not its own")
        fewest = min(replicas)
        if fewest * space.min_stages > len(self.devices):
            raise ValueError(
                f"space.replicas={fewest} of at least {space.min_stages} stages (space.min_stages) need "
                f"{fewest * space.min_stages} devices; {given}"
            )
        return self

    @property
    def concrete_devices(self) -> tuple[str, ...]:
        """The devices, once `auto` has been resolved."""
        assert self.devices != "auto", "devices are resolved before anything runs"
        return self.devices


def check_metrics(config: TuneConfig) -> None:
    """Refuses objectives and constraints on metrics that this workload, with its devices resolved, will not yield: by a
    ConfigError that names the metric, and the prompts that its percentile would need."""
    workload = config.workload
    gpu = any(device_kind(device) == "cuda" for device in config.concrete_devices)
    known = set(metrics_of_workload(workload, gpu=gpu))
    if workload.goodput is not None and workload.arrivals is not None:
        known.add("max_request_rate")
    if workload.arrivals is not None and workload.arrivals.max_concurrency and "max_request_rate" in config.objectives:
        raise ConfigError("workload.arrivals.max_concurrency: it hides what rate a plan sustains; leave it out")
    if not config.protocol.instrument:
        known -= {name for name in known if name.startswith("bubble") or name.endswith("_queue_ms")}
        known -= {"comm_ms", "steady_utilization"}
    places = [(f"objectives: {name}", name) for name in config.objectives]
    places += [(f"constraints: {constraint}", constraint.metric) for constraint in config.constraints]
    for place, metric in places:
        if metric not in known:
            raise ConfigError(f"{place}: {_why_absent(metric, config, known, gpu=gpu)}")


def _why_absent(metric: str, config: TuneConfig, known: set[str], *, gpu: bool) -> str:
    workload = config.workload
    names = partial(metric_names, workload.num_prompts, gpu=gpu)
    if workload.kind == "score" and metric in names(2) and metric not in names(0):
        return (
            f"{metric} counts generated tokens, and where texts are scored there are none; take {SCORE_OBJECTIVE}, "
            "request_throughput or mean_e2el_ms, or --workload-kind generate"
        )
    if metric in ("request_goodput", "slo_attainment") or (metric == "max_request_rate" and workload.arrivals):
        return f"{metric} needs limits; give --goodput, such as ttft:500 tpot:50"
    over_time = {"max_request_rate", *names(2, arrivals=True)} - {*names(2)}
    if workload.arrivals is None and metric in over_time:
        return f"{metric} needs requests that come over time; give --request-rate, or --trace"
    label, _, rest = metric.partition("_")
    if label in PERCENTILES and rest.removesuffix("_ms") in LATENCIES and rest.endswith("_ms"):
        needed = samples_needed(PERCENTILES[label])
        if workload.num_prompts < needed:
            return (
                f"{metric} needs at least {needed} prompts and this workload has {workload.num_prompts}; "
                f"give --num-prompts {needed} or more, or use a lower percentile"
            )
    if "_tpot_" in metric and workload.generated_len < 2:
        return (
            f"{metric} needs an output of at least 2 tokens, not {workload.generated_len}; give --output-len 2 or more"
        )
    if metric in names(workload.generated_len):
        return f"{metric} needs protocol.instrument: true"
    if not gpu and metric in names(workload.generated_len, gpu=True):
        return f"{metric} is only measured on GPUs, and the devices are {', '.join(config.concrete_devices)}"
    near = difflib.get_close_matches(metric, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(known))}"
    return f"{metric} is no metric of this workload; {hint}"
