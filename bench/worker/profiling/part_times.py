"""How the time of a task is shared among the parts of a stage: stamps by hooks on the embedding and on each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import nn

from pipetune.bench.models.layers import find_layers
from pipetune.bench.runtime.device import Clock, Stamp
from pipetune.bench.runtime.stage.stage import Stage

_EMBEDDING = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class PartShares:
    """Shares of a task's time, part by part; together they are 1."""

    overhead: float
    """What lies before the layers and between them."""
    embedding: float
    layers: dict[int, float]
    """By own layer; 0 for one that the model does not call."""
    head: float
    """What lies behind the last layer."""


class PartStamps:
    """While entered, stamps each call of a part of a stage that holds its model's embedding and head.

    Every call costs a little of what it measures: take shares from it, and whole tasks from runs without it.
    """

    def __init__(self, stage: Stage, clock: Clock) -> None:
        self._stage, self._clock = stage, clock
        self._hooks: list[Any] = []
        self._open: list[Stamp] = []
        self._calls: list[tuple[int, Stamp, Stamp]] = []

    def __enter__(self) -> Self:
        assert self._stage.is_first
        assert self._stage.is_last
        model = self._stage.model
        layers = find_layers(model)[1]
        self._watch(model.get_input_embeddings(), _EMBEDDING)
        for index in {*self._stage.own_layers, len(layers) - 1}:
            self._watch(layers[index], index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def shares(self, spans: Sequence[tuple[float, float]]) -> list[PartShares]:
        """Shares of each task from its begin and end in seconds of `time.monotonic`; what was stamped is forgotten."""
        begins = self._clock.resolve([begin for _, begin, _ in self._calls])
        ends = self._clock.resolve([end for _, _, end in self._calls])
        parts = [part for part, _, _ in self._calls]
        self._calls, self._open = [], []
        found = []
        for start_s, end_s in spans:
            # A clock that is tied to the host's anew may be some microseconds off.
            inside = [
                call
                for call in zip(parts, begins, ends, strict=True)
                if start_s - 1e-4 <= call[1] and call[2] <= end_s + 1e-4
            ]
            found.append(self._shares(start_s, end_s, inside))
        return found

    def _shares(self, start_s: float, end_s: float, calls: Sequence[tuple[int, float, float]]) -> PartShares:
        whole = max(end_s - start_s, 1e-9)
        layers = dict.fromkeys(self._stage.own_layers, 0.0)
        embedding, behind_s = 0.0, start_s
        for part, begin, end in calls:
            if part == _EMBEDDING:
                embedding += (end - begin) / whole
                continue
            behind_s = max(behind_s, end)
            if part in layers:
                layers[part] += (end - begin) / whole
        head = max(0.0, end_s - behind_s) / whole
        rest = 1.0 - embedding - head - sum(layers.values())
        return PartShares(overhead=max(0.0, rest), embedding=embedding, layers=layers, head=head)

    def _watch(self, module: nn.Module, part: int) -> None:
        def before(module: nn.Module, args: Any) -> None:
            self._open.append(self._clock.stamp())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            begin = self._open.pop()
            # What a part calls of another is that part's own time.
            if not self._open:
                self._calls.append((part, begin, self._clock.stamp()))

        self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
