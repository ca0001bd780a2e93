"""Optuna, by ask and tell: it proposes points, is told what became of them, and can be rebuilt from the records.

Out of memory is a broken constraint of graded amount, then PRUNED: so TPE learns where the edge is. Every told trial
carries every constraint, in one order. What failed for another reason is FAIL, which TPE passes over.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipetune.bench import metrics
from pipetune.bench.errors import StudyError, UserError
from pipetune.bench.record import Failure, FailureKind, Measurement, Outcome, Record
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.config.storage_url import shown, sqlite_path
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.search.database import CorruptDatabaseError, open_storage, reason
from pipetune.tuner.search.space.resolver import overrun
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.store import StudyStore

MEMORY_CONSTRAINT = "memory"
INFEASIBLE = frozenset({FailureKind.OVER_MEMORY_CAP, FailureKind.OUT_OF_MEMORY})
_STARTUP_TRIALS = 4
_DRAWS = 64
"""Proposals drawn until one is new; then any new point is taken."""


class Proposals:
    """The search's memory: one Optuna study, in a database that the records can restore."""

    taken: tuple[Point, ...] = ()
    """What other processes of the study were running when it was last pulled."""

    def __init__(
        self,
        url: str,
        space: SearchSpace,
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
        seed: int,
        set_aside: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            set_aside: for a database of the study's own: if it is damaged it is kept under another name, which this is
                told, and made anew. Without it the database may be somebody else's, and is never touched.

        Raises:
            CorruptDatabaseError, StudyError: the database cannot be used.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._objectives = tuple(objectives)
        self._constraints = tuple(constraints)
        self._seed = seed
        self._set_aside = set_aside
        self._study = self._open(url)
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(low, high, log=log) for name, (low, high, log) in space.dimensions().items()
        }

    def close(self) -> None:
        """Ends the connections to the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def restore(self, records: Collection[Record]) -> tuple[FrozenTrial, ...]:
        """Brings the database up to the records: adds trials it lacks, tells what it was not told.

        Returns:
            Trials that were running and have no record; their driver died.
        """
        by_trial = {record.trial_number: record for record in records if record.trial_number is not None}
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if not trial.state.is_finished() and trial.number in by_trial:
                self.tell(by_trial[trial.number])
        for number in range(len(trials), max(by_trial, default=-1) + 1):
            self._study.add_trial(self._as_trial(by_trial.get(number)))
        return tuple(trial for trial in trials if not trial.state.is_finished() and trial.number not in by_trial)

    def pull(self, store: StudyStore) -> tuple[Record, ...]:
        """Writes what others have measured into the study's folder.

        Returns:
            The new records; none where a process is alone.
        """
        return ()

    def wait(self) -> None:
        """Waits until something has changed with what others run."""

    def settle(self) -> None:
        """Waits until what others run has ended."""

    def start(self, point: Point) -> int | None:
        """Begins a trial of this point.

        Returns:
            Its number; None where another process has taken the plan in the meantime.
        """
        return self._begin(point, {})

    def _begin(self, point: Point, attributes: Mapping[str, str]) -> int:
        trial = create_trial(
            state=TrialState.RUNNING,
            params=dict(point),
            distributions=self._distributions_of(point),
            user_attrs=dict(attributes),
        )
        trial_id = self._storage.create_new_trial(self._study._study_id, trial)
        return self._storage.get_trial(trial_id).number

    def suggest(self, is_new: Callable[[Point], bool]) -> Point | None:
        """A point that TPE likes and that is new, else any new one; None when there is none."""
        done = len(self._study.get_trials(deepcopy=False))
        # Else samplers see what was known when this process told something last.
        self._study._thread_local.cached_all_trials = None
        # Seeded by what is known, so that a resumed study goes on as it would have, and not from the start.
        sampler = optuna.samplers.TPESampler(
            seed=self._seed + done,
            multivariate=True,
            constant_liar=False,
            n_startup_trials=_STARTUP_TRIALS,
        )
        for _ in range(_DRAWS):
            point = self._draw(sampler)
            if is_new(point):
                return point
        rng = random.Random(self._seed + done)
        dimensions = self._space.dimensions()
        for _ in range(_DRAWS):
            point = {name: rng.randint(low, high) for name, (low, high, _) in dimensions.items()}
            if is_new(point):
                return point
        return next((point for point in self._space.points() if is_new(point)), None)

    def tell(self, record: Record) -> None:
        """Says what became of a trial; its record is durable by now."""
        assert record.trial_number is not None
        frozen = self._study.get_trials(deepcopy=False)[record.trial_number]
        state, values, constraints = self._verdict(record.result)
        trial = optuna.trial.Trial(self._study, frozen._trial_id)
        for key, amount in constraints.items():
            if key not in frozen.constraints:
                trial.set_constraint(key, amount)
        self._study.tell(record.trial_number, values=values, state=state, skip_if_finished=True)

    def _open(self, url: str) -> optuna.Study:
        try:
            return self._create(url)
        except CorruptDatabaseError:
            path = sqlite_path(url)
            if self._set_aside is None or path is None:
                raise
            # The records are the truth: the study's own database is built anew from them.
            kept = path.replace(path.with_name(f"{path.name}.broken"))
            self._set_aside(f"{path} is damaged: it is kept as {kept.name}, and made anew from the records")
            return self._create(url)
        except UserError:
            raise
        except Exception as error:
            raise StudyError(f"storage {shown(url)}: cannot be used: {reason(error)}") from None

    def _create(self, url: str) -> optuna.Study:
        self._storage = open_storage(url)
        return optuna.create_study(
            storage=self._storage,
            study_name=f"pipetune-{self._space.study_id}",
            directions=[Objective(metric=name).direction for name in self._objectives],
            load_if_exists=True,
        )

    def _draw(self, sampler: optuna.samplers.BaseSampler) -> Point:
        """One proposal, without a trial in the database: a repeated one then leaves no trace."""
        trial = create_trial(state=TrialState.RUNNING)
        relative = sampler.infer_relative_search_space(self._study, trial)
        params = dict(sampler.sample_relative(self._study, trial, relative))
        for name, distribution in self._distributions.items():
            if name not in params:
                params[name] = sampler.sample_independent(self._study, trial, name, distribution)
        return {name: int(params[name]) for name in self._distributions}

    def _distributions_of(self, params: Mapping[str, object]) -> dict[str, BaseDistribution]:
        """Of a point's own values; cuts are kept with a trial, and TPE goes by the rank beside them."""
        cut = IntDistribution(1, max(2, sum(self._space.partitions[0]) - 1))
        return {name: self._distributions.get(name, cut) for name in params}

    def _as_trial(self, record: Record | None, attributes: Mapping[str, str] | None = None) -> FrozenTrial:
        """A finished trial made of a record; where there is none, a failed one keeps the count."""
        params: Mapping[str, int | float | str] = (record.params if record else None) or {}
        state, values, constraints = self._verdict(record.result) if record and params else (TrialState.FAIL, None, {})
        return create_trial(
            state=state,
            values=values,
            params=dict(params),
            distributions=self._distributions_of(params),
            constraints=constraints,
            user_attrs=dict(attributes or {}),
        )

    def _verdict(self, result: Outcome) -> tuple[TrialState, list[float] | None, dict[str, float]]:
        if isinstance(result, Failure):
            if result.kind not in INFEASIBLE:
                return TrialState.FAIL, None, {}
            return TrialState.PRUNED, None, self._amounts(overrun(result), {})
        assert isinstance(result, Measurement)
        derived = metrics.derive(result)
        if any(name not in derived for name in self._objectives):
            return TrialState.FAIL, None, {}
        return TrialState.COMPLETE, [derived[name] for name in self._objectives], self._amounts(0.0, derived)

    def _amounts(self, memory: float, derived: Mapping[str, float]) -> dict[str, float]:
        """Every constraint in one order; above zero is broken. What was not measured breaks nothing by itself."""
        amounts = {MEMORY_CONSTRAINT: memory}
        for constraint in self._constraints:
            value = derived.get(constraint.metric)
            amounts[str(constraint)] = 0.0 if value is None else constraint.excess(value)
        return amounts
