"""How the time of a task is shared among the parts of a stage: stamps by hooks on the embedding and on each layer."""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, Self

from torch import nn

from pipetune.bench.models.layers import find_layers
from pipetune.bench.runtime.device import Clock, Stamp
from pipetune.bench.runtime.stage.stage import Stage

Part = int | Literal["overhead", "embedding", "head"]
"""A layer by its number; or what lies before layers and between them, the embedding, and what lies behind the last."""


class PartStamps(contextlib.ExitStack):
    """While entered, stamps each call of a part of a stage that holds its model's embedding and head.

    Every call costs a little of what it measures: take shares from it, and whole tasks from runs without it. Stamps of
    a step that is captured meanwhile are part of its graph, and tell of its last replay.
    """

    def __init__(self, stage: Stage, clock: Clock) -> None:
        super().__init__()
        self._stage, self._clock = stage, clock
        self._open: list[Stamp] = []
        self._calls: list[tuple[Part, Stamp, Stamp]] = []

    def __enter__(self) -> Self:
        assert self._stage.is_first
        assert self._stage.is_last
        model = self._stage.model
        layers = find_layers(model)[1]
        self._watch(model.get_input_embeddings(), "embedding")
        for index in {*self._stage.own_layers, len(layers) - 1}:
            self._watch(layers[index], index)
        return self

    def shares(self, spans: Sequence[tuple[float, float]]) -> list[dict[Part, float]]:
        """What share of a task's time each part took, together 1, by each task's begin and end on the monotonic clock.
        A layer that the model does not call has 0."""
        # At once: each time, a clock is tied to the host's anew.
        moments = self._clock.resolve([stamp for _, *stamps in self._calls for stamp in stamps])
        begins, ends = moments[::2], moments[1::2]
        calls = list(zip((part for part, _, _ in self._calls), begins, ends, strict=True))
        return [self._shares(start_s, end_s, calls) for start_s, end_s in spans]

    def forget(self) -> None:
        """Lets go of what was stamped, also within calls that never came back."""
        self._calls, self._open = [], []

    def _shares(self, start_s: float, end_s: float, calls: Sequence[tuple[Part, float, float]]) -> dict[Part, float]:
        whole = max(end_s - start_s, 1e-9)
        shares: dict[Part, float] = {"embedding": 0.0, **dict.fromkeys(self._stage.own_layers, 0.0)}
        behind_s = start_s
        # A clock that is tied to the host's anew may be some microseconds off.
        inside = [call for call in calls if start_s - 1e-4 <= call[1] and call[2] <= end_s + 1e-4]
        for part, begin, end in inside:
            if part != "embedding":
                behind_s = max(behind_s, end)
            if part in shares:
                shares[part] += (end - begin) / whole
        head = max(0.0, end_s - behind_s) / whole
        rest = 1.0 - shares["embedding"] - head - sum(shares[layer] for layer in self._stage.own_layers)
        return {**shares, "head": head, "overhead": max(0.0, rest)}

    def _watch(self, module: nn.Module, part: Part) -> None:
        def before(module: nn.Module, args: Any) -> None:
            self._open.append(self._clock.stamp())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            begin = self._open.pop()
            # What a part calls of another is that part's own time.
            if not self._open:
                self._calls.append((part, begin, self._clock.stamp()))

        self.enter_context(module.register_forward_pre_hook(before))
        self.enter_context(module.register_forward_hook(after))
