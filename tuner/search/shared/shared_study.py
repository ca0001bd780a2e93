"""Optuna's study among several processes: plans are claimed before they run, and records travel with their trials.

A claim is a running trial that bears its process's name. Whoever claims looks first, with the database to itself, what
others run and what they have measured; so no plan runs twice by accident. The claim of a process that gives no sign of
life any more is released: its trial is failed, and the plan is free again. A process that was thought dead and comes
back with a measurement adds it as a trial of its own.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from optuna.trial import FrozenTrial, TrialState

from pipetune.bench.record import Record
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.shared.codec import pack, unpack
from pipetune.tuner.search.shared.member import RECORD, Member
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.search.trial_codec import point_of_trial
from pipetune.tuner.study.store import StudyStore

_PROCESS, _SOURCE, _DEVICES = "process", "source", "devices"
_POLL_S = 1.0


class SharedStudy(OptunaStudy):
    """The study of several processes, as one of them uses it."""

    def __init__(
        self,
        member: Member,
        space: SearchSpace,
        resolve: Resolver,
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
    ) -> None:
        database = member.database
        super().__init__(database.storage, database.study, space, objectives=objectives, constraints=constraints)
        self._member, self._database = member, database
        self._space, self._resolve = space, resolve
        self._seen: set[str] = set()
        """Sources of the records that this process has."""
        self._pulled: tuple[frozenset[int], int] = (frozenset(), 0)

    def close(self) -> None:
        """Nothing: the member ends the connections."""

    def trials(self) -> list[FrozenTrial]:
        """All trials of all processes in the order of their numbers, not to be changed."""
        return self._database.patiently(self._trials)

    def restore(self, records: Collection[Record]) -> tuple[FrozenTrial, ...]:
        """Brings the database up to the records, which may know more than it does: it may have been lost.

        Returns:
            Trials of this process that were running and have no record.
        """
        self._seen = {self._source(record) for record in records}
        return self._database.patiently(lambda: self._restore(records))

    def pull(self, store: StudyStore) -> tuple[Record, ...]:
        """Writes what others have measured into this process's folder, and gives it."""
        trials, gone = self._database.patiently(lambda: (self._trials(), self._member.gone()))
        self._pulled = self._state_of(trials, gone)
        self.taken = tuple(point_of_trial(trial) for trial in trials if trial.number in self._pulled[0])
        pulled = []
        for trial in trials:
            if not self._is_news(trial):
                continue
            theirs = trial.user_attrs[_DEVICES].split(",")
            record = unpack(trial.user_attrs[RECORD], theirs=theirs, ours=self._member.devices)
            source = trial.user_attrs[_SOURCE]
            ran_on = record.source_devices or theirs
            pulled.append(store.adopt(record, source=source, source_devices=ran_on, trial_number=trial.number))
            self._seen.add(source)
        return tuple(pulled)

    def wait(self) -> None:
        """Waits until something has changed with what others run."""
        while self._pulled[0] and self._database.patiently(self._state) == self._pulled:
            time.sleep(_POLL_S)

    def ask(self, point: Point) -> int | None:
        """Claims a point's plan; its trial's number, or None where another process has taken the plan."""
        return self._database.patiently(lambda: self._claim(point))

    def tell(self, record: Record) -> None:
        """Says what became of a trial, to all processes."""
        self._seen.add(self._source(record))
        self._database.patiently(lambda: self._tell(record))

    def _restore(self, records: Collection[Record]) -> tuple[FrozenTrial, ...]:
        with self._database.alone():
            trials = self._trials()
            known = {trial.user_attrs.get(_SOURCE) for trial in trials}
            by_number = {trial.number: trial for trial in self._claims(trials, own=True)}
            for record in sorted(records, key=lambda record: record.trial_number or 0):
                if record.trial_number is None or self._source(record) in known:
                    continue
                if record.source is None and record.trial_number in by_number:
                    self._finish(by_number.pop(record.trial_number).number, record, self._attributes(record))
                else:
                    self._add(record, self._attributes(record))
        return tuple(by_number.values())

    def _claim(self, point: Point) -> int | None:
        wanted = self._identity(point)
        with self._database.alone():
            trials, gone = self._trials(), self._member.gone()
            for trial in self._claims(trials, own=True):
                # Of a claim whose answer was lost with the connection.
                self._release(trial)
            for trial in self._claims(trials):
                if trial.user_attrs[_PROCESS] in gone:
                    self._release(trial)
                elif self._identity(point_of_trial(trial)) == wanted:
                    return None
            news = (trial for trial in trials if trial.params and self._is_news(trial))
            if any(self._identity(point_of_trial(trial)) == wanted for trial in news):
                return None
            return self._begin(point, {_PROCESS: self._member.name})

    def _tell(self, record: Record) -> None:
        assert record.trial_number is not None
        with self._database.alone():
            trials = self._trials()
            if self._source(record) in (trial.user_attrs.get(_SOURCE) for trial in trials if trial.state.is_finished()):
                return
            if any(trial.number == record.trial_number for trial in self._claims(trials, own=True)):
                self._finish(record.trial_number, record, self._attributes(record))
            else:
                self._add(record, self._attributes(record))

    def _release(self, trial: FrozenTrial) -> None:
        self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _attributes(self, record: Record) -> Mapping[str, str]:
        """What is kept with a trial, so that others can have its record."""
        return {RECORD: pack(record), _SOURCE: self._source(record), _DEVICES: ",".join(self._member.devices)}

    def _claims(self, trials: Collection[FrozenTrial], *, own: bool = False) -> list[FrozenTrial]:
        """Claims of other processes, or of this one."""
        claims = [trial for trial in trials if not trial.state.is_finished() and _PROCESS in trial.user_attrs]
        return [trial for trial in claims if (trial.user_attrs[_PROCESS] == self._member.name) == own]

    def _is_news(self, trial: FrozenTrial) -> bool:
        """Whether it holds a record that this process lacks."""
        return trial.state.is_finished() and RECORD in trial.user_attrs and trial.user_attrs[_SOURCE] not in self._seen

    def _state(self) -> tuple[frozenset[int], int]:
        return self._state_of(self._trials(), self._member.gone())

    def _state_of(self, trials: Collection[FrozenTrial], gone: Collection[str]) -> tuple[frozenset[int], int]:
        """Which trials others run, and how many have ended: when it changes there may be news."""
        running = {trial.number for trial in self._claims(trials) if trial.user_attrs[_PROCESS] not in gone}
        return frozenset(running), sum(trial.state.is_finished() for trial in trials)

    def _identity(self, point: Point) -> str:
        return self._resolve.identity(self._space.plan(point))

    def _source(self, record: Record) -> str:
        """Names a record over all processes."""
        return record.source or f"{self._member.name}/{record.number:04}"
