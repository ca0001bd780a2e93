"""Metrics by vLLM's flat names, derived from raw samples; pure, so that a corrected formula re-reads old records.

Definitions, with W the duration of an iteration, S the number of stages of all replicas and busy_s a stage's compute
time:

* `output_throughput` = generated tokens / W, median over iterations; where texts are scored it is absent, as are TTFT
  and TPOT.
* TTFT of a request: from the prompts to its first token. TPOT: (last − first token) / (tokens − 1). E2EL: last token.
  ITL, where an engine formed the batches: each gap between two tokens of a request.
* `bubble_ratio` = 1 − Σ busy_s / (S · W). It is the sum of
  `bubble_fill_drain` (before a stage's first and after its last task),
  `bubble_imbalance` (Σ (max busy − busy_s) / (S · W), no more than what is left), and
  `bubble_wait` (the rest: dependencies, communication, host).
* `steady_utilization` = Σ busy_s / Σ (last end − first start).

Under arrivals all latencies count from the scheduled arrival, and stage time is the sum of Σ busy_s, the bubble and
`idle_ratio` · S · W, in which no request was in the system. The bubble has a part `bubble_underfilled` more: stages
that wait while all requests do so for their tokens, and none for a row.
"""

import bisect
import itertools
import math
import operator
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipetune.bench.load.rates import RateSearch
from pipetune.bench.record import Intervals, Iteration, Measurement, StageTrace
from pipetune.bench.spec import Workload

LATENCIES = ("queue", "ttft", "tpot", "e2el")
LOAD_LATENCIES = ("itl", "client_queue_time")
"""Latencies that there are under arrivals alone."""
PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


def definitions() -> tuple[tuple[tuple[str, ...], str, str], ...]:
    """Names that are defined alike, their definition, and whether `higher` or `lower` is better, of every metric."""
    lines = Path(__file__).with_suffix(".md").read_text(encoding="utf-8").splitlines()[2:]
    cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return tuple((tuple(re.findall(r"`(\w+)`", names)), text, better) for names, text, better in cells)


HIGHER_IS_BETTER = frozenset(name for names, _, better in definitions() for name in names if better == "higher")


def samples_needed(quantile: float) -> int:
    """Requests without which a percentile says nothing: one tail sample at least, so 10 for p90 and 100 for p99."""
    return math.ceil(round(1.0 / (1.0 - quantile), 9))


def metric_names(
    num_prompts: int,
    output_len: int,
    *,
    gpu: bool = False,
    goodput: bool = False,
    arrivals: bool = False,
    rates: bool = False,
) -> tuple[str, ...]:
    """Names of the scalar metrics that a run of this size yields; percentiles with too few samples are absent."""
    names = ["output_throughput"] if output_len > 0 else []
    names += ["total_token_throughput", "request_throughput", "duration_s"]
    if goodput:
        names += ["request_goodput", "slo_attainment", *(["max_request_rate"] if rates else [])]
    for latency in (*LATENCIES, *(LOAD_LATENCIES if arrivals else ())):
        if (latency in ("tpot", "itl") and output_len < 2) or (latency == "ttft" and output_len < 1):
            continue
        names += [f"mean_{latency}_ms", f"median_{latency}_ms"]
        names += [f"{name}_{latency}_ms" for name, q in PERCENTILES.items() if num_prompts >= samples_needed(q)]
    names += ["bubble_ratio", "bubble_fill_drain", "bubble_imbalance", "bubble_wait", "steady_utilization"]
    names += ["peak_memory_bytes", "peak_memory_fraction", "comm_ms"]
    if arrivals:
        names += ["idle_ratio", "bubble_underfilled", "arrival_lag_ms"]
    return (*names, "gpu_utilization", "energy_j", "output_tokens_per_joule") if gpu else tuple(names)


def metrics_of_workload(workload: Workload, *, gpu: bool, engine: bool = False) -> tuple[str, ...]:
    """Names of the metrics that a plan yields, of our own runtime or of an engine."""
    arrivals = workload.arrivals
    return metric_names(
        workload.num_prompts,
        workload.generated_len,
        gpu=gpu,
        goodput=workload.goodput is not None,
        arrivals=engine or arrivals is not None,
        rates=arrivals is not None and arrivals.slo_attainment is not None,
    )


def percentile(samples: Sequence[float], quantile: float) -> float:
    """Linear interpolation between order statistics (method 7 of Hyndman & Fan 1996, numpy's default)."""
    ordered = sorted(samples)
    position = quantile * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def request_times_s(measurement: Measurement) -> tuple[dict[str, tuple[float, ...]], ...]:
    """By iteration, per prompt as given: `queue`, `ttft`, `tpot` (0 for one token) and `e2el`, in seconds. Under
    arrivals `client_queue_time` as well."""
    if measurement.iterations[0].requests:
        return tuple(_arrived_times_s(run, measurement) for run in measurement.iterations)
    order, tasks = measurement.order, measurement.tasks
    first_rows = list(itertools.accumulate(measurement.micro_batch_sizes, initial=0))
    # Prompts whose rows are worked on together share their times.
    together: dict[tuple[int, int], list[int]] = {}
    for index, task in enumerate(tasks):
        start = first_rows[task.micro_batch]
        together.setdefault((start + task.first_row, start + task.end_row), []).append(index)
    groups = []
    begun: dict[int, int] = {}
    for (row, end_row), own in together.items():
        prompts, prefills = order[row:end_row], [index for index in own if tasks[index].step == 0]
        groups.append((prompts, prefills, own))
        begun |= {one: min(begun.get(one, prefills[0]), prefills[0]) for one in prompts if prefills}
    return tuple(_times_s(measurement, run, groups, begun) for run in measurement.iterations)


def good_requests(times_s: Mapping[str, Sequence[float]], limits_ms: Mapping[str, float]) -> int:
    """Requests of one iteration that keep all limits."""
    kept = [[time <= limit / 1e3 for time in times_s[name]] for name, limit in limits_ms.items() if name in times_s]
    return sum(map(all, zip(*kept, strict=True)))


def _arrived_times_s(run: Iteration, measurement: Measurement) -> dict[str, tuple[float, ...]]:
    rows = [(one, one.token_times_s[0], one.token_times_s[-1]) for one in run.requests]
    times = {
        "queue": tuple((one.began_s or 0.0) - one.arrived_s for one, _, _ in rows),
        "ttft": tuple(first - one.arrived_s for one, first, _ in rows),
        "e2el": tuple(last - one.arrived_s for one, _, last in rows),
    }
    if measurement.is_under_arrivals:
        times["client_queue_time"] = tuple((one.admitted_s or 0.0) - one.arrived_s for one, _, _ in rows)
    if measurement.output_len > 1:
        times["tpot"] = tuple((last - first) / max(len(one.token_times_s) - 1, 1) for one, first, last in rows)
    return times


def _times_s(
    measurement: Measurement,
    run: Iteration,
    groups: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
    begun: Mapping[int, int],
) -> dict[str, tuple[float, ...]]:
    count, known_s = len(measurement.order), run.token_times_s
    first, last = [0.0] * count, [0.0] * count
    lens, tasks = measurement.generated_lens, measurement.tasks
    for prompts, prefills, own in groups:
        # Of several chunks the last one gives the token, and the first one ends the wait.
        gave = max((known_s[index] for index in prefills), default=0.0)
        ended = max(known_s[index] for index in own)
        for prompt in prompts:
            if measurement.output_lens is not None:
                # Others of its micro-batch may go on.
                ended = max((known_s[index] for index in own if tasks[index].step < lens[prompt]), default=0.0)
            first[prompt], last[prompt] = max(first[prompt], gave), max(last[prompt], ended)
    # When each task began on its replica's first stage; empty without instrumentation.
    width = len(run.stages) // len(measurement.replica_tasks or (0,))
    starts = [start for trace in run.stages[:: width or 1] for start in trace.compute_start_s]
    times = {"e2el": tuple(last)}
    if measurement.output_len > 0:
        times["ttft"] = tuple(first)
    if starts:
        times["queue"] = tuple(starts[begun[prompt]] if prompt in begun else 0.0 for prompt in range(count))
    if measurement.output_len > 1:
        spans = zip(first, last, lens, strict=True)
        times["tpot"] = tuple((end - begin) / max(length - 1, 1) for begin, end, length in spans)
    return times


def stage_busy_s(measurement: Measurement, iteration: int) -> tuple[float, ...]:
    """Compute time of each stage in one iteration; empty without instrumentation."""
    stages = measurement.iterations[iteration].stages
    if not any(trace.compute_start_s for trace in stages):
        return ()
    return tuple(
        sum(end - start for start, end in zip(trace.compute_start_s, trace.compute_end_s, strict=True))
        for trace in stages
    )


def bubble(measurement: Measurement, iteration: int) -> dict[str, float]:
    """`bubble_ratio` and its parts, and `steady_utilization`, for one iteration; empty without instrumentation."""
    if not (busy := stage_busy_s(measurement, iteration)):
        return {}
    run = measurement.iterations[iteration]
    area = len(busy) * run.duration_s
    idle = fill_drain = underfilled = active_s = 0.0
    for trace, load in zip(run.stages, run.stage_loads, strict=True):
        outside = _outside(trace, run.duration_s)
        idle += _length(load.idle_s) / area
        active_s += run.duration_s - _length(outside)
        fill_drain += (_length(outside) - _shared(outside, load.idle_s)) / area
        if load.underfilled_s:
            computes = list(zip(trace.compute_start_s, trace.compute_end_s, strict=True))
            computed = _shared(computes, load.underfilled_s) + _shared(outside, load.underfilled_s)
            underfilled += (_length(load.underfilled_s) - computed) / area
    ratio = 1.0 - sum(busy) / area - idle
    imbalance = min(sum(max(busy) - own for own in busy) / area, max(ratio - fill_drain - underfilled, 0.0))
    values = {
        "bubble_ratio": ratio,
        "bubble_fill_drain": fill_drain,
        "bubble_imbalance": imbalance,
        "bubble_wait": ratio - fill_drain - underfilled - imbalance,
        "steady_utilization": sum(busy) / active_s,
    }
    return values | {"idle_ratio": idle, "bubble_underfilled": underfilled} if measurement.is_under_arrivals else values


def _outside(trace: StageTrace, duration_s: float) -> Intervals:
    """Before a stage's first task and after its last; all of the time on a replica without prompts."""
    if not trace.compute_start_s:
        return ((0.0, duration_s),)
    return (0.0, trace.compute_start_s[0]), (trace.compute_end_s[-1], duration_s)


def _length(spans: Intervals) -> float:
    return sum(end - begin for begin, end in spans)


def _shared(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in a span of both, each of which has none that overlap."""
    ends = [end for _, end in other]
    shared = 0.0
    for begin, end in one:
        for index in range(bisect.bisect_right(ends, begin), len(other)):
            if other[index][0] >= end:
                break
            shared += min(end, other[index][1]) - max(begin, other[index][0])
    return shared


def stage_metrics(measurement: Measurement) -> dict[str, tuple[float, ...]]:
    """Per stage, median over iterations: `stage_busy_ms`, `comm_ms` (waits for in- and output), `stage_utilization`."""
    runs = measurement.iterations
    busy = [stage_busy_s(measurement, index) for index in range(len(runs))]
    if not busy[0]:
        return {}
    comm = [[sum(trace.recv_wait_s) + sum(trace.send_wait_s) for trace in run.stages] for run in runs]
    utilization = [[own / run.duration_s for own in row] for row, run in zip(busy, runs, strict=True)]

    def medians(rows: Sequence[Sequence[float]], scale: float) -> tuple[float, ...]:
        return tuple(statistics.median(column) * scale for column in zip(*rows, strict=True))

    times = {"stage_busy_ms": medians(busy, 1e3), "comm_ms": medians(comm, 1e3)}
    return times | {"stage_utilization": medians(utilization, 1.0)}


def latency_metrics(times_s: Mapping[str, Sequence[float]], num_requests: int) -> dict[str, float]:
    """Mean, median and percentiles of each latency's samples, in ms; percentiles that so many requests can have."""
    values = {}
    enough = {label: q for label, q in PERCENTILES.items() if num_requests >= samples_needed(q)}
    for name in (name for name in (*LATENCIES, *LOAD_LATENCIES) if times_s.get(name)):
        samples = sorted(times_s[name])
        values[f"mean_{name}_ms"] = statistics.fmean(samples) * 1e3
        values[f"median_{name}_ms"] = statistics.median(samples) * 1e3
        values |= {f"{label}_{name}_ms": percentile(samples, q) * 1e3 for label, q in enough.items()}
    return values


def derive(measurement: Measurement) -> dict[str, float]:
    """All scalar metrics of one measurement.

    Throughput, duration and bubble are medians over the iterations; latencies are pooled over requests and
    iterations, and a percentile is given only if one iteration has requests enough for it. `comm_ms` is the sum
    over stages, `peak_memory_bytes` and `peak_memory_fraction` (of the cap, without what the process took before any
    model was loaded) the largest over stages.
    """
    output_tokens = sum(measurement.generated_lens)
    total_tokens = sum(measurement.prompt_lens) + output_tokens
    durations = [run.duration_s for run in measurement.iterations]
    duration = statistics.median(durations)
    values: dict[str, float] = {"output_throughput": output_tokens / duration} if output_tokens else {}
    values |= {
        "total_token_throughput": total_tokens / duration,
        "request_throughput": len(measurement.prompt_lens) / duration,
        "duration_s": duration,
    }
    pooled: dict[str, list[float]] = {}
    runs = request_times_s(measurement)
    if measurement.goodput is not None:
        limits = measurement.goodput.limits
        counts = [good_requests(times, limits) for times in runs]
        values["request_goodput"] = statistics.median(map(operator.truediv, counts, durations))
        values["slo_attainment"] = sum(counts) / (len(counts) * len(measurement.prompt_lens))
    if (wanted := measurement.wanted_share) is not None:
        shares = dict(measurement.tried_rates)
        highest = RateSearch(wanted=wanted, guess=1.0, most=len(shares), shares=shares).highest
        values |= {"max_request_rate": highest} if highest else {}
    for times in runs:
        for name, own in times.items():
            has_one = (length > 1 or name != "tpot" for length in measurement.generated_lens)
            pooled.setdefault(name, []).extend(itertools.compress(own, has_one))
    requests = [one for run in measurement.iterations for one in run.requests]
    pooled["itl"] = [b - a for one in requests for a, b in itertools.pairwise(one.token_times_s)]
    if measurement.is_under_arrivals:
        values["arrival_lag_ms"] = max(one.noticed_s - one.arrived_s for one in requests) * 1e3
    values |= latency_metrics(pooled, len(measurement.prompt_lens))
    bubbles = [bubble(measurement, index) for index in range(len(durations))]
    for name in bubbles[0]:
        values[name] = statistics.median(row[name] for row in bubbles)
    if per_stage := stage_metrics(measurement):
        values["comm_ms"] = sum(per_stage["comm_ms"])
    if stages := measurement.memory:
        values["peak_memory_bytes"] = float(max(stage.peak_bytes for stage in stages))
        values["peak_memory_fraction"] = max((one.peak_bytes - one.baseline_bytes) / one.cap_bytes for one in stages)
    telemetry = measurement.telemetry
    if telemetry.gpu_utilization is not None:
        values["gpu_utilization"] = telemetry.gpu_utilization
    if telemetry.energy_j is not None and telemetry.energy_j > 0:
        values["energy_j"] = telemetry.energy_j
        if output_tokens:
            values["output_tokens_per_joule"] = output_tokens * len(durations) / telemetry.energy_j
    return values


def throughputs(measurement: Measurement) -> tuple[float, ...]:
    """Tokens per second in each iteration: those generated, or all where texts are scored."""
    tokens = sum(measurement.generated_lens) or sum(measurement.prompt_lens)
    return tuple(tokens / run.duration_s for run in measurement.iterations)
