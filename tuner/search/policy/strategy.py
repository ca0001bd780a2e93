"""What to run next, and when to stop: a pure function of the question and of the records so far.

In this order: what was stopped or lost its workers; what an earlier study liked; everything, where that is within the
budget; one plan of each kind that the cost model knows little of; what the refitted model promises most of, by expected
improvement; now and then what Optuna's TPE likes, which sees what the model does not; and the leader once more, where
nothing else promises anything and its lead is not sure.

No clock and no global random numbers: replaying the records gives the same proposals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from pipetune.bench.record import Record
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.policy.acquisition import (
    Floats,
    chance_of_gain,
    draw_weights,
    even_weights,
    expected_improvement,
    first_of,
)
from pipetune.tuner.search.policy.forecast import Outlook
from pipetune.tuner.search.policy.forecaster import Lookout
from pipetune.tuner.search.policy.history import History, Lessons, is_lost, kinds_of
from pipetune.tuner.search.policy.stopping_rule import LEAST_CHANCE, LEAST_TRIALS, Patience
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.search_log import Proposal, Reason, Stop

__all__ = ["Proposal", "Stop", "Strategy"]

PROMISING_FIRST = 3
"""So many trials go to what is predicted best, however unsurely; behind them doubt counts as a chance."""
WITHIN_REACH = 0.3
"""A kind is worth a trial if its best plan is predicted no further behind, as a log."""
MOST_REPLICATES, REPLICATES_EVERY = 3, 3
"""Of leaders, in all; and no more than one in so many trials."""
TPE_FROM, TPE_EVERY = 8, 4
BLIND_SHARE = 1 / 3
"""Of the trials that go to what is predicted to be fast, where nothing predicts the objective."""
_REFUSALS = 2
"""Plans that cannot fit may be proposed so often a trial: they cost no time, but shall not go on for ever."""
_LIKELY = 0.3
"""What TPE likes must be so likely to work, as a share of the likeliest."""


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
        suggest: Callable[[Callable[[Point], bool]], Point | None],
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
            suggest: a point that TPE likes and for which the given test holds; None when there is none.
        """
        self._space, self._resolve = space, resolve
        self._n_trials, self._seed, self._stop_early = n_trials, seed, stop_early
        self._num_objectives = len(objectives)
        self._first, self._suggest = tuple(first), suggest
        look_out = functools.partial(Lookout, space, model, resolve, objectives=objectives, constraints=constraints)
        self._lookout = look_out(prior=prior)
        self._own = look_out() if prior else self._lookout
        """Of this study alone."""
        self._lessons: Lessons = {}
        self._history = History(space, resolve)
        self._patience = Patience(self._lookout, num_objectives=len(objectives), seed=seed)

    @property
    def counted(self) -> int:
        """Of the records last seen, trials that count against the budget."""
        return self._history.counted

    def next(self, records: Sequence[Record], *, taken: Collection[Point] = ()) -> Proposal | Stop:
        """What to do after these records, in the order in which they were written.

        Args:
            taken: what other processes of the study run now: their plans are left to them, and count as trials.
        """
        history = self._read(records, taken)
        if history.counted + len(taken) >= self._n_trials:
            return Stop(kind="budget", text=f"{self._n_trials} trials have run, as many as were asked for")
        again = history.due_again()
        if again is not None:
            known = history.of(self._space.plan(again))
            lost = known is not None and any(map(is_lost, known.records))
            return self._of_point(history, again, "again", "it lost its workers" if lost else "it was stopped")
        for point in self._first:
            if self._is_new(history, point):
                return self._of_point(history, point, "first", "an earlier study found it good")
        step: Proposal | Stop | None = None
        if self._lookout.num_candidates:
            step = self._by_model(history)
        return step or self._rest(history)

    def preferred(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Keys of the measured plans, best first as the refitted model has them, which smooths the luck of runs out.

        What earlier studies taught is left aside. Empty of several objectives, or where nothing predicts the one.
        """
        if self._num_objectives > 1 or self._own.is_blind or not self._own.num_candidates:
            return ()
        view = self._own.look(self._read(records, ()))
        cost, _ = view.scalar(None)
        order = np.argsort(cost, kind="stable").tolist()
        return tuple(view.effective[place].key for place in order if view.was_measured[place])

    def _by_model(self, history: History) -> Proposal | Stop | None:
        view = self._lookout.look(history)
        if self._lookout.num_candidates <= self._n_trials:
            count = self._lookout.num_candidates
            return self._most_valuable(view, "all", f"all {count} plans are run, the promising ones first")
        if self._lookout.is_blind:
            if history.counted < max(PROMISING_FIRST, BLIND_SHARE * self._n_trials):
                unseen = self._unseen_kind(history, view, None) if history.counted else None
                return unseen or self._most_valuable(
                    view, "model", "predicted to be fast, which is all that can be predicted"
                )
            return self._tpe(history, view)
        return self._by_promise(history, view)

    def _by_promise(self, history: History, view: Outlook) -> Proposal | Stop | None:
        cost, sd = view.scalar(self._weights(history))
        leader = view.leader(cost)
        calm = leader is not None and self._patience.is_calm(history, view)
        if leader is None or (history.counted < PROMISING_FIRST and not calm):
            return self._most_valuable(view, "model", "predicted to be the best", cost)
        unseen = self._unseen_kind(history, view, float(cost[leader]) + WITHIN_REACH)
        if unseen is not None:
            return unseen
        if calm and self._stop_early and self._patience.is_over(history, self._lessons):
            return self._patience.stop(view)
        best = self._most_promising(view, cost, sd, float(cost[leader]))
        once_more = self._once_more(history, view, cost, sd, leader) if calm else None
        if once_more is not None:
            return once_more
        every = 2 if calm else TPE_EVERY
        if history.counted >= (LEAST_TRIALS if calm else TPE_FROM) and history.counted % every == 0:
            return self._tpe(history, view) or best
        return best

    def _read(self, records: Sequence[Record], taken: Collection[Point]) -> History:
        if not self._history.is_extended_by(records):
            self._history = History(self._space, self._resolve)
            self._lookout.forget()
            self._own.forget()
            self._patience.forget()
        self._history.extend(records, self._lessons)
        self._history.take(taken)
        return self._history

    def _weights(self, history: History) -> Floats | None:
        """Of the objectives, other ones for each trial; None for a single objective."""
        if self._num_objectives == 1:
            return None
        return draw_weights(self._num_objectives, f"{self._seed}-{history.counted}")

    def _most_valuable(self, view: Outlook, kind: Reason, reason: str, cost: Floats | None = None) -> Proposal | None:
        """The open plan of the least cost, where those count less that may fail or break a constraint."""
        if not view.is_open.any():
            return None
        cost = view.scalar(even_weights(self._num_objectives))[0] if cost is None else cost
        return self._of_place(view, first_of(view.worth(cost), view.is_open), kind, reason)

    def _most_promising(self, view: Outlook, cost: Floats, sd: Floats, best: float) -> Proposal | None:
        """The open plan of the largest expected improvement, times the chance that it counts (M. Schonlau, W. J. Welch
        and D. R. Jones, Global versus local search in constrained optimization, 1998)."""
        if not view.is_open.any():
            return None
        gain = expected_improvement(cost, sd, best) * view.kept * view.works
        place = first_of(gain, view.is_open)
        reason = (
            f"{_percent(best - cost[place])} predicted against the best so far, give or take {100 * sd[place]:.1f} %"
        )
        return self._of_place(view, place, "model", reason)

    def _unseen_kind(self, history: History, view: Outlook, most_cost: float | None) -> Proposal | None:
        """The best plan of a kind of which none has run, the most promising kind first."""
        num_devices = len(self._space.devices)
        seen = {
            kind
            for known in history.plans.values()
            if known.finished and known.effective is not None
            for kind in kinds_of(known.effective.plan, num_devices)
        }
        weights = even_weights(self._num_objectives) if most_cost is None else self._weights(history)
        cost = view.scalar(weights)[0]
        within = view.is_open & (view.kept > LEAST_CHANCE)
        if most_cost is not None:
            within &= cost <= most_cost
        new = [set(kinds_of(one.plan, num_devices)) - seen for one in view.effective]
        within &= np.array([bool(kinds) for kinds in new], dtype=bool)
        if not within.any():
            return None
        place = first_of(-cost, within)
        what = " and ".join(_KIND_WORDS[name](number) for name, number in sorted(new[place]))
        return self._of_place(view, place, "kind", f"no plan with {what} has run yet, and this one is within reach")

    def _once_more(self, history: History, view: Outlook, cost: Floats, sd: Floats, leader: int) -> Proposal | None:
        """The leader again, if another plan that ran may be better and there were not enough replicates."""
        known = history.plans[view.effective[leader].key]
        point = view.points[leader] or known.point
        if point is None or history.replicates >= min(MOST_REPLICATES, history.counted // REPLICATES_EVERY):
            return None
        rivals = view.was_measured & (view.kept > LEAST_CHANCE)
        rivals[leader] = False
        both = np.hypot(sd, sd[leader])
        if not (rivals & (chance_of_gain(cost, both, float(cost[leader]), 0.0) > LEAST_CHANCE)).any():
            return None
        predicted, deviations = view.predicted(leader)
        return Proposal(
            point=point,
            kind="replicate",
            reason="it leads, not surely, and nothing new promises more",
            predicted=predicted,
            predicted_sd=deviations,
        )

    def _tpe(self, history: History, view: Outlook) -> Proposal | None:
        point = self._suggest(lambda point: self._is_likely(history, view, point))
        return None if point is None else self._of_point(history, point, "tpe", "Optuna's TPE likes it")

    def _rest(self, history: History) -> Proposal | Stop:
        """Anything new, once the model has nothing left to propose."""
        if not (self._stop_early and self._lookout.num_candidates):
            point = self._suggest(lambda point: self._is_new(history, point))
            if point is not None:
                return self._of_point(history, point, "tpe", "the cost model has nothing left to propose")
        return Stop(kind="exhausted", text="every plan of the space was tried that is worth it")

    def _is_new(self, history: History, point: Point) -> bool:
        return history.is_new(point, most_refused=_REFUSALS * self._n_trials)

    def _is_likely(self, history: History, view: Outlook, point: Point) -> bool:
        """New, and not much likelier to fail than others, by what happened to plans like it."""
        if not self._is_new(history, point):
            return False
        resolved = self._resolve(self._space.plan(point))
        if not isinstance(resolved, EffectivePlan) or not view.is_open.any():
            return True
        return self._lookout.works(resolved, history) >= _LIKELY * float(view.works[view.is_open].max())

    def _of_place(self, view: Outlook, place: int, kind: Reason, reason: str) -> Proposal:
        point = view.points[place]
        assert point is not None, "what ran and is no candidate is never open"
        predicted, deviations = view.predicted(place)
        return Proposal(point=point, kind=kind, reason=reason, predicted=predicted, predicted_sd=deviations)

    def _of_point(self, history: History, point: Point, kind: Reason, reason: str) -> Proposal:
        resolved = self._resolve(self._space.plan(point))
        predicted: dict[str, float] = {}
        deviations: dict[str, float] = {}
        if isinstance(resolved, EffectivePlan) and self._lookout.num_candidates:
            predicted, deviations = self._lookout.predict(history, resolved)
        return Proposal(point=point, kind=kind, reason=reason, predicted=predicted, predicted_sd=deviations)


_KIND_WORDS: dict[str, Callable[[int], str]] = {
    "replicas": lambda count: "one pipeline" if count == 1 else f"{count} replicas",
    "chunks": lambda cut: "prompts in chunks" if cut else "whole prompts",
    "compile": lambda on: "compiled layers" if on else "eager layers",
    "devices": lambda count: "one device",
}


def _percent(log_gain: float) -> str:
    """`+3.1 %`."""
    return f"{100 * math.expm1(log_gain):+.1f} %"
