"""How a search went: its trials in order, predicted and measured, why it ended, and where the time went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipetune.bench.metrics import derive
from pipetune.bench.record import Measurement, Record
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.document import Bar, Cell, Column, Segment, Table, Text, left, rows_of
from pipetune.tuner.report.wording import MISSING, clean, metric_text, ms_text, number_text, percent_text, sentence
from pipetune.tuner.study.files import was_interrupted
from pipetune.tuner.study.search_log import LoggedTrial, Phase, SearchLog, Stop

_COLUMNS = (
    Column("trial"),
    left("plan"),
    left("why", "prose"),
    Column("predicted"),
    Column("measured"),
    Column("error"),
)
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
    """The trial's number."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSummary:
    """How a search went, in words."""

    table: Table
    """A row for each trial."""
    stop: str
    """Why it ended; empty where that is not known."""
    errors: str
    """How well it was predicted; empty where nothing was."""
    time: str
    """How much of it went into measuring; empty where that is not known."""
    phases: str
    """Where it went, phase by phase."""
    shares: Bar | None
    """The same as a bar; None where it is not known."""

    @property
    def text(self) -> str:
        """All of it in a few sentences; empty in studies from before a search log was kept."""
        return " ".join(text for text in (self.stop, self.errors, self.time) if text)


def trials_of(report: Report) -> tuple[Trial, ...]:
    """All trials that ran or were to run, in the order of their records."""
    entries = {entry.trial_number: entry for entry in report.log.entries} if report.log else {}
    metric, best = report.objective.metric, None
    trials = []
    for record in sorted(report.records, key=lambda record: record.number):
        if record.role != "trial":
            continue
        number = record.trial_number if record.trial_number is not None else record.number
        value = derive(record.result).get(metric) if isinstance(record.result, Measurement) else None
        cost = report.objective.cost(value) if value is not None else None
        leads = cost is not None and _keeps(report, record) and (best is None or cost < best)
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


def _keeps(report: Report, record: Record) -> bool:
    """Whether a measured trial keeps the constraints."""
    assert isinstance(record.result, Measurement)
    values = derive(record.result)
    return all(
        limit.metric in values and limit.excess(values[limit.metric]) <= 0 for limit in report.ranking.constraints
    )


def median_error(trials: Sequence[Trial]) -> float | None:
    """Median size of the prediction errors; None where nothing was predicted and measured."""
    errors = [abs(trial.error) for trial in trials if trial.error is not None]
    return statistics.median(errors) if errors else None


def summarize(report: Report) -> SearchSummary | None:
    """The search as text; None where no trial was to run."""
    trials = trials_of(report)
    if not trials:
        return None
    log = report.log
    explained = any(trial.entry for trial in trials)
    table = Table(
        columns=_COLUMNS,
        rows=rows_of(_cells(report, trial) for trial in trials),
        legend=(
            f"measured: {report.objective.metric} of the trial's own run, before any finals; bold: the best so far"
            + ("; error: what was predicted before the run, over what was measured" if explained else "")
        ),
    )
    return SearchSummary(
        table=table if explained else table.only(("trial", "plan", "measured")),
        stop=_stop_text(trials, log.stop) if log and log.stop else "",
        errors=_errors_text(trials),
        time=_time_text(log) if log and log.seconds else "",
        phases=_phases_text(log) if log else "",
        shares=_shares(log) if log and log.seconds else None,
    )


def _stop_text(trials: Sequence[Trial], stop: Stop) -> str:
    measured = sum(trial.measured is not None for trial in trials)
    if stop.kind == "budget" and measured == len(trials):
        return sentence(clean(stop.text))
    text = f"{len(trials)} trial{'' if len(trials) == 1 else 's'}"
    text += "" if measured == len(trials) else f", {measured} of them measured"
    return sentence(f"{text}; {clean(stop.text)}")


def _cells(report: Report, trial: Trial) -> tuple[Cell, ...]:
    record, metric = trial.record, report.objective.metric
    plan = record.spec.plan.describe() if record.spec else MISSING
    measured = metric_text(metric, trial.measured)
    if not isinstance(record.result, Measurement):
        measured = "stopped" if was_interrupted(record) else record.result.kind.value.replace("_", " ")
    predicted = metric_text(metric, trial.predicted)
    if trial.predicted is not None and trial.predicted_sd is not None:
        predicted += f" ±{percent_text(trial.predicted_sd)}"
    why = clean(trial.entry.reason) if trial.entry else MISSING
    if record.source is not None:
        why = f"measured by {clean(record.source.partition('/')[0])}"
    best = Text(measured, "strong") if trial.is_best_so_far else measured
    return (str(trial.number), plan, why, predicted, best, error_text(trial.error))


def error_text(error: float | None) -> str:
    """`+2.1 %`, `-0.4 %`."""
    return MISSING if error is None else f"{100 * error:+.1f} %"


def _errors_text(trials: Sequence[Trial]) -> str:
    typical = median_error(trials)
    if typical is None:
        return ""
    errors = [abs(trial.error) for trial in trials if trial.error is not None]
    text = f"Predictions were off by {100 * typical:.1f} % in the median of {len(errors)} trials"
    if len(errors) > 3:
        later = statistics.median(errors[len(errors) // 2 :])
        text += f", by {100 * errors[0]:.1f} % at the first of them and by {100 * later:.1f} % in the second half"
    return f"{text}."


def _shares(log: SearchLog) -> Bar:
    sums = [(label, sum(log.seconds.get(phase, 0.0) for phase in phases), colour) for label, phases, colour in _GROUPS]
    return Bar(
        segments=tuple(
            Segment(label=label, text=ms_text(1e3 * seconds), percent=100 * seconds / log.total_s, colour=colour)
            for label, seconds, colour in sums
            if seconds > 0
        )
    )


def _time_text(log: SearchLog) -> str:
    share = 1 - log.not_measuring_s / log.total_s
    return f"{percent_text(share)} of {ms_text(log.total_s * 1e3)} went into measuring."


def _phases_text(log: SearchLog) -> str:
    by_size = sorted(log.seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {number_text(seconds, 2)} s" for name, seconds in by_size)
