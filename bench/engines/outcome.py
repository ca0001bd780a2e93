"""From what an engine's hosts told of their passes to a measurement, or to why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipetune.bench.engines.reference import EngineReference
from pipetune.bench.fleet.engine import Engine
from pipetune.bench.memory import stage_bytes
from pipetune.bench.record import Failure, Iteration, Measurement, OutputCheck, RequestTimes, StageMemory, StageTrace
from pipetune.bench.spec import Plan, RunSpec, device_kind
from pipetune.bench.worker.acceptance import over_cap, wrong_tokens

Told = dict[str, Any]
"""What a host or one of its workers answered."""


@dataclass(frozen=True)
class Pass:
    """All prompts once: which each replica was given, when, and what its host answered."""

    shares: Sequence[Sequence[int]]
    start_at: float
    at_s: Sequence[float]
    """When each prompt came, seconds from then."""
    answers: Sequence[Told]

    @property
    def duration_s(self) -> float:
        """Until the last replica was done."""
        return max(float(answer["duration_s"]) for answer in self.answers)

    @property
    def requests(self) -> list[Told]:
        """One for each prompt, in the order given."""
        pairs = zip(self.shares, self.answers, strict=True)
        by_index = {k: v for share, answer in pairs for k, v in zip(share, answer["requests"], strict=True)}
        return [by_index[index] for index in range(len(by_index))]

    @property
    def workers(self) -> list[Told]:
        """By rank, one replica after the other."""
        return [worker for answer in self.answers for worker in answer["workers"]]


def outcome_of(
    engine: Engine,
    spec: RunSpec,
    passes: Sequence[Pass],
    workers: Sequence[Told],
    reference: EngineReference | None,
    check: OutputCheck | None,
) -> Measurement | Failure:
    """What timed passes amount to, without what only the driver knows; `workers` is what each told of itself as it took
    the plan, by rank, one replica after the other, and `check` is of forced tokens, before."""
    workload, lens = spec.workload, spec.workload.generated_lens
    memory, failure = _memory(engine, spec.plan, passes, workers), None
    if reference is not None and check is not None and workload.sampling is None:
        # Draws of other software are others.
        parted = [reference.compare_tokens([one["token_ids"] for one in each.requests]) for each in passes]
        wrong, near = (max(column) for column in zip(*parted, strict=True))
        check = check.model_copy(update={"tokens_equal": wrong == 0, "near_ties": near})
        failure = wrong_tokens(wrong, workload.num_prompts, engine.shape.dtype_bytes)
    if failure := failure or over_cap(memory):
        return failure
    was_reset = all(answer["peak_was_reset"] for one in passes for answer in one.answers)
    return Measurement(
        method="engine",
        prompt_lens=engine.prompt_lens(workload),
        order=tuple(range(workload.num_prompts)),
        output_len=workload.generated_len,
        output_lens=workload.unlike_lens,
        goodput=workload.goodput,
        micro_batch_sizes=(len(lens),),
        tasks=(),
        replica_tasks=(0,) * spec.plan.replicas if spec.plan.replicas > 1 else None,
        iterations=tuple(_iteration(spec.plan, one) for one in passes),
        memory=memory,
        check=check,
        notes=() if was_reset else ("peak memory is the workers' so far: the kernel does not let it be reset",),
    )


def _iteration(plan: Plan, one: Pass) -> Iteration:
    depth = len(plan.stages)
    return Iteration(
        duration_s=round(one.duration_s, 6),
        token_times_s=(),
        stages=tuple(
            stage_trace(worker["spans"], one.start_at, is_last=place % depth == depth - 1)
            for place, worker in enumerate(one.workers[:: plan.width])
        ),
        requests=tuple(
            RequestTimes(
                arrived_s=_since(at_s),
                began_s=_since(row["scheduled_s"]),
                token_times_s=tuple(map(_since, row["token_times_s"])),
            )
            for at_s, row in zip(one.at_s, one.requests, strict=True)
        ),
    )


def _since(moment_s: float) -> float:
    return max(0.0, round(moment_s, 6))


def _memory(engine: Engine, plan: Plan, passes: Sequence[Pass], workers: Sequence[Told]) -> tuple[StageMemory, ...]:
    """The fullest worker of each stage."""
    found = []
    for place, device in enumerate(plan.devices):
        index, own = place % len(plan.stages), range(place * plan.width, (place + 1) * plan.width)
        peak, rank = max((each.workers[rank]["peak_bytes"], rank) for rank in own for each in passes)
        weights = stage_bytes(engine.shape, plan, index, prompt_len=1, output_len=1).weights // plan.width
        kv, baseline = workers[rank]["kv_bytes"], workers[rank]["baseline_bytes"]
        found.append(
            StageMemory(
                device=device,
                weights_bytes=weights,
                kv_bytes=kv,
                activation_bytes=max(0, peak - baseline - weights - kv),
                peak_bytes=peak,
                peak_source="vm_hwm" if device_kind(device) == "cpu" else "cuda_allocator",
                baseline_bytes=baseline,
                cap_bytes=plan.stages[index].cap_bytes(engine.device_bytes[device]),
            )
        )
    return tuple(found)


def stage_trace(spans: Sequence[Sequence[Any]], zero_s: float, *, is_last: bool) -> StageTrace:
    """What a worker did, from the probe's spans; sampling is a task of its own, and the last stage's alone."""
    rows: list[list[Any]] = []
    received_s = 0.0
    for kind, start, end, requests, tokens in sorted(spans, key=lambda span: span[1]):
        if kind == "receive":
            received_s += end - start
        elif kind == "send" and rows:
            rows[-1][3] += end - start
        elif kind == "compute" or (kind == "sample" and is_last):
            rows.append([start - zero_s, end - zero_s, received_s, 0.0, requests, tokens])
            received_s = 0.0
    columns = [[row[place] for row in rows] for place in range(6)]
    starts, ends, received, sent = (tuple(map(_since, column)) for column in columns[:4])
    return StageTrace(
        compute_start_s=starts,
        compute_end_s=ends,
        recv_wait_s=received,
        send_wait_s=sent,
        step_requests=tuple(columns[4]),
        step_tokens=tuple(columns[5]),
    )
