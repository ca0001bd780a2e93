"""The timeline of one iteration in Chrome's trace format, which Perfetto opens: a process per stage of each replica.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Times are in µs from the
moment the prompts were given. A record keeps how long a stage waited before and after each task, not when: a receive
wait is drawn up to the task's compute, a send wait from its end on.
"""

import gzip
import json
from typing import Any

from pipetune.bench.record import Measurement, StageTrace, TaskShape
from pipetune.bench.spec import Plan
from pipetune.tuner.report.data import Report, replica_tasks, typical_iteration
from pipetune.tuner.report.wording import clean, row_text, stage_name

_COMPUTE, _RECEIVE, _SEND = 1, 2, 3
_TRACKS = {_COMPUTE: "compute", _RECEIVE: "receive wait", _SEND: "send wait"}
_MIN_WAIT_US = 1.0
"""Shorter waits are no events: they cannot be seen and would swell the file."""

Event = dict[str, Any]


def render_trace(report: Report) -> bytes | None:
    """The gzipped trace of the best plan's typical iteration; None when no run was instrumented."""
    if (found := report.timeline) is None:
        return None
    row, measurement = found
    iteration = typical_iteration(measurement)
    about = {"study": clean(report.name), "model": clean(report.config.model.name), "plan": row_text(row)}
    run = {"record": row.typical_record, "iteration": iteration}
    events = trace_events(measurement, iteration, row.plan)
    document = {"displayTimeUnit": "ms", "otherData": {**about, **run}, "traceEvents": events}
    return gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0)


def trace_events(measurement: Measurement, iteration: int, plan: Plan) -> list[Event]:
    """All events of one iteration, metadata first."""
    traces = measurement.iterations[iteration].stages
    events: list[Event] = []
    width = len(plan.stages)
    for index, device in enumerate(plan.devices):
        name = f"{stage_name(plan, index)} · {device} · layers {plan.stages[index % width].range_text}"
        # Viewers take process 0 for one of the system's own.
        meta: Event = {"ph": "M", "pid": index + 1}
        events.append({**meta, "name": "process_name", "args": {"name": name}})
        events.append({**meta, "name": "process_sort_index", "args": {"sort_index": index}})
        for track, title in _TRACKS.items():
            events.append({**meta, "tid": track, "name": "thread_name", "args": {"name": title}})
            events.append({**meta, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}})
    flows: list[Event] = []
    for replica, own in enumerate(replica_tasks(measurement)):
        tasks = measurement.tasks[own.start : own.stop]
        first = replica * width
        for index in range(first, first + width):
            events += _stage_events(index, traces[index], tasks)
        flows += _flow_events(traces[first : first + width], tasks, first, len(flows) // 2)
    return events + flows


def task_name(task: TaskShape) -> str:
    """`prefill m1 rows 0–7`, `prefill m1 rows 0–7 tokens 64–127`, `decode m1 step 3`."""
    if task.step == 0:
        cut = task.first_token is not None and task.end_token is not None
        tokens = f" tokens {task.first_token}–{(task.end_token or 0) - 1}" if cut else ""
        return f"prefill m{task.micro_batch} rows {task.first_row}–{task.end_row - 1}{tokens}"
    return f"decode m{task.micro_batch} step {task.step}"


def _stage_events(stage: int, trace: StageTrace, tasks: tuple[TaskShape, ...]) -> list[Event]:
    events: list[Event] = []

    def span(task: TaskShape, track: int, when: str, category: str, start_s: float, end_s: float) -> None:
        args = {"micro_batch": task.micro_batch, "step": task.step, "rows": task.end_row - task.first_row}
        times = {"ts": round(start_s * 1e6, 3), "dur": round((end_s - start_s) * 1e6, 3)}
        event = {"ph": "X", "pid": stage + 1, "tid": track, "name": f"{when}{task_name(task)}", "cat": category}
        events.append({**event, **times, "args": args})

    received_until = sent_until = 0.0
    for index, task in enumerate(tasks):
        start, end = trace.compute_start_s[index], trace.compute_end_s[index]
        span(task, _COMPUTE, "", "decode" if task.step else "prefill", start, end)
        # Events of one track must not overlap, or a viewer takes them for calls within calls.
        waited_from = max(start - trace.recv_wait_s[index], received_until)
        sends_from = max(end, sent_until)
        sends_until = sends_from + trace.send_wait_s[index]
        if (start - waited_from) * 1e6 >= _MIN_WAIT_US:
            span(task, _RECEIVE, "before ", "wait", waited_from, start)
        if (sends_until - sends_from) * 1e6 >= _MIN_WAIT_US:
            span(task, _SEND, "after ", "wait", sends_from, sends_until)
        received_until, sent_until = max(received_until, start), sends_until
    return events


def _flow_events(
    traces: tuple[StageTrace, ...], tasks: tuple[TaskShape, ...], first_stage: int, first_id: int
) -> list[Event]:
    """Arrows of one replica along the path of each task from stage to stage, and of its tokens back to the first."""
    events: list[Event] = []

    def arrow(name: str, sender: int, sent: int, receiver: int, received: int) -> None:
        common = {"cat": "flow", "name": name, "id": first_id + len(events) // 2, "tid": _COMPUTE}
        # Viewers bind an end to the span around it: the middle of both spans is safely inside.
        ends = (traces[sender], sent), (traces[receiver], received)
        begin, end = ((trace.compute_start_s[at] + trace.compute_end_s[at]) / 2 for trace, at in ends)
        events.append({**common, "ph": "s", "pid": first_stage + sender + 1, "ts": round(begin * 1e6, 3)})
        events.append({**common, "ph": "f", "bp": "e", "pid": first_stage + receiver + 1, "ts": round(end * 1e6, 3)})

    if len(traces) < 2:
        return events
    last_of: dict[int, int] = {}
    for index, task in enumerate(tasks):
        if task.step > 0:
            arrow("tokens", len(traces) - 1, last_of[task.micro_batch], 0, index)
        for stage in range(len(traces) - 1):
            arrow("hidden states", stage, index, stage + 1, index)
        last_of[task.micro_batch] = index
    return events
