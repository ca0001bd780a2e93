"""What a record teaches the cost model: times of each kind of task on each stage, of hand-overs, and the metrics.

Small enough to be shared through a database: some numbers a stage, however long the run was.
"""

from __future__ import annotations

import math
import statistics

from pydantic import Field

from pipetune.bench.metrics import derive
from pipetune.bench.profile import TaskKind
from pipetune.bench.record import SHARED_DEVICE_NOTE, Measurement, Record
from pipetune.bench.spec import EffectivePlan, Value
from pipetune.tuner.planning.calibration.spans import HandOver, StageSpans, TaskSpan, together


class Observation(Value):
    """What one record teaches."""

    effective: EffectivePlan
    tasks: tuple[TaskSpan, ...]
    gap_s: tuple[float | None, ...]
    """Per stage: from the end of a task's compute to the begin of the next one whose input was there; None where no
    input was there in time."""
    stall_s: tuple[float | None, ...] = ()
    """Per stage: how long messages that were sent before their receive was posted kept it waiting, reduced to a sender
    that computes all the while (`tuner.planning.simulation.schedule`); None where there were none to speak of."""
    hand_overs: tuple[HandOver, ...] = ()
    metrics: dict[str, float]
    """Metrics of the run, derived by `bench.metrics.derive`."""
    spread: float | None = None
    """Relative standard deviation of the duration over the iterations; None for a single one."""
    iterations: int = Field(default=1, ge=1)
    disturbed: bool = False
    """Something else ran beside it, or its iterations differ: it counts for less."""


def observe(record: Record) -> Observation | None:
    """What a record teaches about the costs of tasks.

    Returns:
        None for failures, for runs without spans (the un-pipelined baseline among them), and for stages that shared a
        device.
    """
    measurement = record.result
    if not isinstance(measurement, Measurement) or measurement.method != "pipeline" or record.effective is None:
        return None
    if any(note.startswith(SHARED_DEVICE_NOTE) for note in measurement.notes):
        return None
    counts = measurement.replica_tasks or (len(measurement.tasks),)
    num_stages = len(record.effective.plan.stages)
    lengths = [count for count in counts for _ in range(num_stages)]
    for run in measurement.iterations:
        if [len(trace.compute_start_s) for trace in run.stages] != lengths:
            return None
    tasks: list[TaskSpan] = []
    hand_overs: list[HandOver] = []
    gaps: list[float | None] = []
    stalls: list[float | None] = []
    kinds = task_kinds(measurement)
    others = together(measurement.iterations)
    first_task = 0
    for replica, count in enumerate(counts):
        own = range(first_task, first_task + count)
        spans = StageSpans(measurement, kinds, own, range(replica * num_stages, (replica + 1) * num_stages), others)
        tasks += spans.tasks()
        hand_overs += spans.hand_overs()
        gaps += spans.gaps_s()
        stalls += spans.stalls_s()
        first_task += count
    durations = [run.duration_s for run in measurement.iterations]
    spread = None
    if len(durations) > 1:
        spread = round(statistics.stdev(math.log(duration) for duration in durations), 6)
    return Observation(
        effective=record.effective,
        tasks=tuple(tasks),
        gap_s=tuple(gaps),
        stall_s=tuple(stalls),
        hand_overs=tuple(hand_overs),
        metrics=derive(measurement),
        spread=spread,
        iterations=len(durations),
        disturbed=bool(measurement.telemetry.disturbances) or (len(durations) > 1 and not measurement.steady),
    )


def task_kinds(measurement: Measurement) -> tuple[TaskKind, ...]:
    """The kind of each of `measurement.tasks`; prompts are padded to the longest of their micro-batch."""
    lengths, row = [], 0
    for size in measurement.micro_batch_sizes:
        lengths.append(max(measurement.prompt_lens[index] for index in measurement.order[row : row + size]))
        row += size
    kinds = []
    for task in measurement.tasks:
        length, rows = lengths[task.micro_batch], task.end_row - task.first_row
        if task.step > 0:
            kinds.append(TaskKind(rows, 1, length + task.step - 1))
            continue
        first = task.first_token or 0
        end = length if task.end_token is None else task.end_token
        kinds.append(TaskKind(rows, end - first, first, end == length or measurement.output_len == 0))
    return tuple(kinds)
