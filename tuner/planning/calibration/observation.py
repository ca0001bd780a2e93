"""What a record teaches the cost model: times of each kind of task on each stage, of hand-overs, and the metrics.

Small enough to be shared through a database: some numbers a stage, however long the run was.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from pipetune.bench.metrics import derive
from pipetune.bench.profile import TaskKind
from pipetune.bench.record import SHARED_DEVICE_NOTE, Iteration, Measurement, Record, StageTrace
from pipetune.bench.spec import EffectivePlan, Value
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.simulation.schedule import RING_DEPTH

_MOST_KINDS = 60
"""Kinds of task, the most frequent ones, that one record teaches."""
_BUCKETS_AN_OCTAVE = 2
"""Lengths are told apart so finely: times within a bucket differ by less than a fifth from their middle."""


class TaskSpan(Value):
    """Tasks of one kind on one stage, over all iterations."""

    stage: int = Field(ge=0)
    """Index of the stage, counted over all replicas one after the other."""
    rows: int
    new_tokens: int
    """New tokens of each row; the mean over the tasks, as similar lengths are taken together."""
    past_tokens: int
    samples: bool = True
    decode_rows: int = 0
    """Rows of the decode step that was part of each."""
    decode_past: int = 0
    others: float = 0.0
    """Mean number of the plan's other devices that computed meanwhile; tasks with few and with many stand apart."""
    seconds: float
    """Seconds of compute: mean over the tasks, without the slowest and the fastest twentieth."""
    count: int = Field(ge=1)

    @property
    def kind(self) -> TaskKind:
        """Kind of task that the cost model is asked for."""
        return TaskKind(self.rows, self.new_tokens, self.past_tokens, self.samples)

    @property
    def step(self) -> TaskKind:
        """Kind of the step that was part of each, where there was one."""
        return TaskKind(self.decode_rows, 1, self.decode_past)


class HandOver(Value):
    """How long messages took to a stage that waited for them: end of compute there to begin of compute here."""

    source: int
    target: int
    """Stages, of all replicas one after the other."""
    rows: int
    new_tokens: int
    """Positions of each row whose hidden states were sent; 0 for tokens on their way back to the first stage."""
    seconds: float
    """Median."""
    count: int = Field(ge=1)


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
    """What a record teaches about the costs of tasks; None for failures, for runs without spans (the un-pipelined
    baseline among them), and for stages that shared a device. Under arrivals nothing is told of the first stage's gaps
    and of tokens on their way back to it."""
    measurement = record.result
    if not isinstance(measurement, Measurement) or record.effective is None:
        return None
    if measurement.method == "engine":
        return _observe_engine(record.effective, measurement)
    if measurement.method != "pipeline":
        return None
    if any(note.startswith(SHARED_DEVICE_NOTE) for note in measurement.notes):
        return None
    runs = measurement.iterations
    num_stages = len(record.effective.plan.stages)
    if measurement.is_under_arrivals:
        parts = [_loaded_tasks(runs, first) for first in range(0, len(runs[0].stages), num_stages)]
        tasks, counts = list(itertools.chain(*parts)), tuple(map(len, parts))
        runs = (_end_to_end(runs),)
    else:
        tasks, counts = _tasks(measurement), measurement.replica_tasks or (len(measurement.tasks),)
    lengths = [count for count in counts for _ in range(num_stages)]
    if any([len(trace.compute_start_s) for trace in run.stages] != lengths for run in runs):
        return None
    others = _together(runs)
    spans = [
        _StageSpans(runs, tasks, others, slice(*own), range(replica * num_stages, (replica + 1) * num_stages))
        for replica, own in enumerate(itertools.pairwise(itertools.accumulate(counts, initial=0)))
    ]
    return Observation(
        effective=record.effective,
        tasks=tuple(task for each in spans for task in each.tasks()),
        gap_s=tuple(gap for each in spans for gap in each.gaps_s()),
        stall_s=tuple(stall for each in spans for stall in each.stalls_s()),
        hand_overs=tuple(hand_over for each in spans for hand_over in each.hand_overs()),
        **_of_whole(measurement),
    )


def _of_whole(measurement: Measurement) -> dict[str, Any]:
    """What an observation says of a whole run."""
    durations = [run.duration_s for run in measurement.iterations]
    is_repeated = len(durations) > 1
    # Traces differ, whatever the plan does.
    has_spread = is_repeated and not measurement.is_under_arrivals
    return {
        "metrics": derive(measurement),
        "spread": round(statistics.stdev(map(math.log, durations)), 6) if has_spread else None,
        "iterations": len(durations),
        "disturbed": bool(measurement.telemetry.disturbances) or (is_repeated and not measurement.steady),
    }


def _observe_engine(effective: EffectivePlan, measurement: Measurement) -> Observation | None:
    """Steps of an engine, those of similar batches taken together: `new_tokens` are of all rows, and a step of the last
    stage ends with its sampling."""
    depth, count = len(effective.plan.stages), len(measurement.iterations[0].stages)
    groups: dict[tuple[int, int, int], list[tuple[int, int, float]]] = {}
    gaps: list[list[float]] = [[] for _ in range(count)]
    for run in measurement.iterations:
        steps, came = [_steps_of(trace) for trace in run.stages], any(one.arrived_s > 0 for one in run.requests)
        for stage, (starts, ends, rows, tokens) in enumerate(steps):
            first = stage - stage % depth
            if len(starts) != len(steps[first][0]) or not len(starts):
                return None
            for row, new, took in zip(rows.tolist(), tokens.tolist(), (ends - starts).tolist(), strict=True):
                groups.setdefault((stage, _bucket(row), _bucket(new)), []).append((row, new, took))
            before = ends[:-1]
            ready = steps[stage - 1][1][1:] if stage > first else np.full(len(before), -np.inf)
            if stage == first:
                known = steps[first + depth - 1][1][: max(0, len(starts) - depth)]
                ready[depth - 1 :] = known
            own = np.sort(starts[1:] - np.maximum(before, ready))
            # Where requests come over time the first stage waits for them as well, but seldom in every other step.
            gaps[stage] += own[: len(own) // 2 if came and stage == first else None].tolist()
    tasks = []
    for (stage, _, _), seen in groups.items():
        rows_, tokens_, took_ = (statistics.fmean(column) for column in zip(*seen, strict=True))
        row, new, took = round(rows_), round(tokens_), round(took_, 7)
        tasks.append(TaskSpan(stage=stage, rows=row, new_tokens=new, past_tokens=0, seconds=took, count=len(seen)))
    return Observation(
        effective=effective,
        tasks=tuple(tasks),
        gap_s=tuple(round(max(0.0, statistics.median(each)), 7) if each else None for each in gaps),
        **_of_whole(measurement),
    )


def _steps_of(trace: StageTrace) -> tuple[Floats, Floats, Floats, Floats]:
    """Begins, ends, requests and tokens of a stage's steps; what has no tokens is the sampling of the step before."""
    rows, tokens = np.array(trace.step_requests), np.array(trace.step_tokens)
    steps = np.flatnonzero(tokens)
    ends = np.array(trace.compute_end_s)[np.append(steps[1:], len(tokens)) - 1] if len(steps) else np.array([])
    return np.array(trace.compute_start_s)[steps], ends, rows[steps], tokens[steps]


class _Task(NamedTuple):
    kind: TaskKind
    is_decode: bool
    micro_batch: int | None
    """None where nobody knows which tokens it waited for."""
    step: TaskKind | None = None
    """The decode step that was part of it."""


def _loaded_tasks(runs: Sequence[Iteration], stage: int) -> list[_Task]:
    """All tasks of a stage under arrivals, one iteration after the other."""
    tasks = [one for run in runs for one in run.stage_loads[stage].load_tasks]
    return [
        _Task(
            TaskKind(one.rows, one.tokens, one.past, one.samples),
            one.kind == "decode",
            None,
            TaskKind(one.decode_rows, 1, one.decode_past) if one.decode_rows else None,
        )
        for one in tasks
    ]


def _end_to_end(runs: Sequence[Iteration]) -> Iteration:
    """Iterations with tasks of their own as one, each behind the one before."""
    begins = list(itertools.accumulate((run.duration_s for run in runs), initial=0.0))
    stages = []
    for traces in zip(*(run.stages for run in runs), strict=True):
        placed = list(zip(traces, begins, strict=False))
        starts = [at + begin for trace, begin in placed for at in trace.compute_start_s]
        ends = [at + begin for trace, begin in placed for at in trace.compute_end_s]
        stages.append(StageTrace.model_construct(compute_start_s=tuple(starts), compute_end_s=tuple(ends)))
    return Iteration.model_construct(stages=tuple(stages))


def _tasks(measurement: Measurement) -> list[_Task]:
    """The tasks of a batch; prompts are padded to the longest of their micro-batch."""
    lengths, row = [], 0
    for size in measurement.micro_batch_sizes:
        lengths.append(max(measurement.prompt_lens[index] for index in measurement.order[row : row + size]))
        row += size
    found = []
    for task in measurement.tasks:
        length, rows = lengths[task.micro_batch], task.end_row - task.first_row
        first = task.first_token or 0
        end = length if task.end_token is None else task.end_token
        kind = TaskKind(rows, end - first, first, end == length or measurement.output_len == 0)
        if task.step > 0:
            kind = TaskKind(rows, 1, length + task.step - 1)
        found.append(_Task(kind, task.step > 0, task.micro_batch))
    return found


class _StageSpans:
    """The spans of one replica's stages over all iterations."""

    def __init__(
        self,
        runs: Sequence[Iteration],
        tasks: Sequence[_Task],
        others: Sequence[Sequence[Floats]],
        own: slice,
        stages: range,
    ) -> None:
        """`others` is `[iteration][stage]`: along tasks, how many others computed meanwhile; `own` is the replica."""
        self.shapes, self.stages = tasks[own], stages
        self.kinds = [task.kind for task in self.shapes]
        self.decodes = np.array([task.is_decode for task in self.shapes], dtype=bool)
        traces = [[run.stages[stage] for stage in stages] for run in runs]
        # `[iteration, stage, task]`
        self.starts = np.array([[trace.compute_start_s for trace in run] for run in traces], dtype=float)
        self.ends = np.array([[trace.compute_end_s for trace in run] for run in traces], dtype=float)
        self.others = np.array([[run[stage] for stage in stages] for run in others])
        self.most_others = max(1, len(runs[0].stages) - 1)

    def tasks(self) -> list[TaskSpan]:
        """Mean times by stage and kind of task, similar lengths taken together."""
        groups: dict[tuple[bool, int, int, int, bool, int | None], list[int]] = {}
        for index, task in enumerate(self.shapes):
            kind, beside = task.kind, _bucket(task.step.rows) if task.step else None
            key = (task.is_decode, kind.rows, _bucket(kind.new_tokens), _bucket(kind.past_tokens), kind.samples, beside)
            groups.setdefault(key, []).append(index)
        # Under arrivals there are so many kinds.
        kept = set(sorted(groups, key=lambda key: -len(groups[key]))[:_MOST_KINDS])
        groups = {key: members for key, members in groups.items() if key in kept}
        spans = []
        for place, stage in enumerate(self.stages):
            took, others = self.ends[:, place] - self.starts[:, place], self.others[:, place]
            for (_, rows, _, _, samples, _), members in groups.items():
                steps = [step for index in members if (step := self.shapes[index].step)]
                joined = {"decode_rows": [one.rows for one in steps], "decode_past": [one.past_tokens for one in steps]}
                many = others[:, members] >= 0.5 * self.most_others
                for seen in (~many, many):
                    if not seen.any():
                        continue
                    seconds = np.sort(took[:, members][seen])
                    cut = len(seconds) // 20
                    spans.append(
                        TaskSpan(
                            stage=stage,
                            rows=rows,
                            new_tokens=round(statistics.fmean(self.kinds[index].new_tokens for index in members)),
                            past_tokens=round(statistics.fmean(self.kinds[index].past_tokens for index in members)),
                            samples=samples,
                            **{name: round(statistics.fmean(own)) for name, own in joined.items() if own},
                            others=round(float(others[:, members][seen].mean()), 3),
                            seconds=round(float(seconds[cut : len(seconds) - cut].mean()), 7),
                            count=len(seconds),
                        )
                    )
        return spans

    def gaps_s(self) -> list[float | None]:
        """Per stage: the lower quartile of the gaps behind tasks whose successor's input was there. The lower one,
        since some stall. And those are left out whose output may have waited for the next stage's buffers, which is
        that stage's time and not this one's: it had work left from before."""
        gaps: list[float | None] = []
        for place in range(len(self.stages)):
            before, after = self.ends[:, place, :-1], self.starts[:, place, 1:]
            free = self._ready(place)[:, 1:] <= before
            if place + 1 < len(self.stages):
                free[:, 2:] &= self.ends[:, place + 1, :-3] <= before[:, 2:]
            seconds = (after - before)[free]
            gaps.append(round(max(0.0, float(np.quantile(seconds, 0.25))), 7) if seconds.size else None)
        return gaps

    def stalls_s(self) -> list[float | None]:
        """Per stage: least squares of what was waited beyond the gap over the square of the sender's share of time."""
        stalls: list[float | None] = []
        took = self.ends - self.starts
        for place, gap in enumerate(self.gaps_s()):
            if place == 0 or gap is None or took.shape[2] <= RING_DEPTH:
                stalls.append(None)
                continue
            own, sent = self.ends[:, place], self.ends[:, place - 1, RING_DEPTH:]
            late = (own[:, :-RING_DEPTH] > sent) & (sent <= own[:, RING_DEPTH - 1 : -1])
            shares = np.minimum(1.0, took[:, place - 1] / np.maximum(took[:, place], 1e-9))[:, RING_DEPTH:][late] ** 2
            waited = (self.starts[:, place, RING_DEPTH:] - own[:, RING_DEPTH - 1 : -1])[late] - gap
            known = float((shares**2).sum())
            stalls.append(round(max(0.0, float(shares @ waited) / known), 7) if known > 1.0 else None)
        return stalls

    def hand_overs(self) -> list[HandOver]:
        """Messages that a stage waited for longer than it takes to go on by itself."""
        found: list[HandOver] = []
        if len(self.stages) == 1:
            return found
        for place, stage in enumerate(self.stages):
            ready = self._ready(place)
            free = np.concatenate([np.full((len(ready), 1), -np.inf), self.ends[:, place, :-1]], axis=1)
            waited = (ready > free + 1e-3 * (self.ends - self.starts)[:, place]) & (ready > 0)
            groups: dict[tuple[int, int], list[int]] = {}
            for index, kind in enumerate(self.kinds):
                if place > 0 or self.decodes[index]:
                    groups.setdefault((kind.rows, kind.new_tokens if place > 0 else 0), []).append(index)
            for (rows, new_tokens), members in groups.items():
                seconds = (self.starts[:, place] - ready)[:, members][waited[:, members]]
                if seconds.size:
                    found.append(
                        HandOver(
                            source=self.stages[place - 1],
                            target=stage,
                            rows=rows,
                            new_tokens=new_tokens,
                            seconds=round(max(0.0, float(np.median(seconds))), 7),
                            count=int(seconds.size),
                        )
                    )
        return found

    def _ready(self, place: int) -> Floats:
        """`[iteration, task]`: when the stage before was done with it; on the first one, when its tokens were known."""
        if place > 0:
            return self.ends[:, place - 1]
        ready = np.zeros_like(self.ends[:, 0])
        sampled: dict[int, int] = {}
        for index, task in enumerate(self.shapes):
            if task.micro_batch is None:
                # It is later than nothing, and no earlier.
                ready[:, index] = np.nan
                continue
            if task.is_decode:
                ready[:, index] = self.ends[:, -1, sampled[task.micro_batch]]
            sampled[task.micro_batch] = index
        return ready


def _together(iterations: Sequence[Iteration]) -> list[list[Floats]]:
    """`[iteration][stage]`: for each task of a stage, how many other stages computed meanwhile, on average."""
    found = []
    for run in iterations:
        busy = [_busy_until(trace) for trace in run.stages]
        own = []
        for stage, trace in enumerate(run.stages):
            starts, ends = np.array(trace.compute_start_s), np.array(trace.compute_end_s)
            meanwhile = np.zeros(len(starts))
            for other, (times, seconds) in enumerate(busy):
                if other != stage and len(times):
                    meanwhile += np.interp(ends, times, seconds) - np.interp(starts, times, seconds)
            own.append(meanwhile / np.maximum(ends - starts, 1e-9))
        found.append(own)
    return found


def _busy_until(trace: StageTrace) -> tuple[Floats, Floats]:
    """Moments, and how long the stage had computed by then."""
    starts, ends = np.array(trace.compute_start_s), np.array(trace.compute_end_s)
    done = np.cumsum(ends - starts)
    before = np.concatenate([[0.0], done[:-1]]) if len(done) else done
    return np.stack([starts, ends], axis=1).ravel(), np.stack([before, done], axis=1).ravel()


def _bucket(length: int) -> int:
    """Lengths alike have the same number."""
    return round(_BUCKETS_AN_OCTAVE * math.log2(length)) if length > 0 else -1
