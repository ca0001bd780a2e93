"""One Optuna study by ask and tell: the search's memory, in a database that can be rebuilt from the records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, count

import optuna
from optuna.trial import FrozenTrial

from pipetune.bench.errors import StudyError, UserError
from pipetune.bench.record import Record
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.config.storage_url import shown, sqlite_path
from pipetune.tuner.search.database import CorruptDatabaseError, open_storage, open_study, reason
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.search.trial_codec import TrialCodec
from pipetune.tuner.study.store import StudyStore


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
        """
        Args:
            storage: that the study is kept in.
        """
        self._storage, self._study = storage, study
        self._codec = TrialCodec(space, objectives, constraints)

    @classmethod
    def open(
        cls,
        url: str,
        space: SearchSpace,
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
        set_aside: Callable[[str], None] | None = None,
    ) -> OptunaStudy:
        """The study of a space in its database.

        Args:
            set_aside: for a database of the study's own: if it is damaged it is kept under another name, which this is
                told, and made anew. Without it the database may be somebody else's, and is never touched.

        Raises:
            CorruptDatabaseError, StudyError: the database cannot be used.
        """

        def create() -> OptunaStudy:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            storage = open_storage(url)
            study = open_study(storage, f"pipetune-{space.study_id}", objectives)
            return cls(storage, study, space, objectives=objectives, constraints=constraints)

        try:
            return create()
        except CorruptDatabaseError:
            path = sqlite_path(url)
            if set_aside is None or path is None:
                raise
            # The records are the truth: the study's own database is built anew from them.
            endings = chain([""], (f"-{number}" for number in count(2)))
            names = (path.with_name(f"{path.name}.broken{ending}") for ending in endings)
            kept = path.replace(next(name for name in names if not name.exists()))
            set_aside(f"{path} is damaged: it is kept as {kept.name}, and made anew from the records")
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
        return self._trials()

    def ask(self, point: Point) -> int | None:
        """Begins a trial of this point.

        Returns:
            Its number; None where another process has taken the plan in the meantime.
        """
        return self._begin(point, {})

    def tell(self, record: Record) -> None:
        """Says what became of a trial; its record is durable by now."""
        assert record.trial_number is not None
        self._finish(record.trial_number, record, {})

    def restore(self, records: Collection[Record]) -> tuple[FrozenTrial, ...]:
        """Brings the database up to the records: adds trials it lacks, tells what it was not told.

        Returns:
            Trials that were running and have no record; their driver died.
        """
        by_trial = {record.trial_number: record for record in records if record.trial_number is not None}
        trials = self._trials()
        for trial in trials:
            if not trial.state.is_finished() and trial.number in by_trial:
                self.tell(by_trial[trial.number])
        for number in range(len(trials), max(by_trial, default=-1) + 1):
            self._add(by_trial.get(number), {})
        return tuple(trial for trial in trials if not trial.state.is_finished() and trial.number not in by_trial)

    def pull(self, store: StudyStore) -> tuple[Record, ...]:
        """Writes what others have measured into the study's folder.

        Returns:
            The new records; none where a process is alone.
        """
        return ()

    def wait(self) -> None:
        """Waits until something has changed with what others run."""

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _begin(self, point: Point, attributes: Mapping[str, str]) -> int:
        """Adds a running trial, whole from the start; nobody else adds one meanwhile."""
        self._study.add_trial(self._codec.running(point, attributes))
        return self._trials()[-1].number

    def _add(self, record: Record | None, attributes: Mapping[str, str]) -> None:
        self._study.add_trial(self._codec.finished(record, attributes))

    def _finish(self, number: int, record: Record, attributes: Mapping[str, str]) -> None:
        """Ends a running trial; one that has ended stays as it is."""
        state, values, constraints = self._codec.outcome(record.result)
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        trial = optuna.trial.Trial(self._study, trial_id)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        known = self._trials()[number].constraints
        for key, amount in constraints.items():
            if key not in known:
                trial.set_constraint(key, amount)
        self._study.tell(number, values=values, state=state, skip_if_finished=True)
