"""What a pass works on: the prompts and how they are batched, alike on every rank, and the tensors they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.schedule import Task, build_schedule, micro_batch_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One pass over a batch of prompts, the same on every rank."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids, in the order given."""
    output_len: int
    micro_batch_size: int
    prefill_size: int
    in_flight: int
    pad_token_id: int
    eos_token_ids: frozenset[int] | None = None
    """None generates exactly `output_len` tokens for every prompt."""
    forced: tuple[tuple[int, ...], ...] | None = None
    """Tokens to feed instead of the sampled ones, per prompt; the logits are then kept."""
    keep_margins: bool = False
    """Keep the margin between the two largest logits of every token sampled."""

    @property
    def order(self) -> tuple[int, ...]:
        """Row → given index: longest prompts first, so that those padded together are of like length."""
        return sort_by_length(self.prompts)

    @property
    def sizes(self) -> tuple[int, ...]:
        return micro_batch_sizes(len(self.prompts), self.micro_batch_size)

    def tasks(self) -> tuple[Task, ...]:
        """The schedule."""
        return build_schedule(
            self.sizes, output_len=self.output_len, in_flight=self.in_flight, prefill_size=self.prefill_size
        )

    @property
    def longest(self) -> int:
        return max(len(prompt) for prompt in self.prompts)


def sort_by_length(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Indices of the prompts, longest first, equal ones in the order given."""
    return tuple(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))


def margins_of(logits: torch.Tensor) -> torch.Tensor:
    """Largest less second largest of the last dimension."""
    top = logits.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchInputs:
    """Ids, mask and positions of a micro-batch for all steps: `[rows, prompt_len + output_len]`, padded on the left."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    prompt_len: int

    @classmethod
    def build(
        cls, prompts: Sequence[Sequence[int]], *, output_len: int, pad_token_id: int, device: torch.device
    ) -> MicroBatchInputs:
        """Pads on the left to the longest prompt; places for generated tokens are attended to once they exist."""
        prompt_len = max(len(prompt) for prompt in prompts)
        total = prompt_len + output_len
        ids = torch.full((len(prompts), total), pad_token_id, dtype=torch.long)
        mask = torch.ones((len(prompts), total), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, prompt_len - len(prompt) : prompt_len] = torch.tensor(prompt, dtype=torch.long)
            mask[row, : prompt_len - len(prompt)] = 0
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        return cls(ids=ids.to(device), mask=mask.to(device), positions=positions.to(device), prompt_len=prompt_len)
