"""What a report says of the best plan: its stages, where time and memory go, and what gained what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipetune.bench.metrics import stage_metrics
from pipetune.bench.record import Measurement, OutputCheck, StageMemory
from pipetune.tuner.ranking.values import Ratio, Row
from pipetune.tuner.report.data import Report, host_us_a_task
from pipetune.tuner.report.tables import BASELINE_NAME
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A piece of a bar."""

    label: str
    text: str
    percent: float
    style: str
    """Its CSS class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageView:
    """One stage of the best plan."""

    name: str
    replica: int
    device: str
    layers: str
    share: float
    """Of all layers, in percent."""
    busy: str
    waits: str
    host: str
    """Host work around a task, neither compute nor waiting."""
    utilization: str
    memory: tuple[Segment, ...]
    memory_text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GainBar:
    """One step from the un-pipelined model to the best plan."""

    label: str
    what: str
    text: str
    percent: float
    style: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The best plan, or the plan shown for lack of one."""

    plan: str
    stages: tuple[StageView, ...]
    numbers: tuple[tuple[str, str, str], ...]
    """Label, number, remark."""
    bubble: tuple[Segment, ...]
    gains: tuple[GainBar, ...]
    gains_text: str
    rival_text: str | None
    """Whether copies of the model or one pipeline won."""
    steps_text: str
    """What getting ready took, which no iteration contains."""
    warnings: tuple[str, ...]
    check: str

    @property
    def replicas(self) -> tuple[tuple[StageView, ...], ...]:
        """The stages, replica by replica."""
        count = 1 + max(stage.replica for stage in self.stages)
        return tuple(tuple(stage for stage in self.stages if stage.replica == number) for number in range(count))


def find(report: Report) -> Finding | None:
    """What to show of the best plan; None when nothing was measured."""
    row = report.shown
    if row is None:
        return None
    measurement = report.typical(row)
    return Finding(
        plan=row_text(row),
        stages=_stages(row, measurement),
        numbers=tuple(_numbers(report, row)),
        bubble=_bubble(row),
        gains=tuple(_gains(report, row)),
        gains_text=_gains_text(report, row),
        rival_text=rival_text(report.ranking) if row.rank == 1 else None,
        steps_text=steps_text(measurement),
        warnings=warnings_of(row) if row.rank == 1 else (),
        check=_check(report.checks(row), scored=report.scores),
    )


def _stages(row: Row, measurement: Measurement) -> tuple[StageView, ...]:
    timed = stage_metrics(measurement)
    host_us = host_us_a_task(measurement)
    views = []
    for index, device in enumerate(row.plan.devices):
        replica, own = divmod(index, len(row.plan.stages))
        stage = row.plan.stages[own]
        memory = measurement.memory[index] if index < len(measurement.memory) else None
        used = memory.peak_bytes - memory.baseline_bytes if memory else 0
        views.append(
            StageView(
                name=stage_name(row.plan, index),
                replica=replica,
                device=device,
                layers=f"{stage.first_layer}–{stage.end_layer - 1}",
                share=100 * stage.num_layers / row.plan.num_layers,
                busy=ms_text(timed["stage_busy_ms"][index]) if timed else MISSING,
                waits=ms_text(timed["comm_ms"][index]) if timed else MISSING,
                host=f"{host_us[index]:.0f} µs" if host_us else MISSING,
                utilization=percent_text(timed["stage_utilization"][index]) if timed else MISSING,
                memory=_memory(memory) if memory else (),
                memory_text=(
                    f"{bytes_text(used)} of {bytes_text(memory.cap_bytes)} ({percent_text(used / memory.cap_bytes)})"
                    if memory
                    else MISSING
                ),
            )
        )
    return tuple(views)


def _memory(memory: StageMemory) -> tuple[Segment, ...]:
    """The peak against the cap, in parts; what the process took before any model was loaded is left out."""
    used = max(memory.peak_bytes - memory.baseline_bytes, 0)
    scale = max(memory.cap_bytes, used) / 100
    parts = [
        ("weights", memory.weights_bytes, "c1"),
        ("KV cache", memory.kv_bytes, "c2"),
        ("activations", memory.activation_bytes, "c3"),
    ]
    if memory.graphs_bytes:
        parts.append(("CUDA graphs", memory.graphs_bytes, "c5"))
    rest = used - sum(size for _, size, _ in parts)
    if rest > 0:
        parts.append(("other", rest, "c4"))
    return tuple(
        Segment(label=label, text=bytes_text(size), percent=size / scale, style=style) for label, size, style in parts
    )


def _numbers(report: Report, row: Row) -> list[tuple[str, str, str]]:
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
    return shown


def _runs_text(row: Row) -> str:
    return "1 run" if len(row.used_records) == 1 else f"{len(row.used_records)} runs"


def _bubble(row: Row) -> tuple[Segment, ...]:
    own = row.metrics
    if "bubble_ratio" not in own:
        return ()
    parts = (
        ("compute", 1 - own["bubble_ratio"], "c1"),
        ("fill and drain", own["bubble_fill_drain"], "c2"),
        ("imbalance", own["bubble_imbalance"], "c3"),
        ("waiting", own["bubble_wait"], "c4"),
    )
    # Medians of parts need not add up to the whole: the bar is drawn to their sum.
    total = sum(max(share, 0.0) for _, share, _ in parts) / 100
    return tuple(
        Segment(label=label, text=percent_text(share), percent=max(share, 0.0) / total, style=style)
        for label, share, style in parts
    )


def _gains(report: Report, row: Row) -> list[GainBar]:
    """From the un-pipelined model over our single stage to the best plan, by gains where all have one."""
    ranking, metric = report.ranking, report.objective.metric
    single, base = ranking.single_stage, ranking.baseline
    steps: list[tuple[str, str, float | None, Ratio | None, str]] = []
    if base:
        what = f"HF {peer_name(report.config.workload)} un-pipelined, batch {base.batch_size}"
        steps.append((BASELINE_NAME, what, base.value, Ratio(value=1.0, rounds=1), "c4"))
    if single and single.key != row.key:
        what = f"our runtime on one device, {single.plan.describe()}"
        steps.append(("single stage", what, single.value, single.speedup_over_baseline, "c2"))
    label = "best plan" if row.rank == 1 else "plan"
    steps.append((label, row_text(row), row.value, row.speedup_over_baseline, "c1"))
    relative = all(gain is not None for *_, gain, _ in steps)
    lengths = [gain.value if relative and gain else value or 0.0 for _, _, value, gain, _ in steps]
    largest = max(lengths)
    return [
        GainBar(
            label=label,
            what=what,
            text=f"{ratio_text(gain)} · {metric_text(metric, value)}" if relative else metric_text(metric, value),
            percent=100 * length / largest if largest > 0 else 0.0,
            style=style,
        )
        for (label, what, value, gain, style), length in zip(steps, lengths, strict=True)
    ]


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
