"""The trials of a study: asks the strategy, runs what it proposes, and tells everybody what came of it."""

import contextlib
import math
import time
from dataclasses import dataclass

from pipetune.bench import metrics
from pipetune.bench.record import Measurement, Record, timestamp
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.config.storage_url import shown
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.progress import values_text
from pipetune.tuner.ranking.finals import before_finals
from pipetune.tuner.ranking.rank import why_broken
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.search.database import naming_losses
from pipetune.tuner.search.optuna_study import OptunaStudy, point_of_trial
from pipetune.tuner.search.policy.strategy import Strategy
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.policy.warm_start import WarmStart
from pipetune.tuner.search.runs import Interrupted, Runs, interruption
from pipetune.tuner.search.shared.participant import Participant
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import fitting, was_interrupted
from pipetune.tuner.study.search_log import Proposal, Stop


@dataclass
class Search:
    """Runs trials until the strategy stops, or time is up."""

    runs: Runs
    participant: Participant
    space: SearchSpace
    cost: CostModel
    resolve: Resolver
    warm: WarmStart

    def __post_init__(self) -> None:
        self._store, self._config, self._log = self.runs.store, self.runs.store.config, self.runs.log
        self._best_cost = math.inf
        for record in self._store.current:
            self._show_best(record)

    def run(self) -> tuple[str, ...]:
        """Goes on from what is recorded, and gives keys of plans, best first as the refitted model has them in the end;
        raises `Interrupted` once a trial that was stopped has its record."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(naming_losses(self._store.storage_url))
            with self._log.spend("search"):
                study = self.participant.open_study(self.space, self.resolve)
                stack.callback(study.close)
                self._restore(study)
                strategy = self._strategy(study)
            stop = self._search(strategy, study)
        with self._log.spend("search"):
            preferred = strategy.preferred(before_finals(self._store.current))
        self._log.end(stop)
        self.runs.reporter.say(f"the search ends: {stop.text}")
        return preferred

    def _strategy(self, study: OptunaStudy) -> Strategy:
        config, seed = self._config, self.participant.seed
        return Strategy(
            self.space,
            self.cost,
            self.resolve,
            objectives=config.objectives,
            constraints=config.constraints,
            n_trials=config.n_trials,
            seed=seed,
            stop_early=config.stop_early,
            prior=self.warm.prior,
            first=self.warm.first,
            suggest=TpePolicy(self.space, objectives=config.objectives, seed=seed, trials=study.trials).suggest,
        )

    def _search(self, strategy: Strategy, study: OptunaStudy) -> Stop:
        deadline = time.monotonic() + (self._config.timeout_s or math.inf)
        while True:
            with self._log.spend("search"):
                for record in study.pull(self._store):
                    self._show_best(record)
                # What finals measure must not reopen the search that they follow.
                step = strategy.next(before_finals(self._store.current), taken=study.taken)
                if time.monotonic() >= deadline and not (isinstance(step, Stop) and step.kind == "budget"):
                    return Stop(kind="time", text=f"{self._config.timeout_s:g} s are over, as many as were asked for")
                if isinstance(step, Stop) and not study.taken:
                    return step
                number = study.ask(step.point) if isinstance(step, Proposal) else None
                if isinstance(step, Proposal) and number is not None:
                    self._log.note(number, step)
            if isinstance(step, Stop):
                # What others run may change that: it may fail, or teach something.
                with self.runs.stop.interruptible():
                    study.wait()
            elif number is not None:
                self._run_trial(number, step, study, strategy.history.counted)

    def _run_trial(self, number: int, proposal: Proposal, study: OptunaStudy, counted: int) -> None:
        plan = self.space.plan(proposal.point)
        label = f"trial {number} ({counted + 1} of {self._config.n_trials}) · {plan.describe()}"
        if predicted := values_text(proposal.predicted, self._config.objectives[:1]):
            label += f" · predicted {predicted}"
        with self._log.spend("trials"):
            record = self.runs.measure(
                label,
                plan,
                self.resolve(plan),
                predicted=proposal.predicted.get("max_request_rate"),
                role="trial",
                trial_number=number,
                params=dict(proposal.point),
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
        kept = all(why_broken(limit, derived) is None for limit in self._config.constraints)
        if not kept or objective.metric not in derived or objective.cost(derived[objective.metric]) >= self._best_cost:
            return
        self._best_cost = objective.cost(derived[objective.metric])
        self.runs.reporter.best(f"{record.spec.plan.describe()} · {values_text(derived, self._config.objectives)}")

    def _restore(self, study: OptunaStudy) -> None:
        """Makes database and records agree; a trial whose driver died gets its record now."""
        with fitting(f"storage {shown(self._store.storage_url)}"):
            # Trials on devices that are lost only keep the count: their points mean nothing here.
            current, everything = self._store.current, self._store.records
            earlier = everything[: len(everything) - len(current)]
            found = study.restore([*(one.model_copy(update={"params": None}) for one in earlier), *current])
        for trial in found:
            point = point_of_trial(trial)
            plan = self.space.plan(point) if point else None
            resolved = self.resolve(plan) if plan else None
            record = self._store.add(
                Record(
                    number=0,
                    role="trial",
                    result=interruption("the driver died while this ran; --resume ran the plan again"),
                    hardware_id=self.runs.fleet.machine.hardware_id,
                    started_at=timestamp(trial.datetime_start),
                    wall_s=0.0,
                    spec=self.runs.spec(plan) if plan else None,
                    effective=resolved if isinstance(resolved, EffectivePlan) else None,
                    trial_number=trial.number,
                    params=dict(point),
                )
            )
            study.tell(record)
