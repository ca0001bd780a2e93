"""What a page shows of the best plan: its stages, where time and memory go, and what gained what."""

from collections.abc import Sequence
from dataclasses import replace

from pipetune.bench.metrics import stage_metrics
from pipetune.bench.record import Measurement, OutputCheck
from pipetune.bench.spec import Plan, StagePlan, device_kind
from pipetune.tuner.ranking.runs import unpaired
from pipetune.tuner.ranking.values import Row, Spread
from pipetune.tuner.report import document as doc
from pipetune.tuner.report import wording as w
from pipetune.tuner.report.data import Report, host_us_a_task
from pipetune.tuner.report.lanes import lane_section
from pipetune.tuner.report.ranking import verdict_of

_LATENCIES = (
    ("time to first token", "mean_ttft_ms", "mean, all prompts given at once"),
    ("time per output token", "median_tpot_ms", "median"),
)
_SCORE_LATENCIES = (("time to the scores", "mean_e2el_ms", "mean, all texts given at once"),)
_STAGE_COLUMNS = (
    *(doc.left(name) for name in ("stage", "device", "layers")),
    *map(doc.Column, ("busy", "waits", "host, a task", "utilization")),
)


def best_plan_parts(report: Report, timeline: doc.Figures) -> tuple[doc.Part, ...]:
    """The best plan, or the plan shown for lack of one; the headline alone where nothing was measured."""
    if (row := report.shown) is None:
        return (doc.Section("", _headline(report), is_hero=True),)
    measurement = report.typical(row)
    rival = (w.rival_text(report.ranking) if row.rank == 1 else None) or ""
    before = doc.Text(f"Before the timed iterations, in the run shown: {w.steps_text(measurement)}.", "faint")
    bars = (_memory_bar(row, measurement, place) for place in range(len(row.plan.devices)))
    cap = doc.Text(
        "The whole width is the cap: memory_fraction of what the device has, which counts what the model takes: the "
        "peak without what the process took before any model was loaded. The peak is real, the parts are counted.",
        "faint",
    )
    return (
        _hero(report, row),
        _cards(report, row),
        doc.Section("What gained what", (*_gains(report, row), doc.Text(_gains_text(report, row)), doc.Text(rival))),
        doc.Section(
            "Where the time goes",
            (*_bubble(row), _stage_table(row, measurement), *launch_gaps(row.plan), timeline, before),
        ),
        *lane_section(report.ranking, row, measurement),
        doc.Section("Memory of each stage against its cap", (*bars, cap)),
    )


def _headline(report: Report) -> tuple[doc.Text, doc.Text]:
    """The one number, and the line below it."""
    if (best := report.ranking.best) is None:
        return doc.Text("No best plan", "warning"), doc.Text(verdict_of(report)[0].text, "faint")
    style: doc.Style = "warning" if w.warnings_of(best) else "good"
    if (gain := best.speedup_over_baseline) is None:
        number = w.metric_text(report.objective.metric, best.value)
        return doc.Text(number, style), doc.Text("No baseline was measured beside it, so there is no gain", "faint")
    metric = "" if report.objective.metric == report.throughput_metric else f" in {report.objective.metric}"
    over = f"over the un-pipelined {report.baseline_name} baseline{metric} · {w.ratio_evidence(gain)}"
    return doc.Text(w.ratio_text(gain), style), doc.Text(over, "faint")


def _hero(report: Report, row: Row) -> doc.Section:
    ranking, plan = report.ranking, row.plan
    width = len(plan.stages)
    shares = [(_layers(stage), 100 * stage.num_layers / plan.num_layers) for stage in plan.stages]
    replicas = (plan.devices[first : first + width] for first in range(0, len(plan.devices), width))
    splits = (tuple((device, *share) for device, share in zip(own, shares, strict=True)) for own in replicas)
    check = _check(report.checks(row), scored=report.scores)
    told = (w.sentence(ranking.separation.text), w.sentence(ranking.recommended_because), check)
    return doc.Section(
        "",
        (
            *_headline(report),
            *([] if ranking.best else [doc.Text("Shown instead:")]),
            doc.Text(w.row_text(row), "strong"),
            *map(doc.Split, splits),
            *(doc.Text(warning, "warning") for warning in (w.warnings_of(row) if row.rank == 1 else ())),
            doc.Text(" ".join(filter(None, told))),
        ),
        is_hero=True,
    )


def _layers(stage: StagePlan) -> str:
    return f"layers {stage.range_text}" if stage.num_layers > 1 else f"layer {stage.range_text}"


def launch_gaps(plan: Plan) -> tuple[doc.Text, ...]:
    """What a GPU's busy time holds beside kernels; nothing where no stage is on one."""
    text = (
        "A GPU is busy here from a task's first kernel to its last, also while it waits for the host to launch the "
        "next one: where steps are not captured, a stage that looks busy may be launching."
    )
    return (doc.Text(text, "faint"),) if any(device_kind(name) == "cuda" for name in plan.devices) else ()


def _stage_table(row: Row, measurement: Measurement) -> doc.Table:
    timed, host_us = stage_metrics(measurement), host_us_a_task(measurement)
    rows = []
    for place, device in enumerate(row.plan.devices):
        layers = row.plan.stages[place % len(row.plan.stages)].range_text
        times = (w.ms_text(timed[of][place] if timed else None) for of in ("stage_busy_ms", "comm_ms"))
        host = f"{host_us[place]:.0f} µs" if host_us else w.MISSING
        used = w.percent_text(timed["stage_utilization"][place] if timed else None)
        rows.append((w.stage_name(row.plan, place), device, layers, *times, host, used))
    return doc.Table(columns=_STAGE_COLUMNS, rows=doc.rows_of(rows))


def _memory_bar(row: Row, measurement: Measurement, place: int) -> doc.Bar:
    """The peak against the cap, in parts; what the process took before any model was loaded is left out."""
    bar = doc.Bar(label=w.stage_name(row.plan, place), text=row.plan.devices[place], remark=w.MISSING, segments=())
    if place >= len(measurement.memory):
        return bar
    memory = measurement.memory[place]
    used = memory.peak_bytes - memory.baseline_bytes
    remark = f"{w.bytes_text(used)} of {w.bytes_text(memory.cap_bytes)} ({w.percent_text(used / memory.cap_bytes)})"
    if before := memory.baseline_bytes:
        remark += f"; with {w.bytes_text(before)} from before the model the peak is {w.bytes_text(memory.peak_bytes)}"
    scale = max(memory.cap_bytes, used) / 100
    parts = [
        ("weights", memory.weights_bytes, 1),
        ("KV cache", memory.kv_bytes, 2),
        ("activations", memory.activation_bytes, 3),
    ]
    parts += [("CUDA graphs", memory.graphs_bytes, 5)] if memory.graphs_bytes else []
    rest = used - sum(size for _, size, _ in parts)
    parts += [("other", rest, 4)] if rest > 0 else []
    segments = (doc.Segment(label, w.bytes_text(size), size / scale, colour) for label, size, colour in parts)
    return replace(bar, remark=remark, segments=tuple(segments))


def _cards(report: Report, row: Row) -> doc.Cards:
    own = row.metrics
    latencies = _SCORE_LATENCIES if report.scores else _LATENCIES
    runs = w.count_text(len(row.used_records), "run")
    cards = [
        ("throughput, tok/s", w.spread_text(row.throughput), f"± interquartile range, {runs}"),
        ("bubble ratio", w.percent_text(own.get("bubble_ratio")), "stage time without compute"),
        *((label, w.ms_text(own.get(name)), remark) for label, name, remark in latencies),
        ("peak memory", w.bytes_text(own.get("peak_memory_bytes")), "of the fullest stage, all that its process holds"),
    ]
    if "output_tokens_per_joule" in own:
        energy = w.metric_text("output_tokens_per_joule", own["output_tokens_per_joule"])
        cards.append(("energy", energy, "all GPUs"))
    extras = report.asked_beside(name for _, name, _ in latencies)
    cards += [(w.column_title(name), w.metric_text(name, own.get(name)), "") for name in extras]
    return doc.Cards(tuple(cards))


def _bubble(row: Row) -> tuple[doc.Part, ...]:
    own = row.metrics
    if "bubble_ratio" not in own:
        return (doc.Text("The run was not instrumented, so there is no bubble ratio and no timeline."),)
    parts = (
        ("compute", 1 - own["bubble_ratio"]),
        ("fill and drain", own["bubble_fill_drain"]),
        ("imbalance", own["bubble_imbalance"]),
        ("waiting", own["bubble_wait"]),
    )
    # Medians of parts need not add up to the whole: the bar is drawn to their sum.
    total = sum(max(share, 0.0) for _, share in parts) / 100
    segments = tuple(
        doc.Segment(label, w.percent_text(share), max(share, 0.0) / total, colour)
        for colour, (label, share) in enumerate(parts, start=1)
    )
    return doc.Bar(segments=segments), doc.Facts(tuple(w.definitions("bubble").items()), stacked=True)


def _gains(report: Report, row: Row) -> list[doc.Bar]:
    """From the un-pipelined model over our single stage to the best plan, as far as they were measured together."""
    ranking, metric = report.ranking, report.objective.metric
    single, base = ranking.single_stage, ranking.baseline_beside(row.in_finals)
    steps: list[tuple[str, str, Spread | None, int]] = []
    if base:
        text = w.baseline_text(base, report.config.workload, report.engine)
        steps.append((report.baseline_name, text, base.spread, 4))
    if single and single.key != row.key and single.in_finals == row.in_finals:
        who = report.engine or "our runtime"
        steps.append(("single stage", f"{who} on one device, {single.plan.describe()}", single.spread, 2))
    steps.append(("best plan" if row.rank == 1 else "plan", w.row_text(row), row.spread, 1))
    gains = [unpaired(report.objective, spread, steps[0][2]) for _, _, spread, _ in steps]
    largest = max((gain.value for gain in gains if gain), default=1.0)
    bars = []
    for (label, what, spread, colour), gain in zip(steps, gains, strict=True):
        value = w.metric_text(metric, spread.median if spread else None)
        text = f"{gain.value:.2f}× · {value}" if base and gain else value
        segment = doc.Segment(label, text, 100 * (gain.value if gain else 0.0) / largest, colour)
        bars.append(doc.Bar(label=label, text=text, remark=what, segments=(segment,), has_legend=False))
    return bars


def _gains_text(report: Report, row: Row) -> str:
    single = report.ranking.single_stage
    total, pipelining = row.speedup_over_baseline, row.speedup_over_single_stage
    if report.engine:
        return f"The baseline is {report.engine} on one device: all of the gain is the plan's and its settings'."
    if single is None:
        return "Our single stage was not measured, so the gain of pipelining cannot be told from that of the runtime."
    if len(row.plan.devices) == 1:
        return "All of the gain is the runtime's."
    if pipelining is None:
        return "Our single stage was not in the finals: what it gave during the search stands in the search's table."
    what, give = ("pipelining", "gives") if row.plan.replicas == 1 else (w.copies_text(row.plan), "give")
    runtime = single.speedup_over_baseline
    if total is None or runtime is None:
        return w.sentence(
            f"{what} {give} {w.ratio_text(pipelining)} over our own single stage ({w.ratio_evidence(pipelining)})"
        )
    return (
        f"Of {w.ratio_text(total)} in all, our runtime gives {w.ratio_text(runtime)} without a pipeline, "
        f"and {what} {w.ratio_text(pipelining)} on top ({w.ratio_evidence(pipelining)})."
    )


def _check(checks: Sequence[OutputCheck], *, scored: bool) -> str:
    """What is known of the plan's output; finalist rounds compare tokens alone."""
    parts = []
    if checks and checks[0].compared_logits:
        against = "the unsplit model's" if checks[0].reference == "unsplit" else "those of the first plan"
        parts.append(f"{w.compared_text(checks[0], scored=scored)} of {against}")
    if tokens := [check.tokens_equal for check in checks if check.tokens_equal is not None]:
        ties = max(check.near_ties for check in checks)
        but = f" but for {ties} prompts that part where the two likeliest tokens are too close to call" if ties else ""
        parts.append(f"the tokens are equal{but}" if all(tokens) else "tokens differ, as they may in this dtype")
    return w.sentence("; ".join(parts)) or "The output of this plan was not checked."
