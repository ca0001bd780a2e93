"""What to run next, and when to stop: a pure function of what is asked and of the records so far.

`rules.RULES` has the order. No clock and no global random numbers: replaying the records gives the same proposals.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import numpy as np

from pipetune.bench.record import Record
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.policy.forecaster import Forecaster
from pipetune.tuner.search.policy.history import History, Lessons
from pipetune.tuner.search.policy.rules import RULES
from pipetune.tuner.search.policy.situation import Situation, Suggest, Terms
from pipetune.tuner.search.policy.stopping_rule import StoppingRule
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.search_log import Proposal, Stop


class Strategy:
    """Proposes trials."""

    def __init__(
        self,
        space: SearchSpace,
        model: CostModel,
        resolve: Resolver,
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
        n_trials: int,
        seed: int,
        stop_early: bool,
        prior: Sequence[Observation] = (),
        first: Sequence[Point] = (),
        suggest: Suggest,
    ) -> None:
        """
        Args:
            model: over uncorrected costs; it is refitted to the records.
            objectives: the first decides where one must.
            n_trials: plans to run.
            seed: of the weights of several objectives.
            stop_early: whether to stop when nothing is predicted better than the noise.
            prior: what earlier runs on this machine taught.
            first: points to run before the model is asked.
        """
        make = functools.partial(Forecaster, space, model, resolve, objectives=objectives, constraints=constraints)
        forecaster = make(prior=prior)
        self._own = make() if prior else forecaster
        """Forecaster by this study alone."""
        self._terms = Terms(
            space=space,
            resolve=resolve,
            forecaster=forecaster,
            stopping_rule=StoppingRule(forecaster, num_objectives=len(objectives), seed=seed),
            suggest=suggest,
            first=tuple(first),
            num_objectives=len(objectives),
            n_trials=n_trials,
            seed=seed,
            stop_early=stop_early,
        )
        self._lessons: Lessons = {}
        self._history = History(space, resolve)

    @property
    def counted(self) -> int:
        """How many trials of the records last seen count against the budget."""
        return self._history.counted

    def next(self, records: Sequence[Record], *, taken: Collection[Point] = ()) -> Proposal | Stop:
        """What to do after these records, in the order in which they were written.

        Args:
            taken: what other processes of the study run now: their plans are left to them, and count as trials.
        """
        now = Situation(self._terms, self._read(records, taken), lessons=self._lessons, num_taken=len(taken))
        return next(step for rule in RULES if (step := rule(now)) is not None)

    def preferred(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Keys of the measured plans, best first as the refitted model has them, which smooths the luck of runs out.

        What earlier studies taught is left aside. Empty for several objectives, or where nothing predicts the one.
        """
        if self._terms.num_objectives > 1 or self._own.is_blind or not self._own.num_candidates:
            return ()
        forecast = self._own.look(self._read(records, ()))
        cost, _ = forecast.scalar(None)
        order = np.argsort(cost, kind="stable").tolist()
        return tuple(forecast.effective[place].key for place in order if forecast.was_measured[place])

    def _read(self, records: Sequence[Record], taken: Collection[Point]) -> History:
        if not self._history.is_extended_by(records):
            self._history = History(self._terms.space, self._terms.resolve)
            for holder in (self._terms.forecaster, self._own, self._terms.stopping_rule):
                holder.forget()
        self._history.extend(records, self._lessons)
        self._history.take(taken)
        return self._history
