"""`report.html`: one self-contained page, without scripts and without a single request to anywhere."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.metrics import stage_metrics
from bench.record import Measurement, StageMemory
from tuner.report.data import Report
from tuner.report.tables import BASELINE_NAME, RankingTable, build_table
from tuner.report.wording import (
    MISSING,
    bytes_text,
    clean,
    gain_warning,
    metric_text,
    ms_text,
    percent_text,
    ratio_evidence,
    ratio_text,
    row_text,
    sentence,
    spread_text,
)
from tuner.standings import Row

_TEMPLATES = Path(__file__).with_name("templates")


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
    device: str
    layers: str
    share: float
    """Of all layers, in percent."""
    busy: str
    waits: str
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
    warning: str | None
    check: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A remark that runs left, and which runs."""

    text: str
    records: str


def render_html(report: Report, plots: Mapping[str, bytes], dark_plots: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        plots: PNGs by name, for light pages; `dark_plots` the same for dark ones.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    table = build_table(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        table=table,
        headline=_headline(report),
        finding=_finding(report),
        separation=sentence(report.ranking.separation.text),
        sweep=_sweep(report),
        plots={name: (_uri(png), _uri(dark_plots.get(name, png))) for name, png in plots.items()},
        machine=_machine(report),
        notes=_notes(report),
        uses=_uses(report),
        metric_text=metric_text,
    )


def _headline(report: Report) -> tuple[str, str]:
    """The one number, and the line below it."""
    best = report.ranking.best
    if best is None:
        return "No best plan", build_table(report).closing[0]
    gain = best.speedup_over_baseline
    if gain is None:
        return metric_text(
            report.objective.metric, best.value
        ), "No baseline was measured, so there is no gain to report"
    metric = "" if report.objective.metric == "output_throughput" else f" in {report.objective.metric}"
    return ratio_text(gain), f"over the un-pipelined {BASELINE_NAME} baseline{metric} · {ratio_evidence(gain)}"


def _finding(report: Report) -> Finding | None:
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
        warning=gain_warning(row.speedup_over_baseline),
        check=_check(measurement),
    )


def _stages(row: Row, measurement: Measurement) -> tuple[StageView, ...]:
    timed = stage_metrics(measurement)
    views = []
    for index, stage in enumerate(row.plan.stages):
        memory = measurement.memory[index] if index < len(measurement.memory) else None
        used = memory.peak_bytes - memory.baseline_bytes if memory else 0
        views.append(
            StageView(
                name=f"stage {index}",
                device=stage.device,
                layers=f"{stage.first_layer}–{stage.end_layer - 1}",
                share=100 * stage.num_layers / row.plan.num_layers,
                busy=ms_text(timed["stage_busy_ms"][index]) if timed else MISSING,
                waits=ms_text(timed["comm_ms"][index]) if timed else MISSING,
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
    rest = used - sum(size for _, size, _ in parts)
    if rest > 0:
        parts.append(("other", rest, "c4"))
    return tuple(
        Segment(label=label, text=bytes_text(size), percent=size / scale, style=style) for label, size, style in parts
    )


def _numbers(report: Report, row: Row) -> list[tuple[str, str, str]]:
    own = row.metrics
    shown = [
        ("throughput", f"{spread_text(row.throughput)} tok/s", f"{len(row.used_records)} runs, ± interquartile range"),
        ("bubble ratio", percent_text(own.get("bubble_ratio")), "stage time without compute"),
        ("time to first token", ms_text(own.get("mean_ttft_ms")), "mean, all prompts given at once"),
        ("time per output token", ms_text(own.get("median_tpot_ms")), "median"),
        ("peak memory", bytes_text(own.get("peak_memory_bytes")), "of the fullest stage"),
    ]
    if "output_tokens_per_joule" in own:
        shown.append(("energy", metric_text("output_tokens_per_joule", own["output_tokens_per_joule"]), "all GPUs"))
    extra = [goal.metric for goal in report.ranking.objectives] + [limit.metric for limit in report.ranking.constraints]
    known = {"output_throughput", "bubble_ratio", "mean_ttft_ms", "median_tpot_ms", "peak_memory_bytes"}
    for name in dict.fromkeys(extra):
        if name not in known:
            shown.append((name, metric_text(name, own.get(name)), ""))
    return shown


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
    ranking, metric = report.ranking, report.objective.metric
    single = ranking.single_stage
    bars = []
    if ranking.baseline and ranking.baseline.value is not None:
        what = f"HF generate un-pipelined, batch {ranking.baseline.batch_size}"
        bars.append((BASELINE_NAME, what, ranking.baseline.value, "c4"))
    if single and single.value is not None and single.key != row.key:
        bars.append(("single stage", f"our runtime on one device, {single.plan.describe()}", single.value, "c2"))
    if row.value is not None:
        bars.append(("best plan" if row.rank == 1 else "plan", row_text(row), row.value, "c1"))
    largest = max((value for *_, value, _ in bars), default=0.0)
    return [
        GainBar(
            label=label,
            what=what,
            text=metric_text(metric, value),
            percent=100 * value / largest if largest > 0 else 0.0,
            style=style,
        )
        for label, what, value, style in bars
    ]


def _gains_text(report: Report, row: Row) -> str:
    single = report.ranking.single_stage
    total, pipelining = row.speedup_over_baseline, row.speedup_over_single_stage
    if single is None:
        return "Our single stage was not measured, so the gain of pipelining cannot be told from that of the runtime."
    if single.key == row.key:
        return "The best plan is a single stage: here pipelining gains nothing, and all of the gain is the runtime's."
    if pipelining is None:
        return ""
    runtime = single.speedup_over_baseline
    if total is None or runtime is None:
        return f"Pipelining gives {ratio_text(pipelining)} over our own single stage ({ratio_evidence(pipelining)})."
    return (
        f"Of {ratio_text(total)} in all, our runtime gives {ratio_text(runtime)} without a pipeline, "
        f"and pipelining {ratio_text(pipelining)} on top ({ratio_evidence(pipelining)})."
    )


def _check(measurement: Measurement) -> str:
    check = measurement.check
    if check is None:
        return "The output of this plan was not checked."
    against = "the unsplit model's" if check.reference == "unsplit" else "those of the first plan"
    text = f"Logits lie within {check.max_logit_error:.2g} of {against} (allowed: {check.tolerance:.2g})"
    if check.tokens_equal is not None:
        same = "the greedy tokens are equal" if check.tokens_equal else "greedy tokens differ"
        text += f"; {same}"
    if check.near_ties:
        text += f"; {check.near_ties} prompts part where the two likeliest tokens are too close to call"
    return f"{text}."


def _sweep(report: Report) -> list[tuple[bool, tuple[str, ...]]]:
    baseline = report.ranking.baseline
    return [
        (
            baseline is not None and row.batch_size == baseline.batch_size,
            (
                str(row.batch_size),
                str(len(row.used_records)),
                spread_text(row.throughput),
                ms_text(row.metrics.get("mean_ttft_ms")),
                bytes_text(row.metrics.get("peak_memory_bytes")),
            ),
        )
        for row in report.ranking.baseline_sweep
    ]


def _machine(report: Report) -> list[tuple[str, str]]:
    machine = report.machine
    if machine is None:
        return []
    hardware, software = machine.hardware, machine.software
    facts = [("host", machine.hostname), ("hardware id", machine.hardware_id)]
    facts += [("CPU", f"{hardware.cpu_model}, {hardware.cpu_cores} cores, {bytes_text(hardware.memory_bytes)}")]
    facts += [
        (f"GPU {index}", f"{gpu.name}, {bytes_text(gpu.memory_bytes)}, {gpu.uuid}")
        for index, gpu in enumerate(hardware.gpus)
    ]
    if hardware.links:
        facts.append(("links", ", ".join(hardware.links)))
    facts += [("system", software.os), ("Python", software.python), ("pipetune", software.pipetune)]
    optional = (("revision", software.git_revision), ("driver", software.driver), ("CUDA", software.cuda))
    facts += [(label, value) for label, value in (*optional, ("NCCL", software.nccl)) if value]
    facts += sorted(software.packages.items())
    return [(label, clean(value)) for label, value in facts]


def _notes(report: Report) -> list[Note]:
    by_text: dict[str, list[int]] = {}
    for record in report.records:
        if isinstance(record.result, Measurement):
            for text in (*record.result.notes, *record.result.telemetry.disturbances):
                by_text.setdefault(clean(text), []).append(record.number)
    return [Note(text=text, records=_numbers_text(numbers)) for text, numbers in by_text.items()]


def _numbers_text(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:04}" for number in numbers[:8])
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _uses(report: Report) -> list[tuple[str, str]]:
    """What can be done with the best plan, as text and lines to copy."""
    best = report.ranking.best
    if best is None:
        return []
    folder = clean(str(report.folder))
    model = clean(report.config.model.name)
    plan_file = shlex.quote(f"{folder}/best_plan.json")
    uses = [
        ("Measure or serve it again", f"pipetune bench --model {shlex.quote(model)} --plan {plan_file}"),
        (
            "Load the same split with transformers",
            "import json, transformers\n"
            f"device_map = json.load(open({f'{folder}/best_device_map.json'!r}))\n"
            f"transformers.AutoModelForCausalLM.from_pretrained({model!r}, device_map=device_map)",
        ),
    ]
    if len(best.plan.stages) > 1:
        counts = ",".join(str(count) for count in best.plan.layer_counts)
        uses.append(
            (
                "Take the split to vLLM or SGLang (it was not measured on those engines)",
                f"export VLLM_PP_LAYER_PARTITION={counts}\nexport SGLANG_PP_LAYER_PARTITION={counts}",
            )
        )
    uses.append(
        ("Write the exports once more, for other device names", f"pipetune export {shlex.quote(folder)} --help")
    )
    return uses


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


__all__ = ["RankingTable", "render_html"]
