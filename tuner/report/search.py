"""How a search went: its trials in order, predicted and measured, why it ended, and where the time went."""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipetune.bench.metrics import derive
from pipetune.bench.record import Measurement, Record
from pipetune.tuner.ranking.rank import why_broken
from pipetune.tuner.report import wording as w
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.document import Bar, Cell, Column, Segment, Table, Text, left, rows_of
from pipetune.tuner.study.files import was_interrupted
from pipetune.tuner.study.search_log import LoggedTrial, Phase, SearchLog, Stop

_COLUMNS = (Column("trial"), left("plan"), left("why", "prose"), *map(Column, ("predicted", "measured", "error")))
_GROUPS: tuple[tuple[str, tuple[Phase, ...], int], ...] = (
    ("trials", ("trials",), 1),
    ("finals", ("finals",), 5),
    ("baseline and single stage", ("baseline", "single_stage"), 3),
    ("profile", ("profile",), 2),
    ("all else", ("start", "reference", "search", "reports"), 4),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial: what was expected of it, and what came."""

    number: int
    record: Record
    entry: LoggedTrial | None
    """None in studies from before a search log was kept, and where another process measured."""
    predicted: float | None
    """Value of the first objective, in its unit."""
    predicted_sd: float | None
    """Standard deviation, relative to the prediction."""
    measured: float | None
    is_best_so_far: bool

    @property
    def error(self) -> float | None:
        """0.02: 2 % more was predicted than measured."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1


class SearchSummary:
    """How a search went, in words; what is not known is empty."""

    def __init__(self, report: Report, trials: Sequence[Trial]) -> None:
        log = report.log or SearchLog()
        took, by_size = w.ms_text(1e3 * log.total_s), sorted(log.seconds.items(), key=lambda item: -item[1])
        self.table = _table(report, trials)
        """A row for each trial."""
        self.stop = _stop_text(trials, log.stop) if log.stop else ""
        """Why it ended."""
        self.errors = _errors_text(prediction_errors(trials))
        """How well it was predicted."""
        self.time = f"{w.percent_text(log.measuring_share)} of {took} went into measuring." if log.seconds else ""
        """How much of it went into measuring."""
        self.phases = ", ".join(f"{name.replace('_', ' ')} {w.number_text(seconds, 2)} s" for name, seconds in by_size)
        """Where it went, phase by phase."""
        self.shares = _shares(log) if log.seconds else None
        """The same as a bar."""

    @property
    def text(self) -> str:
        """All of it in a few sentences; empty in studies from before a search log was kept."""
        return " ".join(filter(None, (self.stop, self.errors, self.time)))


@functools.lru_cache(maxsize=1)
def trials_of(report: Report) -> tuple[Trial, ...]:
    """All trials that ran or were to run, in the order of their records."""
    entries = {entry.trial_number: entry for entry in report.log.entries} if report.log else {}
    metric, best = report.objective.metric, None
    trials = []
    for record in sorted((one for one in report.records if one.role == "trial"), key=lambda one: one.number):
        number = record.trial_number if record.trial_number is not None else record.number
        values = derive(record.result) if isinstance(record.result, Measurement) else {}
        value = values.get(metric)
        keeps = all(why_broken(limit, values) is None for limit in report.ranking.constraints)
        keeps = keeps and record.number >= report.losses.first_record
        cost = report.objective.cost(value) if value is not None and keeps else None
        leads = cost is not None and (best is None or cost < best)
        best = cost if leads else best
        entry = entries.get(number) if record.source is None else None
        trials.append(
            Trial(
                number=number,
                record=record,
                entry=entry,
                predicted=entry.predicted.get(metric) if entry else None,
                predicted_sd=entry.predicted_sd.get(metric) if entry else None,
                measured=value,
                is_best_so_far=leads,
            )
        )
    return tuple(trials)


def prediction_errors(trials: Sequence[Trial]) -> list[float]:
    """Sizes of the errors of what was predicted and measured."""
    return [abs(trial.error) for trial in trials if trial.error is not None]


def summarize(report: Report) -> SearchSummary | None:
    """The search as text; None where no trial was to run."""
    trials = trials_of(report)
    return SearchSummary(report, trials) if trials else None


def _table(report: Report, trials: Sequence[Trial]) -> Table:
    legend = f"measured: {report.objective.metric} of the trial's own run, before any finals; bold: the best so far"
    table = Table(columns=_COLUMNS, rows=rows_of(_cells(report, trial) for trial in trials), legend=legend)
    if any(trial.entry for trial in trials):
        return replace(table, legend=f"{legend}; error: what was predicted before the run, over what was measured")
    return table.only(("trial", "plan", "measured"))


def _stop_text(trials: Sequence[Trial], stop: Stop) -> str:
    measured = sum(trial.measured is not None for trial in trials)
    if stop.kind == "budget" and measured == len(trials):
        return w.sentence(w.clean(stop.text))
    some = "" if measured == len(trials) else f", {measured} of them measured"
    return w.sentence(f"{w.count_text(len(trials), 'trial')}{some}; {w.clean(stop.text)}")


def _cells(report: Report, trial: Trial) -> tuple[Cell, ...]:
    record, metric = trial.record, report.objective.metric
    plan = record.spec.plan.describe() if record.spec else w.MISSING
    measured = w.metric_text(metric, trial.measured)
    if not isinstance(record.result, Measurement):
        measured = "stopped" if was_interrupted(record) else record.result.kind.value.replace("_", " ")
    predicted = w.metric_text(metric, trial.predicted)
    if trial.predicted is not None and trial.predicted_sd is not None:
        predicted += f" ±{w.percent_text(trial.predicted_sd)}"
    why = w.clean(trial.entry.reason) if trial.entry else w.MISSING
    if record.source is not None:
        why = f"measured by {w.clean(record.source.partition('/')[0])}"
    best = Text(measured, "strong") if trial.is_best_so_far else measured
    error = w.MISSING if trial.error is None else f"{100 * trial.error:+.1f} %"
    return str(trial.number), plan, why, predicted, best, error


def _errors_text(errors: Sequence[float]) -> str:
    if not errors:
        return ""
    count = w.count_text(len(errors), "trial")
    text = f"Predictions were off by {100 * statistics.median(errors):.1f} % in the median of {count}"
    if len(errors) > 3:
        later = statistics.median(errors[len(errors) // 2 :])
        text += f", by {100 * errors[0]:.1f} % at the first of them and by {100 * later:.1f} % in the second half"
    return f"{text}."


def _shares(log: SearchLog) -> Bar:
    sums = [(label, sum(log.seconds.get(phase, 0.0) for phase in phases), colour) for label, phases, colour in _GROUPS]
    return Bar(
        segments=tuple(
            Segment(label, w.ms_text(1e3 * seconds), 100 * seconds / log.total_s, colour)
            for label, seconds, colour in sums
            if seconds > 0
        )
    )
