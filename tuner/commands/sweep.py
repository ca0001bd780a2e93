"""A plan at several rates: what is asked for, the table, and the plot of latency against rate."""

import math
from collections.abc import Sequence
from pathlib import Path

from pipetune.bench import metrics
from pipetune.bench.errors import ConfigError
from pipetune.bench.record import Measurement, Record
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.report.chart import SERIES, Chart, Line
from pipetune.tuner.report.document import Column, Table, rows_of
from pipetune.tuner.report.wording import MISSING, ms_text, percent_text


def rates_of(text: str | None) -> tuple[float, ...]:
    """Rates, as the command line gives them. ConfigError: something else than rising numbers above 0."""
    try:
        rates = tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise ConfigError(f"--sweep {text}: give requests a second, such as 2,4,8") from None
    if not all(0.0 < rate < math.inf for rate in rates) or list(rates) != sorted(set(rates)):
        raise ConfigError(f"--sweep {text}: give numbers above 0 that rise, such as 2,4,8")
    return rates


def check_load(config: TuneConfig, *, compare_baseline: bool, saves: bool) -> None:
    """Raises a ConfigError that names the options, for what cannot be done under arrivals."""
    workload = config.workload
    if workload.arrivals is None:
        return
    refused = {
        "--compare-baseline: the un-pipelined model takes a batch at once": compare_baseline,
        "--save-outputs: it generates for a batch at once": saves,
    }
    if why := next((text for text, applies in refused.items() if applies), None):
        raise ConfigError(f"{why}; leave it out where requests come over time")


def sweep_table(sweep: Sequence[tuple[float, Measurement]]) -> Table:
    """A line for each rate."""
    heads = ("req/s", "done/s", "tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "good", "bubble", "idle")
    rows = []
    for rate, measurement in sweep:
        values = metrics.derive(measurement)
        latencies = (f"{of}_{name}_ms" for name in ("ttft", "tpot") for of in ("median", "p99"))
        shares = (values.get(name) for name in ("slo_attainment", "bubble_ratio", "idle_ratio"))
        rates = f"{rate:g}", f"{values['request_throughput']:.2f}", f"{values['output_throughput']:.0f}"
        times = (ms_text(values.get(name)) for name in latencies)
        rows.append((*rates, *times, *(MISSING if share is None else percent_text(share) for share in shares)))
    return Table(columns=tuple(map(Column, heads)), rows=rows_of(rows))


def draw_sweeps(path: Path, records: Sequence[Record]) -> None:
    """Draws latency against rate, a curve for each plan."""
    from pipetune.tuner.report.render.plot import render_png

    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        arrivals = record.spec and record.spec.workload.arrivals
        if record.spec and arrivals and arrivals.request_rate and isinstance(record.result, Measurement):
            values = metrics.derive(record.result)
            name = "p90_ttft_ms" if "p90_ttft_ms" in values else "median_ttft_ms"
            curves.setdefault(record.spec.plan.describe(), []).append((arrivals.request_rate, values[name]))
    lines = tuple(
        Line(xs=xs, ys=ys, colour=colour, label=plan)
        for (plan, points), colour in zip(curves.items(), SERIES, strict=False)
        for xs, ys in [tuple(zip(*sorted(points), strict=True))]
    )
    chart = Chart(
        title="Time to first token against rate", x_label="requests per second", y_label="p90 TTFT, ms", marks=lines
    )
    path.write_bytes(render_png(chart))
