"""What a page shows of the best plan: its stages, where time and memory go, and what gained what."""

from __future__ import annotations

from collections.abc import Sequence

from pipetune.bench.metrics import stage_metrics
from pipetune.bench.record import Measurement, OutputCheck, StageMemory
from pipetune.bench.spec import StagePlan
from pipetune.tuner.ranking.values import Ratio, Row
from pipetune.tuner.report import document as doc
from pipetune.tuner.report.data import Report, host_us_a_task
from pipetune.tuner.report.ranking import BASELINE_NAME, closing_of
from pipetune.tuner.report.wording import (
    MISSING,
    bytes_text,
    column_title,
    compared_text,
    copies_text,
    metric_text,
    ms_text,
    peer_name,
    percent_text,
    ratio_evidence,
    ratio_text,
    rival_text,
    row_text,
    sentence,
    spread_text,
    stage_name,
    steps_text,
    warnings_of,
)

_LATENCIES = (
    ("time to first token", "mean_ttft_ms", "mean, all prompts given at once"),
    ("time per output token", "median_tpot_ms", "median"),
)
_SCORE_LATENCIES = (("time to the scores", "mean_e2el_ms", "mean, all texts given at once"),)
_BUBBLE_PARTS = (
    (
        "Fill and drain",
        "Stages wait for the first task to reach them and idle after their last. Smaller prefill pieces shorten both.",
    ),
    (
        "Imbalance",
        "Stages with less work than the slowest one idle while it computes. Moving layers away from it helps.",
    ),
    (
        "Waiting",
        "The rest: a token that is not back yet, communication, the host. More micro-batches in flight or a faster "
        "link help.",
    ),
)
_STAGE_COLUMNS = (
    *(doc.left(name) for name in ("stage", "device", "layers")),
    *map(doc.Column, ("busy", "waits", "host, a task", "utilization")),
)


def best_plan_parts(report: Report, timeline: doc.Figures) -> tuple[doc.Part, ...]:
    """The best plan, or the plan shown for lack of one; the headline alone where nothing was measured."""
    row = report.shown
    if row is None:
        return (doc.Section("", _headline(report), is_hero=True),)
    measurement = report.typical(row)
    rival = (rival_text(report.ranking) if row.rank == 1 else None) or ""
    return (
        _hero(report, row),
        _cards(report, row),
        doc.Section(
            "What gained what",
            (*_gains(report, row), doc.Text(_gains_text(report, row)), doc.Text(rival)),
        ),
        doc.Section(
            "Where the time goes",
            (
                *_bubble(row),
                _stage_table(row, measurement),
                timeline,
                doc.Text(f"Before the timed iterations, in the run shown: {steps_text(measurement)}.", "faint"),
            ),
        ),
        doc.Section(
            "Memory of each stage against its cap",
            (
                *(_memory_bar(row, measurement, place) for place in range(len(row.plan.devices))),
                doc.Text(
                    "The whole width is the cap: memory_fraction of what the device has. The peak is real, the parts "
                    "are counted; what the process took before any model was loaded is left out.",
                    "faint",
                ),
            ),
        ),
    )


def _headline(report: Report) -> tuple[doc.Text, doc.Text]:
    """The one number, and the line below it."""
    best = report.ranking.best
    if best is None:
        return doc.Text("No best plan", "warning"), doc.Text(closing_of(report)[0], "faint")
    style: doc.Style = "warning" if warnings_of(best) else "good"
    gain = best.speedup_over_baseline
    if gain is None:
        number = metric_text(report.objective.metric, best.value)
        return doc.Text(number, style), doc.Text("No baseline was measured, so there is no gain to report", "faint")
    metric = "" if report.objective.metric == report.throughput_metric else f" in {report.objective.metric}"
    over = f"over the un-pipelined {BASELINE_NAME} baseline{metric} · {ratio_evidence(gain)}"
    return doc.Text(ratio_text(gain), style), doc.Text(over, "faint")


def _hero(report: Report, row: Row) -> doc.Section:
    ranking, plan = report.ranking, row.plan
    shares = tuple(
        (stage.device, f"layers {_layers(stage)}", 100 * stage.num_layers / plan.num_layers) for stage in plan.stages
    )
    width = len(shares)
    splits = [
        tuple((device, layers, share) for device, (_, layers, share) in zip(devices, shares, strict=True))
        for first in range(0, len(plan.devices), width)
        if (devices := plan.devices[first : first + width])
    ]
    check = _check(report.checks(row), scored=report.scores)
    because = sentence(ranking.recommended_because) if ranking.recommended_because else ""
    told = (sentence(ranking.separation.text), because, check)
    return doc.Section(
        "",
        (
            *_headline(report),
            *([] if ranking.best else [doc.Text("Shown instead:")]),
            doc.Text(row_text(row), "strong"),
            *map(doc.Split, splits),
            *(doc.Text(warning, "warning") for warning in (warnings_of(row) if row.rank == 1 else ())),
            doc.Text(" ".join(text for text in told if text)),
        ),
        is_hero=True,
    )


def _layers(stage: StagePlan) -> str:
    return f"{stage.first_layer}–{stage.end_layer - 1}"


def _stage_table(row: Row, measurement: Measurement) -> doc.Table:
    timed, host_us = stage_metrics(measurement), host_us_a_task(measurement)

    def line(place: int, device: str) -> tuple[str, ...]:
        return (
            stage_name(row.plan, place),
            device,
            _layers(row.plan.stages[place % len(row.plan.stages)]),
            ms_text(timed["stage_busy_ms"][place] if timed else None),
            ms_text(timed["comm_ms"][place] if timed else None),
            f"{host_us[place]:.0f} µs" if host_us else MISSING,
            percent_text(timed["stage_utilization"][place] if timed else None),
        )

    return doc.Table(columns=_STAGE_COLUMNS, rows=doc.rows_of(line(*pair) for pair in enumerate(row.plan.devices)))


def _memory_bar(row: Row, measurement: Measurement, place: int) -> doc.Bar:
    name, device = stage_name(row.plan, place), row.plan.devices[place]
    if place >= len(measurement.memory):
        return doc.Bar(label=name, text=device, remark=MISSING, segments=())
    memory = measurement.memory[place]
    used = memory.peak_bytes - memory.baseline_bytes
    share = percent_text(used / memory.cap_bytes)
    return doc.Bar(
        label=name,
        text=device,
        remark=f"{bytes_text(used)} of {bytes_text(memory.cap_bytes)} ({share})",
        segments=_memory(memory),
    )


def _memory(memory: StageMemory) -> tuple[doc.Segment, ...]:
    """The peak against the cap, in parts; what the process took before any model was loaded is left out."""
    used = max(memory.peak_bytes - memory.baseline_bytes, 0)
    scale = max(memory.cap_bytes, used) / 100
    parts = [
        ("weights", memory.weights_bytes, 1),
        ("KV cache", memory.kv_bytes, 2),
        ("activations", memory.activation_bytes, 3),
    ]
    if memory.graphs_bytes:
        parts.append(("CUDA graphs", memory.graphs_bytes, 5))
    rest = used - sum(size for _, size, _ in parts)
    if rest > 0:
        parts.append(("other", rest, 4))
    return tuple(
        doc.Segment(label=label, text=bytes_text(size), percent=size / scale, colour=colour)
        for label, size, colour in parts
    )


def _cards(report: Report, row: Row) -> doc.Cards:
    own = row.metrics
    latencies = _SCORE_LATENCIES if report.scores else _LATENCIES
    shown = [
        ("throughput, tok/s", spread_text(row.throughput), f"± interquartile range, {_runs_text(row)}"),
        ("bubble ratio", percent_text(own.get("bubble_ratio")), "stage time without compute"),
        *((label, ms_text(own.get(name)), remark) for label, name, remark in latencies),
        ("peak memory", bytes_text(own.get("peak_memory_bytes")), "of the fullest stage"),
    ]
    if "output_tokens_per_joule" in own:
        shown.append(("energy", metric_text("output_tokens_per_joule", own["output_tokens_per_joule"]), "all GPUs"))
    extra = [goal.metric for goal in report.ranking.objectives] + [limit.metric for limit in report.ranking.constraints]
    known = {report.throughput_metric, "bubble_ratio", "peak_memory_bytes", *(name for _, name, _ in latencies)}
    for name in dict.fromkeys(extra):
        if name not in known:
            shown.append((column_title(name), metric_text(name, own.get(name)), ""))
    return doc.Cards(tuple(doc.Card(label=label, number=number, remark=remark) for label, number, remark in shown))


def _runs_text(row: Row) -> str:
    return "1 run" if len(row.used_records) == 1 else f"{len(row.used_records)} runs"


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
        doc.Segment(label=label, text=percent_text(share), percent=max(share, 0.0) / total, colour=colour)
        for colour, (label, share) in enumerate(parts, start=1)
    )
    return doc.Bar(segments=segments), doc.Facts(_BUBBLE_PARTS, stacked=True)


def _gains(report: Report, row: Row) -> list[doc.Bar]:
    """From the un-pipelined model over our single stage to the best plan, by gains where all have one."""
    ranking, metric = report.ranking, report.objective.metric
    single, base = ranking.single_stage, ranking.baseline
    steps: list[tuple[str, str, float | None, Ratio | None, int]] = []
    if base:
        what = f"HF {peer_name(report.config.workload)} un-pipelined, batch {base.batch_size}"
        steps.append((BASELINE_NAME, what, base.value, Ratio(value=1.0, rounds=1), 4))
    if single and single.key != row.key:
        what = f"our runtime on one device, {single.plan.describe()}"
        steps.append(("single stage", what, single.value, single.speedup_over_baseline, 2))
    label = "best plan" if row.rank == 1 else "plan"
    steps.append((label, row_text(row), row.value, row.speedup_over_baseline, 1))
    relative = all(gain is not None for *_, gain, _ in steps)
    lengths = [gain.value if relative and gain else value or 0.0 for _, _, value, gain, _ in steps]
    largest = max(lengths)
    bars = []
    for (label, what, value, gain, colour), length in zip(steps, lengths, strict=True):
        text = f"{ratio_text(gain)} · {metric_text(metric, value)}" if relative else metric_text(metric, value)
        percent = 100 * length / largest if largest > 0 else 0.0
        segment = doc.Segment(label=label, text=text, percent=percent, colour=colour)
        bars.append(doc.Bar(label=label, text=text, remark=what, segments=(segment,), has_legend=False))
    return bars


def _gains_text(report: Report, row: Row) -> str:
    single = report.ranking.single_stage
    total, pipelining = row.speedup_over_baseline, row.speedup_over_single_stage
    if single is None:
        return "Our single stage was not measured, so the gain of pipelining cannot be told from that of the runtime."
    if len(row.plan.devices) == 1:
        return "All of the gain is the runtime's."
    what = "pipelining" if row.plan.replicas == 1 else copies_text(row.plan)
    give = "gives" if row.plan.replicas == 1 else "give"
    if pipelining is None:
        return ""
    runtime = single.speedup_over_baseline
    if total is None or runtime is None:
        return sentence(
            f"{what} {give} {ratio_text(pipelining)} over our own single stage ({ratio_evidence(pipelining)})"
        )
    return (
        f"Of {ratio_text(total)} in all, our runtime gives {ratio_text(runtime)} without a pipeline, "
        f"and {what} {ratio_text(pipelining)} on top ({ratio_evidence(pipelining)})."
    )


def _check(checks: Sequence[OutputCheck], *, scored: bool) -> str:
    """What is known of the plan's output; finalist rounds compare tokens alone."""
    if not checks:
        return "The output of this plan was not checked."
    check = checks[0]
    against = "the unsplit model's" if check.reference == "unsplit" else "those of the first plan"
    parts = []
    if check.compared_logits:
        parts.append(f"{compared_text(check, scored=scored)} of {against}")
    tokens = [other.tokens_equal for other in checks if other.tokens_equal is not None]
    ties = max(other.near_ties for other in checks)
    but = f" but for {ties} prompts that part where the two likeliest tokens are too close to call" if ties else ""
    if tokens:
        equal = f"the tokens are equal{but}"
        parts.append(equal if all(tokens) else "tokens differ, as they may in this dtype")
    return sentence("; ".join(parts)) if parts else "The output of this plan was not checked."
