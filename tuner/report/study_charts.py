"""The charts of a study: plans against their bubble and memory, the search, its predictions, and one iteration."""

from dataclasses import replace

from pipetune.tuner.ranking.values import Row
from pipetune.tuner.report.chart import Band, Bars, Chart, Dots, Line, Mark, Rule
from pipetune.tuner.report.data import Report, stage_tasks, typical_iteration
from pipetune.tuner.report.document import Figure
from pipetune.tuner.report.search import trials_of
from pipetune.tuner.report.wording import column_title, layers_text, sizes_text, stage_name

_LOOKS = {
    "finalist": Dots(xs=(), ys=(), colour="plan", size=6.5),
    "plan of the search": Dots(xs=(), ys=(), colour="plan", size=6.5, is_hollow=True),
    "single stage": Dots(xs=(), ys=(), colour="green", marker="D", size=7.5),
    "best plan": Dots(xs=(), ys=(), colour="orange", marker="*", size=15),
}

_MOST_NAMES = 60
"""More of them hide each other, and take most of the time that a chart takes."""


def study_figures(report: Report) -> dict[str, Figure | None]:
    """All figures by file name without ending; None where the study has no data for one."""
    predictions = prediction_chart(report)
    bubble = plans_chart(report, "bubble_ratio", "bubble ratio, % of stage time without compute", 100.0)
    memory = plans_chart(report, "peak_memory_bytes", "peak memory of the fullest stage, MiB", 2.0**-20)
    charts = {
        "throughput_vs_bubble": ("Throughput against bubble ratio", bubble),
        "throughput_vs_memory": ("Throughput against peak memory", memory),
        "history": ("Best so far, trial by trial", search_chart(report, wide=predictions is None)),
        "predicted_vs_measured": ("Predicted against measured", predictions),
        "timeline": ("Timeline of the stages", timeline_chart(report)),
    }
    return {key: Figure(alt, chart, wide=chart.size[0] > 8) if chart else None for key, (alt, chart) in charts.items()}


def plans_chart(report: Report, metric: str, x_label: str, scale: float) -> Chart | None:
    """Every ranked plan's throughput against a metric; None when no plan has it. Where there is a baseline, throughput
    is drawn as the gain over it: the machine may be slower or faster during the finals than it was during the search,
    and then tokens per second of the two do not compare."""
    ranking, base = report.ranking, report.ranking.baseline
    references = (row for row in ranking.unranked if row.is_reference)
    if not (rows := [row for row in (*ranking.rows, *references) if metric in row.metrics]):
        return None
    gains = [row.speedup_over_baseline for row in rows if row.speedup_over_baseline]
    relative = report.objective.metric == report.throughput_metric and len(gains) == len(rows)
    heights = [gain.value for gain in gains] if relative else [row.throughput.median for row in rows]
    single = ranking.single_stage.key if ranking.single_stage else None
    points = [(row, scale * row.metrics[metric], height) for row, height in zip(rows, heights, strict=True)]

    def kind(row: Row) -> str:
        if row.rank == 1:
            return "best plan"
        return "single stage" if row.key == single else "finalist" if row.in_finals else "plan of the search"

    marks: list[Mark] = []
    height = 1.0 if relative else base.throughput.median if base else None
    if height is not None:
        # The un-pipelined model may have no x: it is a line.
        marks.append(Rule(at=height, colour="vermilion", label=report.baseline_name, is_dashed=True))
        if base and metric in base.metrics:
            at = (scale * base.metrics[metric],)
            marks.append(Dots(xs=at, ys=(height,), colour="vermilion", marker="s", size=7))
    for label, look in _LOOKS.items():
        if own := [point for point in points if kind(point[0]) == label]:
            shown, xs, ys = zip(*own, strict=True)
            size = "budget" if report.engine else "mb"
            names = (f"{layers_text(row.plan)}, {size} {sizes_text(row.effective)[0]}" for row in shown)
            marks.append(replace(look, xs=xs, ys=ys, label=label, names=tuple(names) if label == "best plan" else ()))
    return Chart(
        title=f"Throughput against {column_title(metric)}",
        x_label=x_label,
        y_label=f"throughput, × over {report.baseline_name}" if relative else report.throughput_title,
        marks=tuple(marks),
    )


def search_chart(report: Report, *, wide: bool = True) -> Chart | None:
    """The objective of every trial, the best so far as a staircase; None when no trial was measured."""
    trials = trials_of(report)
    found = [(trial.number, trial.measured, trial.is_best_so_far) for trial in trials if trial.measured is not None]
    if not found:
        return None
    values = [value for _, value, _ in found]
    marks: list[Mark] = []
    best_batch = report.ranking.baseline and report.ranking.baseline.batch_size
    # As it was measured before the finals, like the trials.
    base = next((row for row in report.ranking.baseline_sweep if row.batch_size == best_batch), None)
    if base and base.value is not None:
        marks.append(Rule(at=base.value, colour="vermilion", label=report.baseline_name, is_dashed=True))
    if best := [(number, value) for number, value, leads in found if leads]:
        numbers, reached = zip(*best, (max(trial.number for trial in trials), best[-1][1]), strict=True)
        marks.append(Line(xs=numbers, ys=reached, colour="orange", label="best so far", width=2, is_stepped=True))
    marks.append(Dots(xs=tuple(number for number, *_ in found), ys=tuple(values), colour="plan", label="trial"))
    if failed := tuple(trial.number for trial in trials if trial.measured is None):
        foots = (min(values) - 0.12 * (max(values) - min(values)),) * len(failed)
        marks.append(Dots(xs=failed, ys=foots, colour="vermilion", marker="x", size=8, label="no measurement"))
    title, unit = "The search, trial by trial", _unit(report)
    size, columns = ((10.0, 3.6), 4) if wide else ((6.4, 4.6), 2)
    return Chart(title=title, x_label="trial", y_label=unit, marks=tuple(marks), size=size, legend_columns=columns)


def prediction_chart(report: Report) -> Chart | None:
    """Trials by number against the diagonal on which predictions come true; None where there were none."""
    found = [
        (str(trial.number), trial.predicted, trial.measured, trial.predicted * (trial.predicted_sd or 0.0))
        for trial in trials_of(report)
        if trial.predicted is not None and trial.measured
    ]
    if not found:
        return None
    names, predicted, measured, sds = zip(*found, strict=True)
    reach = [value + sign * sd for value, sd in zip(predicted, sds, strict=True) for sign in (-1, 1)]
    low, high = min(*reach, *measured), max(*reach, *measured)
    pad = 0.06 * (high - low or high)
    ends = (low - pad, high + pad)
    lows, highs = (tuple(factor * end for end in ends) for factor in (0.95, 1.05))
    return Chart(
        title="Predicted before the run, and measured",
        x_label=f"predicted, {_unit(report)}",
        y_label=f"measured, {_unit(report)}",
        marks=(
            Band(xs=ends, lows=lows, highs=highs, label="within 5 %"),
            Line(xs=ends, ys=ends, colour="grey", label="as predicted", width=1.3, is_dashed=True),
            Dots(
                xs=predicted,
                ys=measured,
                x_errors=sds,
                names=names if len(names) <= _MOST_NAMES else (),
                colour="plan",
                label="trial, ± predicted SD",
            ),
        ),
        x_range=ends,
        y_range=ends,
    )


def timeline_chart(report: Report) -> Chart | None:
    """One typical iteration of the best plan, a row per stage of every replica; None when none was instrumented."""
    if (found := report.timeline) is None:
        return None
    row, measurement = found
    run = measurement.iterations[typical_iteration(measurement)]
    spans: dict[bool, list[tuple[float, float, float, str]]] = {True: [], False: []}
    for place, (trace, tasks) in enumerate(zip(run.stages, stage_tasks(measurement), strict=True)):
        for index, start, end in zip(tasks, trace.compute_start_s, trace.compute_end_s, strict=True):
            task = measurement.tasks[index]
            spans[task.step == 0].append((place, start, end, f"m{task.micro_batch}"))
    counts = row.plan.layer_counts
    return Chart(
        title=f"One iteration of {row.plan.describe()}",
        x_label="seconds since the prompts were given",
        marks=(
            Bars(spans=tuple(spans[True]), colour="orange", label="prefill"),
            Bars(spans=tuple(spans[False]), colour="plan", label="decode"),
        ),
        rows=tuple(
            f"{stage_name(row.plan, place)}\n{device}\n{counts[place % len(counts)]} layers"
            for place, device in enumerate(row.plan.devices)
        ),
        x_range=(0.0, 1.005 * run.duration_s),
        size=(10.0, 1.8 + 0.62 * len(row.plan.devices)),
    )


def _unit(report: Report) -> str:
    metric = report.objective.metric
    return report.throughput_title if metric == report.throughput_metric else metric
