"""How `plan` shows predictions: what they are made from, the best plans, the best one stage by stage; in 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tuner.planned import Planned, PlannedPlan, PlannedStage
from tuner.report.wording import (
    bytes_text,
    layers_text,
    model_text,
    ms_text,
    number_text,
    percent_text,
    prefill_text,
    workload_text,
)

_LEFT = frozenset({"plan", "device", "layers", "limited by"})


def document(planned: Planned) -> dict[str, Any]:
    """For `--json`."""
    config, source = planned.config, planned.source
    return {
        "schema_version": 1,
        "predicted_from": {"kind": source.kind, "text": source.text, "way_out": source.way_out},
        "model": planned.model.model_dump(mode="json"),
        "architecture": planned.shape.architecture,
        "layers": planned.shape.num_layers,
        "workload": config.workload.model_dump(mode="json"),
        "device_bytes": planned.device_bytes,
        "objective": planned.objective,
        "constraints": [str(constraint) for constraint in config.constraints],
        "space": {
            "partitions": planned.num_partitions,
            "points": planned.num_points,
            "predicted": planned.num_candidates,
        },
        "notes": list(planned.notes),
        "plans": [_plan_document(rank, plan) for rank, plan in enumerate(planned.plans, start=1)],
    }


def _plan_document(rank: int, plan: PlannedPlan) -> dict[str, Any]:
    prediction = plan.prediction
    return {
        "rank": rank,
        "plan": plan.plan.model_dump(mode="json"),
        "in_flight": plan.effective.in_flight,
        "metrics": plan.metrics,
        "duration_s": prediction.duration_s,
        "bound_s": prediction.bound_s,
        "ideal_s": prediction.ideal_s,
        "limiting_stage": prediction.limiting_stage,
        "broken_constraints": [str(constraint) for constraint in plan.broken],
        "stages": [_stage_document(stage) for stage in plan.stages],
    }


def _stage_document(stage: PlannedStage) -> dict[str, Any]:
    return {
        "replica": stage.replica,
        "device": stage.device,
        "first_layer": stage.first_layer,
        "end_layer": stage.end_layer,
        "busy_s": stage.busy_s,
        "idle_share": stage.idle_share,
        "weights_bytes": stage.memory.weights,
        "kv_bytes": stage.kv_bytes,
        "activation_bytes": stage.memory.activations,
        "total_bytes": stage.total_bytes,
        "cap_bytes": stage.cap_bytes,
    }


def show(planned: Planned, console: Console) -> None:
    """For people."""
    console.print("Predictions: nothing was run.", style="bold")
    console.print(f"From {planned.source.text}.", markup=False)
    if planned.source.way_out is not None:
        console.print(f"{planned.source.way_out}.", markup=False)
    console.print()
    console.print(_facts(planned))
    console.print()
    console.print(_ranking(planned))
    console.print(
        "micro-batch: rows decoded / prefilled · chunk; memory: of the fullest stage's cap;\n"
        "limited by: the slowest stage and how much of the time it is busy;\n"
        "of ideal: of what all devices would give, were each of them busy all the time",
        markup=False,
    )
    console.print()
    _show_best(planned, console)
    for note in planned.notes:
        console.print(f"note: {note}", markup=False)


def _facts(planned: Planned) -> Table:
    sizes = dict.fromkeys(planned.device_bytes.values())
    memory = ", ".join(bytes_text(size) for size in sizes)
    facts = {
        "model": f"{model_text(planned.model)} ({planned.shape.architecture}, {planned.shape.num_layers} layers)",
        "workload": workload_text(planned.config.workload, planned.prompt_lens),
        "devices": f"{', '.join(planned.device_bytes)} with {memory}" + (" each" if len(sizes) == 1 else ""),
        "looked at": f"{planned.num_candidates} plans of {planned.num_partitions} ranked partitions",
        "ranked by": planned.objective,
    }
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        grid.add_row(name, escape(text))
    return grid


def _ranking(planned: Planned) -> Table:
    scored = planned.config.workload.kind == "score"
    table = _table(
        "#",
        "plan",
        "micro-batch",
        "tok/s",
        *(("E2EL",) if scored else ("TTFT", "TPOT")),
        "bubble",
        "memory",
        "limited by",
        "of ideal",
    )
    for rank, plan in enumerate(planned.plans, start=1):
        metrics = plan.metrics
        latencies = ("mean_e2el_ms",) if scored else ("mean_ttft_ms", "mean_tpot_ms")
        throughput = metrics["total_token_throughput" if scored else "output_throughput"]
        table.add_row(
            str(rank),
            escape(_plan_text(plan)),
            f"{plan.plan.micro_batch_size}/{prefill_text(plan.plan)}",
            number_text(throughput),
            *(ms_text(metrics.get(name)) for name in latencies),
            percent_text(metrics["bubble_ratio"]),
            percent_text(metrics["peak_memory_fraction"]) + ("!" if plan.broken else ""),
            f"{escape(plan.limiting.device)} {percent_text(plan.bottleneck_share)}",
            percent_text(plan.ideal_share),
        )
    return table


def _plan_text(plan: PlannedPlan) -> str:
    """Layers of each stage; and where that is not plain, on which devices."""
    text = layers_text(plan.plan)
    devices = plan.plan.devices
    return text if list(devices) == sorted(devices) else f"{text} on {','.join(devices)}"


def _show_best(planned: Planned, console: Console) -> None:
    best = planned.plans[0]
    console.print(
        f"Best: {best.plan.describe()}, {best.effective.in_flight} in flight: {ms_text(best.prediction.duration_s * 1e3)}",
        markup=False,
    )
    table = _table("stage", "device", "layers", "busy s", "idle", "weights", "KV", "activations", "of cap")
    for place, stage in enumerate(best.stages):
        replica = f"{stage.replica}." if best.plan.replicas > 1 else ""
        table.add_row(
            f"{replica}{place % len(best.plan.stages)}",
            escape(stage.device),
            f"{stage.first_layer}-{stage.end_layer - 1}",
            number_text(stage.busy_s),
            percent_text(stage.idle_share),
            bytes_text(stage.memory.weights),
            bytes_text(stage.kv_bytes),
            bytes_text(stage.memory.activations),
            percent_text(stage.cap_share),
        )
    console.print(table)
    console.print(_limits_text(best), markup=False)
    if best.broken:
        console.print(f"It is predicted to break {', '.join(map(str, best.broken))}.", markup=False)


def _limits_text(plan: PlannedPlan) -> str:
    """Which stage limits, and how far the plan is from both bounds."""
    prediction, limiting = plan.prediction, plan.limiting
    text = (
        f"{limiting.device} limits: it is busy for {ms_text(limiting.busy_s * 1e3)}, "
        f"{percent_text(plan.bottleneck_share)} of the time"
    )
    return (
        f"{text}.\nWith no wait at all this split would take {ms_text(prediction.bound_s * 1e3)}, and "
        f"{ms_text(prediction.ideal_s * 1e3)} with all devices\nbusy all the time."
    )


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(
            name,
            justify="left" if name in _LEFT else "right",
            no_wrap=name not in ("plan", "micro-batch", "limited by", "of ideal"),
            overflow="fold",
        )
    return table
