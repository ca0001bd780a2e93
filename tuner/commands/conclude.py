"""The end of a study: best plan and device map exported, reports written, and what is to be said of it."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipetune.bench.record import FailureKind
from pipetune.tuner.ranking.values import Ranking, Rival, Row
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.document import Section
from pipetune.tuner.report.files import write_report
from pipetune.tuner.report.search import prediction_errors, trials_of
from pipetune.tuner.search.policy.history import OVER_MEMORY
from pipetune.tuner.study.files import StudyContents, load_study
from pipetune.tuner.study.plan_file import DEVICE_MAP_FILE, PLAN_FILE, PlanFile, write_best

DONE, NOTHING_FEASIBLE, FAULT, INTERRUPTED = 0, 3, 4, 130

PLANS_FAULT = OVER_MEMORY | {FailureKind.WRONG_OUTPUT, FailureKind.UNSUPPORTED_MODEL, FailureKind.TIMEOUT}
"""Failures that lie with a plan or its model; all others lie with the machine or with us."""


def conclude(folder: Path, show: Callable[[Report], int], sections: Sequence[Section] = ()) -> int:
    """Writes the exports and the reports of a study as it stands, `sections` being further ones of its page; then
    `show` prints it, even where they cannot be written, and gives the exit code. StudyError: no study that can be read.
    """
    report = Report.of(load_study(folder))
    best = report.ranking.best
    try:
        if best is None:
            for name in (PLAN_FILE, DEVICE_MAP_FILE):
                (folder / name).unlink(missing_ok=True)
        elif report.shape is not None:
            write_best(folder, plan_file(report, best), report.shape, report.config.device_names)
        write_report(report, sections)
    finally:
        code = show(report)
    return code


def plan_file(contents: StudyContents, row: Row) -> PlanFile:
    """A ranked plan as it is exported."""
    return PlanFile(
        plan=row.plan,
        model=contents.config.model,
        workload=contents.config.workload,
        devices=contents.config.concrete_devices,
        in_flight=row.effective.in_flight,
        metrics=row.metrics,
    )


def exit_code(ranking: Ranking, *, interrupted: bool = False) -> int:
    """0 with a best plan, 3 without one, 4 if that was never a plan's fault, 130 if somebody stopped the study."""
    if interrupted:
        return INTERRUPTED
    if ranking.best is not None:
        return DONE
    kinds = {row.failure.kind for row in ranking.failures if row.role == "trial"}
    return FAULT if kinds and not ranking.rows and not kinds & PLANS_FAULT else NOTHING_FEASIBLE


def why_nothing(ranking: Ranking) -> str | None:
    """Why there is no best plan; None if there is one."""
    if ranking.best is not None:
        return None
    if ranking.rows:
        broken = Counter(why.partition(" ")[0] for row in ranking.rows for why in row.broken_constraints)
        most = broken.most_common(1)[0][0] if broken else "a constraint"
        nearest = ranking.rows[0]
        return (
            f"all {len(ranking.rows)} plans that were measured break a constraint, most often on {most}; the first of "
            f"them: {nearest.plan.describe()}: {'; '.join(nearest.broken_constraints)}"
        )
    if ranking.unranked:
        return f"no plan can be ranked: {ranking.unranked[0].unranked_because}"
    if not (trials := [row.failure for row in ranking.failures if row.role in ("trial", "single_stage")]):
        return "no plan was run"
    kind, count = Counter(failure.kind for failure in trials).most_common(1)[0]
    example = next(failure for failure in trials if failure.kind == kind)
    return f"no plan ran: {count} of {len(trials)} failed with {kind.value}, the first so: {example.message}"


def document(report: Report, *, interrupted: bool = False) -> dict[str, Any]:
    """The study for machines: what `--json` prints."""
    ranking = report.ranking
    return {
        "schema_version": 1,
        "study": str(report.folder),
        "exit_code": exit_code(ranking, interrupted=interrupted),
        "interrupted": interrupted,
        "objectives": [str(objective) for objective in ranking.objectives],
        "constraints": [str(constraint) for constraint in ranking.constraints],
        "devices": list(report.config.concrete_devices),
        "losses": [loss.model_dump(mode="json") for loss in report.losses.losses],
        "best": _row(ranking.best),
        "baseline": ranking.baseline
        and {
            "batch_size": ranking.baseline.batch_size,
            "metrics": ranking.baseline.metrics,
            "measured_in": "finals" if ranking.baseline.in_finals else "search",
        },
        "single_stage": _row(ranking.single_stage),
        "recommended_because": ranking.recommended_because,
        "front": [row.rank for row in ranking.rows if row.on_front],
        "separated": ranking.separation.separated,
        "separation": ranking.separation.text,
        "search": _search(report),
        "rival": _rival(ranking.rival),
        "engine_default": _rival(ranking.engine_default),
        "ranking": [_row(row) for row in ranking.rows],
        "failures": [
            {"record": row.record, "role": row.role, "kind": row.failure.kind.value, "message": row.failure.message}
            for row in ranking.failures
        ],
        "files": sorted(path.name for path in report.folder.iterdir() if not path.name.startswith(".")),
    }


def _rival(rival: Rival | None) -> dict[str, Any] | None:
    if rival is None:
        return None
    values = rival.model_dump(mode="json")
    return {"plan": values["row"]["effective"]["plan"], "gain_over_it": values["gain"]}


def _row(row: Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    values = row.model_dump(mode="json")
    return {
        "rank": row.rank,
        "plan": values["effective"]["plan"],
        "layers": list(row.plan.layer_counts),
        "in_flight": row.effective.in_flight,
        "measured_in": "finals" if row.in_finals else "search",
        "confirmed": row.confirmed,
        "tied": row.tied,
        "recommended": row.recommended,
        "metrics": row.metrics,
        "speedup_over_baseline": values["speedup_over_baseline"],
        "speedup_over_single_stage": values["speedup_over_single_stage"],
        "broken_constraints": list(row.broken_constraints),
        "records": list(row.records),
    }


def _search(report: Report) -> dict[str, Any]:
    """How the search went; times and the reason of its end are null in studies from before a search log was kept."""
    trials, log = trials_of(report), report.log
    errors = prediction_errors(trials)
    return {
        "stop": log.stop.model_dump(mode="json") if log and log.stop else None,
        "trials": [
            {
                "trial": trial.number,
                "record": trial.record.number,
                "source": trial.record.source,
                "kind": trial.entry.kind if trial.entry else None,
                "reason": trial.entry.reason if trial.entry else None,
                **{name: getattr(trial, name) for name in ("predicted", "predicted_sd", "measured", "error")},
            }
            for trial in trials
        ],
        "median_prediction_error": statistics.median(errors) if errors else None,
        "seconds": dict(log.seconds) if log else None,
        "measuring_share": log.measuring_share if log else None,
    }
