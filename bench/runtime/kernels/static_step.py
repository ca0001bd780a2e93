"""A decode step over fixed memory, and a made-up micro-batch that shows whether it computes what an eager step does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from pipetune.bench.runtime.kernels.static_cache import StaticSlotCache
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.runtime.stage.stage import Stage

HIDDEN_STATES = 61
AGREEING_ROWS = 0.75
"""Share of the rows that must agree: where experts are chosen, a near tie may send a row another way."""


class Inputs(Protocol):
    """What a step reads of a micro-batch: `[rows, prompt_len + output_len]` each."""

    @property
    def ids(self) -> torch.Tensor:
        """Token ids."""

    @property
    def mask(self) -> torch.Tensor:
        """1 where a position is attended to, 0 where a row is padded."""

    @property
    def positions(self) -> torch.Tensor:
        """Positions within each prompt, padding not counted."""


class StepKey(NamedTuple):
    """What must be the same for a step to be used again."""

    slot: int
    rows: int
    kv_len: int
    """Positions of KV that attention reads."""


class StaticStep:
    """One decode step: what it reads, and once captured its graph and what that writes."""

    def __init__(self, stage: Stage, slot: SlotCache, key: StepKey) -> None:
        """
        Args:
            slot: a forward pass went through it, so that it has its memory.
        """
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: torch.Tensor | None = None
        self._stage = stage
        device = stage.device
        self._ids = torch.zeros((key.rows, 1), dtype=torch.long, device=device)
        self._positions = torch.zeros((key.rows, 1), dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        # Places of tokens yet to come are attended to by no one before they hold something: causality hides them.
        self._mask = torch.ones((key.rows, key.kv_len), dtype=torch.long, device=device)
        self._hidden: torch.Tensor | None = None
        if not stage.is_first:
            shape = (key.rows, 1, stage.message_values)
            self._hidden = torch.zeros(shape, dtype=stage.message_dtype, device=device)
        self._cache = StaticSlotCache(slot, rows=key.rows, kv_len=key.kv_len, position=self._position)
        self._loaded: Inputs | None = None

    def load(self, position: int, inputs: Inputs, hidden: torch.Tensor | None) -> None:
        """Copies a step's inputs to where it reads them, on the stream it will run on.

        Args:
            position: of the padded prompts and what was generated behind them.
            inputs: of the micro-batch; its mask is copied once for all its steps.
            hidden: `[rows, 1, M]`; None on the first stage.
        """
        # Held, so that no other micro-batch can come to have this one's identity.
        if self._loaded is not inputs:
            length = min(self._mask.shape[1], inputs.mask.shape[1])
            self._mask[:, :length].copy_(inputs.mask[:, :length])
            self._loaded = inputs
        self._ids.copy_(inputs.ids[:, position : position + 1])
        self._positions.copy_(inputs.positions[:, position : position + 1])
        self._position.fill_(position)
        if self._hidden is not None:
            assert hidden is not None
            self._hidden.copy_(hidden)

    def forward(self) -> torch.Tensor:
        """The work itself. At one position it may be repeated: keys and values are written where they stood."""
        cache: Any = self._cache
        return self._stage.forward(self._ids, self._mask, self._positions, cache, self._hidden)

    def run(self) -> torch.Tensor:
        """Replays the graph on the current stream, or does the work where there is none."""
        if self.graph is None:
            return self.forward()
        assert self.output is not None
        self.graph.replay()
        return self.output


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Random ids, padded on the left, and random hidden states, for one step behind a prompt."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor | None
    """`[rows, n, M]`, used again and again along the prompt: for all of it they might not fit."""
    length: int
    """Tokens of the padded prompt, and so the position of the step."""

    @classmethod
    def build(cls, stage: Stage, key: StepKey, *, length: int) -> Probe:
        """A micro-batch of the step's rows, the first of them padded as well where there is room for it."""
        vocab_size = int(stage.config.get_text_config(decoder=True).vocab_size)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (key.rows, length + 1), generator=generator)
        padding = torch.arange(1, key.rows + 1).unsqueeze(1) % max(1, min(4, length))
        mask = (torch.arange(length + 1).unsqueeze(0) >= padding).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = None
        if not stage.is_first:
            values = torch.randn((key.rows, HIDDEN_STATES, stage.message_values), generator=generator)
            hidden = values.to(stage.device, stage.message_dtype)
        ids, mask, positions = (tensor.to(stage.device) for tensor in (ids, mask, positions))
        return cls(ids=ids, mask=mask, positions=positions, hidden=hidden, length=length)

    def run_eagerly(self, stage: Stage, slot: SlotCache, *, most_tokens: int) -> torch.Tensor:
        """Prefills the slot, and returns what the step behind the prompt gives.

        Args:
            most_tokens: worked on at once, over all rows: what memory is there for.
        """
        output, rows = torch.empty(0), self.ids.shape[0]
        chunk = max(1, most_tokens // rows)
        for first in (*range(0, self.length, chunk), self.length):
            end = min(first + chunk, self.length) if first < self.length else self.length + 1
            slot.seek(0, rows, first)
            output = stage.forward(
                self.ids[:, first:end],
                self.mask[:, :end],
                self.positions[:, first:end],
                slot,
                self._hidden_at(first, end),
            )
        return output

    def load(self, step: StaticStep) -> None:
        """Gives the step behind the prompt to a static one."""
        step.load(self.length, self, self._hidden_at(self.length, self.length + 1))

    def _hidden_at(self, first: int, end: int) -> torch.Tensor | None:
        if self.hidden is None:
            return None
        places = torch.arange(first, end, device=self.hidden.device) % HIDDEN_STATES
        return self.hidden[:, places]


def disagreement(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """How far two outputs `[rows, …]` are apart: the relative error that all but the worst rows keep to.

    Rows whose expected values are no numbers prove nothing; a number missing where one should be is infinitely far.
    """
    expected, actual = expected.float().flatten(1), actual.float().flatten(1)
    size = expected.norm(dim=1)
    errors = ((actual - expected).norm(dim=1) / size.clamp(min=torch.finfo(torch.float32).tiny)).cpu()
    errors = errors[size.isfinite().cpu()]
    if errors.numel() == 0:
        return 0.0
    if not bool(errors.isfinite().all()):
        return float("inf")
    return float(errors.sort().values[max(0, round(AGREEING_ROWS * errors.numel()) - 1)])
