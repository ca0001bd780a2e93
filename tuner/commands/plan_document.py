"""What `plan` predicts, for people and for machines: what it is made from, the best plans, the best one by stages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from pipetune.bench.spec import device_index, device_kind
from pipetune.tuner.commands.plan import Planned, PlannedPlan, PlannedStage
from pipetune.tuner.report.document import GAP, Column, Document, Facts, Table, Text, left, rows_of
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

_LEGEND = """rows: decoded together/prefilled together·tokens of a prompt at a time
memory: of the fullest stage's cap; !: breaks a constraint
limited by: the slowest stage, and how much of the time it is busy
ideal: share of what its devices would give, were each of them always busy"""


def json_of(planned: Planned) -> dict[str, Any]:
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


def document_of(planned: Planned) -> Document:
    """For people."""
    best, shape = planned.plans[0], planned.shape
    took = ms_text(best.prediction.duration_s * 1e3)
    remedy = planned.source.remedy
    return Document(
        parts=(
            Text("Predictions: nothing was run.", "strong"),
            Text(f"From {planned.source.text}."),
            *((Text(f"{remedy}."),) if remedy is not None else ()),
            GAP,
            Facts(
                (
                    ("model", f"{model_text(planned.model)} ({shape.architecture}, {shape.num_layers} layers)"),
                    ("workload", workload_text(planned.config.workload, planned.prompt_lens)),
                    ("devices", _devices_text(planned.device_bytes)),
                    ("looked at", f"{planned.num_candidates} plans of {planned.num_partitions} ranked partitions"),
                    ("ranked by", planned.objective),
                )
            ),
            GAP,
            _ranking(planned),
            GAP,
            Text(f"Best: {best.plan.describe()}, {best.effective.in_flight} in flight: {took}"),
            _stages(best),
            Text(_limits_text(best)),
            *((Text(f"It is predicted to break {', '.join(map(str, best.broken))}."),) if best.broken else ()),
            *(Text(f"note: {note}") for note in planned.notes),
        )
    )


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
    latencies = {"E2EL": "mean_e2el_ms"} if scored else {"TTFT": "mean_ttft_ms", "TPOT": "mean_tpot_ms"}
    throughput = "total_token_throughput" if scored else "output_throughput"
    rows = [
        (
            str(rank),
            layers_text(plan.plan),
            f"{plan.plan.micro_batch_size}/{prefill_text(plan.plan)}",
            number_text(plan.metrics[throughput]),
            *(ms_text(plan.metrics.get(name)) for name in latencies.values()),
            percent_text(plan.metrics["bubble_ratio"]),
            percent_text(plan.metrics["peak_memory_fraction"]) + ("!" if plan.broken else ""),
            f"{plan.limiting.device} {percent_text(plan.bottleneck_share)}",
            percent_text(plan.ideal_share),
        )
        for rank, plan in enumerate(planned.plans, start=1)
    ]
    numbers = map(Column, ("rows", "tok/s", *latencies, "bubble", "memory"))
    return Table(
        columns=(Column("#"), left("plan", "prose"), *numbers, left("limited by"), Column("ideal")),
        rows=rows_of(rows),
        legend=_LEGEND,
        gap=1,
    )


def _stages(best: PlannedPlan) -> Table:
    rows = [
        (
            f"{stage.replica}." * (best.plan.replicas > 1) + str(place % len(best.plan.stages)),
            stage.device,
            f"{stage.first_layer}-{stage.end_layer - 1}",
            number_text(stage.busy_s),
            percent_text(stage.idle_share),
            *map(bytes_text, (stage.memory.weights, stage.kv_bytes, stage.memory.activations)),
            percent_text(stage.cap_share),
        )
        for place, stage in enumerate(best.stages)
    ]
    numbers = map(Column, ("busy s", "idle", "weights", "KV", "activations", "of cap"))
    return Table(columns=(Column("stage"), left("device"), left("layers"), *numbers), rows=rows_of(rows), gap=1)


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
