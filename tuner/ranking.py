"""Records in order: which plan is best, by how much over the baseline, and how sure that is.

The best of many noisy measurements looks better than it is, because luck helped to choose it (the winner's curse).
So the finalists are measured again, in interleaved rounds that chose nothing, and wherever a plan has such rounds its
search values are set aside. Gains are ratios within a round, where the machine's mood falls on both sides alike.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from bench import metrics
from bench.record import SHARED_DEVICE_NOTE, Failure, FailureKind, Measurement, Record
from bench.spec import Plan
from tuner.config import Constraint
from tuner.standings import BaselineRow, FailureRow, Objective, Ranking, Ratio, Row, Separation, Spread

__all__ = ["Objective", "Ranking", "Row", "rank"]

MIN_ROUNDS = 3
"""Rounds below which winning every one of them separates nothing."""

_PER_ITERATION = frozenset({"output_throughput", "total_token_throughput", "request_throughput", "duration_s"})
_DEFAULT_OBJECTIVE = Objective(metric="output_throughput")


class _Run:
    """A record that holds a measurement, with its metrics derived once."""

    def __init__(self, record: Record, measurement: Measurement) -> None:
        self.record = record
        self.measurement = measurement
        self.metrics = metrics.derive(measurement)

    @property
    def confirms(self) -> bool:
        return self.record.role == "finalist"

    def samples(self, name: str) -> tuple[float, ...]:
        """Of each iteration where one iteration yields the metric, else of the run."""
        if name not in self.metrics:
            return ()
        if name not in _PER_ITERATION:
            return (self.metrics[name],)
        durations = [run.duration_s for run in self.measurement.iterations]
        if name == "duration_s":
            return tuple(durations)
        return tuple(self.metrics[name] * self.metrics["duration_s"] / duration for duration in durations)


def rank(
    records: Sequence[Record],
    objectives: Sequence[Objective] = (_DEFAULT_OBJECTIVE,),
    constraints: Sequence[Constraint] = (),
) -> Ranking:
    """Orders what was measured; the order of the records does not matter.

    Records of one effective plan are one row. Its values are medians over all iterations of its finalist rounds,
    or where it has none, of its search runs (undisturbed ones, if any was). Rows that keep the constraints come
    first; of those the confirmed ones, which missed one finalist round at most; of those the Pareto front; then the
    objectives in turn decide.

    Args:
        records: of one study: one model, workload and machine.
        objectives: the first orders; with several, the non-dominated rows are marked.
        constraints: a row that breaks one has no rank.
    """
    assert objectives, "a ranking needs an objective"
    first = objectives[0]
    records = sorted(records, key=lambda record: record.number)
    runs = [_Run(record, record.result) for record in records if isinstance(record.result, Measurement)]
    plans: dict[str, list[_Run]] = {}
    for run in runs:
        if run.measurement.method == "pipeline" and run.record.effective is not None:
            plans.setdefault(run.record.effective.key, []).append(run)
    failed_runs = Counter(
        record.effective.key
        for record in records
        if record.effective and isinstance(record.result, Failure) and record.result.kind != FailureKind.INTERRUPTED
    )
    rounds = {key: len({run.record.round for run in group if run.confirms}) for key, group in plans.items()}
    enough = max(1, max(rounds.values(), default=0) - 1)
    rows = [
        _row(group, objectives, constraints).model_copy(
            update={"confirmed": rounds[key] >= enough, "failed_runs": failed_runs[key]}
        )
        for key, group in plans.items()
    ]
    front = _pareto_front([row for row in rows if row.feasible and not row.unranked_because], objectives)
    rows = _ordered([row.model_copy(update={"on_front": row.key in front}) for row in rows], objectives)

    sweep, baseline = _baselines([run for run in runs if run.measurement.method == "hf_generate"], first, constraints)
    base_runs = [run for run in runs if baseline and run.record.number in baseline.records]
    single = next((row for row in rows if "single_stage" in row.roles), None)

    def complete(row: Row, position: int | None) -> Row:
        update: dict[str, object] = {"rank": position}
        if baseline:
            update["speedup_over_baseline"] = _ratio(first, plans[row.key], row.value, base_runs, baseline.value)
        if single:
            update["speedup_over_single_stage"] = _ratio(
                first, plans[row.key], row.value, plans[single.key], single.value
            )
        return row.model_copy(update=update)

    for_speed = [row for row in rows if not row.unranked_because]
    ranked = tuple(complete(row, index if row.feasible else None) for index, row in enumerate(for_speed, start=1))
    unranked = tuple(row for row in rows if row.unranked_because)
    return Ranking(
        objectives=tuple(objectives),
        constraints=tuple(constraints),
        rows=ranked,
        unranked=unranked,
        baseline=baseline,
        baseline_sweep=sweep,
        single_stage=next((row for row in (*ranked, *unranked) if single and row.key == single.key), None),
        failures=tuple(
            FailureRow(
                record=record.number,
                role=record.role,
                trial_number=record.trial_number,
                plan=record.spec.plan if record.spec else None,
                failure=record.result,
            )
            for record in records
            if isinstance(record.result, Failure)
        ),
        separation=_separation([row for row in ranked if row.feasible], plans, first),
    )


def _chosen(group: Sequence[_Run]) -> list[_Run]:
    """The runs that a row's values come from."""
    confirming = [run for run in group if run.confirms]
    if confirming:
        return confirming
    return [run for run in group if not run.measurement.telemetry.disturbances] or list(group)


def _measured_spread(runs: Sequence[_Run], name: str) -> Spread | None:
    """None where no run has the metric."""
    return _spread(runs, name) if any(name in run.metrics for run in runs) else None


def _spread(runs: Sequence[_Run], name: str) -> Spread:
    samples = [sample for run in runs for sample in run.samples(name)]
    q1, median, q3 = (metrics.percentile(samples, quantile) for quantile in (0.25, 0.5, 0.75))
    return Spread(median=median, q1=q1, q3=q3, samples=len(samples), runs=len(runs))


def _medians(runs: Sequence[_Run]) -> dict[str, float]:
    return {name: _spread(runs, name).median for name in dict.fromkeys(name for run in runs for name in run.metrics)}


def _row(group: Sequence[_Run], objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> Row:
    objective = objectives[0]
    used = _chosen(group)
    effective = group[0].record.effective
    assert effective is not None
    values = _medians(used)
    spread = _measured_spread(used, objective.metric)
    value = spread.median if spread else None
    typical = min(
        used,
        key=lambda run: (
            not any(trace.compute_start_s for trace in run.measurement.iterations[0].stages),
            abs(run.metrics.get(objective.metric, 0.0) - (value or 0.0)),
        ),
    )
    notes = dict.fromkeys(note for run in group for note in run.measurement.notes)
    if all(run.measurement.check is None for run in group):
        notes["output not checked"] = None
    return Row(
        key=effective.key,
        effective=effective,
        rank=None,
        value=value,
        spread=spread,
        throughput=_spread(used, "output_throughput"),
        metrics=values,
        confirmed=False,  # the caller knows the other plans' rounds
        roles=tuple(sorted({run.record.role for run in group})),
        records=tuple(run.record.number for run in group),
        used_records=tuple(run.record.number for run in used),
        typical_record=typical.record.number,
        broken_constraints=tuple(why for constraint in constraints if (why := why_broken(constraint, values))),
        unranked_because=next(
            (why for run in group if (why := _why_unranked(run.measurement, effective.plan))),
            next((f"{goal} was not measured" for goal in objectives if goal.metric not in values), None),
        ),
        notes=tuple(notes),
        disturbed_runs=sum(bool(run.measurement.telemetry.disturbances) for run in used),
    )


def why_broken(constraint: Constraint, values: Mapping[str, float]) -> str | None:
    """None when the measured values keep the constraint, else why not; what was not measured keeps nothing."""
    if constraint.metric not in values:
        return f"{constraint.metric} was not measured"
    value = values[constraint.metric]
    return (
        None
        if constraint.excess(value) <= 0
        else f"{constraint.metric} is {value:.4g}, not {constraint.operator} {constraint.limit:g}"
    )


def _why_unranked(measurement: Measurement, plan: Plan) -> str | None:
    """Why a measurement is no basis for a claim of speed."""
    check = measurement.check
    if check is not None and (check.argmax_flips > 0 or check.max_logit_error > check.tolerance):
        return (
            f"wrong output: logits differ by {check.max_logit_error:.3g} (tolerance {check.tolerance:.3g}), "
            f"{check.argmax_flips} argmax flips"
        )
    doubled = len({stage.device for stage in plan.stages}) < len(plan.stages)
    if doubled or any(note.startswith(SHARED_DEVICE_NOTE) for note in measurement.notes):
        return "stages share a GPU, which proves correctness and never speed"
    return None


def _baselines(
    runs: Sequence[_Run], objective: Objective, constraints: Sequence[Constraint]
) -> tuple[tuple[BaselineRow, ...], BaselineRow | None]:
    """The un-pipelined model at every batch size tried, and at its best one.

    That is the one measured again with the finalists; else the best of those that keep the constraints.
    """
    by_size: dict[int, list[_Run]] = {}
    for run in runs:
        by_size.setdefault(run.measurement.batch_size or len(run.measurement.order), []).append(run)
    rows = []
    for size, group in sorted(by_size.items()):
        used = _chosen(group)
        spread = _measured_spread(used, objective.metric)
        rows.append(
            BaselineRow(
                batch_size=size,
                value=spread.median if spread else None,
                spread=spread,
                throughput=_spread(used, "output_throughput"),
                metrics=_medians(used),
                confirmed=any(run.confirms for run in group),
                records=tuple(run.record.number for run in group),
                used_records=tuple(run.record.number for run in used),
                notes=tuple(dict.fromkeys(note for run in group for note in run.measurement.notes)),
                disturbed_runs=sum(bool(run.measurement.telemetry.disturbances) for run in used),
            )
        )

    def order(row: BaselineRow) -> tuple[bool, bool, bool, float, float]:
        broken = any(why_broken(constraint, row.metrics) for constraint in constraints)
        cost = objective.cost(row.value) if row.value is not None else 0.0
        return not row.confirmed, broken, row.value is None, cost, -row.metrics["output_throughput"]

    return tuple(rows), min(rows, key=order, default=None)


def _costs(row: Row, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Less is better; a metric that is missing is worst."""
    return tuple(
        objective.cost(row.metrics[objective.metric]) if objective.metric in row.metrics else float("inf")
        for objective in objectives
    )


def _ordered(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[Row]:
    return sorted(
        rows,
        key=lambda row: (
            not row.feasible,
            not row.confirmed,
            not row.on_front if len(objectives) > 1 else False,
            _costs(row, objectives),
            row.key,
        ),
    )


def _pareto_front(rows: Sequence[Row], objectives: Sequence[Objective]) -> frozenset[str]:
    """Keys of the rows that no other dominates."""
    costs = {row.key: _costs(row, objectives) for row in rows}

    def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return frozenset(key for key, own in costs.items() if not any(dominates(cost, own) for cost in costs.values()))


def _rounds(runs: Sequence[_Run], objective: Objective) -> Mapping[int, float]:
    """The objective in each interleaved round."""
    by_round: dict[int, list[float]] = {}
    for run in runs:
        if run.confirms and run.record.round is not None and objective.metric in run.metrics:
            by_round.setdefault(run.record.round, []).append(run.metrics[objective.metric])
    return {number: statistics.median(values) for number, values in by_round.items()}


def _ratio(
    objective: Objective,
    ours: Sequence[_Run],
    our_value: float | None,
    theirs: Sequence[_Run],
    their_value: float | None,
) -> Ratio | None:
    our_rounds, their_rounds = _rounds(ours, objective), _rounds(theirs, objective)
    gains = [
        gain
        for number in sorted(our_rounds.keys() & their_rounds.keys())
        if (gain := objective.gain(our_rounds[number], their_rounds[number])) is not None
    ]
    if gains:
        return Ratio(value=statistics.median(gains), low=min(gains), high=max(gains), rounds=len(gains))
    if our_value is None or their_value is None or (gain := objective.gain(our_value, their_value)) is None:
        return None
    return Ratio(value=gain)


def _separation(ranked: Sequence[Row], plans: Mapping[str, Sequence[_Run]], objective: Objective) -> Separation:
    """Best against second by their common rounds: separated only when the best won every one of them."""
    if not ranked:
        return Separation(separated=False, text="no plan was measured that can be ranked")
    if len(ranked) == 1:
        return Separation(separated=False, text="only one plan was ranked, there is no second to compare with")
    best, second = ranked[:2]
    names = [f"{row.plan.describe()} · {row.effective.in_flight} in flight" for row in (best, second)]
    ours, theirs = (_rounds(plans[row.key], objective) for row in (best, second))
    common = sorted(ours.keys() & theirs.keys())
    won = [objective.cost(ours[number]) < objective.cost(theirs[number]) for number in common]
    if not common:
        text = f"{names[0]} is not told apart from {names[1]}: the two were not measured side by side"
        return Separation(separated=False, text=text)
    if len(common) < MIN_ROUNDS:
        text = f"{names[0]} is not told apart from {names[1]}: {len(common)} common rounds are too few"
    elif all(won):
        text = f"{names[0]} beat {names[1]} in all {len(common)} interleaved rounds"
    else:
        text = f"tie within noise: {names[0]} won {sum(won)} of {len(common)} rounds against {names[1]}"
    separated = len(common) >= MIN_ROUNDS and all(won)
    return Separation(separated=separated, text=text, wins=sum(won), rounds=len(common))
