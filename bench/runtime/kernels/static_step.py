"""A decode step over fixed memory: one more token a row, at a position that is a number on the device.

The tensors of its cache are those of a KV slot (`bench.runtime.stage.kv_cache`), so that prefill, which sees views of
growing length, and decode steps of fixed shape work on the same memory, and nothing is copied in between. A step writes
its keys and values by index, and attention reads `kv_len` positions whatever the position is: the model's own mask
hides what lies behind it, since transformers builds masks from the cache's length, which is a tensor here as in its
`StaticCache`. A sliding window is such a mask as well: the whole length is read and what left the window is hidden.

What is hidden must be a number all the same, and no huge one: its score is computed before it is hidden, and infinity
less infinity is NaN. Keys and values that some tokens left are such; uninitialised memory is not, and is filled first.

A `Probe`, a made-up micro-batch, shows whether a step computes what an eager one does.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch

from pipetune.bench.models import hf_private as hf
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.runtime.sampling import draw
from pipetune.bench.runtime.stage.kv_cache import SlotCache, SlotLayer
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import Sampling

AGREEING_ROWS = 0.75
"""Share of the rows that must agree: where experts are chosen, a near tie may send a row another way."""


def why_not_static(slot: SlotCache) -> str | None:
    """Why a slot cannot be seen with fixed shapes; None if it can. Keys and values alone can: recurrent states and the
    states of families with caches of their own are written by code that decides on the host."""
    for index, layer in enumerate(slot.layers):
        # What is neither is a place that nothing is kept in.
        if isinstance(layer, hf.CacheLayerMixin | hf.LinearAttentionCacheLayerMixin) and type(layer) is not SlotLayer:
            return f"layer {index} keeps a {type(layer).__name__}, and keys and values alone have a static form"
    return None


class StaticSlotLayer(hf.DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer, `[rows, heads, kv_len, head_dim]`: views of a slot's."""

    is_compileable = True
    """So that transformers builds the mask in full: to leave it out, it would have to look at it on the host."""

    def __init__(self, layer: SlotLayer, *, rows: int, kv_len: int, position: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = layer.is_sliding
        self.sliding_window = layer.sliding_window
        self._kv_len = kv_len
        self._position = position
        self._length = position.view(())
        if layer.keys is not None and layer.values is not None:
            self.keys, self.values = layer.keys[:rows, :, :kv_len], layer.values[:rows, :, :kv_len]
            self.dtype, self.device = layer.keys.dtype, layer.keys.device
            self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `[rows, heads, 1, head_dim]` at the position and returns all `kv_len` positions."""
        assert self.keys is not None, "a static layer was updated whose slot had no memory yet"
        assert self.values is not None
        self.keys.index_copy_(2, self._position, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self._position, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions filled before this step: a tensor, which transformers takes wherever it takes a number."""
        return self._length  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns: always the same."""
        return self._kv_len, 0

    def get_max_length(self) -> int:
        """Positions that attention reads."""
        return self._kv_len


class StaticSlotCache(hf.Cache):
    """The first `rows` rows and `kv_len` positions of a slot that has its memory from a forward pass. Steps are of one
    token at `position`, `[1]` int64 on the slot's device, which whoever runs a step writes first."""

    def __init__(self, slot: SlotCache, *, rows: int, kv_len: int, position: torch.Tensor) -> None:
        assert rows <= slot.rows, f"{rows} rows of a slot of {slot.rows}"
        assert kv_len <= slot.max_len, f"{kv_len} positions of a slot of {slot.max_len}"
        static = partial(StaticSlotLayer, rows=rows, kv_len=kv_len, position=position)
        super().__init__(layers=[static(one) if isinstance(one, SlotLayer) else one for one in slot.layers])

    @property
    def is_compileable(self) -> bool:
        """Always: so that transformers builds masks in full."""
        return True


class StepKey(NamedTuple):
    """What must be the same for a step to be used again."""

    slot: int
    rows: int
    kv_len: int
    """Positions of KV that attention reads."""


class StaticStep:
    """One decode step over a slot that has its memory: what it reads, and once captured its graph and its output."""

    def __init__(self, stage: Stage, slot: SlotCache, key: StepKey) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        """`[rows]`: what the graph chooses from its logits, where it does, in a place of this step alone."""
        self._stage = stage
        device = stage.device
        self._ids = torch.zeros((key.rows, 1), dtype=torch.long, device=device)
        self._positions = torch.zeros((key.rows, 1), dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        # Places of tokens yet to come are attended to by no one before they hold something: causality hides them.
        self._mask = torch.ones((key.rows, key.kv_len), dtype=torch.long, device=device)
        self._u = torch.full((key.rows,), 0.5, dtype=torch.float64, device=device)
        self._hidden: torch.Tensor | None = None
        if not stage.is_first:
            self._hidden = torch.zeros((key.rows, 1, stage.message_values), dtype=stage.message_dtype, device=device)
        self._cache: Any = StaticSlotCache(slot, rows=key.rows, kv_len=key.kv_len, position=self._position)
        self._loaded: MicroBatchInputs | None = None

    def load(
        self, position: int, inputs: MicroBatchInputs, hidden: torch.Tensor | None, u: torch.Tensor | None = None
    ) -> None:
        """Copies a step's inputs to where it reads them, on the stream it will run on.

        `position` is of the padded prompts and what was generated behind them; `inputs` the same object for all steps
        of a micro-batch: its mask is copied once. `hidden` is `[rows, 1, M]` as received, None on the first stage; `u`
        is `[rows]`, what tokens are drawn by, None where they are not, or not by the step.
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
        if u is not None:
            self._u.copy_(u)

    def forward(self) -> torch.Tensor:
        """The work itself. At one position it may be repeated: keys and values are written where they stood."""
        return self._stage.forward(self._ids, self._mask, self._positions, self._cache, self._hidden)

    def choose(self, logits: torch.Tensor, sampling: Sampling | None) -> torch.Tensor:
        """Tokens `[rows]`: the likeliest, or those that `u` draws."""
        return logits.argmax(-1) if sampling is None else draw(logits, self._u, sampling)

    def run(self) -> torch.Tensor:
        """Replays the graph on the current stream, or does the work where there is none."""
        if self.graph is None:
            return self.forward()
        assert self.output is not None
        self.graph.replay()
        return self.output


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Random ids, padded on the left, and random hidden states: one step at a position whose past lies in a slot."""

    inputs: MicroBatchInputs
    """The padded past, whose length is the step's position, and the token behind it."""
    hidden: torch.Tensor | None
    """`[rows, 1, M]`; None on the first stage."""

    @classmethod
    def build(cls, stage: Stage, rows: int, *, position: int, seed: int = 0) -> Self:
        """A micro-batch of so many rows, the first of them padded as well where there is room for it."""
        vocab_size = int(stage.config.get_text_config(decoder=True).vocab_size)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (rows, position + 1), generator=generator)
        padding = torch.arange(1, rows + 1).unsqueeze(1) % max(1, min(4, position))
        mask = (torch.arange(position + 1).unsqueeze(0) >= padding).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = None
        if not stage.is_first:
            values = torch.randn((rows, 1, stage.message_values), generator=generator)
            hidden = values.to(stage.device, stage.message_dtype)
        ids, mask, positions = (tensor.to(stage.device) for tensor in (ids, mask, positions))
        return cls(inputs=MicroBatchInputs(ids=ids, mask=mask, positions=positions, prompt_len=position), hidden=hidden)

    def run_eagerly(self, stage: Stage, slot: SlotCache) -> torch.Tensor:
        """What the step gives."""
        inputs, position = self.inputs, self.inputs.prompt_len
        slot.seek(0, inputs.ids.shape[0], position)
        ids, positions = inputs.ids[:, position:], inputs.positions[:, position:]
        return stage.forward(ids, inputs.mask, positions, slot, self.hidden)


def disagreement(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """How far two outputs `[rows, …]` are apart: the relative error that all but the worst rows keep to. Rows whose
    expected values are no numbers prove nothing; a number missing where one should be is infinitely far."""
    expected, actual = expected.float().flatten(1), actual.float().flatten(1)
    size = expected.norm(dim=1)
    errors = ((actual - expected).norm(dim=1) / size.clamp(min=torch.finfo(torch.float32).tiny)).cpu()
    errors = errors[size.isfinite().cpu()]
    if errors.numel() == 0:
        return 0.0
    if not bool(errors.isfinite().all()):
        return float("inf")
    return float(errors.sort().values[max(0, round(AGREEING_ROWS * errors.numel()) - 1)])
