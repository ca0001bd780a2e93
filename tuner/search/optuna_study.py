"""One Optuna study by ask and tell: the search's memory, in a database that can be rebuilt from the records.

Out of memory is a broken constraint of graded amount, then PRUNED: so TPE learns where the edge is. Every told trial
carries every constraint, in one order. What failed for another reason is FAIL, which TPE passes over.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, count

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipetune.bench import metrics
from pipetune.bench.errors import StudyError, UserError
from pipetune.bench.record import Failure, Outcome, Record
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.config.storage_url import shown, sqlite_path
from pipetune.tuner.search.database import CorruptDatabaseError, aims_at, open_storage, open_study, reason
from pipetune.tuner.search.policy.history import OVER_MEMORY
from pipetune.tuner.search.policy.tpe import distributions
from pipetune.tuner.search.space.resolver import overrun
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.store import StudyStore

_MEMORY_CONSTRAINT = "memory"


def point_of_trial(trial: FrozenTrial) -> Point:
    """The point that a trial runs; empty for one that only keeps the count."""
    return {name: int(value) for name, value in trial.params.items()}


class OptunaStudy:
    """The study of one process."""

    taken: tuple[Point, ...] = ()
    """What other processes of the study were running when it was last pulled."""

    def __init__(
        self,
        storage: optuna.storages.RDBStorage,
        study: optuna.Study,
        space: SearchSpace,
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
    ) -> None:
        self._storage, self._study = storage, study
        self._objectives, self._constraints = tuple(objectives), tuple(constraints)
        self._space, self._distributions = space, distributions(space)
        # Cuts are kept with a trial, and TPE goes by the rank beside them.
        self._cut = IntDistribution(1, max(2, sum(space.partitions[0]) - 1))

    @classmethod
    def open(
        cls,
        url: str,
        space: SearchSpace,
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
        name: str = "pipetune",
        say: Callable[[str], None] = lambda text: None,
        is_own: bool = False,
    ) -> "OptunaStudy":
        """The study of a space in its database; CorruptDatabaseError, StudyError where that cannot be used. The name is
        what it is called there, before what tells it from others; one that is there keeps its own. `say` is told that
        the database is waited for or set aside. A damaged one that is the study's own is kept under another name, and
        made anew; any other may be somebody else's, and is never touched."""

        def create() -> OptunaStudy:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            storage = open_storage(url, say)
            there = (one for one in optuna.get_all_study_names(storage) if one.endswith(f"-{space.study_id}"))
            study = open_study(storage, next(there, f"{name}-{space.study_id}"), objectives)
            if not aims_at(study, objectives):
                raise CorruptDatabaseError(
                    f"storage: {study.study_name} has other objectives than {', '.join(objectives)}"
                )
            return cls(storage, study, space, objectives=objectives, constraints=constraints)

        try:
            return create()
        except CorruptDatabaseError:
            path = sqlite_path(url)
            if not is_own or path is None:
                raise
            # The records are the truth: the study's own database is built anew from them.
            endings = chain([""], (f"-{number}" for number in count(2)))
            names = (path.with_name(f"{path.name}.broken{ending}") for ending in endings)
            kept = path.replace(next(name for name in names if not name.exists()))
            say(f"{path} is damaged: it is kept as {kept.name}, and made anew from the records")
            return create()
        except UserError:
            raise
        except Exception as error:
            raise StudyError(f"storage {shown(url)}: cannot be used: {reason(error)}") from None

    def close(self) -> None:
        """Ends the connections to the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def trials(self) -> list[FrozenTrial]:
        """All trials in the order of their numbers, not to be changed."""
        return self._study.get_trials(deepcopy=False)

    def ask(self, point: Point) -> int | None:
        """Begins a trial of this point; its number, or None where another process has taken the plan by now."""
        return self._begin(point, {})

    def tell(self, record: Record) -> None:
        """Says what became of a running trial, whose record is durable by now; one that has ended stays as it is."""
        assert record.trial_number is not None
        state, values, constraints = self._outcome(record.result)
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, record.trial_number)
        trial = optuna.trial.Trial(self._study, trial_id)
        for key, value in self._attributes(record).items():
            trial.set_user_attr(key, value)
        known = self._study.get_trials(deepcopy=False)[record.trial_number].constraints
        for key, amount in constraints.items():
            if key not in known:
                trial.set_constraint(key, amount)
        self._study.tell(record.trial_number, values=values, state=state, skip_if_finished=True)

    def note_best(self, record: Record | None) -> None:
        """Keeps with the study which trial is its best: finals may find another than the one of the best value."""
        self._study.set_user_attr("best_trial", record and record.trial_number)
        self._study.set_user_attr("best_plan", record and record.spec and record.spec.plan.describe())

    def restore(self, records: Collection[Record]) -> tuple[FrozenTrial, ...]:
        """Brings the database up to the records: adds trials it lacks, tells what it was not told. Those are returned
        that were running and have no record; their driver died."""
        by_trial = {record.trial_number: record for record in records if record.trial_number is not None}
        trials = self.trials()
        for trial in trials:
            if not trial.state.is_finished() and trial.number in by_trial:
                self.tell(by_trial[trial.number])
        for number in range(len(trials), max(by_trial, default=-1) + 1):
            self._add(by_trial.get(number))
        return tuple(trial for trial in trials if not trial.state.is_finished() and trial.number not in by_trial)

    def pull(self, store: StudyStore) -> tuple[Record, ...]:
        """Writes what others have measured into this process's folder, and gives it; nothing where it is alone."""
        return ()

    def wait(self) -> None:
        """Waits until something has changed with what others run."""

    def _begin(self, point: Point, attributes: Mapping[str, str]) -> int:
        """Adds a running trial, whole from the start; nobody else adds one meanwhile."""
        self._study.add_trial(self._trial(TrialState.RUNNING, None, {}, point, attributes))
        return self._study.get_trials(deepcopy=False)[-1].number

    def _add(self, record: Record | None) -> None:
        """Adds a trial that ended; a failed one, which keeps the count, where no point has a record."""
        attributes = {} if record is None else self._attributes(record)
        if record is None or not record.params:
            trial = self._trial(TrialState.FAIL, None, {}, {}, attributes)
        else:
            trial = self._trial(*self._outcome(record.result), record.params, attributes)
        self._study.add_trial(trial)

    def _attributes(self, record: Record) -> Mapping[str, str]:
        """What is kept with a trial beside its outcome."""
        return {}

    def _outcome(self, result: Outcome) -> tuple[TrialState, list[float] | None, dict[str, float]]:
        """State, values of the objectives, and amounts of the constraints; above zero is broken."""
        if isinstance(result, Failure):
            if result.kind not in OVER_MEMORY:
                return TrialState.FAIL, None, {}
            return TrialState.PRUNED, None, self._amounts(overrun(result), {})
        derived = metrics.derive(result)
        if any(name not in derived for name in self._objectives):
            return TrialState.FAIL, None, {}
        return TrialState.COMPLETE, [derived[name] for name in self._objectives], self._amounts(0.0, derived)

    def _amounts(self, memory: float, derived: Mapping[str, float]) -> dict[str, float]:
        """Every constraint in one order; what was not measured breaks nothing by itself."""
        amounts = {_MEMORY_CONSTRAINT: memory}
        for constraint in self._constraints:
            value = derived.get(constraint.metric)
            amounts[str(constraint)] = 0.0 if value is None else constraint.excess(value)
        return amounts

    def _trial(
        self,
        state: TrialState,
        values: list[float] | None,
        constraints: Mapping[str, float],
        params: Mapping[str, int | float | str],
        attributes: Mapping[str, str],
    ) -> FrozenTrial:
        plan = self._space.plan({name: int(value) for name, value in params.items()}) if params else None
        names = ("layer_counts", "devices", "replicas", "micro_batch_size", "prefill_size")
        told = {} if plan is None else {"plan": plan.describe(), **{name: getattr(plan, name) for name in names}}
        return create_trial(
            state=state,
            values=values,
            params=dict(params),
            distributions={name: self._distributions.get(name, self._cut) for name in params},
            constraints=dict(constraints),
            user_attrs={**told, **attributes},
        )
