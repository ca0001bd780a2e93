"""How `plan` shows predictions: what they are made from, the best plans, the best one stage by stage; in 80 columns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from pipetune.bench.spec import device_index, device_kind
from pipetune.tuner.commands.plan import Planned, PlannedPlan, PlannedStage
from pipetune.tuner.report.wording import (
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
_LEGEND = """rows: decoded together/prefilled together·tokens of a prompt at a time
memory: of the fullest stage's cap; !: breaks a constraint
limited by: the slowest stage, and how much of the time it is busy
ideal: share of what its devices would give, were each of them always busy"""


def document(planned: Planned) -> dict[str, Any]:
    """For `--json`."""
    config, source = planned.config, planned.source
    return {
        "schema_version": 1,
        "predicted_from": {"kind": source.kind, "text": source.text, "way_out": source.remedy},
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
    if planned.source.remedy is not None:
        console.print(f"{planned.source.remedy}.", markup=False)
    console.print()
    console.print(_facts(planned))
    console.print()
    console.print(_ranking(planned))
    console.print(_LEGEND, markup=False)
    console.print()
    _show_best(planned, console)
    for note in planned.notes:
        console.print(f"note: {note}", markup=False)


def _facts(planned: Planned) -> Table:
    facts = {
        "model": f"{model_text(planned.model)} ({planned.shape.architecture}, {planned.shape.num_layers} layers)",
        "workload": workload_text(planned.config.workload, planned.prompt_lens),
        "devices": _devices_text(planned.device_bytes),
        "looked at": f"{planned.num_candidates} plans of {planned.num_partitions} ranked partitions",
        "ranked by": planned.objective,
    }
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        grid.add_row(name, escape(text))
    return grid


def _devices_text(device_bytes: Mapping[str, int]) -> str:
    """`cuda:0-1 of 80 GiB, cuda:2-3 of 24 GiB`."""
    parts = []
    for (kind, size), group in itertools.groupby(
        device_bytes, key=lambda name: (device_kind(name), device_bytes[name])
    ):
        numbers = [device_index(name) for name in group]
        run = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
        text = f"{kind}:{numbers[0]}-{numbers[-1]}" if run else ", ".join(f"{kind}:{number}" for number in numbers)
        parts.append(f"{text} of {bytes_text(size)}")
    return ", ".join(parts)


def _ranking(planned: Planned) -> Table:
    scored = planned.config.workload.kind == "score"
    table = _table(
        "#",
        "plan",
        "rows",
        "tok/s",
        *(("E2EL",) if scored else ("TTFT", "TPOT")),
        "bubble",
        "memory",
        "limited by",
        "ideal",
    )
    for rank, plan in enumerate(planned.plans, start=1):
        metrics = plan.metrics
        latencies = ("mean_e2el_ms",) if scored else ("mean_ttft_ms", "mean_tpot_ms")
        throughput = metrics["total_token_throughput" if scored else "output_throughput"]
        table.add_row(
            str(rank),
            escape(layers_text(plan.plan)),
            f"{plan.plan.micro_batch_size}/{prefill_text(plan.plan)}",
            number_text(throughput),
            *(ms_text(metrics.get(name)) for name in latencies),
            percent_text(metrics["bubble_ratio"]),
            percent_text(metrics["peak_memory_fraction"]) + ("!" if plan.broken else ""),
            f"{escape(plan.limiting.device)} {percent_text(plan.bottleneck_share)}",
            percent_text(plan.ideal_share),
        )
    return table


def _show_best(planned: Planned, console: Console) -> None:
    best = planned.plans[0]
    took = ms_text(best.prediction.duration_s * 1e3)
    console.print(f"Best: {best.plan.describe()}, {best.effective.in_flight} in flight: {took}", markup=False)
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
        f"{limiting.device} limits: busy for {ms_text(limiting.busy_s * 1e3)}, "
        f"{percent_text(plan.bottleneck_share)} of the time"
    )
    if prediction.limited_by != "compute":
        text += f"; most is lost to {prediction.limited_by}"
    return (
        f"{text}.\nThese stages cannot take less than {ms_text(prediction.bound_s * 1e3)}; "
        f"with their devices always busy it would be {ms_text(prediction.ideal_s * 1e3)}."
    )


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        justify: JustifyMethod = "left" if name in _LEFT else "right"
        table.add_column(name, justify=justify, no_wrap=name != "plan", overflow="fold")
    return table
