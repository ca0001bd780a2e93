"""What the figures of a study show, as values: points, trials and spans, before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from pipetune.tuner.ranking.values import BaselineRow
from pipetune.tuner.report.data import Report, has_timeline, stage_tasks, typical_iteration
from pipetune.tuner.report.search import trials_of
from pipetune.tuner.report.wording import column_title, layers_text, stage_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One plan in a scatter."""

    x: float
    y: float
    label: str
    is_confirmed: bool = False
    is_best: bool = False
    is_single_stage: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """Throughput against another metric."""

    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    baseline_y: float | None
    """Drawn as a line: the un-pipelined model may have no x."""
    baseline_x: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The objective trial by trial."""

    title: str
    y_label: str
    trials: tuple[tuple[int, float], ...]
    best_so_far: tuple[tuple[int, float], ...]
    failed: tuple[int, ...]
    baseline_y: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What was predicted of each trial against what was measured."""

    title: str
    x_label: str
    y_label: str
    numbers: tuple[int, ...]
    """Of the trials."""
    predicted: tuple[float, ...]
    sd: tuple[float, ...]
    """Absolute; 0 where it is not known."""
    measured: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One task on one stage."""

    stage: int
    start_s: float
    width_s: float
    label: str
    is_prefill: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What every stage of one plan did in one iteration, those of all replicas."""

    title: str
    stages: tuple[str, ...]
    bars: tuple[Bar, ...]
    end_s: float


def scatter_of(report: Report, metric: str, x_label: str, scale: float) -> Scatter | None:
    """Every ranked plan's throughput against a metric; None when no plan has it.

    Where there is a baseline, throughput is drawn as the gain over it: a machine may be in another mood during the
    finals than it was during the search, and then tokens per second of the two do not compare.
    """
    ranking, base = report.ranking, report.ranking.baseline
    rows = [row for row in ranking.rows if metric in row.metrics]
    if not rows:
        return None
    gains = [row.speedup_over_baseline for row in rows if row.speedup_over_baseline]
    relative = report.objective.metric == report.throughput_metric and len(gains) == len(rows)
    heights = [gain.value for gain in gains] if relative else [row.throughput.median for row in rows]
    return Scatter(
        title=f"Throughput against {column_title(metric)}",
        x_label=x_label,
        y_label="throughput, × over device_map" if relative else report.throughput_title,
        points=tuple(
            Point(
                x=row.metrics[metric] * scale,
                y=height,
                label=f"{layers_text(row.plan)}, mb {row.plan.micro_batch_size}",
                is_confirmed=row.confirmed,
                is_best=row.rank == 1,
                is_single_stage=bool(ranking.single_stage and row.key == ranking.single_stage.key),
            )
            for row, height in zip(rows, heights, strict=True)
        ),
        baseline_y=1.0 if relative else base.throughput.median if base else None,
        baseline_x=base.metrics[metric] * scale if base and metric in base.metrics else None,
    )


def sweep_row(report: Report) -> BaselineRow | None:
    """The baseline as it was measured before the finals, like the trials."""
    best = report.ranking.baseline
    return next((row for row in report.ranking.baseline_sweep if best and row.batch_size == best.batch_size), None)


def history_of(report: Report) -> History | None:
    """The objective of every trial of the search; None when no trial was measured."""
    objective = report.objective
    trials, best_so_far, failed = [], [], []
    best: float | None = None
    for trial in trials_of(report):
        if trial.measured is None:
            failed.append(trial.number)
            continue
        trials.append((trial.number, trial.measured))
        best = trial.measured if trial.is_best_so_far else best
        if best is not None:
            best_so_far.append((trial.number, best))
    if not trials:
        return None
    base = sweep_row(report)
    return History(
        title="The search, trial by trial",
        y_label=report.throughput_title if objective.metric == report.throughput_metric else objective.metric,
        trials=tuple(trials),
        best_so_far=tuple(best_so_far),
        failed=tuple(failed),
        baseline_y=base.value if base else None,
    )


def forecast_of(report: Report) -> Forecast | None:
    """Predictions against measurements; None where there were none."""
    trials = [trial for trial in trials_of(report) if trial.error is not None]
    if not trials:
        return None
    metric = report.objective.metric
    unit = report.throughput_title if metric == report.throughput_metric else metric
    predicted = tuple(trial.predicted or 0.0 for trial in trials)
    return Forecast(
        title="Predicted before the run, and measured",
        x_label=f"predicted, {unit}",
        y_label=f"measured, {unit}",
        numbers=tuple(trial.number for trial in trials),
        predicted=predicted,
        sd=tuple(value * (trial.predicted_sd or 0.0) for value, trial in zip(predicted, trials, strict=True)),
        measured=tuple(trial.measured or 0.0 for trial in trials),
    )


def timeline_of(report: Report) -> Timeline | None:
    """One typical iteration of the best plan; None when no run was instrumented."""
    row = report.shown
    if row is None or not has_timeline(report.typical(row)):
        return None
    measurement = report.typical(row)
    run = measurement.iterations[typical_iteration(measurement)]
    bars = tuple(
        Bar(
            stage=place,
            start_s=start,
            width_s=end - start,
            label=f"m{measurement.tasks[index].micro_batch}",
            is_prefill=measurement.tasks[index].step == 0,
        )
        for place, (trace, tasks) in enumerate(zip(run.stages, stage_tasks(measurement), strict=True))
        for index, start, end in zip(tasks, trace.compute_start_s, trace.compute_end_s, strict=True)
    )
    return Timeline(
        title=f"One iteration of {row.plan.describe()}",
        stages=tuple(
            f"{stage_name(row.plan, place)}\n{device}\n{row.plan.layer_counts[place % len(row.plan.stages)]} layers"
            for place, device in enumerate(row.plan.devices)
        ),
        bars=bars,
        end_s=run.duration_s,
    )
