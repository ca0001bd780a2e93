"""From studies to series: nights of one question in order of time, and the changes of their levels. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.tuner.config.schema import GENERATE_OBJECTIVE, SCORE_OBJECTIVE
from pipetune.tuner.report.compare.join import plan_key
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.history.values import History, LevelChange, Night, Question, Series
from pipetune.tuner.report.wording import model_text, workload_text
from pipetune.tuner.stats.change_points import LEAST_NIGHTS, change_points, dependence

METRICS = ("mean_ttft_ms", "mean_tpot_ms", "bubble_ratio", "peak_memory_bytes")
"""Shown beside tokens per second when nothing is said."""
BEST, BASELINE = "best plan", "device_map"
LEAST_SHARED_NIGHTS = 2 * LEAST_NIGHTS
"""A plan that so many nights ran is a series of its own: unlike the best plan it stays what it is."""
MOST_SHARED_PLANS = 6
FALSE_CHANGES = 0.05
"""Chance that any series of a question shows a change where none of them has one; shared equally among them."""
_COMPUTING = ("torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyNight:
    """What history keeps of a study: a ranking has some kilobytes where its records have many megabytes."""

    question: str
    title: str
    hardware_id: str
    machine: str
    night: Night
    scores: bool
    subjects: Mapping[str, Mapping[str, float]]
    """Metrics of the best plan and of the baseline."""
    plans: Mapping[str, tuple[str, Mapping[str, float]]]
    """By plan key: its text and its metrics."""

    @classmethod
    def of(cls, report: Report) -> StudyNight | None:
        """None for a study that has not measured anything yet."""
        if report.machine is None or not report.records:
            return None
        config, ranking, hardware = report.config, report.ranking, report.machine.hardware
        workload = config.workload.model_copy(update={"prompts_file": None})
        goals = [*map(str, ranking.objectives), *map(str, config.constraints)]
        identity = (hardware.hardware_id, config.model.digest(), workload.digest(), *config.concrete_devices, *goals)
        title = [model_text(config.model), workload_text(config.workload), ", ".join(config.concrete_devices)]
        title += [f"for {', '.join(goals)}"] if goals != [report.throughput_metric] else []
        gpus = ", ".join(dict.fromkeys(gpu.name for gpu in hardware.gpus))
        subjects = {BEST: ranking.best, BASELINE: ranking.baseline}
        plans: dict[str, tuple[str, Mapping[str, float]]] = {}
        for row in ranking.rows:
            plans.setdefault(plan_key(row.plan, config.concrete_devices), (row.plan.describe(), row.metrics))
        return cls(
            question=" ".join(identity),
            title=" · ".join(title),
            hardware_id=hardware.hardware_id,
            machine=f"{len(hardware.gpus)} × {gpus}" if gpus else f"{hardware.cpu_model}, {hardware.cpu_cores} cores",
            night=_night(report),
            scores=report.scores,
            subjects={name: row.metrics for name, row in subjects.items() if row is not None},
            plans=plans,
        )


def history_of(nights: Iterable[StudyNight], metrics: Sequence[str] = (), skipped: Sequence[str] = ()) -> History:
    """Groups nights by what they asked and where, and looks for changes of level in each metric.

    Args:
        metrics: tokens per second and `METRICS` where none is given; those that no night has are left out.
    """
    groups: dict[str, list[StudyNight]] = defaultdict(list)
    for night in nights:
        groups[night.question].append(night)
    questions = [_question(group, metrics) for group in groups.values()]
    return History(
        questions=tuple(sorted(questions, key=lambda one: (one.title, one.machine, one.hardware_id))),
        skipped=tuple(skipped),
    )


def _question(group: list[StudyNight], metrics: Sequence[str]) -> Question:
    ordered = sorted(group, key=lambda one: (one.night.started_at, one.night.place))
    nights = tuple(one.night for one in ordered)
    last = ordered[-1]
    wanted = tuple(metrics) or (SCORE_OBJECTIVE if last.scores else GENERATE_OBJECTIVE, *METRICS)
    points = list(_points(ordered, wanted))
    # What is too short or always the same can show no change, and takes no share of the chance of a false one.
    open_ = sum(len(values) >= 2 * LEAST_NIGHTS and len(set(values)) > 1 for *_, values in points)
    alpha = FALSE_CHANGES / max(1, open_)
    return Question(
        title=last.title,
        hardware_id=last.hardware_id,
        machine=last.machine,
        nights=nights,
        alpha=alpha,
        series=tuple(_series(*point, nights, alpha) for point in points),
    )


def _points(
    ordered: Sequence[StudyNight], metrics: Sequence[str]
) -> Iterable[tuple[str, str, tuple[int, ...], tuple[float, ...]]]:
    """Subject, metric, nights and values of every series."""
    subjects: dict[str, dict[int, Mapping[str, float]]] = {BEST: {}, BASELINE: {}}
    shared: dict[str, dict[int, Mapping[str, float]]] = defaultdict(dict)
    texts: dict[str, str] = {}
    for index, one in enumerate(ordered):
        for name, row in one.subjects.items():
            subjects[name][index] = row
        for key, (text, row) in one.plans.items():
            shared[key][index] = row
            texts[key] = text
    # A plan that was best on all of its nights would only repeat what the best plan's series say.
    often = [key for key in shared if len(shared[key]) >= LEAST_SHARED_NIGHTS and shared[key] != subjects[BEST]]
    often.sort(key=lambda key: -len(shared[key]))
    subjects |= {texts[key]: shared[key] for key in often[:MOST_SHARED_PLANS]}
    for subject, rows in subjects.items():
        for metric in metrics:
            found = {index: row[metric] for index, row in rows.items() if math.isfinite(row.get(metric, math.nan))}
            if found:
                yield subject, metric, tuple(found), tuple(found.values())


def _series(
    subject: str,
    metric: str,
    places: tuple[int, ...],
    values: tuple[float, ...],
    nights: Sequence[Night],
    alpha: float,
) -> Series:
    found = change_points(values, alpha=alpha)
    own = [nights[place] for place in places]
    return Series(
        metric=metric,
        subject=subject,
        nights=places,
        values=values,
        changes=tuple(
            LevelChange(
                night=point.index,
                study=own[point.index].study,
                p=point.p,
                before=point.before,
                after=point.after,
                is_worse=(point.after < point.before) == (metric in HIGHER_IS_BETTER),
                also_changed=tuple(_also(own, point.index, is_best=subject == BEST)),
            )
            for point in found
        ),
        dependence=dependence(values, found),
    )


def _also(nights: Sequence[Night], place: int, *, is_best: bool) -> Iterable[str]:
    """What else changed there, and a night before or after: where noise hides it, a level is found to begin beside."""
    for index in range(max(1, place - 1), min(len(nights), place + 2)):
        before, now = nights[index - 1], nights[index]
        when = "" if index == place else f" (from {now.study} on)"
        if is_best and before.plan != now.plan:
            yield f"best plan: {before.plan or 'none'} → {now.plan or 'none'}{when}"
        if before.software != now.software:
            yield f"software: {before.software} → {now.software}{when}"
        if before.git_revision != now.git_revision:
            yield f"pipetune: {(before.git_revision or '?')[:12]} → {(now.git_revision or '?')[:12]}{when}"


def _night(report: Report) -> Night:
    assert report.machine is not None
    software = report.machine.software
    packages = " ".join(f"{name} {software.packages[name]}" for name in _COMPUTING if name in software.packages)
    driver = f" driver {software.driver}" if software.driver else ""
    best = report.ranking.best
    return Night(
        study=report.name,
        place=str(report.folder),
        started_at=min(record.started_at for record in report.records),
        plan=best.plan.describe() if best is not None else None,
        git_revision=software.git_revision,
        software=packages + driver,
    )
