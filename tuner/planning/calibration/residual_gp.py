"""What the cost model misses, learnt from plans nearby: a small Gaussian process over features of plans.

C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine Learning, 2006, ch. 2 and 5. With covariance

    k(a, b) = w² + layout(a, b) · (l² + s² · order(a, b) · exp(−d²(a, b) / 2)) + v² · switches(a, b)

w is an error of all plans, l one of those with as many replicas and stages, s one of those near to one another, v one
of those with the same execution switches beside the usual ones; d is taken over the features, each in its own length.
So a plan beside a measured one gets nearly its error, and a far one that of all. s, and the noise of runs, are the
likeliest of a few, under a prior: everything is deterministic.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipetune.bench.spec import Plan
from pipetune.tuner.planning.arrays import Floats

CUT_LENGTH = 0.25
"""Length scale of cuts, in times of a mean stage."""
LENGTHS = {"micro_batch": 1.5, "prefill": 1.5, "chunk": 2.0, "in_flight": 3.0}
"""Length scales of the other features, in doublings."""
_OPEN = 1 << 14
"""Stands for a limit that is left to an engine."""
COMMON_SD, LAYOUT_SD, SWITCHES_SD = 0.01, 0.01, 0.3
LOCAL_SDS = (0.005, 0.01, 0.02, 0.04, 0.08)
_LOCAL_MEDIAN, _LOCAL_LOG_SD = 0.015, 0.7
"""Prior of the local standard deviation s: its median, and the SD of its logarithm."""
NOISES = (0.7, 1.0, 1.4, 2.0, 2.8)
"""What a run's noise may be, in times of what it is thought to be, and how sure that is: repeats are few."""
_NOISE_LOG_SD = 0.5
_OTHER_ORDER = 0.5
"""Correlation between plans over the same devices in another order."""

PRIOR_SD = math.sqrt(COMMON_SD**2 + LAYOUT_SD**2 + _LOCAL_MEDIAN**2)
"""Standard deviation of the residual of any plan, before anything is seen."""


@dataclass(frozen=True, eq=False, slots=True)
class Features:
    """Coordinates of plans, between which the covariance is taken."""

    layouts: npt.NDArray[np.intp]
    """Replicas and stages, as one number."""
    orders: npt.NDArray[np.intp]
    switches: npt.NDArray[np.intp]
    """0 for the default."""
    places: Floats
    """`[plan, feature]` in lengths."""

    @classmethod
    def of(cls, plans: Sequence[tuple[Plan, int]], shares: Sequence[Sequence[float]], *, longest: int) -> "Features":
        """Where plans are, each given with its micro-batches in flight and the shares that each stage of a replica is
        busy; `longest`, of the prompts, in tokens, is what a chunk is when there is none."""
        widest = max((len(plan.stages) for plan, _ in plans), default=1)
        places = np.zeros((len(plans), widest - 1 + len(LENGTHS)))
        for row, ((plan, in_flight), busy) in enumerate(zip(plans, shares, strict=True)):
            count, done = len(plan.stages), np.cumsum(busy)
            places[row, : count - 1] = done[:-1] / done[-1] * count / CUT_LENGTH
            chunk = min(plan.prefill_chunk_size or longest, longest)
            sizes = (plan.micro_batch_size, plan.prefill_size, chunk, in_flight)
            if plan.engine is not None:
                # What is left to the engine stands far above.
                own = plan.engine
                limits = own.max_num_seqs or _OPEN, own.kv_cache_memory_bytes or _OPEN
                sizes = (*limits, own.max_num_batched_tokens or _OPEN, in_flight)
            places[row, widest - 1 :] = [
                math.log2(size) / length for size, length in zip(sizes, LENGTHS.values(), strict=True)
            ]
        layouts = [4096 * (plan.replicas + 4096 * plan.width) + len(plan.stages) for plan, _ in plans]
        return cls(
            layouts=np.array(layouts, dtype=np.intp),
            orders=np.array([_number(plan.devices) for plan, _ in plans], dtype=np.intp),
            switches=np.array([_number(plan.switches) if plan.switches else 0 for plan, _ in plans], dtype=np.intp),
            places=places,
        )

    def take(self, rows: Sequence[int]) -> "Features":
        """Some of the plans."""
        index = list(rows)
        return Features(self.layouts[index], self.orders[index], self.switches[index], self.places[index])


def _number(words: Sequence[str]) -> int:
    """Equal for equal words in one process and in any other."""
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:7])


class Process:
    """A Gaussian process that has seen some plans' errors."""

    def __init__(self, features: Features, errors: Floats, variances: Floats) -> None:
        """`errors` are logs of measured over modelled, a plan each, and `variances` theirs, from noise."""
        self._features = features
        best = -math.inf
        for local, noise in itertools.product(LOCAL_SDS, NOISES):
            covariance = _covariance(features, features, local) + np.diag(noise**2 * variances)
            lower = np.linalg.cholesky(covariance)
            whitened = np.linalg.solve(lower, errors)
            likelihood = -0.5 * float(whitened @ whitened) - float(np.log(np.diag(lower)).sum())
            likelihood -= 0.5 * (math.log(local / _LOCAL_MEDIAN) / _LOCAL_LOG_SD) ** 2
            likelihood -= 0.5 * (math.log(noise) / _NOISE_LOG_SD) ** 2
            if likelihood > best:
                best, self._local, self._lower, self._whitened = likelihood, local, lower, whitened

    def predict(self, features: Features) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the errors of plans."""
        across = np.linalg.solve(self._lower, _covariance(self._features, features, self._local))
        mean = across.T @ self._whitened
        prior = COMMON_SD**2 + LAYOUT_SD**2 + self._local**2 + SWITCHES_SD**2 * (features.switches != 0)
        return mean, np.sqrt(np.maximum(prior - (across**2).sum(0), 1e-12))


def _covariance(a: Features, b: Features, local: float) -> Floats:
    width = max(a.places.shape[1], b.places.shape[1])
    # With room for as many cuts in front as the other side has; plans of unequal ones are told apart by layout.
    left, right = (np.pad(one.places, ((0, 0), (width - one.places.shape[1], 0))) for one in (a, b))
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None, :] - 2.0 * left @ right.T
    same_layout = a.layouts[:, None] == b.layouts[None, :]
    order = np.where(a.orders[:, None] == b.orders[None, :], 1.0, _OTHER_ORDER)
    near = local**2 * order * np.exp(-0.5 * np.maximum(squares, 0.0))
    switched = (a.switches[:, None] == b.switches[None, :]) & (a.switches[:, None] != 0)
    covariance: Floats = COMMON_SD**2 + same_layout * (LAYOUT_SD**2 + near) + SWITCHES_SD**2 * switched
    return covariance
