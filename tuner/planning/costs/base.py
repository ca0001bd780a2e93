"""What tasks cost on devices, as the simulation asks for it: measured, described, or corrected by what plans took."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class TaskKind(NamedTuple):
    """Tasks of one kind take the same time on a stage."""

    rows: int
    new_tokens: int
    """Tokens computed for each row: the prompt's or the chunk's in prefill, 1 in decode."""
    past_tokens: int
    """Tokens of each row that the KV cache holds already."""
    samples: bool = True
    """Whether the last stage runs the head: not for a chunk that is not its prompt's last."""

    @property
    def is_decode(self) -> bool:
        """Whether the task is a decode step: one new token a row over a filled cache."""
        return self.new_tokens == 1 and self.past_tokens > 0


class Costs(Protocol):
    """Seconds that tasks take; pure, and the same for equal arguments."""

    def layers_s(self, device: str, kind: TaskKind) -> npt.NDArray[np.float64]:
        """`[num_layers]`, of each layer if it lay on the device."""
        ...

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        """Seconds of what a stage does once a task beside its layers: overhead, embedding (first), head (last)."""
        ...

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        """Seconds from the end of compute on one device to its begin on the other, for a message between them."""
        ...
