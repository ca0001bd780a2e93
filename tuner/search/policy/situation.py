"""What the rules of a search look at in one step, and how they word what they propose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.search.policy.acquisition import Floats, draw_weights
from pipetune.tuner.search.policy.forecast import Forecast
from pipetune.tuner.search.policy.forecaster import Forecaster
from pipetune.tuner.search.policy.history import History, Lessons
from pipetune.tuner.search.policy.stopping_rule import StoppingRule
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.search_log import Proposal, Reason

_REFUSALS = 2
"""Plans that cannot fit may be proposed so often a trial: they cost no time, but shall not go on for ever."""

Suggest = Callable[[Callable[[Point], bool]], Point | None]
"""A point that TPE likes and for which the given test holds; None when there is none."""
Mode = Literal["none", "whole", "blind", "model"]
"""What the cost model is good for: nothing, since no plan fits; the order in which to run all plans; telling fast plans
where nothing predicts an objective; predicting the objectives."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What stays the same over a search."""

    space: SearchSpace
    resolve: Resolver
    forecaster: Forecaster
    stopping_rule: StoppingRule
    suggest: Suggest
    first: tuple[Point, ...]
    """Points to run before the model is asked."""
    num_objectives: int
    n_trials: int
    seed: int
    stop_early: bool

    @property
    def mode(self) -> Mode:
        """What the cost model is good for."""
        count = self.forecaster.num_candidates
        if count <= self.n_trials:
            return "whole" if count else "none"
        return "blind" if self.forecaster.is_blind else "model"


class Situation:
    """One step of a search."""

    def __init__(self, terms: Terms, history: History, *, lessons: Lessons, num_taken: int) -> None:
        """
        Args:
            num_taken: how many plans other processes run now.
        """
        self.terms, self.history, self.lessons, self.num_taken = terms, history, lessons, num_taken

    @cached_property
    def forecast(self) -> Forecast:
        """What is to be thought of plans after the records so far."""
        return self.terms.forecaster.look(self.history)

    @cached_property
    def weights(self) -> Floats | None:
        """Weights of the objectives, other ones for each trial; None for a single objective."""
        if self.terms.num_objectives == 1:
            return None
        return draw_weights(self.terms.num_objectives, f"{self.terms.seed}-{self.history.counted}")

    @cached_property
    def scalar(self) -> tuple[Floats, Floats]:
        """One cost of each plan and its standard deviation, under the weights."""
        return self.forecast.scalar(self.weights)

    @cached_property
    def incumbent(self) -> int | None:
        """Place of the best plan measured; None where none was, or the model does not predict the objectives."""
        return self.forecast.incumbent(self.scalar[0]) if self.terms.mode == "model" else None

    @cached_property
    def converged(self) -> bool:
        """Whether no open plan promises a gain over the incumbent."""
        return self.incumbent is not None and self.terms.stopping_rule.is_converged(self.history, self.forecast)

    def is_new(self, point: Point) -> bool:
        """Whether the point's plan is worth a run."""
        return self.history.is_new(point, most_refused=_REFUSALS * self.terms.n_trials)

    def propose_place(self, place: int, kind: Reason, reason: str) -> Proposal:
        """A plan of the forecast."""
        point = self.forecast.points[place]
        assert point is not None, "what ran and is no candidate is never open"
        return self.propose(point, kind, reason, self.forecast.predicted(place))

    def propose(
        self,
        point: Point,
        kind: Reason,
        reason: str,
        predicted: tuple[dict[str, float], dict[str, float]] | None = None,
    ) -> Proposal:
        """A point with what is predicted of it, by the model where it is not given."""
        if predicted is None:
            predicted = {}, {}
            resolved = self.terms.resolve(self.terms.space.plan(point))
            if isinstance(resolved, EffectivePlan) and self.terms.forecaster.num_candidates:
                predicted = self.terms.forecaster.predict(self.history, resolved)
        return Proposal(point=point, kind=kind, reason=reason, predicted=predicted[0], predicted_sd=predicted[1])
