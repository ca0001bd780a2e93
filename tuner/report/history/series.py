"""From studies to series: nights of one question in order of time, and the changes of their levels. Pure."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.bench.record import Hardware
from pipetune.tuner.report.compare.join import rows_by_key
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.history.values import History, LevelChange, Night, Question, Series
from pipetune.tuner.report.wording import hardware_text, model_text, workload_text
from pipetune.tuner.stats.change_points import LEAST_NIGHTS, change_points, dependence

METRICS = ("mean_ttft_ms", "mean_tpot_ms", "bubble_ratio", "peak_memory_bytes")
"""Shown beside tokens per second when nothing is said."""
BEST = "best plan"
LEAST_SHARED_NIGHTS = 2 * LEAST_NIGHTS
"""A plan that so many nights ran is a series of its own: unlike the best plan it stays what it is."""
MOST_SHARED_PLANS = 6
FALSE_CHANGES = 0.05
"""Chance that any series of a question shows a change where none of them has one; shared equally among them."""
_COMPUTING = ("torch", "transformers", "numpy", "engine's vllm", "engine's sglang")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyNight:
    """What history keeps of a study: a ranking has some kilobytes where its records have many megabytes."""

    night: Night
    report: Report
    """The study without its records, log and profile."""
    hardware: Hardware
    goals: list[str]
    """Objectives and constraints."""
    question: tuple[str, ...]
    """What was asked, and where: equal for nights that make a series."""

    @classmethod
    def of(cls, report: Report) -> Self | None:
        """None for a study that has not measured anything yet."""
        if report.machine is None or not report.records:
            return None
        hardware, software, best = report.machine.hardware, report.machine.software, report.ranking.best
        computing = [f"{name} {software.packages[name]}" for name in _COMPUTING if name in software.packages]
        night = Night(
            study=report.name,
            place=str(report.folder),
            started_at=min(record.started_at for record in report.records),
            plan=best.plan.describe() if best is not None else None,
            git_revision=software.git_revision,
            software=" ".join(computing) + (f" driver {software.driver}" if software.driver else ""),
        )
        config, goals = report.config, [*map(str, report.ranking.objectives), *map(str, report.config.constraints)]
        digests = config.model.by_content.digest(), config.workload.model_copy(update={"prompts_file": None}).digest()
        question = (hardware.hardware_id, *digests, *config.concrete_devices, *goals, report.engine or "")
        slim = report.model_copy(update={"records": (), "earlier": (), "log": None, "profile": None})
        return cls(night=night, report=slim, hardware=hardware, goals=goals, question=question)


def history_of(nights: Iterable[StudyNight], metrics: Sequence[str] = (), skipped: Sequence[str] = ()) -> History:
    """Groups nights by what they asked and where, and looks for changes of level in each metric. Metrics are tokens per
    second and `METRICS` where none is given; those that no night has are left out."""
    groups: dict[tuple[str, ...], list[StudyNight]] = defaultdict(list)
    for night in nights:
        groups[night.question].append(night)
    questions = [_question(group, metrics) for group in groups.values()]
    questions.sort(key=lambda one: (one.title, one.machine, one.hardware_id))
    return History(questions=tuple(questions), skipped=tuple(skipped))


def _question(group: list[StudyNight], metrics: Sequence[str]) -> Question:
    ordered = sorted(group, key=lambda one: (one.night.started_at, one.night.place))
    nights = tuple(one.night for one in ordered)
    report, hardware, goals = ordered[-1].report, ordered[-1].hardware, ordered[-1].goals
    series = list(_series(ordered, tuple(metrics) or (report.throughput_metric, *METRICS)))
    # What is too short or always the same can show no change, and takes no share of the chance of a false one.
    open_ = sum(len(one.values) >= 2 * LEAST_NIGHTS and len(set(one.values)) > 1 for one in series)
    alpha = FALSE_CHANGES / max(1, open_)
    config = report.config
    title = [model_text(config.model), workload_text(config.workload), ", ".join(config.concrete_devices)]
    title += [f"by {report.engine}"] if report.engine else []
    title += [f"for {', '.join(goals)}"] if goals != [report.throughput_metric] else []
    return Question(
        title=" · ".join(title),
        hardware_id=hardware.hardware_id,
        machine=hardware_text(hardware),
        nights=nights,
        alpha=alpha,
        series=tuple(_with_changes(one, nights, alpha) for one in series),
    )


def _series(ordered: Sequence[StudyNight], metrics: Sequence[str]) -> Iterator[Series]:
    """Every series, before its changes are looked for."""
    base = ordered[-1].report.baseline_name
    subjects: dict[str, dict[int, Mapping[str, float]]] = {BEST: {}, base: {}}
    shared: dict[str, dict[int, Mapping[str, float]]] = defaultdict(dict)
    texts: dict[str, str] = {}
    for index, one in enumerate(ordered):
        ranking = one.report.ranking
        subjects[BEST] |= {index: ranking.best.metrics} if ranking.best else {}
        subjects[base] |= {index: ranking.baseline.metrics} if ranking.baseline else {}
        for key, row in rows_by_key(one.report).items():
            shared[key][index], texts[key] = row.metrics, row.plan.describe()
    # A plan that was best on all of its nights would only repeat what the best plan's series say.
    often = [key for key in shared if len(shared[key]) >= LEAST_SHARED_NIGHTS and shared[key] != subjects[BEST]]
    often.sort(key=lambda key: -len(shared[key]))
    subjects |= {texts[key]: shared[key] for key in often[:MOST_SHARED_PLANS]}
    for subject, rows in subjects.items():
        for metric in metrics:
            found = {index: row[metric] for index, row in rows.items() if math.isfinite(row.get(metric, math.nan))}
            if found:
                values = tuple(found.values())
                yield Series(metric=metric, subject=subject, nights=tuple(found), values=values, changes=())


def _with_changes(series: Series, nights: Sequence[Night], alpha: float) -> Series:
    found = change_points(series.values, alpha=alpha)
    own = [nights[place] for place in series.nights]
    changes = tuple(
        LevelChange(
            night=point.index,
            study=own[point.index].study,
            p=point.p,
            before=point.before,
            after=point.after,
            is_worse=(point.after < point.before) == (series.metric in HIGHER_IS_BETTER),
            also_changed=tuple(_also(own, point.index, is_best=series.subject == BEST)),
        )
        for point in found
    )
    return series.model_copy(update={"changes": changes, "dependence": dependence(series.values, found)})


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
