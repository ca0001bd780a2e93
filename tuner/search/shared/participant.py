"""Several processes on one study: who takes part, which space they search, and who holds the finals.

The database knows the study's question and space, a sign of life of each process, and its trials with their records.
Each process keeps a folder that is whole by itself: what others measured is written there too. Without a shared study
a process is alone, and all of this comes to nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from pipetune.bench.files import write_durably
from pipetune.bench.record import Machine
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.search.database import Database
from pipetune.tuner.search.optuna_study import Proposals
from pipetune.tuner.search.shared.joining import LEFT, MEMBER, SEARCHED, SEARCHES, SEEN, STATE, Joining, Membership
from pipetune.tuner.search.shared.proposals import RECORD, SharedProposals
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.store import StudyStore

LEASE_S = 60.0
"""So long after its last sign of life a process counts as gone: what it had taken may be taken by others."""
BEAT_S = 15.0
"""Between two signs of life."""
_FINALS = "finals"


class Participant(Protocol):
    """A process's part in a study, alone or with others."""

    @property
    def seed(self) -> int: ...

    def ask(self, machine: Machine) -> None:
        """Finds out whether one may take part.

        Raises:
            StudyError: the study asks something else, or was measured on other hardware.
        """

    def agree(self, space: SearchSpace) -> SearchSpace:
        """Takes the study's space, in one's own devices; `space` where nobody was there before.

        Raises:
            StudyError: the points in this folder's records are of another space.
        """

    def proposals(
        self, space: SearchSpace, resolve: Resolver, *, objectives: Sequence[str], constraints: Sequence[Constraint]
    ) -> Proposals: ...

    def claim_finals(self) -> str | None:
        """Ends one's search; None where the finals are ours to hold, else who holds them."""

    def finish_finals(self) -> None: ...


class Alone:
    """The one process of its study."""

    def __init__(self, store: StudyStore, say: Callable[[str], None]) -> None:
        self._store = store
        self._say = say

    @property
    def seed(self) -> int:
        return self._store.config.seed

    def ask(self, machine: Machine) -> None:
        pass

    def agree(self, space: SearchSpace) -> SearchSpace:
        return space

    def proposals(
        self, space: SearchSpace, resolve: Resolver, *, objectives: Sequence[str], constraints: Sequence[Constraint]
    ) -> Proposals:
        return Proposals(
            self._store.storage_url,
            space,
            objectives=objectives,
            constraints=constraints,
            seed=self.seed,
            set_aside=self._say if self._store.config.storage is None else None,
        )

    def claim_finals(self) -> str | None:
        return None

    def finish_finals(self) -> None:
        pass


class Member:
    """One of several processes; gives signs of life until it is closed."""

    def __init__(self, store: StudyStore, database: Database, say: Callable[[str], None]) -> None:
        self.database = database
        self._store = store
        self._joining = Joining(store, database, say)
        self._membership: Membership | None = None
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="sharing", daemon=True)

    @property
    def membership(self) -> Membership:
        assert self._membership is not None, "a process joins before it takes part"
        return self._membership

    @property
    def name(self) -> str:
        return self.membership.name

    @property
    def seed(self) -> int:
        return self.membership.seed

    @property
    def devices(self) -> tuple[str, ...]:
        return self._store.config.concrete_devices

    def ask(self, machine: Machine) -> None:
        self.database.patiently(lambda: self._joining.ask(machine))

    def agree(self, space: SearchSpace) -> SearchSpace:
        self._membership, agreed = self.database.patiently(lambda: self._joining.agree(space, self.gone))
        if agreed != space or not self._store.space_path.exists():
            write_durably(self._store.space_path, agreed.model_dump_json() + "\n")
        write_durably(self._store.sharing_path, self.membership.model_dump_json() + "\n")
        self._pulse.start()
        return agreed

    def proposals(
        self, space: SearchSpace, resolve: Resolver, *, objectives: Sequence[str], constraints: Sequence[Constraint]
    ) -> Proposals:
        return SharedProposals(self, space, resolve, objectives=objectives, constraints=constraints)

    def claim_finals(self) -> str | None:
        return self.database.patiently(self._claim_finals)

    def finish_finals(self) -> None:
        self.database.patiently(self._finish_finals)

    def gone(self) -> frozenset[str]:
        """Names of the processes that ended, or gave no sign of life for `LEASE_S`."""
        attributes, now_s = self.database.attributes(), self.database.now_s()
        return frozenset(
            key.removeprefix(SEEN)
            for key, seen_s in attributes.items()
            if key.startswith(SEEN)
            and (now_s - float(seen_s) > LEASE_S or attributes.get(STATE + key.removeprefix(SEEN)) == LEFT)
        )

    def leave(self) -> None:
        """Ends the signs of life, and says that nothing more is to be expected."""
        self._ended.set()
        if self._pulse.is_alive():
            self._pulse.join()
            with contextlib.suppress(Exception):  # The others will find out by themselves.
                self.database.set(STATE + self.name, LEFT)
        self.database.close()

    def _finish_finals(self) -> None:
        with self.database.alone():
            claim = self.database.attributes()[_FINALS]
            # A process that measured more trials may have claimed finals over these in the meantime.
            if claim["name"] == self.name:
                self.database.set(_FINALS, {**claim, "done": True})

    def _claim_finals(self) -> str | None:
        with self.database.alone():
            attributes = self.database.attributes()
            self.database.set(STATE + self.name, SEARCHED)
            gone = self.gone()
            others = {
                key.removeprefix(MEMBER): value
                for key, value in attributes.items()
                if key.startswith(MEMBER) and key != MEMBER + self.name
            }
            for name, other in sorted(others.items()):
                if name not in gone and attributes.get(STATE + name) == SEARCHES:
                    return f"{_who(other)} still searches: the finals are left to it"
            count = sum(RECORD in trial.user_attrs for trial in self.database.study.get_trials(deepcopy=False))
            claim = attributes.get(_FINALS)
            if claim is not None and claim["trials"] == count and claim["name"] != self.name:
                holder = _who(others.get(claim["name"], {}))
                if claim["done"]:
                    return f"{holder} ran the finals"
                if claim["name"] not in gone:
                    return f"{holder} runs the finals"
            self.database.set(_FINALS, {"name": self.name, "trials": count, "done": False})
            return None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            # An outage is the main thread's to report: it will want something of the database soon enough.
            with contextlib.suppress(Exception):
                self.database.set(SEEN + self.name, self.database.now_s())
        self.database.storage.remove_session()


@contextlib.contextmanager
def participate(store: StudyStore, say: Callable[[str], None]) -> Iterator[Participant]:
    """A process's part in the study, until the block ends.

    Args:
        say: takes a sentence for people.

    Raises:
        ConfigError: the storage is no URL, or its driver is missing.
        StudyError: the database cannot be used.
    """
    config = store.config
    if config.shared_study is None:
        yield Alone(store, say)
        return
    assert config.storage is not None, "a shared study is checked before it begins"
    member = Member(store, Database(config.storage, config.shared_study), say)
    try:
        yield member
    finally:
        member.leave()


def _who(member: dict[str, Any]) -> str:
    if not member:
        return "another process"
    return f"process {member['process']} on {member['host']} ({member['folder']})"
