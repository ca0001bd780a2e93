"""One of several processes on a study: its signs of life, who is gone, and who holds the finals.

The database knows the study's key and space, a sign of life of each process, and its trials with their records. Each
process keeps a folder that is whole by itself: what others measured is written there too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from pipetune.bench.files import write_durably
from pipetune.bench.record import Machine
from pipetune.tuner.search.database import Database
from pipetune.tuner.search.shared.joining import LEFT, MEMBER, SEARCHED, SEARCHES, SEEN, STATE, Joining, Membership
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.store import StudyStore

LEASE_S = 60.0
"""So long after its last sign of life a process counts as gone: what it had taken may be taken by others."""
BEAT_S = 15.0
"""Between two signs of life."""
RECORD = "record"
"""Attribute of a trial that holds the record of its run."""
_FINALS = "finals"


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
        """The process as the study knows it, once it has joined."""
        assert self._membership is not None, "a process joins before it takes part"
        return self._membership

    @property
    def name(self) -> str:
        """The process's name, unique in the study."""
        return self.membership.name

    @property
    def seed(self) -> int:
        """The seed of this process's random numbers."""
        return self.membership.seed

    @property
    def devices(self) -> tuple[str, ...]:
        """This process's devices in order."""
        return self._store.config.concrete_devices

    def check(self, machine: Machine) -> None:
        """Finds out whether the process may take part.

        Raises:
            StudyError: the study has another key, or was measured on other hardware.
        """
        self.database.patiently(lambda: self._joining.check(machine))

    def agree(self, space: SearchSpace) -> SearchSpace:
        """The study's space in this process's devices; `space` where nobody was there before.

        Raises:
            StudyError: the points in this folder's records are of another space.
        """
        self._membership, agreed = self.database.patiently(lambda: self._joining.agree(space, self.gone))
        if agreed != space or not self._store.space_path.exists():
            write_durably(self._store.space_path, agreed.model_dump_json() + "\n")
        write_durably(self._store.sharing_path, self.membership.model_dump_json() + "\n")
        self._pulse.start()
        return agreed

    def claim_finals(self) -> str | None:
        """Ends the process's search; None where the finals are its to hold, else who holds them."""
        return self.database.patiently(self._claim_finals)

    def finish_finals(self) -> None:
        """Tells the others that the finals have run."""
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


def _who(member: dict[str, Any]) -> str:
    if not member:
        return "another process"
    return f"process {member['process']} on {member['host']} ({member['folder']})"
