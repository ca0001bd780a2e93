"""What `plan` predicts, for people and for machines: what it is made from, the best plans, the best one by stages."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipetune.bench.spec import device_index, device_kind
from pipetune.tuner.commands.plan import Planned, PlannedPlan
from pipetune.tuner.planning.model_fit import ranges_text
from pipetune.tuner.report import wording as w
from pipetune.tuner.report.document import GAP, Column, Document, Facts, Table, Text, left, rows_of

_ROWS = "rows: decoded together/prefilled together·tokens of a prompt at a time"
_LIMITS = "budget: tokens of a batch; seqs: sequences at once; KV: of each worker; –: left to the engine"
_LEGEND = (
    "memory: of the fullest stage's cap; !: breaks a constraint; limited by: the slowest stage, and how much of the "
    "time it is busy; ideal: share of what its devices would give, were each of them always busy"
)
_LOAD_LEGEND = (
    "good: share of requests that keep the limits of --goodput; max rate: requests a second up to which as many do as "
    "--slo-attainment says; bubble: of the time in which there are requests"
)


def json_of(planned: Planned) -> dict[str, Any]:
    """For `--json`."""
    config, known, source = planned.config, planned.known, planned.source
    return {
        "schema_version": 1,
        "predicted_from": {"kind": source.kind, "text": source.text, "way_out": source.remedy},
        "model": known.model.model_dump(mode="json"),
        "architecture": known.shape.architecture,
        "layers": known.shape.num_layers,
        "workload": config.workload.model_dump(mode="json"),
        "device_bytes": known.device_bytes,
        "objective": planned.objective,
        "constraints": [str(constraint) for constraint in config.constraints],
        "space": planned.space,
        "notes": planned.notes,
        "plans": [_plan_json(rank, plan) for rank, plan in enumerate(planned.plans, start=1)],
    }


def _plan_json(rank: int, plan: PlannedPlan) -> dict[str, Any]:
    prediction = plan.prediction
    return {
        "rank": rank,
        **plan.effective.model_dump(mode="json"),
        "metrics": plan.metrics,
        "duration_s": prediction.duration_s,
        "bound_s": prediction.bound_s,
        "ideal_s": prediction.ideal_s,
        "limiting_stage": prediction.limiting_stage,
        "broken_constraints": [str(constraint) for constraint in plan.broken],
        "stages": [asdict(stage) for stage in plan.stages],
    }


def document_of(planned: Planned) -> Document:
    """For people."""
    best, known = planned.plans[0], planned.known
    took = w.ms_text((best.load or best.prediction).duration_s * 1e3)
    remedy = planned.source.remedy
    facts = {
        "model": f"{w.model_text(known.model)} ({known.shape.architecture}, {known.shape.num_layers} layers)",
        "workload": w.workload_text(planned.config.workload, known.prompt_lens),
        "devices": _devices_text(known.device_bytes),
        "looked at": "{predicted} plans of {partitions} ranked partitions".format_map(planned.space),
        "ranked by": planned.objective,
    }
    return Document(
        parts=(
            Text("Predictions: nothing was run.", "strong"),
            Text(f"From {planned.source.text}."),
            *((Text(f"{remedy}."),) if remedy is not None else ()),
            GAP,
            Facts(tuple(facts.items())),
            GAP,
            _ranking(planned) if best.load is None else _loads(planned),
            GAP,
            Text(f"Best: {best.plan.describe()}, {best.effective.in_flight} in flight: {took}"),
            _stages(best),
            *((Text(_limits_text(best)),) if best.load is None else ()),
            *((Text(f"It is predicted to break {', '.join(map(str, best.broken))}."),) if best.broken else ()),
            *(Text(f"note: {note}") for note in planned.notes),
        )
    )


def _devices_text(device_bytes: Mapping[str, int]) -> str:
    """`cuda:0-1 of 80 GiB, cuda:2-3 of 24 GiB`."""
    groups = itertools.groupby(device_bytes, key=lambda name: (device_kind(name), device_bytes[name]))
    return ", ".join(f"{fleet_text(tuple(names))} of {w.bytes_text(size)}" for (_, size), names in groups)


def fleet_text(devices: Sequence[str]) -> str:
    """`cuda:0-1`; runs of numbers alone are ranges."""
    groups = itertools.groupby(devices, key=device_kind)
    return ", ".join(f"{kind}:{ranges_text([device_index(name) for name in names])}" for kind, names in groups)


def _ranking(planned: Planned) -> Table:
    scored = planned.config.workload.kind == "score"
    latencies = {"E2EL": "mean_e2el_ms"} if scored else {"TTFT": "mean_ttft_ms", "TPOT": "mean_tpot_ms"}
    throughput = "total_token_throughput" if scored else "output_throughput"
    engine = planned.config.engine
    has_kv = engine is not None and len(engine.kv_cache_memory_bytes or ()) > 1
    rows = []
    for rank, plan in enumerate(planned.plans, start=1):
        sizes, speed = "/".join(w.sizes_text(plan.effective)[: 2 + has_kv]), w.number_text(plan.metrics[throughput])
        times = (w.ms_text(plan.metrics.get(name)) for name in latencies.values())
        bubble, memory = (w.percent_text(plan.metrics[name]) for name in ("bubble_ratio", "peak_memory_fraction"))
        limit = f"{plan.limiting.device} {w.percent_text(plan.bottleneck_share)}"
        ideal = w.percent_text(plan.prediction.ideal_s / plan.prediction.duration_s)
        cells = (str(rank), w.layers_text(plan.plan), sizes, speed, *times, bubble, memory + "!" * bool(plan.broken))
        rows.append((*cells, limit, ideal))
    limits = "budget/seqs/KV" if has_kv else "budget/seqs"
    head, legend = ("rows", _ROWS) if engine is None else (limits, _LIMITS)
    numbers = map(Column, (head, "tok/s", *latencies, "bubble", "memory"))
    return Table(
        columns=(Column("#"), left("plan", "prose"), *numbers, left("limited by"), Column("ideal")),
        rows=rows_of(rows),
        legend=f"{legend}; {_LEGEND}",
        gap=1,
    )


def _loads(planned: Planned) -> Table:
    """Plans where requests come over time."""
    columns = {"TTFT p90": "p90_ttft_ms", "TPOT p90": "p90_tpot_ms", "E2EL p90": "p90_e2el_ms"}
    rows = []
    for rank, plan in enumerate(planned.plans, start=1):
        *sizes, slots = w.sizes_text(plan.effective)
        times = (w.ms_text(plan.metrics.get(name)) for name in columns.values())
        good, rate = w.percent_text(plan.metrics.get("slo_attainment")), plan.metrics.get("max_request_rate")
        cells = (str(rank), w.layers_text(plan.plan), "/".join(sizes), slots)
        rows.append((*cells, *times, good, w.number_text(rate), w.percent_text(plan.metrics["bubble_ratio"])))
    heads, legend = ("rows", "slots"), f"{_ROWS}, in each of the slots; {_LOAD_LEGEND}"
    if planned.config.engine is not None:
        heads, legend = ("budget/seqs", "KV"), f"{_LIMITS}; {_LOAD_LEGEND}"
    numbers = map(Column, (*heads, *columns, "good", "max rate", "bubble"))
    return Table(columns=(Column("#"), left("plan", "prose"), *numbers), rows=rows_of(rows), legend=legend, gap=1)


def _stages(best: PlannedPlan) -> Table:
    rows = []
    for place, stage in enumerate(best.stages):
        name = f"{stage.replica}." * (best.plan.replicas > 1) + str(place % len(best.plan.stages))
        layers = ranges_text(range(stage.first_layer, stage.end_layer))
        busy, idle = w.number_text(stage.busy_s), w.percent_text(stage.idle_share)
        sizes = map(w.bytes_text, (stage.weights_bytes, stage.kv_bytes, stage.activation_bytes))
        rows.append((name, stage.device, layers, busy, idle, *sizes, w.percent_text(stage.cap_share)))
    numbers = map(Column, ("busy s", "idle", "weights", "KV", "activations", "of cap"))
    return Table(columns=(Column("stage"), left("device"), left("layers"), *numbers), rows=rows_of(rows), gap=1)


def _limits_text(plan: PlannedPlan) -> str:
    """Which stage limits, and how far the plan is from both bounds."""
    prediction, limiting = plan.prediction, plan.limiting
    text = (
        f"{limiting.device} limits: busy for {w.ms_text(limiting.busy_s * 1e3)}, "
        f"{w.percent_text(plan.bottleneck_share)} of the time"
    )
    if prediction.limited_by != "compute":
        text += f"; most is lost to {prediction.limited_by}"
    return (
        f"{text}.\nThese stages cannot take less than {w.ms_text(prediction.bound_s * 1e3)}; "
        f"with their devices always busy it would be {w.ms_text(prediction.ideal_s * 1e3)}."
    )
