"""A process's part in a study: alone in its own database, or with others in one that they share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from pipetune.bench.record import Machine
from pipetune.tuner.search.database import Database
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.shared.member import Member
from pipetune.tuner.search.shared.shared_study import SharedStudy
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.store import StudyStore


class Participant:
    """A process's part in a study; alone, all that concerns others comes to nothing."""

    def __init__(self, store: StudyStore, member: Member | None, say: Callable[[str], None]) -> None:
        self._store, self._say = store, say
        self.member = member
        """None where the process is alone."""

    @property
    def seed(self) -> int:
        """The seed of this process's random numbers."""
        return self.member.seed if self.member else self._store.config.seed

    def check(self, machine: Machine) -> None:
        """Finds out whether the process may take part.

        Raises:
            StudyError: the study has another key, or was measured on other hardware.
        """
        if self.member:
            self.member.check(machine)

    def agree(self, space: SearchSpace) -> SearchSpace:
        """The study's space in this process's devices; `space` where nobody was there before.

        Raises:
            StudyError: the points in this folder's records are of another space.
        """
        return self.member.agree(space) if self.member else space

    def open_study(self, space: SearchSpace, resolve: Resolver) -> OptunaStudy:
        """The search's memory, for this space.

        Raises:
            StudyError: the database cannot be used.
        """
        config = self._store.config
        if self.member:
            return SharedStudy(
                self.member, space, resolve, objectives=config.objectives, constraints=config.constraints
            )
        return OptunaStudy.open(
            self._store.storage_url,
            space,
            objectives=config.objectives,
            constraints=config.constraints,
            set_aside=self._say if config.storage is None else None,
        )

    def claim_finals(self) -> str | None:
        """Ends the process's search; None where the finals are its to hold, else who holds them."""
        return self.member.claim_finals() if self.member else None

    def finish_finals(self) -> None:
        """Tells the others that the finals have run."""
        if self.member:
            self.member.finish_finals()


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
        yield Participant(store, None, say)
        return
    assert config.storage is not None, "a shared study is checked before it begins"
    member = Member(store, Database(config.storage, config.shared_study), say)
    try:
        yield Participant(store, member, say)
    finally:
        member.leave()
