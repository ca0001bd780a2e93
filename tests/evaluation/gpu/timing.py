"""Whether times can be believed: spans between events against the wall clock and against what the profiler saw run.

In one process, with the runtime's own loop: a profiler sees its own process alone. Beside it, of what kinds of kernels
a captured step consists.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.kernels.graphs import DecodeGraphs
from pipetune.bench.runtime.loop import PassResult, StageLoop, Status
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import ModelSpec, Workload
from pipetune.bench.worker.prompts import random_prompts
from tests.evaluation.gpu.context import Context
from tests.evaluation.gpu.models import LARGE, SMALL, save_config

WORKLOAD = Workload(num_prompts=8, input_len=64, output_len=33)
REPEATS = 3
TOLERANCE = 1.05
"""Clocks are read at nearly the same moment, and some small copies run outside of all spans."""


MODELS = {"135M shape": SMALL, "7B shape, 2 layers": {**LARGE, "num_hidden_layers": 2}}
KINDS = {
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "splitk", "cublas"),
    "attention": ("fmha", "flash", "sdpa", "attention", "cudnn"),
    "copies": ("memcpy", "memset", "copy_kernel"),
    "reductions": ("reduce",),
}
"""Kinds of kernels by pieces of their names, the first that fits; the others mostly work element by element."""


def run(context: Context) -> None:
    """Eager and captured decode of a small model, and of two layers of a large one."""
    for name, config in MODELS.items():
        _run_model(context, name, config)


def _run_model(context: Context, name: str, config: dict[str, Any]) -> None:
    folder = save_config(context.work / name.replace(" ", "-"), config)
    resolved = resolve_model(ModelSpec(name=str(folder), dtype="bfloat16", load_format="dummy"))
    device = DeviceContext("cuda:0", num_threads=1)
    stage = Stage(resolved, device.torch_device)
    stage.assign(0, config["num_hidden_layers"], is_first=True, is_last=True)
    job = Job(
        prompts=random_prompts(WORKLOAD, config["vocab_size"]),
        output_len=WORKLOAD.output_len,
        micro_batch_size=WORKLOAD.num_prompts,
        prefill_size=WORKLOAD.num_prompts,
        in_flight=1,
        pad_token_id=0,
    )
    for how in ("eager", "graphs"):
        graphs = DecodeGraphs(stage, device) if how == "graphs" else None
        loop = StageLoop(stage, device, Status(), graphs=graphs)
        loop.prepare(job)
        loop.run(job)
        plain = statistics.median(wall_s(loop.run(job)) for _ in range(REPEATS))
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            result = loop.run(job)
        _compare(context, f"{name}, {how}", result, busy_s(_kernels(profiler)), plain)
        if graphs is not None:
            _break_down(context, name, profiler)
        for note in graphs.notes if graphs is not None else ():
            context.note(note)
        if graphs is not None:
            context.note(
                f"{graphs.report.graphs} graphs: captured in {graphs.report.capture_s:.2f} s, pool "
                f"{graphs.report.pool_bytes / 2**20:.0f} MiB, driver {graphs.report.driver_bytes / 2**20:.0f} MiB"
            )
        loop.close()


def _compare(context: Context, how: str, result: PassResult, busy: float, plain_s: float) -> None:
    timeline = result.timeline
    spans = sum(end - start for start, end in zip(timeline.compute_start_s, timeline.compute_end_s, strict=True))
    wall = wall_s(result)
    context.row(
        how=how,
        kernels_busy_ms=round(busy * 1e3, 3),
        event_spans_ms=round(spans * 1e3, 3),
        wall_ms=round(wall * 1e3, 3),
        wall_without_profiler_ms=round(plain_s * 1e3, 3),
        busy_share_of_spans=round(busy / spans, 3),
    )
    context.aim(
        f"{how}: kernels ≤ event spans ≤ wall clock, within {TOLERANCE - 1:.0%}",
        busy <= spans * TOLERANCE and spans <= wall * TOLERANCE,
        f"{busy * 1e3:.2f}, {spans * 1e3:.2f}, {wall * 1e3:.2f} ms",
        proves_correctness=True,
    )


def _break_down(context: Context, name: str, profiler: Any) -> None:
    """Kernels and their time by kind, of one task on average: nearly all tasks are captured steps."""
    counts: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[str] = collections.Counter()
    for event in profiler.events():
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            low = event.name.lower()
            kind = next(
                (kind for kind, parts in KINDS.items() if any(part in low for part in parts)), "element by element"
            )
            counts[kind] += 1
            seconds[kind] += event.time_range.elapsed_us() / 1e6
    for kind, total in seconds.most_common():
        tasks = WORKLOAD.output_len
        context.row(
            how=f"{name}, a task's {kind}", kernels=counts[kind] // tasks, kernels_busy_ms=round(total * 1e3 / tasks, 4)
        )


def wall_s(result: PassResult) -> float:
    """From the begin of a pass until everything it issued was done."""
    return result.timeline.ended_s - result.timeline.started_s


def busy_s(spans_us: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans (begin, end; microseconds) lasts: what overlaps counts once."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans_us):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total / 1e6


def _kernels(profiler: Any) -> list[tuple[float, float]]:
    """What ran on the GPU, copies included; ranges that only name others left out."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
