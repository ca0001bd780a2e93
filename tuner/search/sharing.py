"""Several processes on one study: who takes part, which space they search, and who holds the finals.

The database knows the study's question and space, a sign of life of each process, and its trials with their records.
Each process keeps a folder that is whole by itself: what others measured is written there too. Without a shared study
a process is alone, and all of this comes to nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from bench.errors import StudyError
from bench.record import Machine, write_durably
from bench.spec import Value, device_kind
from tuner.config import Constraint
from tuner.search.database import Database
from tuner.search.proposals import Proposals
from tuner.search.question import Question
from tuner.search.resolver import Resolver
from tuner.search.shared_proposals import RECORD, SharedProposals
from tuner.search.space import SearchSpace
from tuner.standings import Objective
from tuner.store import StudyStore
from tuner.study_files import read

LEASE_S = 60.0
"""So long after its last sign of life a process counts as gone: what it had taken may be taken by others."""
BEAT_S = 15.0
"""Between two signs of life."""
_QUESTION, _SPACE, _FINALS = "question", "space", "finals"
_MEMBER, _SEEN, _STATE = "member:", "seen:", "state:"
_SEARCHES, _SEARCHED, _LEFT = "searches", "searched", "left"


class Membership(Value):
    """Who a folder is in a shared study: `sharing.json`."""

    schema_version: int = 1
    study: str
    process: int
    """Counts from 1 in the order in which the processes joined."""
    name: str
    """Unique: its host, its number and a few random digits."""
    seed: int
    """Of this process's own stream of random numbers, from the study's seed and its number."""


class Participant(Protocol):
    """A process's part in a study, alone or with others."""

    @property
    def seed(self) -> int: ...

    def agree(self, space: SearchSpace, machine: Machine) -> SearchSpace:
        """Takes the study's space, in one's own devices.

        Raises:
            StudyError: the study asks something else, or was measured on other hardware.
        """

    def proposals(
        self, space: SearchSpace, resolve: Resolver, *, objectives: Sequence[str], constraints: Sequence[Constraint]
    ) -> Proposals: ...

    def claim_finals(self) -> str | None:
        """Ends one's search; None where the finals are ours to hold, else who holds them."""

    def finish_finals(self) -> None: ...


class Alone:
    """The one process of its study."""

    def __init__(self, store: StudyStore) -> None:
        self._store = store

    @property
    def seed(self) -> int:
        return self._store.config.seed

    def agree(self, space: SearchSpace, machine: Machine) -> SearchSpace:
        return space

    def proposals(
        self, space: SearchSpace, resolve: Resolver, *, objectives: Sequence[str], constraints: Sequence[Constraint]
    ) -> Proposals:
        return Proposals(self._store.storage_url, space, objectives=objectives, constraints=constraints, seed=self.seed)

    def claim_finals(self) -> str | None:
        return None

    def finish_finals(self) -> None:
        pass


class Member:
    """One of several processes; gives signs of life until it is closed."""

    def __init__(self, store: StudyStore, database: Database, say: Callable[[str], None]) -> None:
        self.database = database
        self._store = store
        self._say = say
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

    def agree(self, space: SearchSpace, machine: Machine) -> SearchSpace:
        agreed = self.database.patiently(lambda: self._agree(space, machine))
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
        claim = {**self.database.patiently(self.database.attributes)[_FINALS], "done": True}
        self.database.patiently(lambda: self.database.set(_FINALS, claim))

    def gone(self) -> frozenset[str]:
        """Names of the processes that ended, or gave no sign of life for `LEASE_S`."""
        attributes, now_s = self.database.attributes(), self.database.now_s()
        return frozenset(
            key.removeprefix(_SEEN)
            for key, seen_s in attributes.items()
            if key.startswith(_SEEN)
            and (now_s - float(seen_s) > LEASE_S or attributes.get(_STATE + key.removeprefix(_SEEN)) == _LEFT)
        )

    def leave(self) -> None:
        """Ends the signs of life, and says that nothing more is to be expected."""
        self._ended.set()
        if self._pulse.is_alive():
            self._pulse.join()
            with contextlib.suppress(Exception):  # The others will find out by themselves.
                self.database.set(_STATE + self.name, _LEFT)
        self.database.close()

    def _agree(self, space: SearchSpace, machine: Machine) -> SearchSpace:
        config = self._store.config
        assert config.shared_study is not None
        question = Question.of(config, machine)
        with self.database.alone():
            self.database.open_study([Objective(metric=name).direction for name in config.objectives])
            attributes = self.database.attributes()
            if _QUESTION in attributes:
                Question.model_validate(attributes[_QUESTION]).require(question, study=config.shared_study)
            if _SPACE in attributes:
                space = self._adopt(space, SearchSpace.model_validate(attributes[_SPACE]))
            self._membership = self._join(attributes)
            if _SPACE not in attributes:
                self.database.set(_SPACE, space.model_dump(mode="json"))
                self.database.set(_QUESTION, question.model_dump(mode="json"))
        return space

    def _adopt(self, own: SearchSpace, shared: SearchSpace) -> SearchSpace:
        """The study's space; a point in a record of this folder must go on to mean the same plan."""
        shared = shared.model_copy(update={"devices": own.devices})
        points = sum(record.role == "trial" for record in self._store.records)
        if points and shared != own:
            raise StudyError(
                f"shared study {self._store.config.shared_study} searches another space than {self._store.folder}, "
                f"whose {points} trials refer to its own; take a new folder, or another name with --shared-study"
            )
        return shared

    def _join(self, attributes: dict[str, Any]) -> Membership:
        """Enters this process among the members; a folder that was one stays who it was."""
        config = self._store.config
        assert config.shared_study is not None
        members = {key.removeprefix(_MEMBER): value for key, value in attributes.items() if key.startswith(_MEMBER)}
        path = self._store.sharing_path
        known = read(path, Membership) if path.exists() else None
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "folder": str(self._store.folder.resolve()),
            "devices": list(self.devices),
            "cores": sorted(os.sched_getaffinity(0)),
        }
        gone = self.gone()
        if self._membership is not None:
            membership = self._membership
        elif known is not None and known.study == config.shared_study:
            before = members.get(known.name, {})
            if known.name not in gone and before.get("folder", me["folder"]) != me["folder"]:
                raise StudyError(
                    f"{self._store.folder} takes part in shared study {known.study} as {known.name}, which works in "
                    f"{before['folder']} on {before['host']} right now; a copy cannot join, take a new folder"
                )
            membership = known
        else:
            process = 1 + max((int(member["process"]) for member in members.values()), default=0)
            host = re.sub(r"[^A-Za-z0-9.-]", "-", str(me["host"]))[:40]
            membership = Membership(
                study=config.shared_study,
                process=process,
                name=f"{host}-{process}-{secrets.token_hex(3)}",
                seed=stream_seed(config.seed, process),
            )
        self._warn_of_neighbours(me, [value for name, value in members.items() if name not in gone])
        self.database.set(_MEMBER + membership.name, {"process": membership.process, **me})
        self.database.set(_SEEN + membership.name, self.database.now_s())
        self.database.set(_STATE + membership.name, _SEARCHES)
        return membership

    def _warn_of_neighbours(self, me: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
        """CPU workers of two processes on the same cores take time from each other, and neither would know."""
        if all(device_kind(device) != "cpu" for device in self.devices):
            return
        for other in others:
            same = {"host", "folder"} & {key for key in me if me[key] == other.get(key)} == {"host"}
            if same and set(me["cores"]) & set(other["cores"]) and any(d.startswith("cpu") for d in other["devices"]):
                self._say(
                    f"process {other['process']} of this study uses the same cores and will disturb what is measured; "
                    "start each under a taskset of its own"
                )

    def _claim_finals(self) -> str | None:
        with self.database.alone():
            attributes = self.database.attributes()
            self.database.set(_STATE + self.name, _SEARCHED)
            gone = self.gone()
            others = {
                key.removeprefix(_MEMBER): value
                for key, value in attributes.items()
                if key.startswith(_MEMBER) and key != _MEMBER + self.name
            }
            for name, other in sorted(others.items()):
                if name not in gone and attributes.get(_STATE + name) == _SEARCHES:
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
                self.database.set(_SEEN + self.name, self.database.now_s())
        self.database.storage.remove_session()


def stream_seed(seed: int, process: int) -> int:
    """A seed for each process, so that they do not draw the same numbers; far enough apart to be counted up from."""
    return int.from_bytes(hashlib.sha256(f"{seed} process {process}".encode()).digest()[:4]) >> 1


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
        yield Alone(store)
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
