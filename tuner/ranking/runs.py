"""What the runs of plans say: pooled into medians, set against each other round by round, and told apart or not."""

import functools
import math
import statistics
from collections.abc import Collection, Sequence

from pipetune.bench import metrics
from pipetune.bench.record import Failure, FailureKind, Measurement, Record
from pipetune.tuner.ranking.elimination import ALPHA, MIN_ROUNDS, Fit, State, decide
from pipetune.tuner.ranking.values import Objective, Row, Separation, Spread
from pipetune.tuner.stats.ratios import Ratio, ratio_of

BASELINE = "baseline"
"""Stands for the un-pipelined model; all other names are keys of effective plans."""
_PER_ITERATION = frozenset({"output_throughput", "total_token_throughput", "request_throughput", "duration_s"})


class PlanRun:
    """A record with its metrics, derived once; a failure has none."""

    def __init__(self, record: Record) -> None:
        self.record = record

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """All of them by name."""
        return metrics.derive(self.record.result) if isinstance(self.record.result, Measurement) else {}

    @property
    def measurement(self) -> Measurement:
        """What was measured, where something was."""
        assert isinstance(self.record.result, Measurement), f"record {self.record.number} holds no measurement"
        return self.record.result

    @property
    def confirms(self) -> bool:
        """Whether it is a round of a finals."""
        return self.record.role == "finalist"

    def samples(self, name: str) -> tuple[float, ...]:
        """A metric's value in each iteration where one iteration yields it, else in the run."""
        if name not in self.metrics:
            return ()
        if name not in _PER_ITERATION:
            return (self.metrics[name],)
        durations = [run.duration_s for run in self.measurement.iterations]
        if name == "duration_s":
            return tuple(durations)
        return tuple(self.metrics[name] * self.metrics["duration_s"] / duration for duration in durations)


class Finals:
    """The last finals: what its runs say of each plan by its key, and of the un-pipelined model by `BASELINE`. The
    objective, and all that follows from an iteration's duration, are levels: as `tuner.ranking.elimination` reads them,
    in a round as the rounds were on the whole. Other metrics are medians."""

    def __init__(self, runs: Sequence[PlanRun], objective: Objective) -> None:
        self.objective = objective
        self.first_round, own = last_finals([run.record for run in runs])
        numbers = {record.number for record in own}
        self._runs = by_name([run for run in runs if run.record.number in numbers])
        self.cells = {name: log_costs(group, self.first_round, objective) for name, group in self._runs.items()}
        """Log costs by round."""

    @functools.cached_property
    def rounds(self) -> dict[str, int]:
        """Rounds of each that was measured and missed one at most before it left."""
        counts = {name: sum(value is not None for value in row.values()) for name, row in self.cells.items()}
        return {name: count for name, count in counts.items() if count and max(self.cells[name]) - count < 1}

    def runs(self, name: str) -> list[PlanRun]:
        """The measurements of one of them."""
        return [run for run in self._runs.get(name, ()) if run.metrics]

    def spread(self, name: str, metric: str) -> Spread | None:
        """Level and quartiles of a metric; None where no run has it."""
        if metric not in self._fits:
            return measured_spread(self.runs(name), metric)
        fit, goal = self._fits[metric]
        if name not in fit.levels:
            return None
        rounds = [math.exp(goal.cost(cost)) for cost in fit.steady(name)]
        q1, q3 = (metrics.percentile(rounds, quantile) for quantile in (0.25, 0.75))
        level = math.exp(goal.cost(fit.levels[name]))
        return Spread(median=level, q1=q1, q3=q3, samples=len(rounds), runs=len(rounds))

    def values(self, name: str) -> dict[str, float]:
        """Every metric that any run has."""
        levels = {metric: spread.median for metric in self._fits if (spread := self.spread(name, metric))}
        return medians_of(self.runs(name)) | levels

    def state(self, rounds: tuple[int, int], rivals: Collection[str]) -> State | None:
        """How they stand between those that may be best; None where there were none."""
        if not self.cells:
            return None
        return decide(self.cells, min_rounds=rounds[0], max_rounds=rounds[1], rivals=rivals)

    @functools.cached_property
    def _fits(self) -> dict[str, tuple[Fit, Objective]]:
        own = () if self.objective.metric in _PER_ITERATION else (self.objective,)
        goals = [*own, *(Objective(metric=name) for name in sorted(_PER_ITERATION))]
        cells = ({name: log_costs(own, self.first_round, goal) for name, own in self._runs.items()} for goal in goals)
        return {goal.metric: (Fit(table), goal) for goal, table in zip(goals, cells, strict=True)}


def searched_runs(group: Sequence[PlanRun]) -> list[PlanRun]:
    """Those before the finals, if there are any; undisturbed ones, if any was."""
    searched = [run for run in group if not run.confirms] or list(group)
    return [run for run in searched if not run.measurement.telemetry.disturbances] or searched


def measured_spread(runs: Sequence[PlanRun], name: str) -> Spread | None:
    """Median and quartiles over the samples of all runs; None where no run has the metric."""
    if not (samples := _samples(runs, name)):
        return None
    q1, median, q3 = (metrics.percentile(samples, quantile) for quantile in (0.25, 0.5, 0.75))
    return Spread(median=median, q1=q1, q3=q3, samples=len(samples), runs=len(runs))


def medians_of(runs: Sequence[PlanRun]) -> dict[str, float]:
    """Every metric that any of the runs has."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    return {name: metrics.percentile(_samples(runs, name), 0.5) for name in names}


def _samples(runs: Sequence[PlanRun], name: str) -> list[float]:
    return sorted(sample for run in runs for sample in run.samples(name))


def last_finals(records: Sequence[Record]) -> tuple[int, tuple[Record, ...]]:
    """The finals that chose among all trials: number of its first round, which is behind all rounds of earlier finals,
    and its records. Plans measured after a finals call for a new one."""
    trials = [one.number for one in records if one.role == "trial" and isinstance(one.result, Measurement)]
    last_trial = max(trials, default=-1)
    finals = [record for record in records if record.role == "finalist" and record.round is not None]
    first_round = max((record.round + 1 for record in finals if record.number < last_trial), default=0)  # type: ignore[operator]
    return first_round, tuple(record for record in finals if record.number > last_trial)


def by_name(runs: Sequence[PlanRun]) -> dict[str, list[PlanRun]]:
    """Runs of each plan by its key, and those of the baseline by `BASELINE`."""
    found: dict[str, list[PlanRun]] = {}
    for run in runs:
        found.setdefault(run.record.effective.key if run.record.effective is not None else BASELINE, []).append(run)
    return found


def log_costs(runs: Sequence[PlanRun], first_round: int, objective: Objective) -> dict[int, float | None]:
    """Log cost of one plan's runs of a finals by round, counted from its first; None where the run failed."""
    found: dict[int, list[float]] = {}
    for run in runs:
        result = run.record.result
        if run.record.round is None or (isinstance(result, Failure) and result.kind == FailureKind.INTERRUPTED):
            continue
        values = found.setdefault(run.record.round - first_round, [])
        if (value := run.metrics.get(objective.metric, 0.0)) > 0:
            values.append(objective.cost(math.log(value)))
    return {number: statistics.median(values) if values else None for number, values in found.items()}


def unpaired(objective: Objective, ours: Spread | None, theirs: Spread | None) -> Ratio | None:
    """How many times better our median is, the two measured at different times; None without either."""
    gain = objective.gain(ours.median, theirs.median) if ours and theirs else None
    return None if gain is None else ratio_of(math.log(gain))


def separation_of(ranked: Sequence[Row], state: State | None, *, several: bool) -> Separation:
    """What the last finals, if any, says of its fastest plan, in words; the rows keep the constraints."""
    if not ranked:
        return Separation(text="no plan has a rank")
    if several:
        return Separation(text="of several objectives' front no plan is best in all: one is given for another")
    names = {row.key: f"{row.plan.describe()} · {row.effective.in_flight} in flight" for row in ranked}
    if len(names) == 1:
        return Separation(text="only one plan was ranked, there is no second to compare with")
    finalists = state.fit.ordered([row.key for row in ranked if row.in_finals]) if state else []
    if state is None or len(finalists) < 2:
        one, other, *_ = names.values()
        return Separation(text=f"{one} is not told apart from {other}: the two were not measured side by side")
    incumbent, *others = finalists
    gains = {key: gain for key in others if (gain := state.ratio(incumbent, key))}
    rivals = [key for key, gain in gains.items() if not gain.is_told]
    nearest = min(rivals or gains, key=lambda key: gains[key].value)
    gain = gains[nearest]
    if not rivals:
        text = (
            f"{names[incumbent]} beats {names[nearest]}{' and all other finalists' if len(gains) > 1 else ''}: by "
            f"{_gain_text(gain)} over {_rounds_text(gain.rounds)} (two equal plans would be told apart so 1 time in "
            f"{1 / ALPHA:.0f})"
        )
        return Separation(separated=True, text=text, rounds=state.rounds)
    further = f" and {len(rivals) - 1} more" if len(rivals) > 1 else ""
    told = f"{names[incumbent]} is not told apart from {names[nearest]}{further}"
    if state.rounds < MIN_ROUNDS:
        text = f"{told}: {_rounds_text(gain.rounds)} are too few"
    elif state.kind == "open":
        text = f"{told} by the {_rounds_text(state.rounds)} so far: {_gain_text(gain)}"
    else:
        text = f"tie: {told} over {_rounds_text(gain.rounds)}: {_gain_text(gain)}"
    return Separation(text=text, rounds=state.rounds, tied=(incumbent, *rivals))


def _rounds_text(count: int) -> str:
    return f"{count} interleaved round{'' if count == 1 else 's'}"


def _gain_text(gain: Ratio) -> str:
    """`3.1 % (1.9 to 4.3 %)`, with what the test leaves possible."""
    value, *ends = (100 * (end - 1) for end in (gain.value, gain.low, gain.high) if end is not None)
    return f"{value:.1f} %" + (f" ({ends[0]:.1f} to {ends[1]:.1f} %)" if ends else "")
