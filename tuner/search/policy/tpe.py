"""Optuna's TPE as a pure function of the trials: what it likes next, without a trace in any database."""

import itertools
import random
from collections.abc import Callable, Sequence

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.search.space.space import Point, SearchSpace

_STARTUP_TRIALS = 4
_DRAWS = 64
"""Proposals drawn until one is new; then any new point is taken."""


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The dimensions of a space, as Optuna describes them."""
    return {name: IntDistribution(low, high, log=log) for name, (low, high, log) in space.dimensions().items()}


class TpePolicy:
    """Proposes points of a space that TPE likes."""

    def __init__(
        self, space: SearchSpace, *, objectives: Sequence[str], seed: int, trials: Callable[[], Sequence[FrozenTrial]]
    ) -> None:
        """`trials` tells all trials of the study, in the order of their numbers."""
        self._space, self._seed, self._trials = space, seed, trials
        self._directions = [Objective(metric=name).direction for name in objectives]
        self._distributions = distributions(space)

    def suggest(self, is_new: Callable[[Point], bool]) -> Point | None:
        """A point that TPE likes and that is new, else any new one; None when there is none."""
        trials = self._trials()
        study = optuna.create_study(directions=self._directions)
        study.add_trials(trials)
        # Seeded by what is known, so that a resumed study goes on as it would have, and not from the start.
        seed = self._seed + len(trials)
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=False, n_startup_trials=_STARTUP_TRIALS
        )
        rng, dimensions = random.Random(seed), self._space.dimensions()
        liked = (self._draw(sampler, study) for _ in range(_DRAWS))
        drawn = ({name: rng.randint(low, high) for name, (low, high, _) in dimensions.items()} for _ in range(_DRAWS))
        return next(filter(is_new, itertools.chain(liked, drawn, self._space.points())), None)

    def _draw(self, sampler: optuna.samplers.BaseSampler, study: Study) -> Point:
        trial = create_trial(state=TrialState.RUNNING)
        params = dict(sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial)))
        for name, distribution in self._distributions.items():
            if name not in params:
                params[name] = sampler.sample_independent(study, trial, name, distribution)
        return {name: int(params[name]) for name in self._distributions}
