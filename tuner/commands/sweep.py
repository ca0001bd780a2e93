"""A plan at several rates: what is asked for, the table, and the plot of latency against rate."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from pipetune.bench import metrics
from pipetune.bench.errors import ConfigError, StudyError, explain
from pipetune.bench.record import Measurement, Record
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.report.chart import SERIES, Chart, Line
from pipetune.tuner.report.document import Column, Table, rows_of
from pipetune.tuner.report.wording import MISSING, ms_text, percent_text
from pipetune.tuner.study.files import read_records


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


Point = tuple[str, float, float]
"""What was measured, requests a second, and TTFT in ms: p90, or where there are too few requests the median."""


class _Served(BaseModel):
    """What is read of a line that `vllm bench serve --save-result` or `--append-result` wrote."""

    model_id: str
    backend: str
    label: str | None = None
    request_rate: float = Field(gt=0, allow_inf_nan=False)
    p90_ttft_ms: float | None = None
    ttfts: tuple[float, ...] = ()

    @property
    def point(self) -> Point:
        if self.p90_ttft_ms is None and not self.ttfts:
            raise ValueError("no p90_ttft_ms: let it measure with --metric-percentiles 90, or --save-detailed")
        own = self.p90_ttft_ms or metrics.percentile(self.ttfts, 0.9) * 1e3
        return self.label or f"{self.model_id} ({self.backend})", self.request_rate, own


def read_points(path: Path) -> list[Point]:
    """Points of a file of records, or of results of `vllm bench serve`.
    StudyError: it cannot be read, or holds something else."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if lines and "endpoint_type" in json.loads(lines[0]):
            return [_Served.model_validate_json(line).point for line in lines]
    except (OSError, ValueError) as error:
        raise StudyError(f"--beside {path}: {explain(error)}") from None
    return points_of(read_records(path, "--beside "))


def points_of(records: Sequence[Record]) -> list[Point]:
    """Points of what was measured under arrivals."""
    found = []
    for record in records:
        arrivals = record.spec and record.spec.workload.arrivals
        if record.spec and arrivals and arrivals.request_rate and isinstance(record.result, Measurement):
            values = metrics.derive(record.result)
            name = "p90_ttft_ms" if "p90_ttft_ms" in values else "median_ttft_ms"
            found.append((record.spec.plan.describe(), arrivals.request_rate, values[name]))
    return found


def draw_sweeps(path: Path, points: Sequence[Point]) -> None:
    """Draws latency against rate, a curve for each plan."""
    from pipetune.tuner.report.render.plot import render_png

    curves: dict[str, list[tuple[float, float]]] = {}
    for name, rate, time_ms in points:
        curves.setdefault(name, []).append((rate, time_ms))
    lines = tuple(
        Line(xs=xs, ys=ys, colour=colour, label=plan)
        for (plan, points), colour in zip(curves.items(), SERIES, strict=False)
        for xs, ys in [tuple(zip(*sorted(points), strict=True))]
    )
    chart = Chart(
        title="Time to first token against rate",
        x_label="requests per second",
        y_label="p90 TTFT, ms",
        marks=lines,
        y_range=(0.0, 1.05 * max(time_ms for _, _, time_ms in points)),
        legend_columns=1,
    )
    path.write_bytes(render_png(chart))
