"""One measured run inside a worker: move to the plan, check its output, warm up, time it, and say what was seen."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipetune.bench import record as r
from pipetune.bench.machine import telemetry as t
from pipetune.bench.memory import stage_bytes
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.loop import PassResult
from pipetune.bench.spec import RunSpec, device_kind
from pipetune.bench.worker.acceptance import is_steady, over_cap
from pipetune.bench.worker.output_check import TimedCheck, check_output, wrong_logits
from pipetune.bench.worker.reference import Reference
from pipetune.bench.worker.stage_host import StageHost

PEAK_NOT_RESET_NOTE = "peak memory is that of the process so far, not of this run: the kernel does not let it be reset"


class PlanRun:
    """Measures one plan; every rank makes one and calls the same methods."""

    def __init__(self, host: StageHost, spec: RunSpec, job: Job, reference: Reference | None) -> None:
        """The job is over all prompts; without a reference nothing is compared."""
        self.host, self.plan, self.job = host, spec.plan, job
        self.protocol, self.reference = spec.protocol, reference
        self.goodput = spec.workload.goodput

    def measure(self) -> r.Measurement | r.Failure | None:
        """Rank 0 gets the outcome, the others None."""
        host = self.host
        load_s, loaded = host.apply(self.plan)
        jobs = host.parts(self.job)
        if self.plan.compile:
            host.status.phase = "compile"
            host.report("compile", 0, 1)
        self._open(jobs, before_check=True)
        check, check_s = None, None
        if self.reference is not None:
            host.status.phase = "check"
            host.report("check", 0, 1)
            began = time.monotonic()
            check = check_output(host, self.plan, self.job, self.reference)
            check_s = time.monotonic() - began
            if (failure := wrong_logits(check, self.job, host.shape)) is not None:
                return failure
            self._open(jobs, before_check=False)
        host.status.phase = "warmup"
        warmup = self._warm_up(jobs)
        # What loading, checking and the first pass took and gave up is not what the plan needs.
        host.free()
        host.status.phase = "measure"
        outcome = self._iterate(jobs, check)
        if outcome is None or isinstance(outcome, r.Failure):
            return outcome
        steady = self._is_steady(warmup, [run.duration_s for run in outcome.iterations])
        return outcome.model_copy(
            update={
                "load_s": round(load_s, 4),
                "loaded_layers": loaded,
                "check_s": None if check_s is None else round(check_s, 4),
                "warmup_s": tuple(warmup),
                "steady": steady,
                "transport": host.transport(),
                "notes": (*outcome.notes, *self._notes(steady)),
            }
        )

    def _open(self, jobs: Sequence[Job | None], *, before_check: bool) -> None:
        # First of all, since what comes before the measurement can use these KV slots: they are the largest.
        self.host.open(jobs, instrument=self.protocol.instrument)

    def _is_steady(self, warmup: list[float], durations: list[float]) -> bool:
        return is_steady(durations if len(durations) > 1 else warmup[-1:] + durations, self.protocol.steady_tolerance)

    def _notes(self, steady: bool) -> list[str]:
        varies = f"never steady: passes of the same work vary by more than {self.protocol.steady_tolerance:.0%}"
        notes = [] if steady else [varies]
        devices = self.host.devices
        shared = {name for name in devices if device_kind(name) == "cuda" and devices.count(name) > 1}
        if shared & set(self.plan.devices) and len(self.plan.devices) > 1:
            notes.append(
                f"{r.SHARED_DEVICE_NOTE}: stages share a GPU, which proves correctness and never speed; not ranked"
            )
        return notes

    def _warm_up(self, jobs: Sequence[Job | None]) -> list[float]:
        """Repeats `num_iters_warmup` times, and with two or more until two in a row take alike, up to `max_warmup`."""
        protocol = self.protocol
        durations: list[float] = []
        wanted, most = protocol.num_iters_warmup, max(protocol.max_warmup, protocol.num_iters_warmup)
        while len(durations) < wanted:
            self.host.report("warmup", len(durations), wanted)
            _, duration_s = self.host.window(self.host.run(jobs))
            durations.append(round(duration_s, 6))
            if len(durations) == wanted >= 2 and not is_steady(durations[-2:], protocol.steady_tolerance):
                wanted = min(wanted + 1, most)
        return durations

    def _iterate(self, jobs: Sequence[Job | None], check: r.OutputCheck | None) -> r.Measurement | r.Failure | None:
        host = self.host
        assert host.placement is not None
        sensors = t.sensors_for([host.device.name])
        before = sensors.state()
        peak_was_reset = True
        host.device.synchronize()
        if host.device.is_cuda:
            torch.cuda.reset_peak_memory_stats(host.device.torch_device)
        else:
            peak_was_reset = t.reset_peak_rss()
        sensors.start()
        iterations: list[r.Iteration] = []
        timed_check = TimedCheck(host, self.plan, self.job, self.reference)
        compiled_before = host.compiled.graphs
        clock_error_s = 0.0
        for number in range(self.protocol.num_iters):
            host.report("measure", number, self.protocol.num_iters)
            iterations.append(self._pass(number, jobs, timed_check))
            clock_error_s = max(clock_error_s, host.device.clock_error_s)
        telemetry = t.read_telemetry(sensors, before)
        notes = [*host.compiled.notes]
        if (count := host.compiled.graphs - compiled_before) > 0:
            notes.append(f"compile: {count} graphs of stage {host.index} were compiled while it was timed")
        if host.loop is not None and host.loop.graphs is not None:
            notes += host.loop.graphs.notes
        mine: dict[str, Any] = {
            "telemetry": telemetry,
            "compared": timed_check.seen(),
            "peak_was_reset": peak_was_reset,
            "clock_error_s": clock_error_s,
            "notes": notes,
            "prepare_s": (host.compiled.compile_s if self.plan.compile else 0.0)
            + (host.loop.graphs.report.capture_s if host.loop and host.loop.graphs else 0.0),
        }
        if host.index is not None:
            mine["memory"] = self._memory()
        rows = host.control.gather(mine)
        if host.rank != 0:
            return None
        ranks = host.placement.ranks
        check, failure = timed_check.conclude(check, [row["compared"] for row in rows])
        if failure is not None:
            return failure
        # Stages that share a GPU saw the same sensors.
        watchers = {host.devices[rank]: rank for rank in ranks}.values()
        memory = tuple(r.StageMemory.model_validate(rows[rank]["memory"]) for rank in ranks)
        if (over := over_cap(memory)) is not None:
            return over
        return r.Measurement(
            **self._shapes(jobs),
            prompt_lens=tuple(len(prompt) for prompt in self.job.prompts),
            output_len=self.job.output_len,
            output_lens=self.job.output_lens,
            goodput=self.goodput,
            iterations=tuple(iterations),
            memory=memory,
            check=check,
            clock_error_s=max(rows[rank]["clock_error_s"] for rank in ranks) or None,
            prepare_s=max(rows[rank]["prepare_s"] for rank in ranks) or None,
            notes=(
                *(() if all(rows[rank]["peak_was_reset"] for rank in ranks) else (PEAK_NOT_RESET_NOTE,)),
                *(note for rank in ranks for note in rows[rank]["notes"]),
            ),
            telemetry=t.merge_telemetry([r.Telemetry.model_validate(rows[rank]["telemetry"]) for rank in watchers]),
        )

    def _shapes(self, jobs: Sequence[Job | None]) -> dict[str, Any]:
        """What was run in which order, over all replicas: `order`, `micro_batch_sizes`, `tasks`, `replica_tasks`."""
        order: list[int] = []
        sizes: list[int] = []
        tasks: list[r.TaskShape] = []
        counts: list[int] = []
        chunked = self.job.chunk_size is not None
        for replica, job in enumerate(jobs):
            own = job.tasks() if job is not None else ()
            tasks += [r.TaskShape.of(task, first_micro_batch=len(sizes), chunked=chunked) for task in own]
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

    def _pass(self, number: int, jobs: Sequence[Job | None], timed_check: TimedCheck) -> r.Iteration:
        """A timed pass; `number` counts them."""
        placement = self.host.placement
        result = self.host.run(jobs)
        zero_s, duration_s = self.host.window(result)
        timed_check.add(result)
        rows = self.host.control.gather(_seen(result, zero_s))
        assert placement is not None
        seen = [rows[rank] for rank in placement.ranks]
        last = [rows[rank] for rank in placement.last_ranks]
        return r.Iteration(
            duration_s=round(duration_s, 6),
            token_times_s=tuple(itertools.chain.from_iterable(row["tokens_s"] for row in last)),
            stages=tuple(r.StageTrace.model_validate(row["trace"]) for row in seen),
            host_gap_s=tuple(row["gap_s"] for row in seen),
        )

    def _kv_bytes(self) -> int:
        return self.host.loop.kv_bytes() if self.host.loop is not None else 0

    def _memory(self) -> r.StageMemory:
        host = self.host
        assert host.index is not None
        weights = host.stage.weights_bytes()
        kv = self._kv_bytes()
        cap = self.plan.stages[host.index].cap_bytes(host.device_bytes)
        if host.device.is_cuda:
            graphs = host.loop.graphs.report if host.loop is not None and host.loop.graphs is not None else None
            uncounted, driver = (graphs.uncounted_bytes, graphs.driver_bytes) if graphs is not None else (0, 0)
            peak = torch.cuda.max_memory_allocated(host.device.torch_device) + uncounted
            own: dict[str, Any] = {
                "activation_bytes": max(0, peak - weights - kv),
                "peak_bytes": peak,
                "peak_source": "cuda_allocator",
                "graphs_bytes": uncounted + driver,
                "nvml_used_bytes": t.sensors_for([host.device.name]).state()[0].memory_used_bytes,
            }
        else:
            lens = {"prompt_len": self.job.longest, "output_len": self.job.output_len}
            own = {
                "activation_bytes": stage_bytes(host.shape, self.plan, host.index, **lens).activations,
                "peak_bytes": t.peak_rss_bytes(),
                "peak_source": "vm_hwm",
                "baseline_bytes": host.idle_bytes,
            }
        return r.StageMemory(device=host.device.name, weights_bytes=weights, kv_bytes=kv, cap_bytes=cap, **own)


def _seen(result: PassResult | None, zero_s: float) -> dict[str, Any]:
    if result is None:
        return {"trace": {}, "tokens_s": [], "gap_s": 0.0}
    timeline = result.timeline
    return {
        "trace": timeline.trace(zero_s),
        "tokens_s": [max(0.0, round(moment - zero_s, 6)) for moment in timeline.token_times_s],
        "gap_s": round(timeline.host_gap_s(), 6),
    }
