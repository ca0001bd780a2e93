"""How much a plan promises, from what is predicted of it and how surely: pure formulas over arrays.

Costs are logs of metrics, turned so that less is better: a gain of 0.01 is one of a hundredth, whatever the metric.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.planning.arrays import Floats

_LEAST = 1e-9
"""Values and deviations below it are taken for it, so that logs and quotients exist."""
AUGMENTATION = 0.05
"""What the sum of all costs counts beside the largest: plans that are no worse in it and better in others win."""


def log_cost(metric: str, values: Floats) -> Floats:
    """Less is better."""
    logs: Floats = np.log(np.maximum(values, _LEAST))
    return -logs if metric in HIGHER_IS_BETTER else logs


def expected_improvement(mean: Floats, sd: Floats, best: float) -> Floats:
    """Expected fall of a normal cost below the best one, rises counted as zero. D. R. Jones, M. Schonlau and W. J.
    Welch, Efficient Global Optimization, 1998, eq. 15."""
    sd = np.maximum(sd, _LEAST)
    gain = best - mean
    scaled = gain / sd
    density = np.exp(-0.5 * np.square(scaled)) / math.sqrt(2 * math.pi)
    improvement: Floats = gain * ndtr(scaled) + sd * density
    return np.maximum(improvement, 0.0)


def chance_of_gain(mean: Floats, sd: Floats, best: float, margin: float) -> Floats:
    """Probability that a normal cost lies below the best one by more than a margin."""
    chance: Floats = ndtr((best - margin - mean) / np.maximum(sd, _LEAST))
    return chance


def chance_kept(constraint: Constraint, mean: Floats, relative_sd: Floats) -> Floats:
    """Probability that a metric, log-normal about its prediction, keeps the limit."""
    if constraint.limit <= 0:
        held = mean <= constraint.limit if constraint.operator == "<=" else mean >= constraint.limit
        return held.astype(np.float64)
    room = math.log(constraint.limit) - np.log(np.maximum(mean, _LEAST))
    if constraint.operator == ">=":
        room = -room
    chance: Floats = ndtr(room / np.maximum(relative_sd, 1e-6))
    return chance


def draw_weights(count: int, seed: str) -> Floats:
    """Weights of so many objectives, uniform on the simplex."""
    rng = random.Random(seed)
    draws = np.array([rng.expovariate(1.0) for _ in range(count)])
    weights: Floats = draws / draws.sum()
    return weights


def even_weights(count: int) -> Floats | None:
    """Equal weights of the objectives; None for a single one."""
    return None if count == 1 else np.full(count, 1 / count)


def tchebycheff(costs: Floats, sds: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """One cost of several: `max(w · c) + 0.05 · Σ (w · c)`, and its standard deviation to first order. `costs` and
    `sds` are `[plan, objective]`, scaled to a like range; `weights` are `[objective]`, summing to one. J. Knowles,
    ParEGO: a hybrid algorithm with on-line landscape approximation, 2006, eq. 2."""
    weighted = costs * weights
    mean: Floats = weighted.max(axis=1) + AUGMENTATION * weighted.sum(axis=1)
    slopes = weights * (AUGMENTATION + (np.arange(costs.shape[1]) == weighted.argmax(axis=1)[:, None]))
    sd: Floats = np.sqrt(np.square(slopes * sds).sum(axis=1))
    return mean, sd


def ranges(costs: Floats) -> tuple[Floats, Floats]:
    """The least of each objective in costs `[plan, objective]`, and how far it rises over the plans that are best in
    one objective each."""
    least = costs.min(axis=0)
    corners = costs[costs.argmin(axis=0)]
    spans = corners.max(axis=0) - least
    return least, np.where(spans > 1e-6, spans, 1.0)


def first_of(scores: Floats, among: npt.NDArray[np.bool_] | Sequence[bool]) -> int:
    """Place of the largest score among those allowed, the first of equals."""
    return int(np.argmax(np.where(among, scores, -np.inf)))
