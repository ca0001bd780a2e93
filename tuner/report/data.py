"""What every report of a study is made from: its settings, its machine, its records and their ranking."""

import itertools
import statistics
from collections.abc import Iterable
from functools import partial
from typing import Any, Self

from pipetune.bench.profile import Profile
from pipetune.bench.record import Measurement, OutputCheck
from pipetune.bench.spec import ENGINE_TITLES
from pipetune.tuner.config.schema import GENERATE_OBJECTIVE, SCORE_OBJECTIVE
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.values import Objective, Ranking, Row
from pipetune.tuner.study.files import StudyContents, StudyFile, read_sound, still_told
from pipetune.tuner.study.losses import Loss
from pipetune.tuner.study.search_log import SearchLog

BASELINE_NAME = "device_map"


class Report(StudyContents):
    """A study, ranked, with the records from before the last loss among the others."""

    __hash__ = object.__hash__

    ranking: Ranking
    log: SearchLog | None = None
    """None in studies from before one was kept."""
    profile: Profile | None = None
    """What predictions were made from; None where nominal rates were."""

    @classmethod
    def of(cls, study: StudyContents) -> Self:
        """Ranks a study by its own objectives and constraints; what of it is damaged is left out, and named."""
        config, unread, losses = study.config, list(study.unread), study.losses
        log, profile = study.folder / StudyFile.SEARCH, losses.path(study.folder, StudyFile.PROFILE)
        records = still_told((*study.earlier, *study.records))
        ranked = partial(
            rank,
            objectives=[Objective(metric=name) for name in config.objectives],
            constraints=config.constraints,
            rounds=(config.finalist_rounds, config.max_finalist_rounds),
            space=config.space,
        )
        ranking = ranked(losses.current(records))
        for loss, own in losses.earlier(records):
            ranking = _beside(ranking, loss, ranked(own))
        found: dict[str, Any] = {
            "records": records,
            "ranking": ranking,
            "log": read_sound(log, SearchLog, unread) if log.exists() else None,
            "profile": read_sound(profile, Profile, unread) if profile.exists() else None,
        }
        return cls(**{**dict(study), **found, "unread": tuple(unread)})

    @property
    def name(self) -> str:
        """The study's name, or its folder's."""
        return self.config.name or self.folder.resolve().name

    @property
    def prompt_lens(self) -> tuple[int, ...]:
        """Tokens of each prompt; empty when nothing was measured."""
        results = (record.result for record in self.records)
        return next((result.prompt_lens for result in results if isinstance(result, Measurement)), ())

    @property
    def scores(self) -> bool:
        """Whether texts are scored: no tokens are put out, and none has a time of its own."""
        return self.config.workload.kind == "score"

    @property
    def engine(self) -> str | None:
        """What another engine that ran the plans is called; None: our own runtime did."""
        plans = [row.plan for row in (*self.ranking.rows, *self.ranking.unranked)]
        plans += [row.plan for row in self.ranking.failures if row.plan]
        return next((ENGINE_TITLES[plan.engine.name] for plan in plans if plan.engine), None)

    @property
    def baseline_name(self) -> str:
        """What the un-pipelined model is called in tables: by how it runs."""
        return "PP=1" if self.engine else BASELINE_NAME

    @property
    def throughput_metric(self) -> str:
        """What is meant by tok/s."""
        return SCORE_OBJECTIVE if self.scores else GENERATE_OBJECTIVE

    @property
    def throughput_title(self) -> str:
        """The throughput metric as a label of axes."""
        return "tokens / s" if self.scores else "output tokens / s"

    @property
    def latency(self) -> tuple[str, str]:
        """The latency that is shown beside it, as its metric and in short."""
        return ("mean_e2el_ms", "E2EL") if self.scores else ("mean_ttft_ms", "TTFT")

    def asked_beside(self, shown: Iterable[str]) -> tuple[str, ...]:
        """Metrics of objectives and constraints beside these, throughput, bubble and memory, which all reports show."""
        known = {self.throughput_metric, "bubble_ratio", "peak_memory_bytes", *shown}
        asked = [goal.metric for goal in self.ranking.objectives] + [one.metric for one in self.ranking.constraints]
        return tuple(name for name in dict.fromkeys(asked) if name not in known)

    @property
    def objective(self) -> Objective:
        """The first objective, by which plans are ranked."""
        return self.ranking.objectives[0]

    @property
    def shown(self) -> Row | None:
        """The row whose run is drawn: the best, or without one the first that was measured at all."""
        return self.ranking.best or next(iter((*self.ranking.rows, *self.ranking.unranked)), None)

    @property
    def timeline(self) -> tuple[Row, Measurement] | None:
        """That row and its run, where it was instrumented: every stage has a span for every task."""
        if self.shown is None:
            return None
        measurement = self.typical(self.shown)
        tasks = stage_tasks(measurement)
        runs = (zip(run.stages, tasks, strict=True) for run in measurement.iterations)
        is_whole = tasks and all(len(trace.compute_start_s) == len(own) for run in runs for trace, own in run)
        return (self.shown, measurement) if is_whole else None

    def typical(self, row: Row) -> Measurement:
        """The measurement of the row that lies nearest to its median."""
        result = next(record.result for record in self.records if record.number == row.typical_record)
        assert isinstance(result, Measurement), f"record {row.typical_record} of row {row.key} holds no measurement"
        return result

    def checks(self, row: Row) -> tuple[OutputCheck, ...]:
        """All comparisons of the plan's output with the reference, the one of most logits first."""
        results = [record.result for record in self.records if record.number in row.records]
        checks = [result.check for result in results if isinstance(result, Measurement) and result.check]
        return tuple(sorted(checks, key=lambda check: -check.compared_logits))


def _beside(ranking: Ranking, loss: Loss, earlier: Ranking) -> Ranking:
    """A ranking with the plans, without a rank, and the failures from before a loss."""
    why = f"ran on {', '.join(loss.devices)}, before {loss.device} was lost"
    bare = {"rank": None, "tied": False, "on_front": False, "in_finals": False, "confirmed": False}
    bare |= {"is_reference": False, "speedup_over_baseline": None, "speedup_over_single_stage": None}
    rows = (row.model_copy(update={**bare, "unranked_because": why}) for row in (*earlier.rows, *earlier.unranked))
    failures = sorted((*ranking.failures, *earlier.failures), key=lambda row: row.record)
    return ranking.model_copy(update={"unranked": (*ranking.unranked, *rows), "failures": tuple(failures)})


def typical_iteration(measurement: Measurement) -> int:
    """Index of the iteration whose duration lies nearest to the median."""
    durations = [run.duration_s for run in measurement.iterations]
    median = statistics.median(durations)
    return min(range(len(durations)), key=lambda index: abs(durations[index] - median))


def replica_tasks(measurement: Measurement) -> tuple[range, ...]:
    """Which of the tasks each replica ran."""
    counts = measurement.replica_tasks or (len(measurement.tasks),)
    return tuple(range(end - count, end) for count, end in zip(counts, itertools.accumulate(counts), strict=True))


def stage_tasks(measurement: Measurement) -> tuple[range, ...]:
    """Which of the tasks each stage ran, along `Iteration.stages`: all of its replica's."""
    replicas = replica_tasks(measurement)
    width = len(measurement.iterations[0].stages) // len(replicas)
    return tuple(own for own in replicas for _ in range(width))


def host_us_a_task(measurement: Measurement) -> tuple[float, ...]:
    """Per stage: host work around a task, neither compute nor waiting, median over iterations; empty where unknown."""
    gaps = [run.host_gap_s for run in measurement.iterations]
    if not all(gaps):
        return ()
    medians = [statistics.median(column) for column in zip(*gaps, strict=True)]
    return tuple(1e6 * gap_s / max(1, len(own)) for gap_s, own in zip(medians, stage_tasks(measurement), strict=True))
