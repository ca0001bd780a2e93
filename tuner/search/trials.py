"""The trials of a study: what must be repeated, then the head of the analytic ranking, then what TPE proposes."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import time

from bench import metrics
from bench.record import Failure, FailureKind, Measurement, Record
from bench.spec import EffectivePlan
from tuner.planning.cost import CostModel
from tuner.progress import values_text
from tuner.search.head import head
from tuner.search.proposals import Proposals
from tuner.search.resolver import Resolver, identity
from tuner.search.runs import TRANSIENT, Runs, interruption, timestamp
from tuner.search.space import Point, SearchSpace
from tuner.search.stop import Interrupted
from tuner.standings import Objective
from tuner.store import was_interrupted


class Search:
    """Runs trials until there are enough, time is up, or nothing new is left."""

    def __init__(self, runs: Runs, space: SearchSpace, cost: CostModel, resolve: Resolver) -> None:
        self._runs = runs
        self._config = runs.store.config
        self._space = space
        self._cost = cost
        self._resolve = resolve
        self._by_identity: dict[str, list[Record]] = {}
        self._refused = 0
        self._counted = 0
        self._best_cost = math.inf
        for record in runs.store.records:
            self._note(record)
            self._show_best(record)

    def run(self) -> None:
        """Goes on from what is recorded.

        Raises:
            Interrupted: somebody asked to stop; the running trial has its record.
        """
        proposals = Proposals(
            self._runs.store.storage_url,
            self._space,
            objectives=self._config.objectives,
            constraints=self._config.constraints,
            seed=self._config.seed,
        )
        with contextlib.closing(proposals):
            self._restore(proposals)
            queue = [*self._repeats(), *head(self._space, self._cost, self._resolve, self._config.n_trials)]
            deadline = time.monotonic() + (self._config.timeout_s or math.inf)
            while self._counted < self._config.n_trials:
                if time.monotonic() >= deadline:
                    self._runs.reporter.say(f"the search ends after {self._config.timeout_s:.0f} s, as asked")
                    return
                point = self._next(queue, proposals)
                if point is None:
                    self._runs.reporter.say("the search ends early: every plan of the space was tried")
                    return
                record = self._run_trial(point, proposals)
                if is_lost(record) and self._is_due(point):
                    queue.insert(0, point)

    def _next(self, queue: list[Point], proposals: Proposals) -> Point | None:
        while queue:
            point = queue.pop(0)
            if self._is_due(point):
                return point
        return proposals.suggest(self._is_due)

    def _run_trial(self, point: Point, proposals: Proposals) -> Record:
        plan = self._space.plan(point)
        number = proposals.start(point)
        label = f"trial {self._counted + 1} of {self._config.n_trials} · {plan.describe()}"
        record = self._runs.measure("trial", label, plan, self._resolve(plan), trial_number=number, params=point)
        self._note(record)
        proposals.tell(record)
        self._show_best(record)
        if was_interrupted(record):
            raise Interrupted
        return record

    def _show_best(self, record: Record) -> None:
        """Says it when a plan keeps the constraints and is better than all before in the first objective."""
        if not isinstance(record.result, Measurement) or record.spec is None:
            return
        derived = metrics.derive(record.result)
        objective = Objective(metric=self._config.objectives[0])
        kept = all(
            limit.metric in derived and limit.excess(derived[limit.metric]) <= 0 for limit in self._config.constraints
        )
        if not kept or objective.metric not in derived or objective.cost(derived[objective.metric]) >= self._best_cost:
            return
        self._best_cost = objective.cost(derived[objective.metric])
        values = values_text(derived, self._config.objectives)
        self._runs.reporter.best(f"{record.spec.plan.describe()} · {values}")

    def _restore(self, proposals: Proposals) -> None:
        """Makes database and records agree; a trial whose driver died gets its record now."""
        for trial in proposals.restore(self._runs.store.records):
            point = {name: int(value) for name, value in trial.params.items()}
            plan = self._space.plan(point) if point else None
            resolved = self._resolve(plan) if plan else None
            record = self._runs.store.add(
                role="trial",
                result=interruption("the driver died while this ran; --resume ran the plan again"),
                hardware_id=self._runs.fleet.machine.hardware_id,
                started_at=timestamp(trial.datetime_start or dt.datetime.now(dt.UTC)),
                wall_s=0.0,
                spec=self._runs.spec(plan) if plan else None,
                effective=resolved if isinstance(resolved, EffectivePlan) else None,
                trial_number=trial.number,
                params=dict(point),
            )
            self._note(record)
            proposals.tell(record)

    def _note(self, record: Record) -> None:
        """Keeps count of what is known of each plan."""
        if record.role not in ("trial", "single_stage") or record.spec is None:
            return
        plan = record.spec.plan
        known = self._by_identity.setdefault(identity(plan, record.effective or self._resolve(plan)), [])
        known.append(record)
        if record.role == "single_stage":
            # Measured already, so that no trial need repeat it.
            return
        if is_refusal(record):
            self._refused += 1
        elif not was_interrupted(record) and not (is_lost(record) and self._is_first(record, known)):
            self._counted += 1

    def _is_first(self, record: Record, known: list[Record]) -> bool:
        """Whether no earlier run of the plan came to an end."""
        return next(other for other in known if not was_interrupted(other)) is record

    def _repeats(self) -> list[Point]:
        """Points of the records, in order; few of them are due again."""
        return [
            {name: int(value) for name, value in records[0].params.items()}
            for records in self._by_identity.values()
            if records[0].params
        ]

    def _is_due(self, point: Point) -> bool:
        """Whether the plan is new, was only ever interrupted, or lost its workers once: a second chance, no third."""
        plan = self._space.plan(point)
        resolved = self._resolve(plan)
        known = self._by_identity.get(identity(plan, resolved), [])
        finished = [record for record in known if not was_interrupted(record)]
        if not finished:
            # What cannot fit costs no time, but shall not go on for ever.
            return isinstance(resolved, EffectivePlan) or self._refused < 2 * self._config.n_trials
        return len(finished) == 1 and is_lost(finished[0])


def is_lost(record: Record) -> bool:
    """Whether the run lost its workers, which may have been chance."""
    return isinstance(record.result, Failure) and record.result.kind in TRANSIENT


def is_refusal(record: Record) -> bool:
    """Whether a plan was found too large before it ran."""
    result = record.result
    return isinstance(result, Failure) and result.kind == FailureKind.OVER_MEMORY_CAP and record.effective is None
