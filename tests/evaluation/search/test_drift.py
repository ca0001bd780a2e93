"""Plans told apart on a machine with drifts: what was put in comes out, and no drift is found where none is."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation.search.drift import Run, fit, judge


def runs_of(worths: list[float], *, repeats: int, drift: float, noise: float, seed: int) -> list[Run]:
    """Each repeat in an order of its own, a run every 3 s, under drifts that last for 40 s."""
    rng = np.random.default_rng(seed)
    runs: list[Run] = []
    state = 0.0
    for _ in range(repeats):
        for plan in rng.permutation(len(worths)):
            kept = float(np.exp(-3 / 40))
            state = kept * state + float(rng.normal(0, drift * np.sqrt(1 - kept**2)))
            log = worths[plan] + state + float(rng.normal(0, noise))
            runs.append(Run(plan=int(plan), at_s=3.0 * len(runs), log=log))
    return runs


WORTHS = np.linspace(0.0, 0.3, 30).tolist()


def test_with_its_drifts_taken_out_a_plan_is_known_better_than_by_its_mean() -> None:
    squares, plain = [], []
    for seed in range(6):
        runs = runs_of(WORTHS, repeats=4, drift=0.05, noise=0.01, seed=seed)
        judged = judge(runs, fit(runs))
        found = np.array([judged.logs[plan] for plan in range(30)]) - WORTHS
        means = np.array([np.mean([run.log for run in runs if run.plan == plan]) for plan in range(30)]) - WORTHS
        squares.append(found.var())
        plain.append(means.var())
    assert np.sqrt(np.mean(squares)) < 0.6 * np.sqrt(np.mean(plain))


def test_errors_are_as_large_as_they_say() -> None:
    scaled = []
    for seed in range(6):
        runs = runs_of(WORTHS, repeats=4, drift=0.05, noise=0.01, seed=seed)
        judged = judge(runs, fit(runs))
        found = np.array([judged.logs[plan] for plan in range(30)]) - WORTHS
        scaled += ((found - found.mean()) / [judged.errors[plan] for plan in range(30)]).tolist()
    assert np.std(scaled) == pytest.approx(1.0, abs=0.25)


def test_where_there_is_no_drift_plans_are_judged_by_their_means() -> None:
    runs = runs_of(WORTHS, repeats=6, drift=0.0, noise=0.01, seed=1)
    drift = fit(runs)
    judged = judge(runs, drift)
    means = {plan: np.mean([run.log for run in runs if run.plan == plan]) for plan in range(30)}
    assert drift.noise * np.sqrt(1 + drift.ratio) == pytest.approx(0.01, rel=0.25)
    assert all(judged.logs[plan] == pytest.approx(mean, abs=0.006) for plan, mean in means.items())
