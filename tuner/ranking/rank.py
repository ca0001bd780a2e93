"""Records in order: which plan is best, by how much over the baseline, and how sure that is.

The best of many noisy measurements looks better than it is, because luck helped to choose it (the winner's curse).
So the finalists are measured again, in interleaved rounds that chose nothing, and wherever a plan has such rounds its
search values are set aside. Gains are ratios within a round, where drift of the machine falls on both sides alike. The
order of the finalists, and whether the fastest is told apart, come from `tuner.ranking.elimination`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pipetune.bench.record import SHARED_DEVICE_NOTE, Failure, FailureKind, Measurement, OutputCheck, Record
from pipetune.bench.spec import Plan
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.ranking.elimination import State, decide
from pipetune.tuner.ranking.order import ordered, pareto_front
from pipetune.tuner.ranking.rounds import gain_over, last_finals, log_costs, separation_of
from pipetune.tuner.ranking.runs import (
    PlanRun,
    chosen_runs,
    measured_spread,
    medians_of,
    searched_runs,
    throughput_spread,
)
from pipetune.tuner.ranking.values import BaselineRow, FailureRow, Objective, Ranking, Rival, Row

__all__ = ["Objective", "Ranking", "Row", "rank"]

_DEFAULT_OBJECTIVE = Objective(metric="output_throughput")


def rank(
    records: Sequence[Record],
    objectives: Sequence[Objective] = (_DEFAULT_OBJECTIVE,),
    constraints: Sequence[Constraint] = (),
    rounds: tuple[int, int] = (3, 8),
) -> Ranking:
    """Orders what was measured; the order of the records does not matter.

    Records of one effective plan are one row. Its values are medians over all iterations of its finalist rounds,
    or where it has none, of its search runs (undisturbed ones, if any was). Rows that keep the constraints come
    first; of those the confirmed ones, which missed one round of the last finals at most until they were told to be
    behind. With one objective these stand in the order of their common rounds; of those that are not told apart from
    the fastest and measured within a practical margin of it, the one that takes least comes first. With several
    objectives the knee of the front comes first, then the front, and the objectives in turn decide the rest.

    Args:
        records: of one study: one model, workload and machine.
        objectives: the first orders; with several, the non-dominated rows are marked.
        constraints: a row that breaks one has no rank.
        rounds: how many the finals have at least and at most.
    """
    assert objectives, "a ranking needs an objective"
    first = objectives[0]
    records = sorted(records, key=lambda record: record.number)
    runs = [PlanRun(record, record.result) for record in records if isinstance(record.result, Measurement)]
    plans: dict[str, list[PlanRun]] = {}
    for run in runs:
        if run.measurement.method == "pipeline" and run.record.effective is not None:
            plans.setdefault(run.record.effective.key, []).append(run)
    failed_runs = Counter(
        record.effective.key
        for record in records
        if record.effective and isinstance(record.result, Failure) and record.result.kind != FailureKind.INTERRUPTED
    )
    cells = _final_cells(records, first)
    rows = [
        _row(group, objectives, constraints).model_copy(
            update={"confirmed": _is_confirmed(cells.get(key, {})), "failed_runs": failed_runs[key]}
        )
        for key, group in plans.items()
    ]
    front = pareto_front([row for row in rows if row.feasible and not row.unranked_because], objectives)
    rows = [row.model_copy(update={"on_front": row.key in front}) for row in rows]
    state = _finals(rows, cells, rounds)
    rows, recommended_because = ordered(rows, objectives, state)

    sweep, baseline = _baselines([run for run in runs if run.measurement.method != "pipeline"], first, constraints)
    base_runs = [run for run in runs if baseline and run.record.number in baseline.records]
    rows.sort(key=lambda row: row.unranked_because is not None)
    single = next((row for row in rows if len(row.plan.devices) == 1), None)

    def complete(row: Row, position: int | None) -> Row:
        update: dict[str, object] = {"rank": position, "recommended": position == 1}
        if base_runs:
            update["speedup_over_baseline"] = gain_over(first, plans[row.key], base_runs)
        if single:
            update["speedup_over_single_stage"] = gain_over(first, plans[row.key], plans[single.key])
        return row.model_copy(update=update)

    for_speed = [row for row in rows if not row.unranked_because]
    ranked = tuple(complete(row, index if row.feasible else None) for index, row in enumerate(for_speed, start=1))
    unranked = tuple(row for row in rows if row.unranked_because)
    other = _rival(ranked)
    return Ranking(
        objectives=tuple(objectives),
        constraints=tuple(constraints),
        rows=ranked,
        unranked=unranked,
        baseline=baseline,
        baseline_sweep=sweep,
        single_stage=next((row for row in (*ranked, *unranked) if single and row.key == single.key), None),
        rival=Rival(row=other, gain=gain_over(first, plans[ranked[0].key], plans[other.key])) if other else None,
        failures=tuple(
            FailureRow(
                record=record.number,
                role=record.role,
                trial_number=record.trial_number,
                plan=record.spec.plan if record.spec else None,
                batch_size=_batch_size(record),
                failure=record.result,
            )
            for record in records
            if isinstance(record.result, Failure)
        ),
        separation=separation_of([row for row in ranked if row.feasible], state, several=len(objectives) > 1),
        recommended_because=recommended_because,
    )


def _rival(ranked: Sequence[Row]) -> Row | None:
    """The best pipeline of several stages where replicas are best, the best replicas where a pipeline is."""
    if not ranked or not ranked[0].feasible:
        return None
    replicated = ranked[0].plan.replicas > 1
    others = (row for row in ranked if row.feasible and len(row.plan.devices) > 1)
    return next((row for row in others if (row.plan.replicas > 1) != replicated), None)


def _batch_size(record: Record) -> int | None:
    size = (record.params or {}).get("batch_size")
    return size if isinstance(size, int) else None


def _final_cells(records: Sequence[Record], objective: Objective) -> dict[str, dict[int, float | None]]:
    """What each plan did in the last finals: its log cost by round."""
    first_round, finals = last_finals(records)
    by_key: dict[str, list[Record]] = {}
    for record in finals:
        if record.effective is not None:
            by_key.setdefault(record.effective.key, []).append(record)
    return {key: log_costs(group, first_round, objective) for key, group in by_key.items()}


def _is_confirmed(cells: Mapping[int, float | None]) -> bool:
    """Whether a plan was measured in the last finals, and missed one of its rounds at most before it left."""
    measured = sum(value is not None for value in cells.values())
    return measured > 0 and max(cells) - measured < 1


def _finals(
    rows: Iterable[Row], cells: Mapping[str, Mapping[int, float | None]], rounds: tuple[int, int]
) -> State | None:
    """How the last finals stand among the rows that keep the constraints; None without any."""
    finalists = {row.key: cells[row.key] for row in rows if row.confirmed and row.feasible and not row.unranked_because}
    return decide(finalists, min_rounds=rounds[0], max_rounds=rounds[1]) if finalists else None


def _row(group: Sequence[PlanRun], objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> Row:
    objective = objectives[0]
    used = chosen_runs(group)
    effective = group[0].record.effective
    assert effective is not None
    values = medians_of(used)
    spread = measured_spread(used, objective.metric)
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
        throughput=throughput_spread(used),
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
    if check is not None and _is_wrong(check):
        return (
            f"wrong output: logits differ by {check.max_logit_error:.3g} (tolerance {check.tolerance:.3g}), "
            f"{check.argmax_flips} argmax flips"
        )
    doubled = len(set(plan.devices)) < len(plan.devices)
    if doubled or any(note.startswith(SHARED_DEVICE_NOTE) for note in measurement.notes):
        return "stages share a GPU, which proves correctness and never speed"
    return None


def _is_wrong(check: OutputCheck) -> bool:
    """Whether a comparison does not hold what a measurement promises.

    Where positions were counted, a few of a mixture of experts may lie beyond the tolerance: whoever measured judged
    them, and gave a failure where they were too many.
    """
    if check.typical_error is not None and check.typical_tolerance is not None:
        return check.typical_error > check.typical_tolerance
    return check.argmax_flips > 0 or check.max_logit_error > check.tolerance


def _baselines(
    runs: Sequence[PlanRun], objective: Objective, constraints: Sequence[Constraint]
) -> tuple[tuple[BaselineRow, ...], BaselineRow | None]:
    """The un-pipelined model at every batch size tried, and at its best one.

    The best is chosen by the sweep, among those that keep the constraints if any does, unless the finals chose already.
    """
    by_size: dict[int, list[PlanRun]] = {}
    for run in runs:
        by_size.setdefault(run.measurement.batch_size or len(run.measurement.order), []).append(run)
    sweep = {
        size: _baseline_row(size, group, searched_runs(group) or group, objective) for size, group in by_size.items()
    }

    def order(size: int) -> tuple[bool, bool, bool, float, float]:
        row = sweep[size]
        broken = any(why_broken(constraint, row.metrics) for constraint in constraints)
        cost = objective.cost(row.value) if row.value is not None else 0.0
        return not row.confirmed, broken, row.value is None, cost, -row.throughput.median

    if not sweep:
        return (), None
    best = min(sweep, key=order)
    rows = tuple(sweep[size] for size in sorted(sweep))
    return rows, _baseline_row(best, by_size[best], chosen_runs(by_size[best]), objective)


def _baseline_row(size: int, group: Sequence[PlanRun], used: Sequence[PlanRun], objective: Objective) -> BaselineRow:
    spread = measured_spread(used, objective.metric)
    return BaselineRow(
        batch_size=size,
        value=spread.median if spread else None,
        spread=spread,
        throughput=throughput_spread(used),
        metrics=medians_of(used),
        confirmed=any(run.confirms for run in group),
        records=tuple(run.record.number for run in group),
        used_records=tuple(run.record.number for run in used),
        notes=tuple(dict.fromkeys(note for run in group for note in run.measurement.notes)),
        disturbed_runs=sum(bool(run.measurement.telemetry.disturbances) for run in used),
    )
