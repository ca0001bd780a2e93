"""What each lane of a plan gave the requests whose prompts it takes."""

from itertools import compress

from pipetune.bench.metrics import good_requests, latency_metrics, request_times_s
from pipetune.bench.record import Measurement
from pipetune.bench.spec import Plan
from pipetune.tuner.ranking.runs import unpaired
from pipetune.tuner.ranking.values import Ranking, Row
from pipetune.tuner.report.document import Column, Section, Table, Text, left, rows_of
from pipetune.tuner.report.wording import MISSING, ms_text, percent_text, ratio_text, row_text, sentence

_SHOWN = tuple(f"{of}_{name}_ms" for name in ("ttft", "tpot") for of in ("median", "p90"))


def lane_table(plan: Plan, measurement: Measurement) -> Table:
    """A line for each lane: its prompts, their share of the requests, latencies, and those that kept the limits."""
    taken, rows = [plan.lane_of(length) for length in measurement.prompt_lens], []
    for lane in plan.lanes or ():
        is_own = [one is lane for one in taken]
        count = sum(is_own)
        runs = [
            {name: tuple(compress(times, is_own)) for name, times in run.items()}
            for run in request_times_s(measurement)
        ]
        pooled = {name: [time for run in runs for time in run[name]] for name in runs[0]}
        values = latency_metrics(pooled, count) if count else {}
        good = MISSING
        if measurement.goodput is not None and count:
            kept = sum(good_requests(run, measurement.goodput.limits) for run in runs)
            good = percent_text(kept / (count * len(runs)))
        times = (ms_text(values.get(name)) for name in _SHOWN)
        rows.append((lane.text, percent_text(count / len(taken)), *times, good))
    heads = map(Column, ("requests", "TTFT p50", "p90", "TPOT p50", "p90", "good"))
    return Table(columns=(left("lane, tokens of a prompt"), *heads), rows=rows_of(rows))


def lane_section(ranking: Ranking, row: Row, measurement: Measurement) -> tuple[Section, ...]:
    """The lanes of a plan, and what they gain; nothing for a plan without any, or for batches."""
    if not row.plan.lanes or not measurement.is_under_arrivals:
        return ()
    without = next((one for one in ranking.rows if not one.plan.lanes), None)
    objective, told = ranking.objectives[0], "no plan without lanes was measured beside it, so there is no gain"
    if without is not None and (gain := unpaired(objective, row.spread, without.spread)) is not None:
        told = f"{ratio_text(gain)} over the best plan without lanes in {objective.metric}: {row_text(without)}"
    return (Section("Lanes", (lane_table(row.plan, measurement), Text(sentence(told)))),)
