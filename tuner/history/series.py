"""From studies to series: nights of one question in order of time, and the changes of their levels. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from bench.metrics import HIGHER_IS_BETTER
from tuner.compare.join import plan_key
from tuner.history.values import History, LevelChange, Night, Question, Series
from tuner.report.data import Report
from tuner.report.wording import model_text, workload_text
from tuner.stats.change_points import change_points

METRICS = ("output_throughput", "total_token_throughput", "mean_ttft_ms", "mean_tpot_ms", "bubble_ratio", "peak_memory_bytes")
BEST, BASELINE = "best plan", "device_map"
LEAST_SHARED_NIGHTS = 6
"""A plan that so many nights ran is a series of its own: unlike the best plan it stays what it is."""
_COMPUTING = ("torch", "transformers", "numpy")


def history_of(reports: Sequence[Report], metrics: Sequence[str] = METRICS, skipped: Sequence[str] = ()) -> History:
    """Groups studies by what they asked and where, and looks for changes of level in each metric.

    Args:
        metrics: those that no night has are left out.
    """
    groups: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        if report.machine is not None and report.records:
            groups[_question_of(report)].append(report)
    questions = [_question(group, metrics) for group in groups.values()]
    return History(questions=tuple(sorted(questions, key=lambda one: one.title)), skipped=tuple(skipped))


def _question_of(report: Report) -> str:
    assert report.machine is not None
    workload = report.config.workload.model_copy(update={"prompts_file": None})
    model = report.config.model
    return " ".join((report.machine.hardware.hardware_id, model.digest(), workload.digest(), *report.config.concrete_devices))


def _question(reports: list[Report], metrics: Sequence[str]) -> Question:
    ordered = sorted(reports, key=_began)
    nights = tuple(_night(report) for report in ordered)
    last = ordered[-1]
    assert last.machine is not None
    hardware = last.machine.hardware
    gpus = ", ".join(dict.fromkeys(gpu.name for gpu in hardware.gpus))
    return Question(
        title=f"{model_text(last.config.model)} · {workload_text(last.config.workload)} · {', '.join(last.config.concrete_devices)}",
        hardware_id=hardware.hardware_id,
        machine=f"{len(hardware.gpus)} × {gpus}" if gpus else f"{hardware.cpu_model}, {hardware.cpu_cores} cores",
        nights=nights,
        series=tuple(_all_series(ordered, nights, metrics)),
    )


def _all_series(reports: Sequence[Report], nights: Sequence[Night], metrics: Sequence[str]) -> Iterable[Series]:
    subjects: dict[str, dict[int, Mapping[str, float]]] = {BEST: {}, BASELINE: {}}
    shared: dict[str, dict[int, Mapping[str, float]]] = defaultdict(dict)
    texts: dict[str, str] = {}
    for index, report in enumerate(reports):
        ranking = report.ranking
        if ranking.best is not None:
            subjects[BEST][index] = ranking.best.metrics
        if ranking.baseline is not None:
            subjects[BASELINE][index] = ranking.baseline.metrics
        for row in ranking.rows:
            key = plan_key(row.plan)
            shared[key].setdefault(index, row.metrics)
            texts.setdefault(key, row.plan.describe())
    often = sorted((key for key in shared if len(shared[key]) >= LEAST_SHARED_NIGHTS), key=lambda key: -len(shared[key]))
    subjects |= {texts[key]: shared[key] for key in often}
    for subject, rows in subjects.items():
        for metric in metrics:
            places = [index for index, row in rows.items() if metric in row]
            if places:
                yield _series(metric, subject, places, [rows[index][metric] for index in places], nights)


def _series(
    metric: str, subject: str, places: Sequence[int], values: Sequence[float], nights: Sequence[Night]
) -> Series:
    found = change_points(values)
    return Series(
        metric=metric,
        subject=subject,
        nights=tuple(places),
        values=tuple(values),
        changes=tuple(
            LevelChange(
                night=point.index,
                study=nights[places[point.index]].study,
                p=point.p,
                before=point.before,
                after=point.after,
                is_worse=(point.after < point.before) == (metric in HIGHER_IS_BETTER),
                also_changed=_also(nights[places[point.index - 1]], nights[places[point.index]], subject),
            )
            for point in found
        ),
    )


def _also(before: Night, now: Night, subject: str) -> tuple[str, ...]:
    changed = []
    if subject == BEST and before.plan != now.plan:
        changed.append(f"best plan: {before.plan} → {now.plan}")
    if before.software != now.software:
        changed.append(f"software: {before.software} → {now.software}")
    if before.git_revision != now.git_revision:
        changed.append(f"pipetune: {(before.git_revision or 'unknown')[:12]} → {(now.git_revision or 'unknown')[:12]}")
    return tuple(changed)


def _night(report: Report) -> Night:
    assert report.machine is not None
    software = report.machine.software
    packages = " ".join(f"{name} {software.packages[name]}" for name in _COMPUTING if name in software.packages)
    driver = f" driver {software.driver}" if software.driver else ""
    best = report.ranking.best
    return Night(
        study=report.name,
        place=str(report.folder),
        started_at=_began(report),
        plan=best.plan.describe() if best is not None else None,
        git_revision=software.git_revision,
        software=packages + driver,
    )


def _began(report: Report) -> str:
    return min(record.started_at for record in report.records)
