"""One measured run inside a worker: move to the plan, check its output, warm up, time it, and say what was seen."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.memory import stage_bytes
from bench.record import (
    SHARED_DEVICE_NOTE,
    Failure,
    Iteration,
    Measurement,
    OutputCheck,
    StageMemory,
    StageTrace,
    TaskShape,
    Telemetry,
)
from bench.reference import (
    Reference,
    choose_checked,
    compare_logits,
    compare_tokens,
    reference_digest,
    spread_of,
    worst_check,
)
from bench.runner import Runner
from bench.runtime.generate import PassResult
from bench.runtime.job import Job
from bench.runtime.packing import packed_bytes
from bench.schedule import Task
from bench.spec import EffectivePlan, Plan, Protocol, RunSpec, device_kind
from bench.telemetry import merge_telemetry, peak_rss_bytes, read_telemetry, reset_peak_rss, sensors_for
from bench.verdicts import is_steady, over_cap, wrong_output, wrong_tokens

PEAK_NOT_RESET_NOTE = "peak memory is that of the process so far, not of this run: the kernel does not let it be reset"


class MeasuredRun:
    """Measures one plan; every rank makes one and calls the same methods."""

    def __init__(self, runner: Runner, plan: Plan, job: Job, protocol: Protocol, reference: Reference | None) -> None:
        """
        Args:
            job: over all prompts.
            reference: what the output is compared with; None compares nothing.
        """
        self.runner, self.plan, self.job = runner, plan, job
        self.protocol, self.reference = protocol, reference
        self.control = runner.control

    def measure(self) -> Measurement | Failure | None:
        """Rank 0 gets the outcome, the others None."""
        runner, protocol = self.runner, self.protocol
        load_s, loaded = runner.apply(self.plan)
        check, check_s = None, None
        if self.reference is not None and protocol.check_outputs:
            runner.status.phase = "check"
            runner.report("check", 0, 1)
            began = time.monotonic()
            check = self._check(self.reference)
            check_s = time.monotonic() - began
            failure = wrong_output(check)
            if failure is not None:
                return failure
        jobs = runner.parts(self.job)
        runner.open(jobs, instrument=protocol.instrument)
        runner.status.phase = "warmup"
        warmup = self._warm_up(jobs)
        runner.status.phase = "measure"
        outcome = self._iterate(jobs, check)
        if runner.rank != 0 or isinstance(outcome, Failure):
            return outcome if runner.rank == 0 else None
        assert outcome is not None
        durations = [run.duration_s for run in outcome.iterations]
        steady = is_steady(durations if len(durations) > 1 else warmup[-1:] + durations, protocol.steady_tolerance)
        return outcome.model_copy(
            update={
                "load_s": round(load_s, 4),
                "loaded_layers": loaded,
                "check_s": None if check_s is None else round(check_s, 4),
                "warmup_s": tuple(warmup),
                "steady": steady,
                "transport": runner.transport(),
                "notes": (*outcome.notes, *self._notes(steady)),
            }
        )

    def _notes(self, steady: bool) -> list[str]:
        notes = []
        if not steady:
            notes.append(
                f"never steady: passes of the same work differ by more than {self.protocol.steady_tolerance:.0%}"
            )
        devices = self.runner.devices
        shared = {name for name in devices if device_kind(name) == "cuda" and devices.count(name) > 1}
        if shared & set(self.plan.devices) and len(self.plan.devices) > 1:
            notes.append(
                f"{SHARED_DEVICE_NOTE}: stages share a GPU, which proves correctness and never speed; not ranked"
            )
        return notes

    def _check(self, reference: Reference) -> OutputCheck:
        """Feeds the reference's tokens through every replica and compares logits; the worst replica counts."""
        count, steps = reference.logits.shape[0], reference.logits.shape[1]
        tokens = reference.tokens[list(reference.checked), :steps]
        logits = forced_pass(self.runner, self.plan, self.job, reference.checked, tokens, max(1, count // 2))
        mine = compare_logits(reference, logits).model_dump(mode="json") if logits is not None else None
        rows = self.control.gather(mine)
        return worst_check([OutputCheck.model_validate(row) for row in rows if row is not None])

    def _warm_up(self, jobs: Sequence[Job | None]) -> list[float]:
        """Repeats `num_iters_warmup` times, and with two or more until two in a row take alike, up to `max_warmup`."""
        protocol = self.protocol
        durations: list[float] = []
        wanted, most = protocol.num_iters_warmup, max(protocol.max_warmup, protocol.num_iters_warmup)
        while len(durations) < wanted:
            self.runner.report("warmup", len(durations), wanted)
            _, duration_s = self.runner.window(self.runner.run(jobs))
            durations.append(round(duration_s, 6))
            if len(durations) == wanted >= 2 and not is_steady(durations[-2:], protocol.steady_tolerance):
                wanted = min(wanted + 1, most)
        return durations

    def _iterate(self, jobs: Sequence[Job | None], check: OutputCheck | None) -> Measurement | Failure | None:
        runner = self.runner
        assert runner.placement is not None
        sensors = sensors_for([runner.device.name])
        before = sensors.state()
        peak_was_reset = True
        runner.device.synchronize()
        if runner.device.is_cuda:
            torch.cuda.reset_peak_memory_stats(runner.device.torch_device)
        else:
            peak_was_reset = reset_peak_rss()
        sensors.start()
        iterations: list[Iteration] = []
        wrong: list[int] | None = None
        for number in range(self.protocol.num_iters):
            runner.report("measure", number, self.protocol.num_iters)
            result = runner.run(jobs)
            zero_s, duration_s = runner.window(result)
            wrong = self._compare(result, wrong)
            rows = self.control.gather(_seen(result, zero_s))
            if runner.rank == 0:
                iterations.append(self._iteration(rows, duration_s))
        telemetry = read_telemetry(sensors, before)
        mine: dict[str, Any] = {
            "telemetry": telemetry.model_dump(mode="json"),
            "wrong": wrong,
            "peak_was_reset": peak_was_reset,
        }
        if runner.index is not None:
            mine["memory"] = self._memory().model_dump(mode="json")
        rows = self.control.gather(mine)
        if runner.rank != 0:
            return None
        ranks = runner.placement.ranks
        compared = [rows[rank]["wrong"] for rank in runner.placement.last_ranks if rows[rank]["wrong"] is not None]
        if compared:
            wrong_rows, near_ties = (sum(column) for column in zip(*compared, strict=True))
            base = check or OutputCheck(
                reference="unsplit", max_logit_error=0.0, tolerance=0.0, compared_logits=0, argmax_flips=0
            )
            check = base.model_copy(update={"tokens_equal": wrong_rows == 0, "near_ties": near_ties})
            failure = wrong_tokens(wrong_rows, len(self.job.prompts), runner.shape.dtype_bytes)
            if failure is not None:
                return failure
        # Stages that share a GPU saw the same sensors.
        watchers = {runner.devices[rank]: rank for rank in ranks}.values()
        memory = tuple(StageMemory.model_validate(rows[rank]["memory"]) for rank in ranks)
        over = over_cap(memory)
        if over is not None:
            return over
        return Measurement(
            **self._shapes(jobs),
            prompt_lens=tuple(len(prompt) for prompt in self.job.prompts),
            output_len=self.job.output_len,
            iterations=tuple(iterations),
            memory=memory,
            check=check,
            notes=() if all(rows[rank]["peak_was_reset"] for rank in ranks) else (PEAK_NOT_RESET_NOTE,),
            telemetry=merge_telemetry([Telemetry.model_validate(rows[rank]["telemetry"]) for rank in watchers]),
        )

    def _shapes(self, jobs: Sequence[Job | None]) -> dict[str, Any]:
        """What was run in which order, over all replicas: `order`, `micro_batch_sizes`, `tasks`, `replica_tasks`."""
        order: list[int] = []
        sizes: list[int] = []
        tasks: list[TaskShape] = []
        counts: list[int] = []
        for replica, job in enumerate(jobs):
            own = job.tasks() if job is not None else ()
            tasks += [_task_shape(task, len(sizes), job) for task in own if job is not None]
            counts.append(len(own))
            if job is not None:
                share = self.job.share(replica, len(jobs))
                order += [share[index] for index in job.order] if len(jobs) > 1 else job.order
                sizes += job.sizes
        return {
            "order": tuple(order),
            "micro_batch_sizes": tuple(sizes),
            "tasks": tuple(tasks),
            "replica_tasks": tuple(counts) if len(jobs) > 1 else None,
        }

    def _compare(self, result: PassResult | None, so_far: list[int] | None) -> list[int] | None:
        """Prompts of this replica whose tokens are wrong, and near ties; the worst of all iterations."""
        if result is None or result.tokens is None or self.reference is None:
            return so_far
        placement = self.runner.placement
        assert placement is not None
        assert placement.replica is not None
        share = self.job.share(placement.replica, self.plan.replicas)
        given = {index if self.plan.replicas == 1 else share[index]: row for index, row in result.tokens.items()}
        wrong, near = compare_tokens(self.reference, given)
        return [max(wrong, so_far[0]), max(near, so_far[1])] if so_far else [wrong, near]

    def _iteration(self, rows: list[Any], duration_s: float) -> Iteration:
        placement = self.runner.placement
        assert placement is not None
        nothing: dict[str, Any] = {"trace": {}, "tokens_s": [], "gap_s": 0.0}
        seen = [rows[rank] or nothing for rank in placement.ranks]
        last = [rows[rank] or nothing for rank in placement.last_ranks]
        return Iteration(
            duration_s=round(duration_s, 6),
            token_times_s=tuple(itertools.chain.from_iterable(row["tokens_s"] for row in last)),
            stages=tuple(StageTrace.model_validate(row["trace"]) for row in seen),
            host_gap_s=tuple(row["gap_s"] for row in seen),
        )

    def _memory(self) -> StageMemory:
        runner = self.runner
        assert runner.index is not None
        weights = runner.stage.weights_bytes() + packed_bytes(runner.stage.model)
        kv = runner.loop.kv_bytes() if runner.loop is not None else 0
        cap = int(self.plan.stages[runner.index].memory_fraction * runner.device_bytes)
        if runner.device.is_cuda:
            peak = torch.cuda.max_memory_allocated(runner.device.torch_device)
            return StageMemory(
                device=runner.device.name,
                weights_bytes=weights,
                kv_bytes=kv,
                activation_bytes=max(0, peak - weights - kv),
                peak_bytes=peak,
                peak_source="cuda_allocator",
                baseline_bytes=0,
                cap_bytes=cap,
                nvml_used_bytes=sensors_for([runner.device.name]).state()[0].memory_used_bytes,
            )
        predicted = stage_bytes(
            runner.shape, self.plan, runner.index, prompt_len=self.job.longest, output_len=self.job.output_len
        )
        return StageMemory(
            device=runner.device.name,
            weights_bytes=weights,
            kv_bytes=kv,
            activation_bytes=predicted.activations,
            peak_bytes=peak_rss_bytes(),
            peak_source="vm_hwm",
            baseline_bytes=runner.baseline_bytes,
            cap_bytes=cap,
        )


def measure(
    runner: Runner,
    spec: RunSpec,
    effective: EffectivePlan,
    prompts: tuple[tuple[int, ...], ...],
    *,
    pad_token_id: int,
    reference_path: str | None,
) -> Measurement | Failure | None:
    """Measures one plan; every rank calls it, rank 0 gets the outcome, the others None."""
    reference = None
    if reference_path is not None:
        reference = Reference.load(Path(reference_path), reference_digest(spec.model, spec.workload))
    job = runner.job(spec, effective, prompts, pad_token_id)
    return MeasuredRun(runner, spec.plan, job, spec.protocol, reference).measure()


def forced_pass(
    runner: Runner, plan: Plan, job: Job, checked: Sequence[int], tokens: torch.Tensor, rows: int
) -> dict[int, torch.Tensor] | None:
    """Logits `[t, V]` by place in `checked` when `tokens` `[k, t]` are fed; on the last stage of every replica.

    Args:
        rows: of a micro-batch at most; few, so that prompts of unlike length are padded against each other.
    """
    small = min(job.micro_batch_size, rows)
    forced = Job(
        prompts=tuple(job.prompts[index] for index in checked),
        output_len=tokens.shape[1],
        micro_batch_size=small,
        prefill_size=small if job.prefill_size == job.micro_batch_size else 1,
        chunk_size=job.chunk_size,
        in_flight=min(job.in_flight, math.ceil(len(checked) / small)),
        pad_token_id=job.pad_token_id,
        forced=tuple(tuple(row) for row in tokens.tolist()),
    )
    jobs = (forced,) * plan.replicas
    runner.open(jobs)
    result = runner.run(jobs)
    return result.logits if result is not None else None


def make_reference_from_plan(
    runner: Runner, job: Job, plan: Plan, path: Path, digest: str, *, check_prompts: int, check_tokens: int
) -> None:
    """Takes a plan's own output for the truth, where the unsplit model does not fit on any device.

    Later plans are compared with this one: that tells them apart, and cannot tell whether the first was right.
    """
    plan = plan.replica(0)
    runner.apply(plan)
    runner.status.phase = "reference"
    jobs = (dataclasses.replace(job, keep_margins=True),)
    runner.open(jobs)
    result = runner.run(jobs)
    mine = None
    if result is not None and result.tokens is not None:
        mine = [result.tokens[index] for index in range(len(job.prompts))]
    rows = next(row for row in runner.control.gather(mine) if row is not None)
    tokens = torch.tensor(rows, dtype=torch.long)
    checked = choose_checked(job.prompts, check_prompts)
    chosen = tokens[list(checked), :check_tokens]
    sizes = (len(checked), max(1, len(checked) // 2), 1)
    passes = [forced_pass(runner, plan, job, checked, chosen, size) for size in sizes]
    if result is not None and result.margins is not None:
        margins = result.margins
        logits, *others = [
            torch.stack([one[place] for place in range(len(checked))]) for one in passes if one is not None
        ]
        Reference(
            source="plan",
            workload_digest=digest,
            tokens=tokens,
            margins=torch.stack([margins[index] for index in range(len(job.prompts))]),
            checked=checked,
            logits=logits,
            spread=spread_of(logits, others, runner.stage.dtype),
        ).save(path)
    runner.control.barrier()


def _seen(result: PassResult | None, zero_s: float) -> dict[str, Any] | None:
    if result is None:
        return None
    timeline = result.timeline
    return {
        "trace": timeline.trace(zero_s).model_dump(mode="json"),
        "tokens_s": [round(moment - zero_s, 6) for moment in timeline.token_times_s],
        "gap_s": round(timeline.host_gap_s(), 6),
    }


def _task_shape(task: Task, first_micro_batch: int, job: Job) -> TaskShape:
    chunked = task.is_prefill and job.chunk_size is not None
    return TaskShape(
        micro_batch=first_micro_batch + task.micro_batch,
        step=task.step,
        first_row=task.first_row,
        end_row=task.end_row,
        first_token=task.first_token if chunked else None,
        end_token=task.end_token if chunked else None,
    )
