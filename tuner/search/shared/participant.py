"""A process's part in a study: alone in its own database, or as one of several in one that they share.

The shared database knows the study's key and space, a sign of life of each process, and its trials with their records.
Each process keeps a folder that is whole by itself: what others measured is written there too.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from pipetune.bench.errors import StudyError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet.fleet import Closing
from pipetune.bench.record import Machine
from pipetune.bench.spec import Value
from pipetune.tuner.search.database import Database, patient
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.shared import joining
from pipetune.tuner.search.shared.shared_study import RECORD, SharedStudy
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import StudyFile
from pipetune.tuner.study.store import StudyStore

LEASE_S = 60.0
"""So long after its last sign of life a process counts as gone: what it had taken may be taken by others."""
BEAT_S = 15.0
"""Between two signs of life."""
STUDY_KEY, _SPACE, _FINALS = "question", "space", "finals"
_MEMBER, _SEEN, _STATE = "member:", "seen:", "state:"
"""Prefixes of a process's name: who it is, when it last gave a sign of life, and what it does."""
_SEARCHES, _SEARCHED, _LEFT = "searches", "searched", "left"
_T = TypeVar("_T", bound=Value)


class Participant(Closing):
    """A process's part in a study; alone, all that concerns others comes to nothing."""

    def __init__(self, store: StudyStore, say: Callable[[str], None]) -> None:
        self._store, self._say = store, say

    @property
    def seed(self) -> int:
        """The seed of this process's random numbers."""
        return self._store.config.seed

    def check(self, machine: Machine) -> None:
        """Raises a StudyError where the study has another key, or was measured on other hardware."""

    def agree(self, space: SearchSpace) -> SearchSpace:
        """The study's space in this process's devices; `space` where nobody was there before. A `StudyError` where the
        points in this folder's records are of another space."""
        return space

    def open_study(self, space: SearchSpace, resolve: Resolver) -> OptunaStudy:
        """The search's memory, for this space; a `StudyError` where the database cannot be used."""
        config = self._store.config
        return OptunaStudy.open(
            self._store.storage_url,
            space,
            objectives=config.objectives,
            constraints=config.constraints,
            name=config.name or self._store.folder.resolve().name,
            say=self._say,
            is_own=config.storage is None,
        )

    def claim_finals(self) -> str | None:
        """Ends the process's search; None where the finals are its to hold, else who holds them."""
        return None

    def finish_finals(self) -> None:
        """Tells the others that the finals have run."""


class Member(Participant):
    """One of several processes; gives signs of life from when it has agreed until it is closed."""

    def __init__(self, store: StudyStore, say: Callable[[str], None]) -> None:
        """Connects to the database; raises as `open_storage`."""
        super().__init__(store, say)
        assert store.config.storage is not None, "a shared study is checked before it begins"
        assert store.config.shared_study is not None
        self._study = store.config.shared_study
        self.database = Database(store.config.storage, self._study, store.config.objectives)
        self._membership: joining.Membership | None = None
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="sharing", daemon=True)

    @property
    def membership(self) -> joining.Membership:
        """The process as the study knows it, once it has joined."""
        assert self._membership is not None, "a process joins before it takes part"
        return self._membership

    @property
    def seed(self) -> int:
        """The seed of this process's own stream of random numbers."""
        return self.membership.seed

    @patient
    def check(self, machine: Machine) -> None:
        """Compares keys; the first to come sets the study's, which is made where it is not there yet."""
        key = joining.StudyKey.of(self._store.config, machine)
        with self.database.alone():
            attributes = self.database.study.user_attrs
            if STUDY_KEY in attributes:
                self._parse(joining.StudyKey, attributes[STUDY_KEY]).require(key, study=self._study)
            else:
                self.database.study.set_user_attr(STUDY_KEY, key.model_dump(mode="json"))

    @patient
    def agree(self, space: SearchSpace) -> SearchSpace:
        """Takes the study's space, which `space` is if nobody was there before, and enters among those who search it. A
        point in a record of this folder must go on to mean the same plan."""
        agreed = space
        with self.database.alone():
            attributes = self.database.study.user_attrs
            if _SPACE in attributes:
                agreed = self._parse(SearchSpace, attributes[_SPACE]).model_copy(update={"devices": space.devices})
                points = sum(record.role == "trial" for record in self._store.records)
                if points and agreed != space:
                    raise StudyError(
                        f"shared study {self._study} searches another space than {self._store.folder}, whose {points} "
                        "trials refer to its own; take a new folder, or another name with --shared-study"
                    )
            else:
                self.database.study.set_user_attr(_SPACE, space.model_dump(mode="json"))
            self._enter(_by_name(attributes, _MEMBER))
        path = self._store.path(StudyFile.SPACE)
        if agreed != space or not path.exists():
            write_durably(path, agreed.model_dump_json() + "\n")
        write_durably(self._store.folder / StudyFile.SHARING, self.membership.model_dump_json() + "\n")
        self._pulse.start()
        return agreed

    def open_study(self, space: SearchSpace, resolve: Resolver) -> SharedStudy:
        """The memory that all processes share."""
        return SharedStudy(self.database, self.membership.name, self.gone, self._store.config, space, resolve)

    @patient
    def claim_finals(self) -> str | None:
        """Ends the process's search; None where the finals are its to hold, else who holds them."""
        with self.database.alone():
            attributes = self.database.study.user_attrs
            self.database.study.set_user_attr(_STATE + self.membership.name, _SEARCHED)
            gone = self.gone()
            others = _by_name(attributes, _MEMBER)
            others.pop(self.membership.name, None)
            for name, other in sorted(others.items()):
                if name not in gone and attributes.get(_STATE + name) == _SEARCHES:
                    return f"{_who(other)} still searches: the finals are left to it"
            count = sum(RECORD in trial.user_attrs for trial in self.database.study.get_trials(deepcopy=False))
            claim = attributes.get(_FINALS)
            if claim is not None and claim["trials"] == count and claim["name"] != self.membership.name:
                holder = _who(others.get(claim["name"], {}))
                if claim["done"]:
                    return f"{holder} ran the finals"
                if claim["name"] not in gone:
                    return f"{holder} runs the finals"
            self.database.study.set_user_attr(_FINALS, {"name": self.membership.name, "trials": count, "done": False})
            return None

    @patient
    def finish_finals(self) -> None:
        """Tells the others that the finals have run."""
        with self.database.alone():
            claim = self.database.study.user_attrs[_FINALS]
            # A process that measured more trials may have claimed finals over these in the meantime.
            if claim["name"] == self.membership.name:
                self.database.study.set_user_attr(_FINALS, {**claim, "done": True})

    def gone(self) -> frozenset[str]:
        """Names of the processes that ended, or gave no sign of life for `LEASE_S`."""
        attributes, now_s = self.database.study.user_attrs, self.database.now_s()
        return frozenset(
            name
            for name, seen_s in _by_name(attributes, _SEEN).items()
            if now_s - float(seen_s) > LEASE_S or attributes.get(_STATE + name) == _LEFT
        )

    def close(self) -> None:
        """Ends the signs of life, and says that nothing more is to be expected."""
        self._ended.set()
        if self._pulse.is_alive():
            self._pulse.join()
            with contextlib.suppress(Exception):  # The others will find out by themselves.
                self.database.study.set_user_attr(_STATE + self.membership.name, _LEFT)
        self.database.close()

    def _parse(self, kind: type[_T], values: Any) -> _T:
        try:
            return kind.model_validate(values)
        except ValidationError:
            raise StudyError(
                f"shared study {self._study} was made by another version of pipetune; take another name with "
                "--shared-study"
            ) from None

    def _enter(self, members: Mapping[str, Any]) -> None:
        """Enters this process among the members; a folder that was one stays who it was."""
        me, gone = joining.describe_self(self._store), self.gone()
        # It may be entered already, when the database was lost before it could say so.
        known = joining.membership_of(self._store, self._study, me, members, gone)
        self._membership = membership = self._membership or known
        for other in joining.disturbing_neighbours(me, [value for name, value in members.items() if name not in gone]):
            self._say(
                f"process {other['process']} of this study uses the same cores and will disturb what is measured; "
                "start each under a taskset of its own"
            )
        self.database.study.set_user_attr(_MEMBER + membership.name, {"process": membership.process, **me})
        self.database.study.set_user_attr(_SEEN + membership.name, self.database.now_s())
        self.database.study.set_user_attr(_STATE + membership.name, _SEARCHES)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            # An outage is the main thread's to report: it will want something of the database soon enough.
            with contextlib.suppress(Exception):
                self.database.study.set_user_attr(_SEEN + self.membership.name, self.database.now_s())
        self.database.storage.remove_session()


def members_of(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All that ever joined, in their order; `attributes` are the study's."""
    return sorted(_by_name(attributes, _MEMBER).values(), key=lambda member: int(member["process"]))


def _by_name(attributes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What the study holds of each process under a prefix."""
    return {key.removeprefix(prefix): value for key, value in attributes.items() if key.startswith(prefix)}


def _who(member: Mapping[str, Any]) -> str:
    if not member:
        return "another process"
    return f"process {member['process']} on {member['host']} ({member['folder']})"
