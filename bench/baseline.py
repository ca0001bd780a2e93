"""The un-pipelined peer: Hugging Face `generate`, at a batch size of its own, sorted and padded as we do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bench.runtime.generate import MicroBatchInputs, sort_by_length
from bench.schedule import micro_batch_sizes


class _TokenClock(StoppingCriteria):
    """Called by `generate` after every token; notes when that was and never stops."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times_s.append(time.monotonic())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselinePass:
    """One pass over all prompts."""

    duration_s: float
    token_times_s: tuple[float, ...]
    """Per batch and step, from the prompts on."""
    tokens: dict[int, list[int]]
    """By given index."""


def generate_once(
    model: Any, prompts: Sequence[Sequence[int]], *, output_len: int, batch_size: int, pad_token_id: int
) -> BaselinePass:
    """Runs `generate` over the prompts, longest first, `batch_size` at a time, with a fixed output length."""
    device = model.get_input_embeddings().weight.device
    order = sort_by_length(prompts)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=output_len, do_sample=False, eos_token_id=None, pad_token_id=pad_token_id, use_cache=True
    )
    # `generate` fills what the given config leaves open from the model's own.
    model.generation_config = config
    batches, first = [], 0
    for size in micro_batch_sizes(len(prompts), batch_size):
        chosen = order[first : first + size]
        inputs = MicroBatchInputs.build(
            [prompts[index] for index in chosen], output_len=0, pad_token_id=pad_token_id, device=device
        )
        batches.append((chosen, inputs))
        first += size
    tokens: dict[int, list[int]] = {}
    clock = _TokenClock()
    began = time.monotonic()
    for chosen, inputs in batches:
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs.ids,
                attention_mask=inputs.mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        for index, row in zip(chosen, output[:, inputs.prompt_len :].tolist(), strict=True):
            assert len(row) == output_len, f"generate gave {len(row)} tokens, not {output_len}"
            tokens[index] = row
    return BaselinePass(
        duration_s=time.monotonic() - began,
        token_times_s=tuple(round(moment - began, 6) for moment in clock.times_s),
        tokens=tokens,
    )
