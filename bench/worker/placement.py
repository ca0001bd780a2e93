"""Which rank holds which stage of which replica: pure, and alike on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pipetune.bench.spec import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A plan laid over the ranks of a fleet, as one of them sees it."""

    replicas: tuple[tuple[int, ...], ...]
    """The rank of each stage, replica by replica."""
    replica: int | None
    """The replica that this rank is part of; None if it holds no stage."""
    index: int | None
    """The stage of this rank within its replica."""

    @classmethod
    def of(cls, plan: Plan, devices: Sequence[str], rank: int) -> Self:
        """Lays a plan over the ranks: a device named twice (stages that share a GPU) takes its workers in turn.

        Args:
            devices: of all ranks, by rank; the plan names no others.
            rank: whose view it is.
        """
        taken: list[int] = []
        for wanted in plan.devices:
            taken.append(next(free for free, name in enumerate(devices) if name == wanted and free not in taken))
        width = len(plan.stages)
        replicas = tuple(tuple(taken[first : first + width]) for first in range(0, len(taken), width))
        replica, index = divmod(taken.index(rank), width) if rank in taken else (None, None)
        return cls(replicas=replicas, replica=replica, index=index)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of all stages, replica by replica."""
        return tuple(rank for row in self.replicas for rank in row)

    @property
    def first_ranks(self) -> tuple[int, ...]:
        """Holders of each replica's first stage."""
        return tuple(row[0] for row in self.replicas)

    @property
    def last_ranks(self) -> tuple[int, ...]:
        """Holders of each replica's last stage."""
        return tuple(row[-1] for row in self.replicas)
