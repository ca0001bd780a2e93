"""A forecast: what the refitted model makes of plans that may come next and of those that ran, and how surely."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.planning.calibration.predictor import PredictedMetrics, Predictor
from pipetune.tuner.search.policy.acquisition import Floats, ranges, tchebycheff
from pipetune.tuner.search.space.space import Point

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """Plans in order: the candidates looked at, then what ran and is none of them."""

    effective: tuple[EffectivePlan, ...]
    points: tuple[Point | None, ...]
    """None for what ran and is no candidate."""
    is_open: Bools
    """Whether a candidate may be proposed: it is new, and nothing that happened to plans like it rules it out."""
    was_measured: Bools
    costs: Floats
    """`[plan, objective]`, logs, less is better."""
    sds: Floats
    """`[plan, objective]`, standard deviations of the costs."""
    kept: Floats
    """Probability that every constraint is kept; 1 or 0 for what ran."""
    works: Floats
    """Probability that a run ends in a measurement; of use for comparing plans."""
    metrics: PredictedMetrics
    predictor: Predictor

    @property
    def noise(self) -> float:
        """Relative standard deviation of a repeated run."""
        return self.predictor.noise

    @cached_property
    def _ranges(self) -> tuple[Floats, Floats]:
        return ranges(self.costs)

    @cached_property
    def _scaled(self) -> tuple[Floats, Floats]:
        least, spans = self._ranges
        return (self.costs - least) / spans, self.sds / spans

    def margin(self, weights: Floats | None) -> float:
        """The noise of a run, in the cost that `scalar` makes."""
        return self.noise if weights is None else self.noise * float(np.linalg.norm(weights / self._ranges[1]))

    def scalar(self, weights: Floats | None) -> tuple[Floats, Floats]:
        """One cost of each plan and its deviation; the log itself for a single objective.

        Args:
            weights: of the objectives; None for a single one.
        """
        return (self.costs[:, 0], self.sds[:, 0]) if weights is None else tchebycheff(*self._scaled, weights)

    def worth(self, cost: Floats) -> Floats:
        """What a run of each plan promises, doubt left aside: less where it may fail or break a constraint."""
        value: Floats = np.exp(np.min(cost) - cost) * self.kept * self.works
        return value

    def incumbent(self, cost: Floats) -> int | None:
        """Place of the best plan that was measured and keeps the constraints, its luck smoothed out by the model."""
        among = self.was_measured & (self.kept > 0.5)
        return int(np.argmin(np.where(among, cost, np.inf))) if among.any() else None

    def predicted(self, place: int) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of one plan, and their relative deviations."""
        return self.metrics.of(place)
