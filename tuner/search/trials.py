"""The trials of a study: asks the strategy, runs what it proposes, and tells everybody what came of it."""

from __future__ import annotations

import contextlib
import math
import time

from pipetune.bench import metrics
from pipetune.bench.record import Measurement, Record, timestamp
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.progress import values_text
from pipetune.tuner.ranking.finals import before_finals
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.participant import Participant
from pipetune.tuner.search.policy.strategy import Strategy
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.policy.warm_start import WarmStart
from pipetune.tuner.search.runs import Runs, interruption
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.search.stop import Interrupted
from pipetune.tuner.search.trial_codec import point_of_trial
from pipetune.tuner.study.files import was_interrupted
from pipetune.tuner.study.search_log import Proposal, SearchLogWriter, Stop


class Search:
    """Runs trials until the strategy stops, or time is up."""

    def __init__(
        self,
        runs: Runs,
        log: SearchLogWriter,
        participant: Participant,
        space: SearchSpace,
        cost: CostModel,
        resolve: Resolver,
        warm: WarmStart,
    ) -> None:
        self._runs, self._log, self._participant = runs, log, participant
        self._store, self._config = runs.store, runs.store.config
        self._space, self._cost, self._resolve, self._warm = space, cost, resolve, warm
        self._best_cost = math.inf
        self.preferred: tuple[str, ...] = ()
        """Keys of plans at the end of the search, best first as the refitted model has them."""
        for record in self._store.records:
            self._show_best(record)

    def run(self) -> Stop:
        """Goes on from what is recorded.

        Raises:
            Interrupted: somebody asked to stop; the running trial has its record.
        """
        with contextlib.ExitStack() as stack:
            with self._log.spend("search"):
                study = self._participant.open_study(self._space, self._resolve)
                stack.callback(study.close)
                self._restore(study)
                strategy = self._strategy(study)
            stop = self._search(strategy, study)
        with self._log.spend("search"):
            self.preferred = strategy.preferred(before_finals(self._store.records))
        self._log.end(stop)
        self._runs.reporter.say(f"the search ends: {stop.text}")
        return stop

    def _strategy(self, study: OptunaStudy) -> Strategy:
        seed = self._participant.seed
        tpe = TpePolicy(self._space, objectives=self._config.objectives, seed=seed, trials=study.trials)
        return Strategy(
            self._space,
            self._cost,
            self._resolve,
            objectives=self._config.objectives,
            constraints=self._config.constraints,
            n_trials=self._config.n_trials,
            seed=seed,
            stop_early=self._config.stop_early,
            prior=self._warm.prior,
            first=self._warm.first,
            suggest=tpe.suggest,
        )

    def _search(self, strategy: Strategy, study: OptunaStudy) -> Stop:
        deadline = time.monotonic() + (self._config.timeout_s or math.inf)
        while True:
            with self._log.spend("search"):
                for record in study.pull(self._store):
                    self._show_best(record)
                # What finals measure must not reopen the search that they follow.
                step = strategy.next(before_finals(self._store.records), taken=study.taken)
                if time.monotonic() >= deadline and not (isinstance(step, Stop) and step.kind == "budget"):
                    return Stop(kind="time", text=f"{self._config.timeout_s:g} s are over, as many as were asked for")
                if isinstance(step, Stop) and not study.taken:
                    return step
                number = study.ask(step.point) if isinstance(step, Proposal) else None
                if isinstance(step, Proposal) and number is not None:
                    self._log.note(number, step)
            if isinstance(step, Stop):
                # What others run may change that: it may fail, or teach something.
                with self._runs.stop.interruptible():
                    study.wait()
            elif number is not None:
                self._run_trial(number, step, study, strategy.counted)

    def _run_trial(self, number: int, proposal: Proposal, study: OptunaStudy, counted: int) -> None:
        plan = self._space.plan(proposal.point)
        label = f"trial {counted + 1} of {self._config.n_trials} · {plan.describe()}"
        predicted = values_text(proposal.predicted, self._config.objectives[:1])
        if predicted:
            label += f" · predicted {predicted}"
        with self._log.spend("trials"):
            record = self._runs.measure(
                label, plan, self._resolve(plan), role="trial", trial_number=number, params=dict(proposal.point)
            )
        with self._log.spend("search"):
            study.tell(record)
            self._log.save()
        self._show_best(record)
        if was_interrupted(record):
            raise Interrupted

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

    def _restore(self, study: OptunaStudy) -> None:
        """Makes database and records agree; a trial whose driver died gets its record now."""
        for trial in study.restore(self._store.records):
            point = point_of_trial(trial)
            plan = self._space.plan(point) if point else None
            resolved = self._resolve(plan) if plan else None
            record = self._store.add(
                Record(
                    number=0,
                    role="trial",
                    result=interruption("the driver died while this ran; --resume ran the plan again"),
                    hardware_id=self._runs.fleet.machine.hardware_id,
                    started_at=timestamp(trial.datetime_start),
                    wall_s=0.0,
                    spec=self._runs.spec(plan) if plan else None,
                    effective=resolved if isinstance(resolved, EffectivePlan) else None,
                    trial_number=trial.number,
                    params=dict(point),
                )
            )
            study.tell(record)
