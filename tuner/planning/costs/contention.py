"""What devices lose to each other while they compute at once: cores of one processor share its memory and caches.

A task whose device computes while n of N - 1 other devices do takes exp(-k · (1 - n / (N - 1))) of the time that it
takes while all do, with k by phase. For a plan, n is estimated from how busy its stages are. Prefill is a pipe that
takes as long as its busiest stage and one task of each other; decode goes round the micro-batches in flight, and takes
as long as the busiest stage, or as all stages need for each of them. While one stage computes another does for its
share of this time, but no more others than there are further micro-batches to work on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipetune.bench.profile import TaskKind
from pipetune.tuner.planning.arrays import Floats


@dataclass(frozen=True, kw_only=True)
class Contention:
    """How much of a task's time others cost it."""

    prefill: float
    """k."""
    decode: float
    devices: int
    """N."""

    def of(self, *, decode: bool) -> float:
        """k of a phase."""
        return self.decode if decode else self.prefill

    def factors(
        self, kinds: Sequence[TaskKind], counts: npt.NDArray[np.intp], busy_s: Floats, *, slots: int, replicas: int
    ) -> Floats:
        """Factors `[kind, stage, plan]` on the times of tasks, where all devices computing at once is 1: of
        `counts[kind]` tasks that each take `busy_s[kind, stage, plan]` while all devices compute, with `slots`
        micro-batches in flight."""
        decodes = np.array([kind.is_decode for kind in kinds])
        factors = np.ones_like(busy_s)
        for decode in (False, True):
            members = np.flatnonzero(decodes == decode)
            if len(members) and self.devices > 1:
                number = counts[members].astype(float)
                total_s = np.einsum("k,ksp->sp", number, busy_s[members])
                others = _others(total_s, tasks=int(number.sum()), slots=slots if decode else None, replicas=replicas)
                share = np.minimum(others / (self.devices - 1), 1.0)
                factors[members] = np.exp(-self.of(decode=decode) * (1.0 - share))
        return factors


def _others(total_s: Floats, *, tasks: int, slots: int | None, replicas: int) -> Floats:
    """`[stage, plan]`: how many others compute while a stage does that takes `total_s`; slots are those of decode."""
    slowest, together = total_s.max(axis=0), total_s.sum(axis=0)
    if slots is None:
        took, further = slowest + (together - slowest) / tasks, tasks - 1
    else:
        took, further = np.maximum(slowest, together / slots), slots - 1
    share = total_s / np.maximum(took, 1e-12)
    mates = np.minimum(share.sum(axis=0) - share, further)
    others: Floats = mates + (replicas - 1) * share.sum(axis=0)
    return np.minimum(others, len(total_s) * replicas - 1)
