"""The runs of one plan pooled: which of them count, and their medians and spreads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipetune.bench import metrics
from pipetune.bench.record import Measurement, Record
from pipetune.tuner.config.schema import GENERATE_OBJECTIVE, SCORE_OBJECTIVE
from pipetune.tuner.ranking.values import Spread

_PER_ITERATION = frozenset({"output_throughput", "total_token_throughput", "request_throughput", "duration_s"})


class PlanRun:
    """A record that holds a measurement, with its metrics derived once."""

    def __init__(self, record: Record, measurement: Measurement) -> None:
        self.record = record
        self.measurement = measurement
        self.metrics = metrics.derive(measurement)

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


def throughput_name(names: Collection[str]) -> str:
    """Tokens put out in a second; where texts are scored and none are, all tokens."""
    return GENERATE_OBJECTIVE if GENERATE_OBJECTIVE in names else SCORE_OBJECTIVE


def throughput_spread(runs: Sequence[PlanRun]) -> Spread:
    """Spread of what `throughput_name` names, over at least one run."""
    return spread_of(runs, throughput_name({name for run in runs for name in run.metrics}))


def chosen_runs(group: Sequence[PlanRun]) -> list[PlanRun]:
    """Those that a plan's values come from: its finalist rounds, else its runs of the search."""
    return [run for run in group if run.confirms] or searched_runs(group)


def searched_runs(group: Sequence[PlanRun]) -> list[PlanRun]:
    """Those before the finals; undisturbed ones, if any was."""
    searched = [run for run in group if not run.confirms]
    return [run for run in searched if not run.measurement.telemetry.disturbances] or searched


def measured_spread(runs: Sequence[PlanRun], name: str) -> Spread | None:
    """None where no run has the metric."""
    return spread_of(runs, name) if any(name in run.metrics for run in runs) else None


def spread_of(runs: Sequence[PlanRun], name: str) -> Spread:
    """Median and quartiles over the samples of all runs; at least one run has the metric."""
    samples = [sample for run in runs for sample in run.samples(name)]
    q1, median, q3 = (metrics.percentile(samples, quantile) for quantile in (0.25, 0.5, 0.75))
    return Spread(median=median, q1=q1, q3=q3, samples=len(samples), runs=len(runs))


def medians_of(runs: Sequence[PlanRun]) -> dict[str, float]:
    """Every metric that any of the runs has."""
    return {name: spread_of(runs, name).median for name in dict.fromkeys(name for run in runs for name in run.metrics)}
