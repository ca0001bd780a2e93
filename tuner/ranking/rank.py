"""Records in order: which plan is best, by how much over the baseline, and how sure that is.

The best of many noisy measurements looks better than it is, because luck helped to choose it (the winner's curse).
So the finalists are measured again, in interleaved rounds that chose nothing, and wherever a plan has such rounds its
search values are set aside. What it gains over others is then read off these rounds, where drift of the machine falls
on all alike (`tuner.ranking.elimination`); plans of the search alone compare by the values of the search.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipetune.bench.record import SHARED_DEVICE_NOTE, Failure, FailureKind, Measurement, OutputCheck, Record
from pipetune.bench.spec import Plan
from pipetune.tuner.config.schema import GENERATE_OBJECTIVE, SCORE_OBJECTIVE, Constraint, SpaceConfig
from pipetune.tuner.planning.partition.splits import unevenness
from pipetune.tuner.ranking import runs as r
from pipetune.tuner.ranking.order import ordered, pareto_front
from pipetune.tuner.ranking.values import BaselineRow, FailureRow, Objective, Ranking, Rival, Row, Spread
from pipetune.tuner.stats.ratios import Ratio

_UNBOUND = SpaceConfig()
_DEFAULT_OBJECTIVE = Objective(metric="output_throughput")


def rank(
    records: Sequence[Record],
    objectives: Sequence[Objective] = (_DEFAULT_OBJECTIVE,),
    constraints: Sequence[Constraint] = (),
    rounds: tuple[int, int] = (3, 8),
    *,
    space: SpaceConfig = _UNBOUND,
) -> Ranking:
    """Orders what was measured in one study, of one model, workload and machine; the order of the records does not
    matter.

    Records of one effective plan are one row. Its values are those of the last finals (of `rounds`, at least and at
    most), or where it took no part, medians over all iterations of its search runs (undisturbed ones, if any was). Rows
    that keep the constraints come first, others have no rank, nor have plans outside the bounds of `space`, which are
    references; of the rows the finalists come first. With one objective these stand in the order of their levels; of
    those that are tied with the fastest, the one that takes least comes first. With several objectives the knee of the
    front comes first, then the front, whose rows are marked as non-dominated, and the objectives in turn decide the
    rest.
    """
    assert objectives, "a ranking needs an objective"
    first = objectives[0]
    records = sorted(records, key=lambda record: record.number)
    runs = [r.PlanRun(record) for record in records]
    finals = r.Finals(runs, first)
    measured = [run for run in runs if run.metrics]
    plans = r.by_name([run for run in measured if run.record.effective])
    failed_runs = Counter(
        record.effective.key
        for record in records
        if record.effective and isinstance(record.result, Failure) and record.result.kind != FailureKind.INTERRUPTED
    )
    rows = [_row(group, finals, objectives, constraints, failed_runs[key], space) for key, group in plans.items()]
    fit = [row for row in rows if row.feasible and not row.unranked_because]
    state = finals.state(rounds, {row.key for row in fit})
    front = pareto_front(fit, objectives)
    rows = [row.model_copy(update={"on_front": row.key in front}) for row in rows]
    rows, recommended_because = ordered(rows, objectives, state)
    sound = [row for row in rows if row.feasible and not row.unranked_because]
    separation = r.separation_of(sound, state, several=len(objectives) > 1)

    sweep, baseline = _baselines([run for run in measured if not run.record.effective], finals, constraints)
    rows.sort(key=lambda row: row.unranked_because is not None)
    compared = [row for row in rows if row.is_reference or not row.unranked_because]
    single = next((row for row in compared if len(row.plan.devices) == 1), None)
    searched = {key: r.measured_spread(r.searched_runs(group), first.metric) for key, group in plans.items()}
    searched[r.BASELINE] = next(
        (row.spread for row in sweep if baseline and row.batch_size == baseline.batch_size), None
    )

    def gain(ours: str, theirs: str, *, anyhow: bool = False) -> Ratio | None:
        """Within the finals that ours was in; else, or `anyhow` without theirs, by the search's values."""
        if state and ours in finals.rounds and (theirs in finals.rounds or not anyhow):
            return state.ratio(ours, theirs) if theirs in finals.rounds else None
        return r.unpaired(first, searched.get(ours), searched.get(theirs))

    def complete(row: Row, position: int) -> Row:
        place = position if row.feasible and not row.unranked_because else None
        update: dict[str, object] = {"rank": place, "tied": row.key in separation.tied}
        if row.is_reference or not row.unranked_because:
            update["speedup_over_baseline"] = gain(row.key, r.BASELINE)
            update["speedup_over_single_stage"] = gain(row.key, single.key) if single else None
        return row.model_copy(update=update)

    rows = [complete(row, at) for at, row in enumerate(rows, start=1)]
    ranked = tuple(row for row in rows if not row.unranked_because)
    other = _rival(ranked)
    # The most even of an engine's longest pipelines at its own limits, by the finals where it ran there.
    defaults = (row for row in ranked if row.plan.is_engine_default)
    default = min(defaults, key=lambda row: (not row.in_finals, unevenness(row.plan.layer_counts)), default=None)
    return Ranking(
        objectives=tuple(objectives),
        constraints=tuple(constraints),
        rows=ranked,
        unranked=tuple(row for row in rows if row.unranked_because),
        baseline=baseline,
        baseline_sweep=sweep,
        single_stage=next((row for row in rows if single and row.key == single.key), None),
        rival=Rival(row=other, gain=gain(ranked[0].key, other.key, anyhow=True)) if other else None,
        engine_default=Rival(
            row=default, gain=gain(ranked[0].key, default.key, anyhow=True) if default is not ranked[0] else None
        )
        if default
        else None,
        failures=tuple(
            FailureRow(
                record=record.number,
                role=record.role,
                plan=record.spec.plan if record.spec else None,
                batch_size=size if isinstance(size := (record.params or {}).get("batch_size"), int) else None,
                failure=record.result,
            )
            for record in records
            if isinstance(record.result, Failure)
        ),
        separation=separation,
        recommended_because=recommended_because,
    )


def _rival(ranked: Sequence[Row]) -> Row | None:
    """The best pipeline of several stages where replicas are best, the best replicas where a pipeline is."""
    if not ranked or not ranked[0].feasible:
        return None
    others = (row for row in ranked if row.feasible and len(row.plan.devices) > 1)
    return next((row for row in others if (row.plan.replicas > 1) != (ranked[0].plan.replicas > 1)), None)


def _row(
    group: Sequence[r.PlanRun],
    finals: r.Finals,
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    failed_runs: int,
    space: SpaceConfig,
) -> Row:
    """A row of what its own runs say."""
    effective = group[0].record.effective
    assert effective is not None
    used, pooled = _pooled(group, finals, effective.key)
    values, value = pooled["metrics"], pooled["spread"].median if pooled["spread"] else 0.0
    if all(run.measurement.check is None for run in group):
        pooled["notes"] += ("output not checked",)
    typical = min(
        used,
        key=lambda run: (
            not any(trace.compute_start_s for trace in run.measurement.iterations[0].stages),
            abs(run.metrics.get(objectives[0].metric, 0.0) - value),
        ),
    )
    unranked_because = next(
        (why for run in group if (why := _why_unranked(run.measurement, effective.plan))),
        next((f"{goal} was not measured" for goal in objectives if goal.metric not in values), None),
    )
    outside = space.why_outside(effective.plan) if unranked_because is None else None
    return Row(
        **pooled,
        effective=effective,
        typical_record=typical.record.number,
        broken_constraints=tuple(why for constraint in constraints if (why := why_broken(constraint, values))),
        unranked_because=unranked_because or outside,
        is_reference=outside is not None,
        failed_runs=failed_runs,
    )


def _pooled(group: Sequence[r.PlanRun], finals: r.Finals, name: str | None) -> tuple[list[r.PlanRun], dict[str, Any]]:
    """What a row of either kind says of all of its runs, and of those that its values come from, which are given too;
    its name in the finals is None for values of the search, whatever came later."""
    rounds = finals.rounds.get(name, 0) if name else 0
    used = finals.runs(name) if name and rounds else r.searched_runs(group)

    def spread(metric: str) -> Spread | None:
        return finals.spread(name, metric) if name and rounds else r.measured_spread(used, metric)

    return used, {
        "spread": spread(finals.objective.metric),
        "throughput": spread(GENERATE_OBJECTIVE) or spread(SCORE_OBJECTIVE),
        "metrics": finals.values(name) if name and rounds else r.medians_of(used),
        "in_finals": rounds > 0,
        "confirmed": rounds > 1,
        "records": tuple(run.record.number for run in group),
        "used_records": tuple(run.record.number for run in used),
        "notes": tuple(dict.fromkeys(note for run in group for note in run.measurement.notes)),
        "disturbed_runs": sum(bool(run.measurement.telemetry.disturbances) for run in used),
    }


def why_broken(constraint: Constraint, values: Mapping[str, float]) -> str | None:
    """None when the measured values keep the constraint, else why not; what was not measured keeps nothing."""
    if constraint.metric not in values:
        return f"{constraint.metric} was not measured"
    value = values[constraint.metric]
    if constraint.excess(value) <= 0:
        return None
    return f"{constraint.metric} is {value:.4g}, not {constraint.operator} {constraint.limit:g}"


def _why_unranked(measurement: Measurement, plan: Plan) -> str | None:
    """Why a measurement is no basis for a claim of speed."""
    if (check := measurement.check) is not None and _is_wrong(check):
        return (
            f"wrong output: logits differ by {check.max_logit_error:.3g} (tolerance {check.tolerance:.3g}), "
            f"{check.argmax_flips} argmax flips"
        )
    doubled = len(set(plan.devices)) < len(plan.devices)
    if doubled or any(note.startswith(SHARED_DEVICE_NOTE) for note in measurement.notes):
        return "stages share a GPU, which proves correctness and never speed"
    return None


def _is_wrong(check: OutputCheck) -> bool:
    """Whether a comparison does not hold what a measurement promises. Where positions were counted, a few of a mixture
    of experts may lie beyond the tolerance: whoever measured judged them, and gave a failure where they were too
    many."""
    if check.typical_error is not None and check.typical_tolerance is not None:
        return check.typical_error > check.typical_tolerance
    return check.argmax_flips > 0 or check.max_logit_error > check.tolerance


def _baselines(
    runs: Sequence[r.PlanRun], finals: r.Finals, constraints: Sequence[Constraint]
) -> tuple[tuple[BaselineRow, ...], BaselineRow | None]:
    """The un-pipelined model at every batch size tried, and at its best one. The best is chosen by the sweep, among
    those that keep the constraints if any does, unless the finals chose already."""
    by_size: dict[int, list[r.PlanRun]] = {}
    for run in runs:
        by_size.setdefault(run.measurement.batch_size or len(run.measurement.order), []).append(run)

    def row(size: int, name: str | None = None) -> BaselineRow:
        return BaselineRow(**_pooled(by_size[size], finals, name)[1], batch_size=size)

    sweep = {size: row(size) for size in sorted(by_size)}

    def order(size: int) -> tuple[bool, bool, bool, float, float]:
        row = sweep[size]
        broken = any(why_broken(constraint, row.metrics) for constraint in constraints)
        cost = finals.objective.cost(row.value) if row.value is not None else 0.0
        was_chosen = any(run.confirms for run in by_size[size])
        return not was_chosen, broken, row.value is None, cost, -row.throughput.median

    return tuple(sweep.values()), row(min(sweep, key=order), r.BASELINE) if sweep else None
