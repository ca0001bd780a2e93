"""Joining a shared study: the key that all agree on, the space that all search, and a name and number of one's own."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Machine
from pipetune.bench.spec import Value, device_kind
from pipetune.tuner.search.database import Database
from pipetune.tuner.search.shared.study_key import StudyKey
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import read
from pipetune.tuner.study.store import StudyStore

STUDY_KEY, SPACE = "question", "space"
MEMBER, SEEN, STATE = "member:", "seen:", "state:"
"""Prefixes of a process's name: who it is, when it last gave a sign of life, and what it does."""
SEARCHES, SEARCHED, LEFT = "searches", "searched", "left"
_T = TypeVar("_T", bound=Value)


class Membership(Value):
    """Who a folder is in a shared study: `sharing.json`."""

    schema_version: int = 1
    study: str
    process: int
    """Counts from 1 in the order in which the processes joined."""
    name: str
    """Unique: its host, its number and a few random digits."""
    seed: int
    """Seed of this process's own stream of random numbers, from the study's seed and its number."""


class Joining:
    """A process on its way into the study."""

    def __init__(self, store: StudyStore, database: Database, say: Callable[[str], None]) -> None:
        assert store.config.shared_study is not None
        self._study = store.config.shared_study
        self._store = store
        self._database = database
        self._say = say
        self._membership: Membership | None = None

    def check(self, machine: Machine) -> None:
        """Compares keys; the first to come sets the study's, which is made where it is not there yet.

        Raises:
            StudyError: the study asks something else, or was measured on other hardware.
        """
        config = self._store.config
        key = StudyKey.of(config, machine)
        with self._database.alone():
            self._database.open(config.objectives)
            attributes = self._database.attributes()
            if STUDY_KEY in attributes:
                self._read(StudyKey, attributes[STUDY_KEY]).require(key, study=self._study)
            else:
                self._database.set(STUDY_KEY, key.model_dump(mode="json"))

    def agree(self, space: SearchSpace, gone: Callable[[], Collection[str]]) -> tuple[Membership, SearchSpace]:
        """Takes the study's space, and enters among those who search it; may be done twice.

        Args:
            space: that is the study's if nobody was here before.
            gone: tells the names of processes that are no more.

        Returns:
            Who this process is, and the study's space in its own devices.

        Raises:
            StudyError: the points in this folder's records are of another space.
        """
        with self._database.alone():
            attributes = self._database.attributes()
            if SPACE in attributes:
                space = self._adopt(space, self._read(SearchSpace, attributes[SPACE]))
            else:
                self._database.set(SPACE, space.model_dump(mode="json"))
            return self._enter(attributes, gone()), space

    def _read(self, kind: type[_T], values: Any) -> _T:
        try:
            return kind.model_validate(values)
        except ValidationError:
            raise StudyError(
                f"shared study {self._study} was made by another version of pipetune; take another name with "
                "--shared-study"
            ) from None

    def _adopt(self, own: SearchSpace, shared: SearchSpace) -> SearchSpace:
        """The study's space; a point in a record of this folder must go on to mean the same plan."""
        shared = shared.model_copy(update={"devices": own.devices})
        points = sum(record.role == "trial" for record in self._store.records)
        if points and shared != own:
            raise StudyError(
                f"shared study {self._study} searches another space than {self._store.folder}, whose {points} trials "
                "refer to its own; take a new folder, or another name with --shared-study"
            )
        return shared

    def _enter(self, attributes: Mapping[str, Any], gone: Collection[str]) -> Membership:
        """Enters this process among the members; a folder that was one stays who it was."""
        members = {key.removeprefix(MEMBER): value for key, value in attributes.items() if key.startswith(MEMBER)}
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "folder": str(self._store.folder.resolve()),
            "devices": list(self._store.config.concrete_devices),
            "cores": sorted(os.sched_getaffinity(0)),
        }
        known = self._known(members, gone, str(me["folder"]))
        # Entered once already, when the database was lost before it could say so.
        membership = self._membership or known or self._new(members, str(me["host"]))
        self._membership = membership
        self._warn_of_neighbours(me, [value for name, value in members.items() if name not in gone])
        self._database.set(MEMBER + membership.name, {"process": membership.process, **me})
        self._database.set(SEEN + membership.name, self._database.now_s())
        self._database.set(STATE + membership.name, SEARCHES)
        return membership

    def _known(self, members: Mapping[str, Any], gone: Collection[str], folder: str) -> Membership | None:
        """Who this folder was when it took part before."""
        path = self._store.sharing_path
        known = read(path, Membership) if path.exists() else None
        if known is None or known.study != self._study:
            return None
        before = members.get(known.name, {})
        if known.name not in gone and before.get("folder", folder) != folder:
            raise StudyError(
                f"{self._store.folder} takes part in shared study {known.study} as {known.name}, which works in "
                f"{before['folder']} on {before['host']} right now; a copy cannot join, take a new folder"
            )
        return known

    def _new(self, members: Mapping[str, Any], host: str) -> Membership:
        process = 1 + max((int(member["process"]) for member in members.values()), default=0)
        named = re.sub(r"[^A-Za-z0-9.-]", "-", host)[:40]
        return Membership(
            study=self._study,
            process=process,
            name=f"{named}-{process}-{secrets.token_hex(3)}",
            seed=stream_seed(self._store.config.seed, process),
        )

    def _warn_of_neighbours(self, me: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
        """CPU workers of two processes on the same cores take time from each other, and neither would know."""
        if all(device_kind(device) != "cpu" for device in me["devices"]):
            return
        for other in others:
            is_neighbour = other["host"] == me["host"] and other["folder"] != me["folder"]
            works_on_cpu = any(device_kind(device) == "cpu" for device in other["devices"])
            if is_neighbour and works_on_cpu and set(me["cores"]) & set(other["cores"]):
                self._say(
                    f"process {other['process']} of this study uses the same cores and will disturb what is measured; "
                    "start each under a taskset of its own"
                )


def stream_seed(seed: int, process: int) -> int:
    """A seed for each process, so that they do not draw the same numbers; far enough apart to be counted up from."""
    return int.from_bytes(hashlib.sha256(f"{seed} process {process}".encode()).digest()[:4]) >> 1
