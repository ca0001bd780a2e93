"""What to run next, and when to stop: rules in their order, of which the first that has something to say decides.

No clock and no global random numbers: replaying the records gives the same proposals.
"""

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from pipetune.bench.record import Record
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.search.policy.acquisition import chance_of_gain, even_weights, expected_improvement, first_of
from pipetune.tuner.search.policy.history import History, is_lost, kinds_of
from pipetune.tuner.search.policy.situation import LEAST_CHANCE, MARGIN, Situation, Terms
from pipetune.tuner.search.space.space import Point
from pipetune.tuner.study.search_log import Proposal, Reason, Stop

Rule = Callable[[Situation], Proposal | Stop | None]
"""What is to be done in a situation; None leaves it to the next rule."""

LEAST_TRIALS, CONVERGED_IN_A_ROW = 6, 3
"""Before so many trials, and before so many forecasts without promise, no search ends by itself."""
PROMISING_FIRST = 3
"""So many trials go to what is predicted best, however unsurely; behind them doubt counts as a chance."""
WITHIN_REACH = 0.3
"""A kind is worth a trial if its best plan is predicted no further behind, as a log."""
MOST_REPLICATES, REPLICATES_EVERY = 3, 3
"""Most runs of incumbents once more, in all; and no more than one in so many trials."""
TPE_FROM, TPE_EVERY = 8, 4
BLIND_SHARE = 1 / 3
"""Share of the trials that go to what is predicted to be fast, where nothing predicts the objective."""
_LIKELY = 0.3
"""What TPE likes must be so likely to work, as a share of the likeliest."""


def spent_budget(now: Situation) -> Stop | None:
    """The end, once as many trials have run or are running as were asked for."""
    if now.history.counted + now.num_taken < now.terms.n_trials:
        return None
    return Stop(kind="budget", text=f"{now.terms.n_trials} trials have run, as many as were asked for")


def unfinished_plan(now: Situation) -> Proposal | None:
    """A plan that was stopped or lost its workers."""
    if (known := now.history.due_again()) is None or known.point is None:
        return None
    lost = any(map(is_lost, known.records))
    return now.propose(known.point, "again", "it lost its workers" if lost else "it was stopped")


def earlier_best(now: Situation) -> Proposal | None:
    """A plan that an earlier study liked."""
    point = next(filter(now.is_new, now.terms.first), None)
    return None if point is None else now.propose(point, "first", "an earlier study found it good")


def whole_space(now: Situation) -> Proposal | None:
    """Every plan, where all of them are within the budget."""
    if now.terms.mode != "whole":
        return None
    count = now.terms.forecaster.num_candidates
    return _most_valuable(now, "all", f"all {count} plans are run, the promising ones first")


def predicted_best(now: Situation) -> Proposal | None:
    """What is predicted to be the best, in the first trials and as long as nothing that ran keeps the constraints."""
    if now.terms.mode != "model":
        return None
    # In this order: the stopping rule hears of every step.
    if now.incumbent is not None and (now.converged or now.history.counted >= PROMISING_FIRST):
        return None
    return _most_valuable(now, "model", "predicted to be the best", now.scalar[0])


def unseen_kind(now: Situation) -> Proposal | None:
    """The best plan within reach of a kind of which none has run, the most promising kind first."""
    if now.incumbent is not None:
        cost = now.scalar[0]
        most_cost = float(cost[now.incumbent]) + WITHIN_REACH
    elif _is_early_and_blind(now) and now.history.counted:
        cost = now.forecast.scalar(even_weights(len(now.terms.objectives)))[0]
        most_cost = math.inf
    else:
        return None
    num_devices = len(now.terms.space.devices)
    seen = {
        kind
        for known in now.history.plans.values()
        if known.finished and known.effective is not None
        for kind in kinds_of(known.effective.plan, num_devices)
    }
    new = [set(kinds_of(one.plan, num_devices)) - seen for one in now.forecast.effective]
    within = now.forecast.is_open & (now.forecast.kept > LEAST_CHANCE) & (cost <= most_cost)
    within &= np.array([bool(kinds) for kinds in new], dtype=bool)
    if not within.any():
        return None
    place = first_of(-cost, within)
    what = " and ".join(_KIND_WORDS[name](number) for name, number in sorted(new[place]))
    return now.propose_place(place, "kind", f"no plan with {what} has run yet, and this one is within reach")


def predicted_fast(now: Situation) -> Proposal | None:
    """What is predicted to be fast, for a share of the trials where nothing predicts the objective."""
    if not _is_early_and_blind(now):
        return None
    return _most_valuable(now, "model", "predicted to be fast, which is all that can be predicted")


def nothing_to_gain(now: Situation) -> Stop | None:
    """The end, once no plan has promised a gain several times in a row."""
    if not (now.converged and now.terms.stop_early) or now.history.counted < LEAST_TRIALS:
        return None
    if not all(map(now.was_calm, now.history.marks[-CONVERGED_IN_A_ROW:-1])):
        return None
    chance, place = now.largest_chance
    text = (
        f"no plan that did not run is predicted to gain more than {100 * MARGIN * now.forecast.noise:.1f} %, "
        "half the noise of a run"
    )
    if chance >= 0.005:
        name = now.forecast.effective[place].plan.describe()
        text += f"; the likeliest to, {name}, would with a probability of {100 * chance:.0f} %"
    return Stop(kind="converged", text=text)


def unsure_incumbent(now: Situation) -> Proposal | None:
    """The incumbent once more, where nothing new promises a gain and another plan that ran may be better."""
    if not now.converged:
        return None
    assert now.incumbent is not None
    history, forecast, incumbent = now.history, now.forecast, now.incumbent
    key = forecast.effective[incumbent].key
    point = forecast.points[incumbent] or history.plans[key].point
    if (
        point is None
        or key in history.taken
        or history.replicates >= min(MOST_REPLICATES, history.counted // REPLICATES_EVERY)
    ):
        return None
    cost, sd = now.scalar
    rivals = forecast.was_measured & (forecast.kept > LEAST_CHANCE)
    rivals[incumbent] = False
    both = np.hypot(sd, sd[incumbent])
    if not (rivals & (chance_of_gain(cost, both, float(cost[incumbent]), 0.0) > LEAST_CHANCE)).any():
        return None
    reason = "it leads, not surely, and nothing new promises more"
    return now.propose(point, "replicate", reason, forecast.metrics.of(incumbent))


def turn_of_tpe(now: Situation) -> Proposal | None:
    """What Optuna's TPE likes, which sees what the model does not: now and then, or always where that is blind."""
    if now.incumbent is not None:
        least, every = (LEAST_TRIALS, 2) if now.converged else (TPE_FROM, TPE_EVERY)
        if now.history.counted < least or now.history.counted % every:
            return None
    elif now.terms.mode != "blind" or _is_early_and_blind(now):
        return None
    point = now.terms.suggest(lambda point: _is_likely(now, point))
    return None if point is None else now.propose(point, "tpe", "Optuna's TPE likes it")


def largest_improvement(now: Situation) -> Proposal | None:
    """The open plan of the largest expected improvement, times the chance that it counts (M. Schonlau, W. J. Welch and
    D. R. Jones, Global versus local search in constrained optimization, 1998)."""
    if now.incumbent is None or not now.forecast.is_open.any():
        return None
    cost, sd = now.scalar
    best = float(cost[now.incumbent])
    gain = expected_improvement(cost, sd, best) * now.forecast.kept * now.forecast.works
    place = first_of(gain, now.forecast.is_open)
    percent = f"{100 * math.expm1(best - cost[place]):+.1f} %"
    reason = f"{percent} predicted against the best so far, give or take {100 * sd[place]:.1f} %"
    return now.propose_place(place, "model", reason)


def anything_new(now: Situation) -> Proposal | None:
    """Any new point, once the model has nothing left to propose and the search may not end early."""
    if now.terms.stop_early and now.terms.forecaster.num_candidates:
        return None
    point = now.terms.suggest(now.is_new)
    return None if point is None else now.propose(point, "tpe", "the cost model has nothing left to propose")


def exhausted(now: Situation) -> Stop:
    """The end, where no rule before had anything to say."""
    return Stop(kind="exhausted", text="every plan of the space was tried that is worth it")


RULES: tuple[Rule, ...] = (
    spent_budget,
    unfinished_plan,
    earlier_best,
    whole_space,
    predicted_best,
    unseen_kind,
    predicted_fast,
    nothing_to_gain,
    unsure_incumbent,
    turn_of_tpe,
    largest_improvement,
    anything_new,
    exhausted,
)


class Strategy(Terms):
    """Proposes trials: a pure function of the terms and of the records so far."""

    def next(self, records: Sequence[Record], *, taken: Collection[Point] = ()) -> Proposal | Stop:
        """What to do after these records, in the order in which they were written; the plans of `taken` are run by
        other processes of the study now: they are left to them, and count as trials."""
        now = Situation(self, self._read(records, taken), num_taken=len(taken))
        return next(step for rule in RULES if (step := rule(now)) is not None)

    def preferred(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Keys of the measured plans, best first as the refitted model has them, which smooths the luck of runs out.
        What earlier studies taught is left aside. Empty for several objectives, or where nothing predicts the one."""
        if len(self.objectives) > 1 or self.own_forecaster.is_blind or not self.own_forecaster.num_candidates:
            return ()
        forecast = self.own_forecaster.look(self._read(records))
        cost, _ = forecast.scalar(None)
        order = np.argsort(cost, kind="stable").tolist()
        return tuple(forecast.effective[place].key for place in order if forecast.was_measured[place])

    def _read(self, records: Sequence[Record], taken: Collection[Point] = ()) -> History:
        if not self.history.is_extended_by(records):
            self.forget()
        self.history.extend(records)
        self.history.take(taken)
        return self.history


def _is_early_and_blind(now: Situation) -> bool:
    return now.terms.mode == "blind" and now.history.counted < max(PROMISING_FIRST, BLIND_SHARE * now.terms.n_trials)


def _most_valuable(now: Situation, kind: Reason, reason: str, cost: Floats | None = None) -> Proposal | None:
    """The open plan of the least cost, where those count less that may fail or break a constraint."""
    if not now.forecast.is_open.any():
        return None
    cost = now.forecast.scalar(even_weights(len(now.terms.objectives)))[0] if cost is None else cost
    return now.propose_place(first_of(now.forecast.worth(cost), now.forecast.is_open), kind, reason)


def _is_likely(now: Situation, point: Point) -> bool:
    """Whether a point is new, and not much likelier to fail than others, by what happened to plans like it."""
    if not now.is_new(point):
        return False
    resolved = now.terms.resolve(now.terms.space.plan(point))
    if not isinstance(resolved, EffectivePlan) or not now.forecast.is_open.any():
        return True
    likeliest = float(now.forecast.works[now.forecast.is_open].max())
    return now.terms.forecaster.works(resolved, now.history) >= _LIKELY * likeliest


_KIND_WORDS: dict[str, Callable[[int], str]] = {
    "stages": lambda count: "one stage" if count == 1 else f"{count} stages",
    "budget": lambda given: "a token budget" if given else "the engine's own token budget",
    "shards": lambda count: "one worker a stage" if count == 1 else f"{count} workers a stage",
    "replicas": lambda count: "one pipeline" if count == 1 else f"{count} replicas",
    "chunks": lambda cut: "prompts in chunks" if cut else "whole prompts",
    "compile": lambda on: "compiled layers" if on else "eager layers",
    "devices": lambda count: "one device",
    "lanes": lambda count: f"{count} lanes by the length of prompts",
}
