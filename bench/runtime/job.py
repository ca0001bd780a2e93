"""What a pass works on: the prompts and how they are batched, alike on every rank, and the tensors they become."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from pipetune.bench.runtime.links import to_device
from pipetune.bench.schedule import Task, build_schedule, micro_batch_sizes
from pipetune.bench.spec import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One pass over a batch of prompts, the same on every rank."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids, in the order given."""
    output_len: int
    """Tokens to generate for each, at most; 0 scores the prompts instead."""
    micro_batch_size: int
    prefill_size: int
    in_flight: int
    pad_token_id: int
    chunk_size: int | None = None
    """Tokens of a prompt prefilled at once; None prefills whole prompts."""
    sampling: Sampling | None = None
    """None takes the likeliest token."""
    numbers: tuple[int, ...] | None = None
    """Each prompt's number, on which draws depend; None counts them from 0."""
    output_lens: tuple[int, ...] | None = None
    """Tokens to generate for each prompt, at most `output_len`; None generates as many for all."""
    eos_token_ids: frozenset[int] | None = None
    """None generates all of its tokens for every prompt."""
    forced: tuple[tuple[int, ...], ...] | None = None
    """Tokens to feed instead of the sampled ones, per prompt; the logits are then kept."""
    keep_margins: bool = False
    """Keep the margin between the two largest logits of every token sampled."""

    @property
    def scores(self) -> bool:
        """Whether the prompts are scored, and nothing is generated."""
        return self.output_len == 0

    @property
    def order(self) -> tuple[int, ...]:
        """Row → given index: longest prompts first, so that those padded together are of like length."""
        return sort_by_length(self.prompts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each micro-batch."""
        return micro_batch_sizes(len(self.prompts), self.micro_batch_size)

    @property
    def first_rows(self) -> tuple[int, ...]:
        """First row of each micro-batch, counted over all."""
        return tuple(itertools.accumulate(self.sizes[:-1], initial=0))

    @property
    def prompt_lens(self) -> tuple[int, ...]:
        """Tokens of each micro-batch's padded prompts."""
        return tuple(len(self.prompts[self.order[row]]) for row in self.first_rows)

    @property
    def steps(self) -> tuple[int, ...]:
        """Most tokens to generate for a row of each micro-batch."""
        if self.output_lens is None:
            return (self.output_len,) * len(self.sizes)
        lens = [self.output_lens[index] for index in self.order]
        return tuple(max(lens[first : first + size]) for first, size in zip(self.first_rows, self.sizes, strict=True))

    def tasks(self) -> tuple[Task, ...]:
        """The schedule."""
        return build_schedule(
            self.sizes,
            prompt_lens=self.prompt_lens,
            output_len=[max(1, steps) for steps in self.steps],
            in_flight=self.in_flight,
            prefill_size=self.prefill_size,
            chunk_size=self.chunk_size,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt) for prompt in self.prompts)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest task."""
        chunk = min(self.chunk_size or self.longest, self.longest)
        return max(min(self.prefill_size, len(self.prompts)) * chunk, min(self.micro_batch_size, len(self.prompts)))

    def share(self, replica: int, replicas: int) -> tuple[int, ...]:
        """Given indices of the prompts that one of several replicas works on: of every length its part."""
        return self.order[replica::replicas]

    def part(self, share: Sequence[int]) -> Self:
        """The pass over some of the prompts, by given index; draws stay what they are in the whole."""
        numbers = self.numbers or range(len(self.prompts))
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[index] for index in share),
            output_lens=None if self.output_lens is None else tuple(self.output_lens[index] for index in share),
            numbers=tuple(numbers[index] for index in share),
            forced=None if self.forced is None else tuple(self.forced[index] for index in share),
        )


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
    full_rows: int = 0
    """Leading rows that are not padded."""

    @classmethod
    def build(
        cls, prompts: Sequence[Sequence[int]], *, output_len: int, pad_token_id: int, device: torch.device
    ) -> Self:
        """Pads on the left to the longest prompt; places for generated tokens are attended to once they exist."""
        prompt_len = max(len(prompt) for prompt in prompts)
        total = prompt_len + output_len
        ids = torch.full((len(prompts), total), pad_token_id, dtype=torch.long)
        mask = torch.ones((len(prompts), total), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, prompt_len - len(prompt) : prompt_len] = torch.tensor(prompt, dtype=torch.long)
            mask[row, : prompt_len - len(prompt)] = 0
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        return cls(
            ids=to_device(ids, device),
            mask=to_device(mask, device),
            positions=to_device(positions, device),
            prompt_len=prompt_len,
            full_rows=next((row for row, prompt in enumerate(prompts) if len(prompt) < prompt_len), len(prompts)),
        )
