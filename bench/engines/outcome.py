"""From what an engine's hosts told of their passes to a measurement, or to why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipetune.bench.engines.reference import EngineReference
from pipetune.bench.memory import ModelShape, stage_bytes
from pipetune.bench.record import (
    Failure,
    Iteration,
    Measurement,
    OutputCheck,
    RequestTimes,
    StageMemory,
    StageTrace,
)
from pipetune.bench.spec import RunSpec
from pipetune.bench.worker.acceptance import over_cap, wrong_tokens


@dataclass(frozen=True)
class Pass:
    """All prompts once: which each replica was given, when, and what its host answered."""

    shares: Sequence[Sequence[int]]
    start_at: float
    answers: Sequence[dict[str, Any]]

    @property
    def duration_s(self) -> float:
        """Until the last replica was done."""
        return max(float(answer["duration_s"]) for answer in self.answers)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """One for each prompt, in the order given."""
        pairs = (
            pair
            for share, answer in zip(self.shares, self.answers, strict=True)
            for pair in zip(share, answer["requests"], strict=True)
        )
        return [request for _, request in sorted(pairs, key=lambda pair: pair[0])]

    @property
    def workers(self) -> list[dict[str, Any]]:
        """By rank, one replica after the other."""
        return [worker for answer in self.answers for worker in answer["workers"]]


@dataclass(frozen=True)
class TimedRun:
    """The timed passes of a plan, with what is known of its workers."""

    spec: RunSpec
    prompt_lens: tuple[int, ...]
    shape: ModelShape
    device_bytes: dict[str, int]
    passes: Sequence[Pass]
    kv_bytes: Sequence[int]
    baseline_bytes: Sequence[int]
    """These two by rank, one replica after the other."""
    reference: EngineReference | None
    check: OutputCheck | None

    def outcome(self) -> Measurement | Failure:
        """Without what only the driver knows."""
        workload, plan = self.spec.workload, self.spec.plan
        check, failure = self._checked()
        memory = self._memory()
        failure = failure or over_cap(memory)
        if failure is not None:
            return failure
        lens, count = workload.generated_lens, workload.num_prompts
        reset = all(answer["peak_was_reset"] for one in self.passes for answer in one.answers)
        return Measurement(
            method="engine",
            prompt_lens=self.prompt_lens,
            order=tuple(range(count)),
            output_len=workload.generated_len,
            output_lens=lens if len(set(lens)) > 1 else None,
            goodput=workload.goodput,
            micro_batch_sizes=(count,),
            tasks=(),
            replica_tasks=(0,) * plan.replicas if plan.replicas > 1 else None,
            iterations=tuple(map(self._iteration, self.passes)),
            memory=memory,
            check=check,
            notes=() if reset else ("peak memory is that of the workers so far: the kernel does not let it be reset",),
            transport="vllm",
        )

    def _checked(self) -> tuple[OutputCheck | None, Failure | None]:
        """The check with the timed passes' tokens in it; draws of other software are others."""
        if self.reference is None or self.check is None or self.spec.workload.sampling is not None:
            return self.check, None
        counts = [
            self.reference.compare_tokens([request["token_ids"] for request in one.requests]) for one in self.passes
        ]
        wrong, near = (max(column) for column in zip(*counts, strict=True))
        failure = wrong_tokens(wrong, self.spec.workload.num_prompts, self.shape.dtype_bytes)
        return self.check.model_copy(update={"tokens_equal": wrong == 0, "near_ties": near}), failure

    @property
    def _width(self) -> int:
        engine = self.spec.plan.engine
        return engine.tensor_parallel_size if engine is not None else 1

    def _iteration(self, one: Pass) -> Iteration:
        stages, leads = len(self.spec.plan.stages), one.workers[:: self._width]
        return Iteration(
            duration_s=round(one.duration_s, 6),
            token_times_s=(),
            stages=tuple(
                stage_trace(worker["spans"], one.start_at, is_last=place % stages == stages - 1)
                for place, worker in enumerate(leads)
            ),
            requests=tuple(
                RequestTimes(
                    scheduled_s=max(0.0, round(request["scheduled_s"], 6)),
                    token_times_s=tuple(round(moment, 6) for moment in request["token_times_s"]),
                )
                for request in one.requests
            ),
        )

    def _memory(self) -> tuple[StageMemory, ...]:
        plan, lens = self.spec.plan, {"prompt_len": 1, "output_len": 1}
        told = ([worker["peak_bytes"] for worker in one.workers] for one in self.passes)
        peaks = [max(column) for column in zip(*told, strict=True)]
        found = []
        for place, device in enumerate(plan.devices):
            stage, ranks = place % len(plan.stages), range(place * self._width, (place + 1) * self._width)
            fullest = max(ranks, key=lambda rank: peaks[rank])
            weights = stage_bytes(self.shape, plan, stage, **lens).weights // self._width
            kv, baseline = self.kv_bytes[fullest], self.baseline_bytes[fullest]
            found.append(
                StageMemory(
                    device=device,
                    weights_bytes=weights,
                    kv_bytes=kv,
                    activation_bytes=max(0, peaks[fullest] - baseline - weights - kv),
                    peak_bytes=peaks[fullest],
                    peak_source="vm_hwm",
                    baseline_bytes=baseline,
                    cap_bytes=plan.stages[stage].cap_bytes(self.device_bytes[device]),
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
    times = [tuple(max(0.0, round(moment, 6)) for moment in column) for column in columns[:4]]
    return StageTrace(
        compute_start_s=times[0],
        compute_end_s=times[1],
        recv_wait_s=times[2],
        send_wait_s=times[3],
        step_requests=tuple(columns[4]),
        step_tokens=tuple(columns[5]),
    )
