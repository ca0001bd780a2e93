"""Plans told apart on a machine that has drifts: minutes in which everything runs faster or slower.

The logarithm of a run's throughput is read as plan + drift + noise, where drifts are alike at times near each other and
the runs of a plan lie scattered over hours: a mixed model, whose drift has an exponential correlation and whose three
parameters are those of the largest restricted likelihood on a grid (Patterson and Thompson 1971, Biometrika 58,
545-554). Plans are then estimated by generalised least squares, which takes the drifts out as far as other plans' runs
nearby show them. Nothing about the plans goes into it but which runs are the same plan's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_RATIOS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
_LENGTHS_S = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_SLOW_SHARES = (0.0, 0.25, 0.5)
_SLOW_S = 7200.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a plan."""

    plan: int
    at_s: float
    log: float
    """Of its throughput."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How the machine's drift comes and goes."""

    ratio: float
    """Variance of the drift over that of the noise of a run."""
    length_s: float
    """After so long a drift has changed by all but 1/e."""
    slow_share: float
    """Share of it that changes in hours instead."""
    noise: float
    """SD of a run beyond its drift: 0.02 is 2 %."""

    def covariance(self, runs: Sequence[Run]) -> Floats:
        """Of all runs, in units of the noise's variance."""
        times = np.array([run.at_s for run in runs])
        apart = np.abs(times[:, None] - times[None, :])
        fast = (1 - self.slow_share) * np.exp(-apart / self.length_s)
        drift: Floats = np.eye(len(runs)) + self.ratio * (fast + self.slow_share * np.exp(-apart / _SLOW_S))
        return drift


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What plans are worth, by their runs."""

    logs: dict[int, float]
    """Of each plan's throughput."""
    errors: dict[int, float]
    """Standard error of each against the mean of all."""


def fit(runs: Sequence[Run]) -> Drift:
    """The drift that explains the runs best."""
    found = []
    for ratio, length_s, slow_share in itertools.product(_RATIOS, _LENGTHS_S, _SLOW_SHARES):
        if ratio == 0.0 and (length_s, slow_share) != (_LENGTHS_S[0], 0.0):
            continue
        drift = Drift(ratio=ratio, length_s=length_s, slow_share=slow_share, noise=1.0)
        likelihood, variance = _restricted(runs, drift)
        found.append(
            (likelihood, Drift(ratio=ratio, length_s=length_s, slow_share=slow_share, noise=math.sqrt(variance)))
        )
    return max(found, key=lambda one: one[0])[1]


def judge(runs: Sequence[Run], drift: Drift) -> Judged:
    """Estimates plans."""
    plans = sorted({run.plan for run in runs})
    _, _, normal, solution = _solve(runs, drift)
    inverse = drift.noise**2 * np.linalg.inv(normal)
    # What all plans share cannot be told from a drift that lasts: errors are those of contrasts with the mean.
    centred = np.eye(len(plans)) - 1.0 / len(plans)
    errors = np.sqrt(np.diag(centred @ inverse @ centred))
    return Judged(
        logs=dict(zip(plans, map(float, solution), strict=True)),
        errors=dict(zip(plans, map(float, errors), strict=True)),
    )


def _restricted(runs: Sequence[Run], drift: Drift) -> tuple[float, float]:
    """Restricted log likelihood, up to a constant, and the noise's variance at its largest."""
    root = np.linalg.cholesky(drift.covariance(runs))
    design, values, normal, solution = _solve(runs, drift)
    residual = values - design @ solution
    freedom = len(runs) - design.shape[1]
    variance = float(residual @ residual) / freedom
    logs = freedom * math.log(variance) + 2 * float(np.log(np.diag(root)).sum()) + float(np.linalg.slogdet(normal)[1])
    return -0.5 * logs, variance


def _solve(runs: Sequence[Run], drift: Drift) -> tuple[Floats, Floats, Floats, Floats]:
    """The whitened design and values, the normal matrix, and the plans' estimates."""
    plans = sorted({run.plan for run in runs})
    places = {plan: index for index, plan in enumerate(plans)}
    raw = np.zeros((len(runs), len(plans)))
    raw[np.arange(len(runs)), [places[run.plan] for run in runs]] = 1.0
    root = np.linalg.cholesky(drift.covariance(runs))
    design = np.linalg.solve(root, raw)
    values = np.linalg.solve(root, np.array([run.log for run in runs]))
    normal = design.T @ design
    return design, values, normal, np.linalg.solve(normal, design.T @ values)
