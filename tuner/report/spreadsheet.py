"""`ranking.csv`: every plan, baseline and failure in full precision, a line each, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from pipetune.bench.metrics import metric_names
from pipetune.bench.spec import Plan
from pipetune.tuner.ranking.values import BaselineRow, FailureRow, Ratio, Row, Spread
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.search import Trial, trials_of
from pipetune.tuner.report.wording import clean

Cell = str | int | float | bool | None

_FORMULA_STARTS = ("=", "+", "-", "@")
_HEAD = (
    "entry",
    "rank",
    "confirmed",
    "on_front",
    "recommended",
    "feasible",
    "layers",
    "replicas",
    "devices",
    "memory_fractions",
    "micro_batch_size",
    "prefill_micro_batch_size",
    "prefill_chunk_size",
    "in_flight",
    "compile",
    "cuda_graphs",
    "packed_weights",
    "objective",
    "value",
    "q1",
    "q3",
    "samples",
    "runs",
    "speedup_over_baseline",
    "speedup_over_baseline_low",
    "speedup_over_baseline_high",
    "speedup_over_baseline_rounds",
    "speedup_over_single_stage",
    "speedup_over_single_stage_low",
    "speedup_over_single_stage_high",
    "speedup_over_single_stage_rounds",
    "predicted",
    "predicted_sd",
    "prediction_error",
)
_TAIL = (
    "disturbed_runs",
    "failed_runs",
    "records",
    "broken_constraints",
    "unranked_because",
    "notes",
    "failure_kind",
    "failure_stage",
    "failure_device",
    "failure_phase",
    "failure_message",
)


def render_csv(report: Report) -> str:
    """The ranking as CSV text with a header line; columns are defined in `results/README.md`."""
    ranking, objective = report.ranking, report.objective.metric
    forecasts: dict[str, Trial] = {}
    for trial in trials_of(report):
        if trial.predicted is not None and trial.record.effective is not None:
            forecasts.setdefault(trial.record.effective.key, trial)
    entries: list[dict[str, Cell]] = [
        {"objective": objective, **_plan_entry(row), **_forecast_cells(forecasts.get(row.key))}
        for row in (*ranking.rows, *ranking.unranked)
    ]
    baselines = [(row, False) for row in ranking.baseline_sweep]
    if ranking.baseline and ranking.baseline.confirmed:
        baselines.append((ranking.baseline, True))
    entries += [{"objective": objective, **_baseline_entry(row, confirmed)} for row, confirmed in baselines]
    entries += [_failure_entry(row) for row in ranking.failures]
    workload = report.config.workload
    names = dict.fromkeys(metric_names(workload.num_prompts, workload.generated_len, gpu=True))
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=[*_HEAD, *names, *_TAIL], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: safe_cell(value) for name, value in entry.items()} for entry in entries)
    return out.getvalue()


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
        "records": _joined(f"{number:04}" for number in row.records),
        "broken_constraints": "; ".join(row.broken_constraints),
        "unranked_because": row.unranked_because,
        "notes": "; ".join(row.notes),
    }


def _baseline_entry(row: BaselineRow, confirmed: bool) -> dict[str, Cell]:
    return {
        "entry": "baseline",
        "confirmed": confirmed,
        "micro_batch_size": row.batch_size,
        "value": row.value,
        **_spread_cells(row.spread),
        **row.metrics,
        "disturbed_runs": row.disturbed_runs,
        "records": _joined(f"{number:04}" for number in row.used_records),
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
        "devices": _joined(plan.devices),
        "memory_fractions": _joined(str(stage.memory_fraction) for stage in plan.stages),
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


def _forecast_cells(trial: Trial | None) -> dict[str, Cell]:
    if trial is None:
        return {}
    return {
        "predicted": trial.predicted,
        "predicted_sd": trial.predicted_sd,
        "prediction_error": trial.error,
    }


def _joined(parts: Iterable[str]) -> str:
    return " ".join(parts)


def safe_cell(value: Cell) -> Cell:
    """Numbers as they are; text on one line, and never one that a spreadsheet would take for a formula."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
