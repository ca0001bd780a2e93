"""`ranking.csv`: every plan, baseline and failure in full precision, a line each, safe to open in a spreadsheet."""

from collections.abc import Sequence

from pipetune.bench.metrics import metrics_of_workload
from pipetune.bench.spec import Plan
from pipetune.tuner.ranking.values import BaselineRow, FailureRow, Pooled, Row
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.render.csv import Cell
from pipetune.tuner.report.search import trials_of
from pipetune.tuner.stats.ratios import Ratio

_HEAD = (
    "entry", "rank", "measured_in", "confirmed", "tied", "on_front", "recommended", "feasible", "layers", "replicas",
    "devices", "memory_fractions", "max_memory_bytes", "micro_batch_size", "prefill_micro_batch_size",
    "prefill_chunk_size", "in_flight", "compile", "cuda_graphs", "packed_weights", "objective", "value", "q1", "q3",
    "samples", "runs",
    "speedup_over_baseline", "speedup_over_baseline_low", "speedup_over_baseline_high", "speedup_over_baseline_rounds",
    "speedup_over_single_stage", "speedup_over_single_stage_low", "speedup_over_single_stage_high",
    "speedup_over_single_stage_rounds", "predicted", "predicted_sd", "prediction_error",
)  # fmt: skip
_TAIL = (
    "disturbed_runs", "failed_runs", "records", "broken_constraints", "unranked_because", "notes", "failure_kind",
    "failure_stage", "failure_device", "failure_phase", "failure_message",
)  # fmt: skip


def columns_of(report: Report) -> tuple[str, ...]:
    """The names of the columns, which `results/README.md` defines."""
    metrics = metrics_of_workload(report.config.workload, gpu=True, engine=bool(report.engine))
    return (*_HEAD, *(["engine"] if report.engine else []), *metrics, *_TAIL)


def entries_of(report: Report) -> list[dict[str, Cell]]:
    """A row for every plan, baseline and failure."""
    ranking, objective = report.ranking, report.objective.metric
    predicted: dict[str, dict[str, Cell]] = {}
    for trial in trials_of(report):
        if trial.predicted is not None and trial.record.effective is not None:
            cells = _cells(trial, "predicted", "predicted_sd") | {"prediction_error": trial.error}
            predicted.setdefault(trial.record.effective.key, cells)
    entries = [_plan_entry(row) | predicted.get(row.key, {}) for row in (*ranking.rows, *ranking.unranked)]
    entries += map(_baseline_entry, ranking.baseline_sweep)
    if ranking.baseline and ranking.baseline.in_finals:
        entries.append(_baseline_entry(ranking.baseline))
    return [*({**entry, "objective": objective} for entry in entries), *map(_failure_entry, ranking.failures)]


def _cells(value: object, *names: str) -> dict[str, Cell]:
    return {name: getattr(value, name) for name in names}


def _plan_entry(row: Row) -> dict[str, Cell]:
    return {
        "entry": "plan",
        **_cells(row, "rank", "tied", "on_front", "recommended", "feasible", "unranked_because", "failed_runs"),
        **_plan_cells(row.plan),
        "in_flight": row.effective.in_flight,
        **_ratio_cells("speedup_over_baseline", row.speedup_over_baseline),
        **_ratio_cells("speedup_over_single_stage", row.speedup_over_single_stage),
        **_run_cells(row, row.records),
        "broken_constraints": "; ".join(row.broken_constraints),
    }


def _baseline_entry(row: BaselineRow) -> dict[str, Cell]:
    return {"entry": "baseline", "micro_batch_size": row.batch_size, **_run_cells(row, row.used_records)}


def _failure_entry(row: FailureRow) -> dict[str, Cell]:
    told = _cells(row.failure, "stage", "device", "phase", "message")
    return {
        "entry": "failure",
        **(_plan_cells(row.plan) if row.plan else {"micro_batch_size": row.batch_size}),
        "records": f"{row.record:04}",
        "failure_kind": row.failure.kind.value,
        **{f"failure_{name}": cell for name, cell in told.items()},
    }


def _plan_cells(plan: Plan) -> dict[str, Cell]:
    return {
        **_cells(
            plan, "replicas", "micro_batch_size", "prefill_chunk_size", "compile", "cuda_graphs", "packed_weights"
        ),
        "layers": "+".join(map(str, plan.layer_counts)),
        "devices": " ".join(plan.devices),
        "memory_fractions": " ".join(str(stage.memory_fraction) for stage in plan.stages),
        "max_memory_bytes": " ".join(str(stage.max_memory_bytes or "") for stage in plan.stages).strip(),
        "prefill_micro_batch_size": plan.prefill_size,
        **({"engine": " · ".join(plan.engine.words)} if plan.engine is not None else {}),
    }


def _run_cells(row: Pooled, records: Sequence[int]) -> dict[str, Cell]:
    return {
        "measured_in": "finals" if row.in_finals else "search",
        **_cells(row, "confirmed", "value"),
        **(_cells(row.spread, "q1", "q3", "samples", "runs") if row.spread else {}),
        **row.metrics,
        "disturbed_runs": row.disturbed_runs,
        "records": " ".join(f"{number:04}" for number in records),
        "notes": "; ".join(row.notes),
    }


def _ratio_cells(name: str, ratio: Ratio | None) -> dict[str, Cell]:
    if ratio is None:
        return {}
    return {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high, f"{name}_rounds": ratio.rounds}
