"""Optuna's study among several processes: plans are claimed before they run, and records travel with their trials.

A claim is a running trial that bears its process's name. Whoever claims looks first, with the database to itself, what
others run and what they have measured; so no plan runs twice by accident. The claim of a process that gives no sign of
life any more is released: its trial is failed, and the plan is free again. A process that was thought dead and comes
back with a measurement adds it as a trial of its own.

The processes work on devices of their own, alike place by place. A plan means the same on each of them, so a record
from elsewhere says the reader's names throughout: one plan is then one plan in the search, the ranking and the finals.
Which devices it really ran on stays beside it.
"""

import base64
import json
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Record
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.search.database import Database, patient
from pipetune.tuner.search.optuna_study import OptunaStudy, point_of_trial
from pipetune.tuner.search.space.resolver import Resolver, identity
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.store import StudyStore

RECORD = "record"
"""Attribute of a trial that holds the record of its run."""
_PROCESS, _SOURCE, _DEVICES = "process", "source", "devices"
_POLL_S = 1.0
_DEVICE = re.compile(r"\b(?:cpu|cuda):\d+\b")
_VERBATIM = frozenset({"detail", "source_devices"})
"""Ends of logs and tracebacks stay as they were."""


class SharedStudy(OptunaStudy):
    """The study of several processes, as one of them uses it."""

    def __init__(
        self,
        database: Database,
        name: str,
        gone: Callable[[], Collection[str]],
        config: TuneConfig,
        space: SearchSpace,
        resolve: Resolver,
    ) -> None:
        """Takes the name of this process, and what names those that are no more."""
        super().__init__(
            database.storage, database.study, space, objectives=config.objectives, constraints=config.constraints
        )
        self.database, self._name, self._gone, self._devices = database, name, gone, config.concrete_devices
        self._space, self._resolve = space, resolve
        self._seen: set[str] = set()
        """Sources of the records that this process has."""
        self._pulled: tuple[frozenset[int], int] = (frozenset(), 0)

    def close(self) -> None:
        """Nothing: the member ends the connections."""

    @patient
    def trials(self) -> list[FrozenTrial]:
        """All trials of all processes in the order of their numbers, not to be changed."""
        return super().trials()

    @patient
    def restore(self, records: Collection[Record]) -> tuple[FrozenTrial, ...]:
        """Brings the database up to the records, which may know more than it does: it may have been lost."""
        self._seen = {self._source(record) for record in records}
        with self.database.alone():
            trials = super().trials()
            known = {trial.user_attrs.get(_SOURCE) for trial in trials}
            by_number = {trial.number: trial for trial in self._claims(trials, own=True)}
            for record in sorted(records, key=lambda record: record.trial_number or 0):
                if record.trial_number is None or self._source(record) in known:
                    continue
                if record.source is None and record.trial_number in by_number:
                    del by_number[record.trial_number]
                    super().tell(record)
                else:
                    self._add(record)
        return tuple(by_number.values())

    @patient
    def pull(self, store: StudyStore) -> tuple[Record, ...]:
        """Writes what others have measured into this process's folder, and gives it."""
        trials, gone = super().trials(), self._gone()
        self._pulled = self._state_of(trials, gone)
        self.taken = tuple(point_of_trial(trial) for trial in trials if trial.number in self._pulled[0])
        pulled = []
        for source, ran_on, number, record in records_of(filter(self._is_news, trials), self._devices):
            pulled.append(store.adopt(record, source=source, source_devices=ran_on, trial_number=number))
            self._seen.add(source)
        return tuple(pulled)

    def wait(self) -> None:
        """Waits until something has changed with what others run."""
        while self._pulled[0] and self._state() == self._pulled:
            time.sleep(_POLL_S)

    @patient
    def ask(self, point: Point) -> int | None:
        """Claims a point's plan; its trial's number, or None where another process has taken the plan."""
        wanted = self._identity(point)
        with self.database.alone():
            trials, gone = super().trials(), self._gone()
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
            return self._begin(point, {_PROCESS: self._name})

    @patient
    def tell(self, record: Record) -> None:
        """Says what became of a trial, to all processes."""
        self._seen.add(self._source(record))
        with self.database.alone():
            trials = super().trials()
            if self._source(record) in (trial.user_attrs.get(_SOURCE) for trial in trials if trial.state.is_finished()):
                return
            if any(trial.number == record.trial_number for trial in self._claims(trials, own=True)):
                super().tell(record)
            else:
                self._add(record)

    def _release(self, trial: FrozenTrial) -> None:
        self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _attributes(self, record: Record) -> Mapping[str, str]:
        """The record, so that others can have it."""
        return {RECORD: pack(record), _SOURCE: self._source(record), _DEVICES: ",".join(self._devices)}

    def _claims(self, trials: Collection[FrozenTrial], *, own: bool = False) -> list[FrozenTrial]:
        """Claims of other processes, or of this one."""
        claims = [trial for trial in trials if not trial.state.is_finished() and _PROCESS in trial.user_attrs]
        return [trial for trial in claims if (trial.user_attrs[_PROCESS] == self._name) == own]

    def _is_news(self, trial: FrozenTrial) -> bool:
        """Whether it holds a record that this process lacks."""
        return trial.state.is_finished() and RECORD in trial.user_attrs and trial.user_attrs[_SOURCE] not in self._seen

    @patient
    def _state(self) -> tuple[frozenset[int], int]:
        return self._state_of(super().trials(), self._gone())

    def _state_of(self, trials: Collection[FrozenTrial], gone: Collection[str]) -> tuple[frozenset[int], int]:
        """Which trials others run, and how many have ended: when it changes there may be news."""
        running = {trial.number for trial in self._claims(trials) if trial.user_attrs[_PROCESS] not in gone}
        return frozenset(running), sum(trial.state.is_finished() for trial in trials)

    def _identity(self, point: Point) -> str:
        plan = self._space.plan(point)
        return identity(plan, self._resolve(plan))

    def _source(self, record: Record) -> str:
        """Names a record over all processes."""
        return record.source or f"{self._name}/{record.number:04}"


def records_of(
    trials: Iterable[FrozenTrial], ours: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...], int, Record]]:
    """What was measured: source, devices it ran on, trial's number, and the record in our devices' names; raises as
    `unpack`."""
    for trial in trials:
        if trial.state.is_finished() and RECORD in trial.user_attrs:
            theirs = tuple(trial.user_attrs[_DEVICES].split(","))
            record = unpack(trial.user_attrs[RECORD], theirs=theirs, ours=ours)
            yield trial.user_attrs[_SOURCE], record.source_devices or theirs, trial.number, record


def pack(record: Record) -> str:
    """Text for a database: JSON, compressed, in base64."""
    return base64.b64encode(zlib.compress(record.model_dump_json().encode(), level=6)).decode("ascii")


def unpack(text: str, *, theirs: Sequence[str], ours: Sequence[str]) -> Record:
    """The record, with the devices of the process that measured it renamed to ours in the same places; StudyError where
    it is no record of this version."""
    assert len(theirs) == len(ours), f"{theirs} and {ours} are no pairs"
    try:
        values = json.loads(zlib.decompress(base64.b64decode(text, validate=True)))
        return Record.model_validate(_renamed(values, dict(zip(theirs, ours, strict=True))))
    except (ValueError, zlib.error) as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) if isinstance(error, ValidationError) else ""
        raise StudyError(
            f"another process of the study wrote a record that cannot be read here{f' ({where})' if where else ''}; "
            "all of them need the same version of pipetune"
        ) from None


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _DEVICE.sub(lambda match: names.get(match[0], match[0]), value)
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    if isinstance(value, dict):
        return {key: part if key in _VERBATIM else _renamed(part, names) for key, part in value.items()}
    return value
