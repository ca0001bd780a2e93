"""Builds records as a fleet would write them: the real schedule, simulated with a plausible cost of each task.

The costs are those of a 30-layer model on one slow core: prefill costs by the row, decode by the step and a little by
the row, so that micro-batches trade bubbles for intensity as they do on real machines.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.record import (
    Failure,
    FailureKind,
    GpuInfo,
    Hardware,
    Iteration,
    Machine,
    Measurement,
    Outcome,
    OutputCheck,
    Record,
    Role,
    Software,
    StageMemory,
    StageTrace,
    TaskShape,
    Telemetry,
)
from pipetune.bench.schedule import Task, build_schedule, micro_batch_sizes
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Workload
from tests.ideal_schedule import simulate

DEVICES = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
MODEL = ModelSpec(name="smollm2-135m", revision="b179c9523d0e")
WORKLOAD = Workload(num_prompts=32, input_len=64, output_len=16)
NUM_LAYERS = 30

PREFILL_LAYER_ROW_S = 5.0e-3
DECODE_LAYER_S = 6.0e-3
DECODE_LAYER_ROW_S = 0.15e-3
HEAD_LAYERS = 2.5
"""The head's cost in layers, which the last stage pays."""
BASELINE_OVERHEAD = 1.3
"""How much slower HF generate is than our single stage."""


def make_plan(
    counts: Sequence[int] = (17, 13),
    micro_batch_size: int = 16,
    prefill: int | None = None,
    *,
    chunk: int | None = None,
    replicas: int = 1,
    compile: bool = False,  # noqa: A002  the name of the field
) -> Plan:
    """A plan over the first devices of `DEVICES`."""
    return Plan.from_layer_counts(
        tuple(counts),
        DEVICES,
        micro_batch_size,
        prefill_micro_batch_size=prefill,
        prefill_chunk_size=chunk,
        replicas=replicas,
        compile=compile,
    )


def make_effective(plan: Plan, workload: Workload = WORKLOAD) -> EffectivePlan:
    """The plan with as many micro-batches in flight as there are."""
    count = len(micro_batch_sizes(math.ceil(workload.num_prompts / plan.replicas), plan.micro_batch_size))
    return EffectivePlan(plan=plan, in_flight=min(count, plan.max_in_flight or count))


def make_measurement(
    plan: Plan,
    workload: Workload = WORKLOAD,
    *,
    num_iters: int = 3,
    seed: int = 0,
    noise: float = 0.02,
    drift: float = 1.0,
    hop_s: float = 1.5e-3,
    slow: Mapping[str, float] | None = None,
    instrument: bool = True,
    notes: tuple[str, ...] = (),
    disturbances: tuple[str, ...] = (),
    check: OutputCheck | None = None,
    telemetry: Telemetry | None = None,
) -> Measurement:
    """What a pipeline run of the plan gives.

    Args:
        noise: relative spread of task times.
        drift: factor on all times, for a machine that is slower today.
        slow: factors on the times of single devices.
        check: None makes a passed one.
    """
    rng = random.Random(
        f"{plan.describe()} {workload.num_prompts}×{workload.input_len} {workload.generated_len} {seed}"
    )
    in_flight = make_effective(plan, workload).in_flight
    prompt_lens = make_prompt_lens(workload)
    by_length = tuple(sorted(range(len(prompt_lens)), key=lambda index: -prompt_lens[index]))
    shares = [by_length[replica :: plan.replicas] for replica in range(plan.replicas)]
    sizes = [micro_batch_sizes(len(share), plan.micro_batch_size) for share in shares]
    schedules = [
        build_schedule(
            own,
            prompt_lens=[workload.input_len] * len(own),
            output_len=max(1, workload.generated_len),
            in_flight=in_flight,
            prefill_size=plan.prefill_size,
            chunk_size=plan.prefill_chunk_size,
        )
        for own in sizes
    ]
    iterations = []
    for _ in range(num_iters):
        today = drift * rng.uniform(1 - noise, 1 + noise)
        seen = [
            _replica_run(plan.replica(replica), tasks, rng, today, noise, hop_s, slow or {})
            for replica, tasks in enumerate(schedules)
        ]
        stages = tuple(trace for traces, _ in seen for trace in traces)
        token_times = tuple(moment for traces, _ in seen for moment in traces[-1].compute_end_s)
        iterations.append(
            Iteration(
                duration_s=max(token_times),
                token_times_s=token_times,
                stages=stages if instrument else (StageTrace(),) * len(stages),
                host_gap_s=tuple(gap for _, gaps in seen for gap in gaps) if instrument else (),
            )
        )
    return Measurement(
        prompt_lens=prompt_lens,
        order=tuple(index for share in shares for index in share),
        output_len=workload.generated_len,
        micro_batch_sizes=tuple(size for own in sizes for size in own),
        tasks=tuple(
            TaskShape.of(
                task,
                first_micro_batch=sum(map(len, sizes[:replica])),
                chunked=plan.prefill_chunk_size is not None,
            )
            for replica, tasks in enumerate(schedules)
            for task in tasks
        ),
        replica_tasks=tuple(map(len, schedules)) if plan.replicas > 1 else None,
        iterations=tuple(iterations),
        warmup_s=(1.3 * iterations[0].duration_s,),
        memory=tuple(
            _stage_memory(plan, index, in_flight, workload, replica)
            for replica in range(plan.replicas)
            for index in range(len(plan.stages))
        ),
        check=check or make_check(),
        telemetry=telemetry or Telemetry(disturbances=disturbances),
        load_s=0.8,
        loaded_layers=(13, 14, 15, 16),
        check_s=1.9,
        prepare_s=21.5 if plan.compile else None,
        notes=notes,
        transport="gloo" if len(plan.stages) > 1 else "local",
    )


def _replica_run(
    plan: Plan,
    tasks: Sequence[Task],
    rng: random.Random,
    today: float,
    noise: float,
    hop_s: float,
    slow: Mapping[str, float],
) -> tuple[list[StageTrace], list[float]]:
    """One iteration of one replica: what its stages did, and their host gaps."""
    durations = [
        [
            today
            * rng.uniform(1 - noise, 1 + noise)
            * slow.get(stage.device, 1.0)
            * (stage.num_layers + HEAD_LAYERS * (index == len(plan.stages) - 1))
            * layer_s(task.num_rows, task.num_tokens, is_prefill=task.is_prefill)
            for task in tasks
        ]
        for index, stage in enumerate(plan.stages)
    ]
    starts = simulate(tasks, durations, hop_s=hop_s)
    stages, gaps = [], []
    for own_starts, own_durations in zip(starts, durations, strict=True):
        ends = [start + took for start, took in zip(own_starts, own_durations, strict=True)]
        idle = [max(0.0, now - before) for before, now in zip([0.0, *ends[:-1]], own_starts, strict=True)]
        stages.append(
            StageTrace(
                compute_start_s=own_starts,
                compute_end_s=tuple(ends),
                recv_wait_s=tuple(0.9 * gap for gap in idle),
                send_wait_s=(0.1 * hop_s,) * len(tasks),
            )
        )
        gaps.append(0.1 * sum(idle))
    return stages, gaps


def make_baseline_measurement(
    batch_size: int,
    workload: Workload = WORKLOAD,
    *,
    num_iters: int = 3,
    seed: int = 0,
    noise: float = 0.02,
    drift: float = 1.0,
    notes: tuple[str, ...] = (),
) -> Measurement:
    """What HF generate gives, batch after batch, without spans."""
    plan = Plan.from_layer_counts((NUM_LAYERS,), DEVICES, batch_size).model_copy(update={"max_in_flight": 1})
    run = make_measurement(
        plan, workload, num_iters=num_iters, seed=seed, noise=noise, drift=drift * BASELINE_OVERHEAD, instrument=False
    )
    iterations = tuple(iteration.model_copy(update={"stages": (), "host_gap_s": ()}) for iteration in run.iterations)
    return run.model_copy(
        update={
            "method": "hf_forward" if workload.kind == "score" else "hf_generate",
            "batch_size": batch_size,
            "iterations": iterations,
            "check": None,
            "check_s": None,
            "transport": None,
            "loaded_layers": (),
            "notes": notes,
        }
    )


def make_check(max_logit_error: float = 2.1e-5, argmax_flips: int = 0) -> OutputCheck:
    """A comparison with the unsplit model; passed as it stands."""
    return OutputCheck(
        reference="unsplit",
        max_logit_error=max_logit_error,
        tolerance=2.0e-4,
        compared_logits=32 * 49152,
        argmax_flips=argmax_flips,
        tokens_equal=argmax_flips == 0,
    )


def make_failure(kind: FailureKind = FailureKind.WORKER_DIED, message: str | None = None) -> Failure:
    """A failure of stage 1."""
    return Failure(
        kind=kind,
        message=message or "worker of stage 1 on cpu:1 was killed by signal 9; see logs/rank1.log",
        stage=1,
        device="cpu:1",
        phase="decode",
        detail="Traceback (most recent call last): …",
    )


def make_record(
    number: int,
    role: Role,
    plan: Plan | None,
    result: Outcome,
    *,
    workload: Workload = WORKLOAD,
    round_: int | None = None,
    trial_number: int | None = None,
) -> Record:
    """A record around an outcome; `plan` is None for the baseline."""
    params: dict[str, int | float | str] | None = {"cut_rank": number} if trial_number is not None else None
    if isinstance(result, Measurement) and result.batch_size is not None:
        params = {"batch_size": result.batch_size}
    return Record(
        number=number,
        role=role,
        trial_number=trial_number,
        params=params,
        round=round_,
        spec=RunSpec(model=MODEL, workload=workload, plan=plan, protocol=Protocol()) if plan else None,
        effective=make_effective(plan, workload) if plan else None,
        hardware_id=make_machine().hardware_id,
        started_at=f"2026-01-02T03:{number // 60 % 60:02}:{number % 60:02}Z",
        wall_s=30.0,
        result=result,
    )


def make_study_records(
    *, workload: Workload = WORKLOAD, rounds: int = 5, seed: int = 0, failures: bool = True, instrument: bool = True
) -> tuple[Record, ...]:
    """A whole study: baseline sweep, single stage, trials with failures, interleaved finalists."""
    records: list[Record] = []

    def add(
        role: Role, plan: Plan | None, result: Outcome, round_: int | None = None, trial_number: int | None = None
    ) -> None:
        number = len(records)
        records.append(
            make_record(number, role, plan, result, workload=workload, round_=round_, trial_number=trial_number)
        )

    def measure(plan: Plan, drift: float = 1.0) -> Measurement:
        return make_measurement(plan, workload, seed=seed + len(records), drift=drift, instrument=instrument)

    for batch_size in (8, 16, 32):
        add("baseline", None, make_baseline_measurement(batch_size, workload, seed=seed + len(records)))
    single = make_plan((NUM_LAYERS,), 32)
    add("single_stage", single, measure(single))
    plans = [
        make_plan((15, 15), 16),
        make_plan((17, 13), 16),
        make_plan((16, 14), 16, prefill=8),
        make_plan((16, 14), 8),
        make_plan((10, 20), 16),
        make_plan((20, 10), 16),
        make_plan((17, 13), 16, prefill=8),
        make_plan((15, 15), 32),
    ]
    for trial_number, plan in enumerate(plans):
        add("trial", plan, measure(plan), trial_number=trial_number)
    if failures:
        add("trial", make_plan((18, 12), 16), make_failure(), trial_number=len(plans))
        big = make_plan((1, 29), 32)
        capped = Failure(
            kind=FailureKind.OVER_MEMORY_CAP,
            message="stage 1 on cpu:1 needs 812 MiB for one micro-batch and its cap is 600 MiB; give it fewer layers",
            stage=1,
            device="cpu:1",
            phase="plan",
            bytes_wanted=812 * 2**20,
            bytes_had=600 * 2**20,
        )
        add("trial", big, capped, trial_number=len(plans) + 1)
    rng = random.Random(seed)
    trials = [record for record in records if record.role == "trial" and isinstance(record.result, Measurement)]
    trials.sort(key=lambda record: min(run.duration_s for run in record.result.iterations))  # type: ignore[union-attr]
    finalists = [*(record.spec.plan for record in trials[:3] if record.spec), None]
    for round_ in range(rounds):
        drift = rng.uniform(0.95, 1.15)
        for finalist in rng.sample(finalists, len(finalists)):
            if finalist is None:
                result = make_baseline_measurement(32, workload, seed=seed + len(records), drift=drift)
                add("finalist", None, result, round_)
            else:
                add("finalist", finalist, measure(finalist, drift), round_)
    return tuple(records)


def make_prompt_lens(workload: Workload) -> tuple[int, ...]:
    """Lengths of the random prompts, in the order given."""
    rng = random.Random(workload.seed)
    ratio = workload.random_range_ratio
    return tuple(
        max(1, round(workload.input_len * rng.uniform(1 - ratio, 1 + ratio))) for _ in range(workload.num_prompts)
    )


def make_machine(*, gpus: int = 0) -> Machine:
    """A small CPU machine, or one with NVIDIA GPUs."""
    hardware = Hardware(
        cpu_model="Example CPU @ 2.50GHz",
        cpu_cores=2,
        memory_bytes=8 * 2**30,
        gpus=tuple(
            GpuInfo(name="NVIDIA L4", memory_bytes=24 * 2**30, uuid=f"GPU-{index:04}", compute_capability="8.9")
            for index in range(gpus)
        ),
        links=tuple(f"{index}-{index + 1}:PHB" for index in range(gpus - 1)),
    )
    return Machine(
        hostname="workstation",
        hardware_id=hardware.hardware_id,
        hardware=hardware,
        software=Software(
            python="3.11.9",
            packages={"torch": "2.13.0+cpu", "transformers": "5.23.0", "optuna": "5.0.0"},
            os="Linux 6.1",
            git_revision="0123abc",
            pipetune="0.1.0",
        ),
    )


def make_shape() -> ModelShape:
    """SmolLM2-135M: 30 layers of 14 MB in fp32, a tied head."""
    layer = LayerShape(weight_bytes=14_160_384, active_params=3_540_096, kv_bytes_per_token=2 * 3 * 64 * 4)
    return ModelShape(
        architecture="LlamaForCausalLM",
        num_parameters=134_515_008,
        layers_prefix="model.layers",
        first_modules=("model.embed_tokens", "model.rotary_emb"),
        last_modules=("model.norm", "lm_head"),
        embedding_bytes=113_246_208,
        head_bytes=0,
        other_bytes=2304,
        tied=True,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        vocab_size=49152,
        dtype_bytes=4,
        layers=(layer,) * NUM_LAYERS,
        max_positions=8192,
    )


def layer_s(rows: int, tokens: int, *, is_prefill: bool) -> float:
    """Seconds of one task of one layer; the head takes `HEAD_LAYERS` times as long."""
    if is_prefill:
        return PREFILL_LAYER_ROW_S * rows * tokens / 64 + 2e-3
    return DECODE_LAYER_S + DECODE_LAYER_ROW_S * rows


def _stage_memory(plan: Plan, index: int, in_flight: int, workload: Workload, replica: int) -> StageMemory:
    stage = plan.replica(replica).stages[index]
    weights = stage.num_layers * 14_160_384 + 113_246_208
    kv = in_flight * plan.micro_batch_size * (workload.input_len + workload.generated_len) * stage.num_layers * 1536
    activations = plan.prefill_size * workload.input_len * 8064 * 4
    base = 310 * 2**20
    return StageMemory(
        device=stage.device,
        weights_bytes=weights,
        kv_bytes=kv,
        activation_bytes=activations,
        peak_bytes=base + weights + kv + activations,
        peak_source="vm_hwm",
        baseline_bytes=base,
        cap_bytes=int(stage.memory_fraction * 4 * 2**30),
    )
