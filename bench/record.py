"""What a run gave: a measurement or a failure, with the machine it ran on. Raw samples only; metrics are derived.

Times are seconds. Those of one iteration count from the moment its prompts were given (`t = 0`).
"""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field

from pipetune.bench.schedule import Task
from pipetune.bench.spec import SCHEMA_VERSION, EffectivePlan, RunSpec, Value

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
    FailureKind.COMMUNICATION_TIMEOUT: "see the other stages' logs: one of them stopped answering",
    FailureKind.UNSUPPORTED_MODEL: "choose another model or another cut",
    FailureKind.WORKER_ERROR: "see the traceback in the detail and in the worker's log",
}
"""What to do about a failure of a kind, as the end of its message."""


class Failure(Value):
    """A run that gave no measurement: what happened, where, and what to do."""

    outcome: Literal["failure"] = "failure"
    kind: FailureKind
    message: str
    """What happened and the remedy."""
    stage: int | None = None
    device: str | None = None
    phase: str | None = None
    """`start`, `load`, `check`, `warmup`, `measure`, `prefill`, `decode` …"""
    bytes_wanted: int | None = None
    bytes_had: int | None = None
    detail: str | None = None
    """Traceback or the end of the worker's log."""


class TaskShape(Value):
    """One task of the schedule, as it was run; see `bench.schedule.Task`."""

    micro_batch: int
    step: int
    first_row: int
    end_row: int
    first_token: int | None = None
    end_token: int | None = None
    """Positions of the padded prompts that a prefill worked on; None for whole prompts and for decode."""

    @classmethod
    def of(cls, task: Task, *, first_micro_batch: int, chunked: bool) -> Self:
        """The shape of a task of the schedule.

        Args:
            first_micro_batch: number of its replica's first micro-batch.
            chunked: whether prompts are prefilled in chunks.
        """
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

    compute_start_s: tuple[float, ...] = ()
    compute_end_s: tuple[float, ...] = ()
    recv_wait_s: tuple[float, ...] = ()
    """Time blocked on input (hidden states, or tokens on the first stage) before each task."""
    send_wait_s: tuple[float, ...] = ()
    """Time spent handing the output over, waits for a free buffer included."""


class Iteration(Value):
    """One timed repetition of the workload."""

    duration_s: float
    """Time from the prompts to the last token."""
    token_times_s: tuple[float, ...]
    """When the tokens of each task were known at the last stage (of a chunk without any: when it was done there);
    along `Measurement.tasks`."""
    stages: tuple[StageTrace, ...]
    """Stage by stage; of several replicas, one replica after the other."""
    host_gap_s: tuple[float, ...] = ()
    """Per stage: time inside the loop that was neither compute nor waiting."""


class StageMemory(Value):
    """Memory of one stage's device over the timed iterations, reset before them."""

    device: str
    weights_bytes: int
    """Counted over the stage's parameters and buffers, tied ones once."""
    kv_bytes: int
    """Counted over the preallocated KV slots."""
    activation_bytes: int
    """CPU: by accounting. CUDA: the allocator's peak less weights and KV."""
    peak_bytes: int
    """The real peak: CUDA allocator, or the resident set of the process on CPU."""
    peak_source: Literal["cuda_allocator", "vm_hwm"]
    baseline_bytes: int = 0
    """What the process or context took before any model was loaded; part of `peak_bytes` on CPU."""
    graphs_bytes: int = 0
    """Bytes that CUDA graphs take: of their pool what the allocator's peak lacks, which is part of `peak_bytes`, and
    what the driver keeps for them, which is not."""
    cap_bytes: int
    """memory_fraction × what the device has."""
    nvml_used_bytes: int | None = None


class OutputCheck(Value):
    """How the plan's output compared with the study's reference."""

    reference: Literal["unsplit", "plan"]
    max_logit_error: float
    """Largest difference of a logit under forced tokens; of a log-probability where texts are scored."""
    tolerance: float
    """Largest error put down to kernels: from the reference's own spread over batch sizes in this dtype."""
    compared_logits: int
    argmax_flips: int
    """Positions whose argmax differs though the top two are further apart than the tolerance."""
    typical_error: float | None = None
    """Median over positions of the largest error at each; None in records from before it was looked at."""
    typical_tolerance: float | None = None
    """Largest median error put down to kernels: from the medians of the reference's own passes, which no single expert
    routed otherwise can widen."""
    positions: int = 0
    """Positions compared: steps under forced tokens, or tokens scored."""
    outliers: int = 0
    """Positions with an error beyond the tolerance."""
    tokens_equal: bool | None = None
    """Free-running tokens of the timed runs, greedy or drawn, equal the reference's; None where not compared."""
    near_ties: int = 0
    """Prompts whose tokens part from the reference where its margin is within the tolerance: where the top two are, or
    where the number that a token is drawn by lies so near to another token's."""


class DeviceState(Value):
    """What the sensors said of one device at one moment; absent where there is no sensor."""

    device: str
    clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    utilization: float | None = None
    """NVML's share of time with a kernel running: spinning receives count as busy. CPU: share of the cores."""
    memory_used_bytes: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    ecc_errors: int | None = None
    foreign_processes: tuple[str, ...] = ()
    """Processes of others on the device (GPU), or those that took more than 10 % of a core (CPU)."""
    load_average: float | None = None


class Telemetry(Value):
    """Devices before and after the timed iterations, and what ran over them."""

    before: tuple[DeviceState, ...] = ()
    after: tuple[DeviceState, ...] = ()
    energy_j: float | None = None
    gpu_utilization: float | None = None
    """Mean of NVML's utilisation over the timed iterations, 0–1; spinning receives count as busy."""
    disturbances: tuple[str, ...] = ()
    """What makes this run doubtful, in words; empty for an undisturbed run."""


class Measurement(Value):
    """One plan, measured."""

    outcome: Literal["measurement"] = "measurement"
    method: Literal["pipeline", "hf_generate", "hf_forward"] = "pipeline"
    """Our runtime, or the baseline: Hugging Face `generate`, or its forward pass where texts are scored."""
    batch_size: int | None = None
    """Prompts that the baseline takes at once; a pipeline's sizes stand in its plan."""
    prompt_lens: tuple[int, ...]
    """Tokens of each prompt, in the order given."""
    order: tuple[int, ...]
    """`order[i]` is the given index of the prompt in row i; rows fill micro-batches in order. Each replica's are sorted
    by length."""
    output_len: int
    """Tokens generated for each prompt; 0 where texts were scored."""
    micro_batch_sizes: tuple[int, ...]
    """Rows of each micro-batch, one replica after the other."""
    tasks: tuple[TaskShape, ...]
    """The tasks of all replicas, one after the other; micro-batches are counted through."""
    replica_tasks: tuple[int, ...] | None = None
    """How many of `tasks` each replica has; None for a single one."""
    iterations: tuple[Iteration, ...] = Field(min_length=1)
    warmup_s: tuple[float, ...] = ()
    steady: bool = True
    memory: tuple[StageMemory, ...] = ()
    check: OutputCheck | None = None
    telemetry: Telemetry = Telemetry()
    load_s: float = 0.0
    """Time to move to this plan; only layers that changed hands are loaded."""
    loaded_layers: tuple[int, ...] = ()
    check_s: float | None = None
    """Time of the comparison with the reference; None where there was none."""
    prepare_s: float | None = None
    """Time of compiling and of capturing CUDA graphs, which no iteration contains; None where there was neither."""
    notes: tuple[str, ...] = ()
    """What a reader must know: fallbacks, stages that share a device, a machine that never got steady."""
    transport: str | None = None
    """`local`, `gloo`, `gloo+staging` or `nccl`."""


Outcome = Annotated[Measurement | Failure, Field(discriminator="outcome")]


class GpuInfo(Value):
    """One GPU, as NVML describes it."""

    name: str
    memory_bytes: int
    uuid: str
    compute_capability: str | None = None


class Hardware(Value):
    """What comparisons and resumes demand to be equal (UUIDs apart)."""

    cpu_model: str
    cpu_cores: int
    memory_bytes: int
    """Rounded down to whole GiB: kernels report a little more or less from boot to boot."""
    gpus: tuple[GpuInfo, ...] = ()
    links: tuple[str, ...] = ()
    """`0-1:NV18`: what lies between each pair of GPUs."""

    @property
    def hardware_id(self) -> str:
        """Digest of everything here but the UUIDs."""
        anonymous = tuple(gpu.model_copy(update={"uuid": ""}) for gpu in self.gpus)
        return self.model_copy(update={"gpus": anonymous}).digest(exclude_defaults=False)


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

    schema_version: int = SCHEMA_VERSION
    hostname: str
    hardware_id: str
    hardware: Hardware
    software: Software


Role = Literal["baseline", "single_stage", "trial", "finalist", "bench"]


class Record(Value):
    """One run, durable before anyone is told of it; `records/NNNN.json`."""

    schema_version: int = SCHEMA_VERSION
    number: int = Field(ge=0)
    """NNNN of the file name; counts up over the study."""
    role: Role
    trial_number: int | None = None
    params: dict[str, int | float | str] | None = None
    """What the search proposed, so that its database can be rebuilt from the records."""
    round: int | None = None
    """Which interleaved round, for finalists and repeated comparisons."""
    spec: RunSpec | None
    """None for the baseline, which has no plan."""
    effective: EffectivePlan | None = None
    replicate_of: int | None = None
    """Number of the first record with the same effective plan."""
    hardware_id: str
    started_at: str
    """UTC, ISO 8601."""
    wall_s: float
    source: str | None = None
    """`<process>/<NNNN>` of a record that another process of a shared study measured: that process's name and the
    record's number there. None for one's own."""
    source_devices: tuple[str, ...] = ()
    """Devices that a record of another process ran on there, in the order of the study's devices; everywhere else the
    record says this study's names for them, so that one plan is one plan wherever it ran."""
    result: Outcome


def timestamp(moment: dt.datetime | None = None) -> str:
    """A moment, by default now, in UTC by ISO 8601, to the second."""
    return (moment or dt.datetime.now(dt.UTC)).astimezone(dt.UTC).isoformat(timespec="seconds")
