"""`ranking.csv`: every plan, baseline and failure in full precision, a line each, safe to open in a spreadsheet."""

from __future__ import annotations

from pipetune.bench.metrics import metric_names
from pipetune.bench.spec import Plan
from pipetune.tuner.ranking.values import BaselineRow, FailureRow, Ratio, Row, Spread
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.render.csv import Cell
from pipetune.tuner.report.search import Trial, trials_of

_HEAD = (
    "entry", "rank", "confirmed", "on_front", "recommended", "feasible", "layers", "replicas", "devices",
    "memory_fractions", "micro_batch_size", "prefill_micro_batch_size", "prefill_chunk_size", "in_flight", "compile",
    "cuda_graphs", "packed_weights", "objective", "value", "q1", "q3", "samples", "runs", "speedup_over_baseline",
    "speedup_over_baseline_low", "speedup_over_baseline_high", "speedup_over_baseline_rounds",
    "speedup_over_single_stage", "speedup_over_single_stage_low", "speedup_over_single_stage_high",
    "speedup_over_single_stage_rounds", "predicted", "predicted_sd", "prediction_error",
)  # fmt: skip
_TAIL = (
    "disturbed_runs", "failed_runs", "records", "broken_constraints", "unranked_because", "notes", "failure_kind",
    "failure_stage", "failure_device", "failure_phase", "failure_message",
)  # fmt: skip


def columns_of(report: Report) -> tuple[str, ...]:
    """The names of the columns, which `results/README.md` defines."""
    workload = report.config.workload
    metrics = dict.fromkeys(metric_names(workload.num_prompts, workload.generated_len, gpu=True))
    return (*_HEAD, *metrics, *_TAIL)


def entries_of(report: Report) -> list[dict[str, Cell]]:
    """A row for every plan, baseline and failure."""
    ranking, objective = report.ranking, report.objective.metric
    predicted: dict[str, Trial] = {}
    for trial in trials_of(report):
        if trial.predicted is not None and trial.record.effective is not None:
            predicted.setdefault(trial.record.effective.key, trial)
    entries = [
        _plan_entry(row) | _prediction_cells(predicted.get(row.key)) for row in (*ranking.rows, *ranking.unranked)
    ]
    entries += [_baseline_entry(row, confirmed=False) for row in ranking.baseline_sweep]
    if ranking.baseline and ranking.baseline.confirmed:
        entries.append(_baseline_entry(ranking.baseline, confirmed=True))
    return [*({**entry, "objective": objective} for entry in entries), *map(_failure_entry, ranking.failures)]


def _plan_entry(row: Row) -> dict[str, Cell]:
    return {
        "entry": "plan",
        "rank": row.rank,
        "confirmed": row.confirmed,
        "on_front": row.on_front,
        "recommended": row.recommended,
        "feasible": row.feasible,
        **_plan_cells(row.plan),
        "in_flight": row.effective.in_flight,
        "value": row.value,
        **_spread_cells(row.spread),
        **_ratio_cells("speedup_over_baseline", row.speedup_over_baseline),
        **_ratio_cells("speedup_over_single_stage", row.speedup_over_single_stage),
        **row.metrics,
        "disturbed_runs": row.disturbed_runs,
        "failed_runs": row.failed_runs,
        "records": " ".join(f"{number:04}" for number in row.records),
        "broken_constraints": "; ".join(row.broken_constraints),
        "unranked_because": row.unranked_because,
        "notes": "; ".join(row.notes),
    }


def _baseline_entry(row: BaselineRow, *, confirmed: bool) -> dict[str, Cell]:
    return {
        "entry": "baseline",
        "confirmed": confirmed,
        "micro_batch_size": row.batch_size,
        "value": row.value,
        **_spread_cells(row.spread),
        **row.metrics,
        "disturbed_runs": row.disturbed_runs,
        "records": " ".join(f"{number:04}" for number in row.used_records),
        "notes": "; ".join(row.notes),
    }


def _failure_entry(row: FailureRow) -> dict[str, Cell]:
    return {
        "entry": "failure",
        **(_plan_cells(row.plan) if row.plan else {"micro_batch_size": row.batch_size}),
        "records": f"{row.record:04}",
        "failure_kind": row.failure.kind.value,
        "failure_stage": row.failure.stage,
        "failure_device": row.failure.device,
        "failure_phase": row.failure.phase,
        "failure_message": row.failure.message,
    }


def _plan_cells(plan: Plan) -> dict[str, Cell]:
    return {
        "layers": "+".join(map(str, plan.layer_counts)),
        "replicas": plan.replicas,
        "devices": " ".join(plan.devices),
        "memory_fractions": " ".join(str(stage.memory_fraction) for stage in plan.stages),
        "micro_batch_size": plan.micro_batch_size,
        "prefill_micro_batch_size": plan.prefill_size,
        "prefill_chunk_size": plan.prefill_chunk_size,
        "compile": plan.compile,
        "cuda_graphs": plan.cuda_graphs,
        "packed_weights": plan.packed_weights,
    }


def _spread_cells(spread: Spread | None) -> dict[str, Cell]:
    if spread is None:
        return {}
    return {"q1": spread.q1, "q3": spread.q3, "samples": spread.samples, "runs": spread.runs}


def _ratio_cells(name: str, ratio: Ratio | None) -> dict[str, Cell]:
    if ratio is None:
        return {}
    return {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high, f"{name}_rounds": ratio.rounds}


def _prediction_cells(trial: Trial | None) -> dict[str, Cell]:
    if trial is None:
        return {}
    return {"predicted": trial.predicted, "predicted_sd": trial.predicted_sd, "prediction_error": trial.error}
