"""One measured run inside a worker: move to the plan, check its output, warm up, time it, and say what was seen.

Every rank runs the same steps in the same order; what one rank alone knows (tokens, logits) is gathered before any
rank decides, so that all decide alike.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.control import ControlGroup
from bench.memory import ModelShape, stage_bytes
from bench.models.resolve import ResolvedModel
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
from bench.reference import Reference, choose_checked, compare_logits, compare_tokens, reference_digest, spread_of
from bench.runtime.device import DeviceContext, undisturbed
from bench.runtime.generate import Edges, PassResult, StageLoop, Status
from bench.runtime.job import Job
from bench.runtime.links import Links
from bench.runtime.stage import Stage
from bench.spec import (
    EffectivePlan,
    Plan,
    Protocol,
    RunSpec,
    device_kind,
)
from bench.telemetry import merge_telemetry, peak_rss_bytes, read_telemetry, reset_peak_rss, sensors_for
from bench.verdicts import is_steady, over_cap, wrong_output, wrong_tokens

PEAK_NOT_RESET_NOTE = "peak memory is that of the process so far, not of this run: the kernel does not let it be reset"


class Runner:
    """What one worker holds between runs: its stage, its links, its KV slots."""

    def __init__(
        self,
        *,
        resolved: ResolvedModel,
        shape: ModelShape,
        device: DeviceContext,
        devices: Sequence[str],
        device_bytes: int,
        control: ControlGroup,
        status: Status,
        baseline_bytes: int,
        report: Any,
    ) -> None:
        """
        Args:
            devices: of all ranks, by rank.
            device_bytes: memory of this rank's device.
            baseline_bytes: what the process took before any model was loaded.
            report: called with phase, done and total on rank 0, for progress.
        """
        self.rank = control.rank
        self.shape = shape
        self.device = device
        self.devices = tuple(devices)
        self.control = control
        self.status = status
        self._device_bytes = device_bytes
        self._baseline_bytes = baseline_bytes
        self._report = report
        self.stage = Stage(resolved, device.torch_device)
        self._links = Links(self.devices, self.rank, device.torch_device)
        self._loop: StageLoop | None = None
        self.plan: Plan | None = None
        self.index: int | None = None

    def ranks_of(self, plan: Plan) -> tuple[int, ...]:
        """The rank of each stage: a device named twice (stages that share a GPU) takes its workers in turn."""
        taken: list[int] = []
        for stage in plan.stages:
            taken.append(
                next(rank for rank, name in enumerate(self.devices) if name == stage.device and rank not in taken)
            )
        return tuple(taken)

    def apply(self, plan: Plan) -> tuple[float, tuple[int, ...]]:
        """Moves to a plan; loads only layers that changed hands.

        Returns:
            Seconds until the slowest stage was ready, and all layers that were loaded.
        """
        self.status.phase = "load"
        ranks = self.ranks_of(plan)
        self.plan = plan
        self.index = ranks.index(self.rank) if self.rank in ranks else None
        self._loop = None
        gc.collect()
        loaded: tuple[int, ...] = ()
        load_s = 0.0
        if self.index is None:
            self.stage.release()
        else:
            own = plan.stages[self.index]
            self.device.cap_memory(int(own.memory_fraction * self._device_bytes))
            loaded = self.stage.assign(
                own.first_layer,
                own.end_layer,
                is_first=self.index == 0,
                is_last=self.index == len(plan.stages) - 1,
            )
            load_s = self.stage.load_s
        self.device.free_cached()
        gathered = self.control.gather({"loaded": loaded, "load_s": load_s})
        layers = sorted(layer for row in gathered for layer in row["loaded"])
        return max(row["load_s"] for row in gathered), tuple(layers)

    def release(self) -> None:
        """Frees the stage and its KV, before something else wants the memory."""
        self._loop = self.plan = self.index = None
        self.stage.release()
        # The last plan's cap is not meant for what comes now.
        self.device.cap_memory(None)
        self.free()

    def free(self) -> None:
        """Gives memory that nothing holds any more back to the device, where other workers may want it."""
        gc.collect()
        self.device.free_cached()

    def open(self, job: Job, *, instrument: bool = True) -> None:
        """Makes edges and KV slots for a job under the present plan; every rank calls it."""
        assert self.plan is not None
        ranks = self.ranks_of(self.plan)
        tokens = max(job.prefill_size * job.longest, job.micro_batch_size)
        pieces = math.ceil(job.micro_batch_size / job.prefill_size)
        edges = self._links.edges(
            ranks,
            hidden_numel=tokens * self.stage.hidden_size,
            hidden_dtype=self.stage.dtype,
            tokens_numel=job.micro_batch_size,
            tokens_depth=job.in_flight * pieces,
        )
        if self.index is None:
            return
        if self._loop is None:
            self._loop = StageLoop(self.stage, self.device, edges or Edges(), self.status, instrument=instrument)
        else:
            self._loop.rewire(edges or Edges(), instrument=instrument)
        self._loop.prepare(job)

    def run(self, job: Job) -> PassResult | None:
        """One pass over the job; None on ranks without a stage."""
        if self._loop is None or self.index is None:
            self.control.barrier()
            return None
        with undisturbed():
            return self._loop.run(job, start=self.control.barrier)

    def window(self, result: PassResult | None) -> tuple[float, float]:
        """When the prompts were given and how long the pass took until its last token, alike on every rank."""
        mine = None
        if result is not None:
            times = result.timeline.token_times_s
            mine = [result.timeline.started_s, times[-1] if times else None]
        assert self.plan is not None
        ranks = self.ranks_of(self.plan)
        gathered = self.control.gather(mine)
        zero_s: float = gathered[ranks[0]][0]
        last_s: float = gathered[ranks[-1]][1]
        return zero_s, last_s - zero_s

    @staticmethod
    def job(spec: RunSpec, effective: EffectivePlan, prompts: tuple[tuple[int, ...], ...], pad_token_id: int) -> Job:
        """The pass over all prompts that a run spec asks for."""
        return Job(
            prompts=prompts,
            output_len=spec.workload.output_len,
            micro_batch_size=spec.plan.micro_batch_size,
            prefill_size=spec.plan.prefill_size,
            in_flight=effective.in_flight,
            pad_token_id=pad_token_id,
        )

    def measure(
        self,
        spec: RunSpec,
        effective: EffectivePlan,
        prompts: tuple[tuple[int, ...], ...],
        *,
        pad_token_id: int,
        reference_path: str | None,
    ) -> Measurement | Failure | None:
        """Measures one plan; every rank calls it, rank 0 gets the outcome, the others None."""
        plan, protocol = spec.plan, spec.protocol
        load_s, loaded = self.apply(plan)
        job = self.job(spec, effective, prompts, pad_token_id)
        self.open(job, instrument=protocol.instrument)
        reference = None
        check: OutputCheck | None = None
        if reference_path is not None:
            digest = reference_digest(spec.model, spec.workload)
            reference = Reference.load(Path(reference_path), digest)
            if protocol.check_outputs:
                self.status.phase = "check"
                self._report("check", 0, 1)
                check = self._check(reference, job)
                self.open(job, instrument=protocol.instrument)
                failure = wrong_output(check)
                if failure is not None:
                    return failure
        self.status.phase = "warmup"
        warmup = self._warm_up(job, protocol)
        self.status.phase = "measure"
        outcome = self._iterate(job, plan, protocol, reference, check)
        if self.rank != 0 or isinstance(outcome, Failure):
            return outcome if self.rank == 0 else None
        assert outcome is not None
        notes = list(outcome.notes)
        durations = [run.duration_s for run in outcome.iterations]
        steady = is_steady(durations if len(durations) > 1 else warmup[-1:] + durations, protocol.steady_tolerance)
        if not steady:
            notes.append(f"never steady: passes of the same work differ by more than {protocol.steady_tolerance:.0%}")
        shared = {d for d in self.devices if device_kind(d) == "cuda" and self.devices.count(d) > 1}
        if shared & {stage.device for stage in plan.stages} and len(plan.stages) > 1:
            notes.append(
                f"{SHARED_DEVICE_NOTE}: stages share a GPU, which proves correctness and never speed; not ranked"
            )
        return outcome.model_copy(
            update={
                "load_s": round(load_s, 4),
                "loaded_layers": loaded,
                "warmup_s": tuple(warmup),
                "steady": steady,
                "transport": self._links.kind(self.ranks_of(plan)),
                "notes": tuple(notes),
            }
        )

    def _check(self, reference: Reference, job: Job) -> OutputCheck:
        """Feeds the reference's tokens through the plan and compares logits."""
        count, steps = reference.logits.shape[0], reference.logits.shape[1]
        tokens = reference.tokens[list(reference.checked), :steps]
        logits = self._forced(job, reference.checked, tokens, max(1, count // 2))
        mine = compare_logits(reference, logits).model_dump(mode="json") if logits is not None else None
        found = next(row for row in self.control.gather(mine) if row is not None)
        return OutputCheck.model_validate(found)

    def _forced(
        self, job: Job, checked: Sequence[int], tokens: torch.Tensor, rows: int
    ) -> dict[int, torch.Tensor] | None:
        """Logits `[t, V]` by place in `checked` when `tokens` `[k, t]` are fed; on the last stage alone.

        Args:
            rows: of a micro-batch at most; few, so that prompts of unlike length are padded against each other.
        """
        small = min(job.micro_batch_size, rows)
        forced = Job(
            prompts=tuple(job.prompts[index] for index in checked),
            output_len=tokens.shape[1],
            micro_batch_size=small,
            prefill_size=small if job.prefill_size == job.micro_batch_size else 1,
            in_flight=min(job.in_flight, math.ceil(len(checked) / small)),
            pad_token_id=job.pad_token_id,
            forced=tuple(tuple(row) for row in tokens.tolist()),
        )
        self.open(forced)
        result = self.run(forced)
        return result.logits if result is not None else None

    def make_reference(
        self, job: Job, plan: Plan, path: Path, digest: str, *, check_prompts: int, check_tokens: int
    ) -> None:
        """Takes a plan's own output for the truth, where the unsplit model does not fit on any device.

        Later plans are compared with this one: that tells them apart, and cannot tell whether the first was right.
        """
        self.apply(plan)
        self.status.phase = "reference"
        job = dataclasses.replace(job, keep_margins=True)
        self.open(job)
        result = self.run(job)
        mine = None
        if result is not None and result.tokens is not None:
            mine = [result.tokens[index] for index in range(len(job.prompts))]
        rows = next(row for row in self.control.gather(mine) if row is not None)
        tokens = torch.tensor(rows, dtype=torch.long)
        checked = choose_checked(job.prompts, check_prompts)
        chosen = tokens[list(checked), :check_tokens]
        passes = [self._forced(job, checked, chosen, size) for size in (len(checked), max(1, len(checked) // 2), 1)]
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
                spread=spread_of(logits, others, self.stage.dtype),
            ).save(path)
        self.control.barrier()

    def _warm_up(self, job: Job, protocol: Protocol) -> list[float]:
        """Repeats `num_iters_warmup` times, and with two or more until two in a row take alike, up to `max_warmup`."""
        durations: list[float] = []
        wanted, most = protocol.num_iters_warmup, max(protocol.max_warmup, protocol.num_iters_warmup)
        while len(durations) < wanted:
            self._report("warmup", len(durations), wanted)
            _, duration_s = self.window(self.run(job))
            durations.append(round(duration_s, 6))
            if len(durations) == wanted >= 2 and not is_steady(durations[-2:], protocol.steady_tolerance):
                wanted = min(wanted + 1, most)
        return durations

    def _iterate(
        self, job: Job, plan: Plan, protocol: Protocol, reference: Reference | None, check: OutputCheck | None
    ) -> Measurement | Failure | None:
        sensors = sensors_for([self.device.name])
        before = sensors.state()
        peak_was_reset = True
        self.device.synchronize()
        if self.device.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device.torch_device)
        else:
            peak_was_reset = reset_peak_rss()
        sensors.start()
        iterations, tokens = [], None
        for number in range(protocol.num_iters):
            self._report("measure", number, protocol.num_iters)
            result = self.run(job)
            zero_s, duration_s = self.window(result)
            mine = None
            if result is not None:
                timeline = result.timeline
                mine = {
                    "trace": timeline.trace(zero_s).model_dump(mode="json"),
                    "tokens_s": [round(moment - zero_s, 6) for moment in timeline.token_times_s],
                    "gap_s": round(timeline.host_gap_s(), 6),
                }
                if result.tokens is not None:
                    tokens = self._compare(reference, result.tokens, tokens)
            rows = self.control.gather(mine)
            if self.rank == 0:
                iterations.append(self._iteration(plan, rows, duration_s))
        telemetry = read_telemetry(sensors, before)
        mine = {"telemetry": telemetry.model_dump(mode="json"), "tokens": tokens, "peak_was_reset": peak_was_reset}
        if self.index is not None:
            mine["memory"] = self._memory(job, plan).model_dump(mode="json")
        rows = self.control.gather(mine)
        if self.rank != 0:
            return None
        ranks = self.ranks_of(plan)
        wrong = rows[ranks[-1]]["tokens"]
        if wrong is not None:
            base = check or OutputCheck(
                reference="unsplit", max_logit_error=0.0, tolerance=0.0, compared_logits=0, argmax_flips=0
            )
            check = base.model_copy(update={"tokens_equal": wrong[0] == 0, "near_ties": wrong[1]})
            failure = wrong_tokens(wrong[0], len(job.prompts), self.shape.dtype_bytes)
            if failure is not None:
                return failure
        # Stages that share a GPU saw the same sensors.
        watchers = {self.devices[rank]: rank for rank in ranks}.values()
        memory = tuple(StageMemory.model_validate(rows[rank]["memory"]) for rank in ranks)
        over = over_cap(memory)
        if over is not None:
            return over
        return Measurement(
            prompt_lens=tuple(len(prompt) for prompt in job.prompts),
            order=job.order,
            output_len=job.output_len,
            micro_batch_sizes=job.sizes,
            tasks=tuple(
                TaskShape(micro_batch=task.micro_batch, step=task.step, first_row=task.first_row, end_row=task.end_row)
                for task in job.tasks()
            ),
            iterations=tuple(iterations),
            memory=memory,
            check=check,
            notes=() if all(rows[rank]["peak_was_reset"] for rank in ranks) else (PEAK_NOT_RESET_NOTE,),
            telemetry=merge_telemetry([Telemetry.model_validate(rows[rank]["telemetry"]) for rank in watchers]),
        )

    def _compare(
        self, reference: Reference | None, own: dict[int, list[int]], so_far: list[int] | None
    ) -> list[int] | None:
        if reference is None:
            return None
        wrong, near = compare_tokens(reference, own)
        return [max(wrong, so_far[0]), max(near, so_far[1])] if so_far else [wrong, near]

    def _iteration(self, plan: Plan, rows: list[Any], duration_s: float) -> Iteration:
        ranks = self.ranks_of(plan)
        return Iteration(
            duration_s=round(duration_s, 6),
            token_times_s=tuple(rows[ranks[-1]]["tokens_s"]),
            stages=tuple(StageTrace.model_validate(rows[rank]["trace"]) for rank in ranks),
            host_gap_s=tuple(rows[rank]["gap_s"] for rank in ranks),
        )

    def _memory(self, job: Job, plan: Plan) -> StageMemory:
        assert self._loop is not None
        assert self.index is not None
        weights, kv = self.stage.weights_bytes(), self._loop.kv_bytes()
        cap = int(plan.stages[self.index].memory_fraction * self._device_bytes)
        if self.device.is_cuda:
            peak = torch.cuda.max_memory_allocated(self.device.torch_device)
            return StageMemory(
                device=self.device.name,
                weights_bytes=weights,
                kv_bytes=kv,
                activation_bytes=max(0, peak - weights - kv),
                peak_bytes=peak,
                peak_source="cuda_allocator",
                baseline_bytes=0,
                cap_bytes=cap,
                nvml_used_bytes=sensors_for([self.device.name]).state()[0].memory_used_bytes,
            )
        predicted = stage_bytes(self.shape, plan, self.index, prompt_len=job.longest, output_len=job.output_len)
        return StageMemory(
            device=self.device.name,
            weights_bytes=weights,
            kv_bytes=kv,
            activation_bytes=predicted.activations,
            peak_bytes=peak_rss_bytes(),
            peak_source="vm_hwm",
            baseline_bytes=self._baseline_bytes,
            cap_bytes=cap,
        )
