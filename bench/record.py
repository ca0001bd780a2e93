"""What a run gave: a measurement or a failure, with the machine it ran on. Raw samples only; metrics are derived.

Times are seconds. Those of one iteration count from the moment its prompts were given (`t = 0`).
"""

import datetime as dt
import operator
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipetune.bench.schedule import Task
from pipetune.bench.spec import EffectivePlan, Goodput, Rate, RunSpec, SchemaVersion, Value, digest_of

Seconds = Annotated[float, Field(ge=0, le=1e9)]
Amount = Annotated[float, Field(ge=0, le=1e100)]
Count = Annotated[int, Field(ge=0, le=2**60)]
Size = Annotated[Count, Field(ge=1)]
Moment = Annotated[str, AfterValidator(lambda text: dt.datetime.fromisoformat(text) and text)]
"""UTC, ISO 8601. What is beyond these bounds is damaged, and would overflow what is derived from it."""

SHARED_DEVICE_NOTE = "shared_device"
"""How the note begins of a run whose stages shared a GPU: it proves correctness, never speed, and is not ranked."""


class FailureKind(StrEnum):
    """Why a run gave no measurement."""

    OVER_MEMORY_CAP = "over_memory_cap"
    """A plan refused before it ran, or found above its cap afterwards; carries the bytes wanted and had."""
    OUT_OF_MEMORY = "out_of_memory"
    """An allocation failed, or the kernel killed the worker for memory."""
    WRONG_OUTPUT = "wrong_output"
    WORKER_DIED = "worker_died"
    WORKER_HUNG = "worker_hung"
    """A worker stopped giving signs of life."""
    COMMUNICATION_TIMEOUT = "communication_timeout"
    """All workers live, but nothing moves between them."""
    UNSUPPORTED_MODEL = "unsupported_model"
    """The model cannot be found, read or split."""
    TIMEOUT = "timeout"
    """The run took longer than the protocol allows."""
    INTERRUPTED = "interrupted"
    """Somebody stopped the study, or the driver died, while this ran."""
    WORKER_ERROR = "worker_error"
    """An exception in a worker that nobody foresaw."""


REMEDIES = {
    FailureKind.OUT_OF_MEMORY: (
        "give this stage fewer layers, use smaller micro-batches, or let fewer be in flight by memory_fraction"
    ),
    FailureKind.WORKER_DIED: "the kernel's log (dmesg) may name an Xid, and with it the cause",
    FailureKind.COMMUNICATION_TIMEOUT: "see the other stages' logs: one of them stopped answering",
    FailureKind.UNSUPPORTED_MODEL: "choose another model or another cut",
    FailureKind.WORKER_ERROR: "see the traceback in the detail and in the worker's log",
}
"""What to do about a failure of a kind, as the end of its message."""
TRANSIENT = frozenset({FailureKind.WORKER_DIED, FailureKind.WORKER_HUNG, FailureKind.COMMUNICATION_TIMEOUT})
"""Failures that may not come again."""


class Failure(Value):
    """A run that gave no measurement: what happened, where, and what to do."""

    outcome: Literal["failure"] = "failure"
    kind: FailureKind
    message: str
    """What happened and the remedy."""
    stage: Count | None = None
    device: str | None = None
    phase: str | None = None
    """`start`, `load`, `check`, `warmup`, `measure`, `prefill`, `decode` …"""
    bytes_wanted: Count | None = None
    bytes_had: Count | None = None
    detail: str | None = None
    """Traceback or the end of the worker's log."""

    @property
    def lost_device(self) -> str | None:
        """The device whose worker died, hung or could not start; of a lost message nobody knows whose fault it is."""
        unopened = self.kind is FailureKind.WORKER_ERROR and self.phase == "start"
        return self.device if unopened or self.kind in (FailureKind.WORKER_DIED, FailureKind.WORKER_HUNG) else None


class TaskShape(Value):
    """One task of the schedule, as it was run; see `bench.schedule.Task`."""

    micro_batch: Count
    step: Count
    first_row: Count
    end_row: Count
    first_token: Count | None = None
    end_token: Count | None = None
    """Positions of the padded prompts that a prefill worked on; None for whole prompts and for decode."""

    @classmethod
    def of(cls, task: Task, *, first_micro_batch: int, chunked: bool) -> Self:
        """The shape of a task of a replica whose first micro-batch has this number; prompts may be chunked."""
        spans = chunked and task.is_prefill
        return cls(
            micro_batch=first_micro_batch + task.micro_batch,
            step=task.step,
            first_row=task.first_row,
            end_row=task.end_row,
            first_token=task.first_token if spans else None,
            end_token=task.end_token if spans else None,
        )


class StageTrace(Value):
    """What one stage did in one iteration. Arrays run along its replica's tasks; empty without instrumentation."""

    compute_start_s: tuple[Seconds, ...] = ()
    compute_end_s: tuple[Seconds, ...] = ()
    recv_wait_s: tuple[Seconds, ...] = ()
    """Time blocked on input (hidden states, or tokens on the first stage) before each task."""
    send_wait_s: tuple[Seconds, ...] = ()
    """Time spent handing the output over, waits for a free buffer included."""
    step_requests: tuple[Count, ...] = ()
    """Where an engine formed the batches: requests in each, 0 where it only sampled; else empty."""
    step_tokens: tuple[Count, ...] = ()
    """Likewise, tokens of each."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        arrays = (self.compute_start_s, self.compute_end_s, self.recv_wait_s, self.send_wait_s)
        steps = [steps for steps in (self.step_requests, self.step_tokens) if steps]
        if len({*map(len, (*arrays, *steps))}) > 1 or any(map(operator.gt, *arrays[:2])):
            raise ValueError("its arrays are of unlike lengths, or a span ends before it starts")
        return self


class RequestTimes(Value):
    """One request that came over time, or that an engine put into its batches. Seconds from the start."""

    arrived_s: Seconds = 0.0
    """As it was scheduled; latencies count from here."""
    noticed_s: Seconds = 0.0
    """When the first stage saw it."""
    admitted_s: Seconds | None = None
    """When it was in the system: later than `noticed_s` where `max_concurrency` held it back."""
    began_s: Seconds | None = None
    """When its prefill was ordered, or it first became part of an engine's batch."""
    token_times_s: tuple[Seconds, ...] = ()
    """When each token was known to the first stage, or came out of the engine."""


class LoadTask(Value):
    """One task on requests that come over time, the same on every stage."""

    kind: Literal["prefill", "decode"]
    slot: Count
    """Where its rows decode, or will."""
    rows: Count
    tokens: Count
    """Positions of each row that it worked on; their mean, rounded up, where prompts were not padded."""
    past: Count
    """Positions before them, padding among them."""
    samples: bool = True
    """Whether tokens came of it: not of a chunk that is not its prompts' last. The first records do not tell."""
    decode_rows: Count = 0
    """Rows of a decode step that went through a prefill's forward pass."""
    decode_past: Count = 0
    """Positions of each of these rows that were cached before."""


Intervals = tuple[tuple[Seconds, Seconds], ...]


class ReplicaLoad(Value):
    """What one replica did with requests that came over time."""

    load_tasks: tuple[LoadTask, ...] = ()
    """Under arrivals, what the traces of its stages run along."""
    idle_s: Intervals = ()
    """Under arrivals: spans in which none of its requests was in the system."""
    underfilled_s: Intervals = ()
    """Under arrivals: spans in which all that were waited for their tokens, and none for a row."""


class Iteration(ReplicaLoad):
    """One timed repetition of the workload; under arrivals the first replica's part of it."""

    duration_s: Annotated[Seconds, Field(ge=1e-6)]
    """Time from the prompts to the last token."""
    token_times_s: tuple[Seconds, ...]
    """When the tokens of each task were known at the last stage (of a chunk without any: when it was done there);
    along `Measurement.tasks`."""
    stages: tuple[StageTrace, ...]
    """Stage by stage; of several replicas, one replica after the other."""
    host_gap_s: tuple[Seconds, ...] = ()
    """Per stage: time inside the loop that was neither compute nor waiting."""
    requests: tuple[RequestTimes, ...] = ()
    """Under arrivals and where an engine formed the batches: along the prompts, and `tasks` is empty."""
    further_replicas: tuple[ReplicaLoad, ...] = ()
    """Under arrivals: what the other replicas did."""

    @property
    def stage_loads(self) -> tuple[ReplicaLoad, ...]:
        """Along `stages`, what the replica did that each is of; of a batch all are alike."""
        loads = (self, *self.further_replicas)
        return tuple(one for one in loads for _ in range(len(self.stages) // len(loads)))


class StageMemory(Value):
    """Memory of one stage's device over the timed iterations, reset before them."""

    device: str
    weights_bytes: Count
    """Counted over the stage's parameters and buffers, tied ones once."""
    kv_bytes: Count
    """Counted over the preallocated KV slots."""
    activation_bytes: Count
    """CPU: by accounting. CUDA: the allocator's peak less weights and KV."""
    peak_bytes: Count
    """The real peak: CUDA allocator, or the resident set of the process on CPU."""
    peak_source: Literal["cuda_allocator", "vm_hwm"]
    baseline_bytes: Count = 0
    """What the process or context took before any model was loaded; part of `peak_bytes` on CPU."""
    graphs_bytes: Count = 0
    """Bytes that CUDA graphs take: of their pool what the allocator's peak lacks, which is part of `peak_bytes`, and
    what the driver keeps for them, which is not."""
    cap_bytes: Size
    """memory_fraction × what the device has."""
    nvml_used_bytes: Count | None = None


class OutputCheck(Value):
    """How the plan's output compared with the study's reference."""

    reference: Literal["unsplit", "plan"]
    max_logit_error: Amount
    """Largest difference of a logit under forced tokens; of a log-probability where texts are scored."""
    tolerance: Amount
    """Largest error put down to kernels: from the reference's own spread over batch sizes in this dtype."""
    compared_logits: Count
    argmax_flips: Count
    """Positions whose argmax differs though the top two are further apart than the tolerance."""
    typical_error: Amount | None = None
    """Median over positions of the largest error at each; None in records from before it was looked at."""
    typical_tolerance: Amount | None = None
    """Largest median error put down to kernels: from the medians of the reference's own passes, which no single expert
    routed otherwise can widen."""
    positions: Count = 0
    """Positions compared: steps under forced tokens, or tokens scored."""
    outliers: Count = 0
    """Positions with an error beyond the tolerance."""
    tokens_equal: bool | None = None
    """Free-running tokens of the timed runs, greedy or drawn, equal the reference's; None where not compared."""
    near_ties: Count = 0
    """Prompts whose tokens part from the reference where its margin is within the tolerance: where the top two are, or
    where the number that a token is drawn by lies so near to another token's."""


class DeviceState(Value):
    """What the sensors said of one device at one moment; absent where there is no sensor."""

    device: str
    clock_mhz: Amount | None = None
    temperature_c: float | None = None
    power_w: Amount | None = None
    utilization: Amount | None = None
    """NVML's share of time with a kernel running: spinning receives count as busy. CPU: share of the cores."""
    memory_used_bytes: Count | None = None
    throttle_reasons: tuple[str, ...] = ()
    ecc_errors: Count | None = None
    foreign_processes: tuple[str, ...] = ()
    """Processes of others on the device (GPU), or those that took more than 10 % of a core (CPU)."""
    load_average: Amount | None = None


class Telemetry(Value):
    """Devices before and after the timed iterations, and what ran over them."""

    before: tuple[DeviceState, ...] = ()
    after: tuple[DeviceState, ...] = ()
    energy_j: Amount | None = None
    gpu_utilization: Amount | None = None
    """Mean of NVML's utilisation over the timed iterations, 0–1; spinning receives count as busy."""
    disturbances: tuple[str, ...] = ()
    """What makes this run doubtful, in words; empty for an undisturbed run."""


class Measurement(Value):
    """One plan, measured."""

    outcome: Literal["measurement"] = "measurement"
    method: Literal["pipeline", "engine", "hf_generate", "hf_forward"] = "pipeline"
    """Our runtime, another engine, or Hugging Face as the baseline: `generate`, or `forward` where texts are scored."""
    batch_size: Size | None = None
    """Prompts that the baseline takes at once, an engine its `max_num_seqs`; a pipeline's sizes are its plan's."""
    prompt_lens: tuple[Size, ...] = Field(min_length=1)
    """Tokens of each prompt, in the order given."""
    order: tuple[Count, ...]
    """`order[i]` is the given index of the prompt in row i; rows fill micro-batches in order. Each replica's are sorted
    by length."""
    output_len: Count
    """Most tokens generated for a prompt; 0 where texts were scored."""
    output_lens: tuple[Size, ...] | None = None
    """Tokens generated for each prompt, in the order given, where that differs."""
    goodput: Goodput | None = None
    """The workload's limits for a good request."""
    tried_rates: tuple[tuple[Rate, Annotated[float, Field(ge=0.0, le=1.0)]], ...] = ()
    """Where the highest rate was looked for: each that was tried, and its share of good requests. All else is of the
    highest that was sustained, or of the lowest if none was."""
    wanted_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of good requests of a rate that is sustained."""
    micro_batch_sizes: tuple[Size, ...]
    """Rows of each micro-batch, one replica after the other."""
    tasks: tuple[TaskShape, ...]
    """The tasks of all replicas, one after the other; micro-batches are counted through."""
    replica_tasks: tuple[Count, ...] | None = None
    """How many of `tasks` each replica has; None for a single one."""
    iterations: tuple[Iteration, ...] = Field(min_length=1)
    warmup_s: tuple[Seconds, ...] = ()
    steady: bool = True
    memory: tuple[StageMemory, ...] = ()
    check: OutputCheck | None = None
    telemetry: Telemetry = Telemetry()
    load_s: Seconds = 0.0
    """Time to move to this plan; only layers that changed hands are loaded."""
    loaded_layers: tuple[Count, ...] = ()
    check_s: Seconds | None = None
    """Time of the comparison with the reference; None where there was none."""
    clock_error_s: Seconds | None = None
    prepare_s: Seconds | None = None
    """Time of compiling and of capturing CUDA graphs, which no iteration contains; None where there was neither."""
    notes: tuple[str, ...] = ()
    """What a reader must know: fallbacks, stages that share a device, a machine that never got steady."""
    transport: str | None = None
    """`local`, `gloo`, `gloo+staging` or `nccl`."""

    @property
    def generated_lens(self) -> tuple[int, ...]:
        """Tokens generated for each prompt, in the order given."""
        return self.output_lens or (self.output_len,) * len(self.prompt_lens)

    @property
    def is_under_arrivals(self) -> bool:
        """Whether requests came over time."""
        return self.method == "pipeline" and bool(self.iterations[0].requests)

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        sizes, counts = self.micro_batch_sizes, self.replica_tasks or (len(self.tasks),)
        stages = len(self.iterations[0].stages)
        rows, spans = dict(enumerate(sizes)), [count for count in counts for _ in range(stages // len(counts))]
        first_steps = {task.micro_batch: task.step for task in reversed(self.tasks)}
        in_rows = (task.first_row < task.end_row <= rows.get(task.micro_batch, 0) for task in self.tasks)
        lens = {
            (len(run.token_times_s), len(run.host_gap_s) or stages, len(run.further_replicas) + 1)
            for run in self.iterations
        }
        engine, loaded = self.method == "engine", self.is_under_arrivals
        served = list(self.generated_lens) if engine or loaded else []
        tasks = ([len(one.load_tasks) for one in run.stage_loads] if loaded else spans for run in self.iterations)
        traced = ([len(trace.compute_start_s) for trace in run.stages] for run in self.iterations)
        requests = ([len(one.token_times_s) for one in run.requests] for run in self.iterations)
        fits = {
            "output_lens": len(self.generated_lens) == len(self.prompt_lens)
            and max(self.generated_lens) == self.output_len,
            "order": sorted(self.order) == list(range(len(self.prompt_lens)))
            and (loaded or sum(sizes) == len(self.order)),
            "tasks": sum(counts) == (0 if loaded else len(self.tasks))
            and not any(first_steps.values())
            and all(in_rows),
            "iterations": lens == {(len(self.tasks), stages, len(counts) if loaded else 1)}
            and (engine or all(one in (own, [0] * stages) for one, own in zip(traced, tasks, strict=True))),
            "requests": all(one == served for one in requests),
        }
        if odd := [name for name, holds in fits.items() if not holds]:
            raise ValueError(f"{odd[0]}: does not fit the rest of the measurement")
        return self


Outcome = Annotated[Measurement | Failure, Field(discriminator="outcome")]


class GpuInfo(Value):
    """One GPU, as NVML describes it."""

    name: str
    memory_bytes: Count | None
    uuid: str
    """Empty where it is not known, as `name` says it and None does."""
    compute_capability: str | None = None
    numa_node: int | None = None
    """To whose CPUs the GPU's worker is bound; None where it is not known."""


class Hardware(Value):
    """What comparisons and resumes demand to be equal (UUIDs and NUMA nodes apart)."""

    cpu_model: str
    cpu_cores: Count
    memory_bytes: Count
    """Rounded down to whole GiB: kernels report a little more or less from boot to boot."""
    gpus: tuple[GpuInfo, ...] = ()
    links: tuple[str, ...] = ()
    """`0-1:NV18`: what lies between each pair of GPUs."""
    further_hosts: "tuple[Hardware, ...]" = ()
    """Host 1 and so on, where a fleet is on several."""

    @property
    def hardware_id(self) -> str:
        """Digest of everything here but the UUIDs and NUMA nodes."""
        anonymous = tuple(gpu.model_copy(update={"uuid": ""}) for gpu in self.gpus)
        alone = self.model_copy(update={"gpus": anonymous, "further_hosts": ()})
        own = alone.digest(exclude={"further_hosts": True, "gpus": {"__all__": {"numa_node"}}}, exclude_defaults=False)
        others = [host.hardware_id for host in self.further_hosts]
        return digest_of([own, *others]) if others else own


class Software(Value):
    """Recorded and shown, never demanded to be equal."""

    python: str
    packages: dict[str, str]
    """torch, transformers, optuna … as installed."""
    driver: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    os: str
    git_revision: str | None = None
    pipetune: str


class Machine(Value):
    """What a run ran on."""

    schema_version: SchemaVersion = 1
    hostname: str
    hardware_id: str
    hardware: Hardware
    software: Software


Role = Literal["baseline", "single_stage", "trial", "finalist", "bench"]


class Record(Value):
    """One run, durable before anyone is told of it; `records/NNNN.json`."""

    schema_version: SchemaVersion = 1
    number: Count
    """NNNN of the file name; counts up over the study."""
    role: Role
    trial_number: Count | None = None
    params: dict[str, int | float | str] | None = None
    """What the search proposed, so that its database can be rebuilt from the records."""
    round: Count | None = None
    """Which interleaved round, for finalists and repeated comparisons."""
    spec: RunSpec | None
    """None for the baseline, which has no plan."""
    effective: EffectivePlan | None = None
    replicate_of: Count | None = None
    """Number of the first record with the same effective plan."""
    hardware_id: str
    started_at: Moment
    wall_s: Seconds
    source: str | None = None
    """`<process>/<NNNN>` of a record that another process of a shared study measured: that process's name and the
    record's number there. None for one's own."""
    source_devices: tuple[str, ...] = ()
    """Devices that a record of another process ran on there, in the order of the study's devices; everywhere else the
    record says this study's names for them, so that one plan is one plan wherever it ran."""
    result: Outcome

    @model_validator(mode="after")
    def _has_its_plan(self) -> Self:
        result, plan = self.result, self.effective and self.effective.plan
        of_plan = ("pipeline", "engine") if self.spec is not None else ("pipeline",)
        if isinstance(result, Measurement) and result.method in of_plan:
            if plan is None or self.spec is None or self.spec.plan != plan:
                raise ValueError("spec, effective: a pipeline that was measured has its plan in both")
            stages = len(plan.devices)
            had = (len(result.iterations[0].stages), len(result.memory) or stages, len(result.replica_tasks or (0,)))
            if had != (stages, stages, plan.replicas):
                raise ValueError(f"result: stages, memory or replica_tasks are not those of the plan's {stages} stages")
        return self


def timestamp(moment: dt.datetime | None = None) -> str:
    """A moment, by default now, in UTC by ISO 8601, to the second."""
    return (moment or dt.datetime.now(dt.UTC)).astimezone(dt.UTC).isoformat(timespec="seconds")
