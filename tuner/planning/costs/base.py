"""What tasks cost on devices, as the simulation asks for it: measured, described, or corrected by what plans took."""

from typing import Protocol

from pipetune.bench.profile import TaskKind
from pipetune.tuner.planning.arrays import Floats


class Costs(Protocol):
    """Seconds that tasks take; pure, and the same for equal arguments."""

    def layers_s(self, device: str, kind: TaskKind) -> Floats:
        """`[num_layers]`, of each layer if it lay on the device."""

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        """Seconds of what a stage does once a task beside its layers: overhead, embedding (first), head (last)."""

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        """Seconds from the end of compute on one device to its begin on the other, for a message between them."""
