"""What the rules of a search look at in one step, and whether a plan promises more than the noise hides."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Literal

from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.policy.acquisition import chance_of_gain, draw_weights
from pipetune.tuner.search.policy.forecaster import Forecast, Forecaster
from pipetune.tuner.search.policy.history import History
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.search_log import Proposal, Reason

MARGIN = 0.5
"""Share of the noise of a run that several rounds of finals can tell. A gain below it is none."""
LEAST_CHANCE = 0.1
"""A plan that gains more than that with less probability promises nothing."""
_WEIGHTINGS = 12
"""Ways to weigh several objectives under which nothing must be promising."""
_REFUSALS = 2
"""Plans that cannot fit may be proposed so often a trial: they cost no time, but shall not go on for ever."""

Suggest = Callable[[Callable[[Point], bool]], Point | None]
"""A point that TPE likes and for which the given test holds; None when there is none."""
Mode = Literal["none", "whole", "blind", "model"]
"""What the cost model is good for: nothing, since no plan fits; the order in which to run all plans; telling fast plans
where nothing predicts an objective; predicting the objectives."""


@dataclass(eq=False)
class Terms:
    """What stays the same over a search, and what was made of its records."""

    space: SearchSpace
    model: CostModel
    """Over uncorrected costs; it is refitted to the records."""
    resolve: Resolver
    _: KW_ONLY
    objectives: Sequence[str]
    """The first decides where one must."""
    constraints: Sequence[Constraint]
    n_trials: int
    """Plans to run."""
    seed: int
    """Seed of the weights of several objectives."""
    stop_early: bool
    """Whether to stop when nothing is predicted better than the noise."""
    suggest: Suggest
    prior: Sequence[Observation] = ()
    """What earlier runs on this machine taught."""
    first: Sequence[Point] = ()
    """Points to run before the model is asked."""

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets the records, and what was made of them."""
        make = partial(
            Forecaster, self.space, self.model, self.resolve, objectives=self.objectives, constraints=self.constraints
        )
        self.history = History(self.space, self.resolve)
        self.forecaster = make(prior=self.prior)
        self.own_forecaster = make() if self.prior else self.forecaster
        """Forecaster by this study alone."""
        self.calm: dict[int, bool] = {}
        """Whether nothing was promising, by the number of records."""

    @property
    def mode(self) -> Mode:
        """What the cost model is good for."""
        count = self.forecaster.num_candidates
        if count <= self.n_trials:
            return "whole" if count else "none"
        return "blind" if self.forecaster.is_blind else "model"

    def weights(self, draw: str) -> Floats | None:
        """Weights of the objectives, by the name of a draw; None for a single objective."""
        return None if len(self.objectives) == 1 else draw_weights(len(self.objectives), f"{self.seed}-{draw}")


class Situation:
    """One step of a search."""

    def __init__(self, terms: Terms, history: History, *, num_taken: int = 0) -> None:
        """`num_taken` counts the plans that other processes run now."""
        self.terms, self.history, self.num_taken = terms, history, num_taken

    @cached_property
    def forecast(self) -> Forecast:
        """What is to be thought of plans after the records so far."""
        return self.terms.forecaster.look(self.history)

    @cached_property
    def scalar(self) -> tuple[Floats, Floats]:
        """One cost of each plan and its standard deviation, under weights that are others for each trial."""
        return self.forecast.scalar(self.terms.weights(f"{self.history.counted}"))

    @cached_property
    def incumbent(self) -> int | None:
        """Place of the best plan measured; None where none was, or the model does not predict the objectives."""
        return self.forecast.incumbent(self.scalar[0]) if self.terms.mode == "model" else None

    @cached_property
    def converged(self) -> bool:
        """Whether no open plan promises a gain over the incumbent."""
        calm = self.incumbent is not None and self.largest_chance[0] < LEAST_CHANCE
        # What others run now is not open, and may be again after the same records.
        if not self.history.taken:
            self.terms.calm[len(self.history.records)] = calm
        return calm

    @cached_property
    def largest_chance(self) -> tuple[float, int]:
        """The probability to gain of the open plan that is likeliest to, under any weights, and its place."""
        largest, place, forecast = 0.0, 0, self.forecast
        for number in range(1 if len(self.terms.objectives) == 1 else _WEIGHTINGS):
            weights = self.terms.weights(f"calm-{number}")
            cost, sd = forecast.scalar(weights)
            if (incumbent := forecast.incumbent(cost)) is None:
                return 1.0, 0
            margin = MARGIN * forecast.margin(weights)
            chance = chance_of_gain(cost, sd, float(cost[incumbent]), margin) * forecast.kept * forecast.is_open
            if chance.max(initial=0.0) > largest:
                largest, place = float(chance.max()), int(chance.argmax())
        return largest, place

    def was_calm(self, mark: int) -> bool:
        """Whether no open plan promised a gain when there were so many records; after a resume it is thought again."""
        if mark not in self.terms.calm:
            return Situation(self.terms, self.history.until(mark)).converged
        return self.terms.calm[mark]

    def is_new(self, point: Point) -> bool:
        """Whether the point's plan is worth a run."""
        return self.history.is_new(point, most_refused=_REFUSALS * self.terms.n_trials)

    def propose_place(self, place: int, kind: Reason, reason: str) -> Proposal:
        """A plan of the forecast."""
        point = self.forecast.points[place]
        assert point is not None, "what ran and is no candidate is never open"
        return self.propose(point, kind, reason, self.forecast.metrics.of(place))

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
