"""The un-pipelined peer: Hugging Face `generate`, at a batch size of its own, sorted and padded as we do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bench.record import Iteration, Measurement, StageMemory, TaskShape
from bench.runtime.device import undisturbed
from bench.runtime.job import MicroBatchInputs, sort_by_length
from bench.schedule import micro_batch_sizes
from bench.spec import Protocol, device_index, device_kind
from bench.telemetry import peak_rss_bytes, read_telemetry, reset_peak_rss, sensors_for
from bench.verdicts import is_steady


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


def measure_baseline(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    output_len: int,
    protocol: Protocol,
    batch_size: int,
    pad_token_id: int,
    devices: Sequence[str],
    device_bytes: dict[str, int],
    report: Callable[[str, int, int], None],
) -> Measurement:
    """Measures HF `generate` on the un-pipelined model: warm-up, then timed passes, as for a plan."""
    gpus = tuple(dict.fromkeys(name for name in devices if device_kind(name) == "cuda"))
    used = gpus or (devices[0],)

    def once() -> BaselinePass:
        with undisturbed():
            return generate_once(
                model, prompts, output_len=output_len, batch_size=batch_size, pad_token_id=pad_token_id
            )

    warmup = []
    for number in range(protocol.num_iters_warmup):
        report("baseline warmup", number, protocol.num_iters_warmup)
        warmup.append(round(once().duration_s, 6))
    sensors = sensors_for(used)
    before = sensors.state()
    if not gpus:
        reset_peak_rss()
    for name in gpus:
        torch.cuda.reset_peak_memory_stats(device_index(name))
    sensors.start()
    passes = []
    for number in range(protocol.num_iters):
        report("baseline", number, protocol.num_iters)
        passes.append(once())
    telemetry = read_telemetry(sensors, before)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    memory = tuple(
        StageMemory(
            device=name,
            weights_bytes=weights // len(used),
            kv_bytes=0,
            activation_bytes=0,
            peak_bytes=torch.cuda.max_memory_allocated(device_index(name)) if gpus else peak_rss_bytes(),
            peak_source="cuda_allocator" if gpus else "vm_hwm",
            cap_bytes=device_bytes[name],
        )
        for name in used
    )
    sizes = micro_batch_sizes(len(prompts), batch_size)
    durations = [one.duration_s for one in passes]
    steady = is_steady(durations if len(durations) > 1 else warmup[-1:] + durations, protocol.steady_tolerance)
    return Measurement(
        method="hf_generate",
        batch_size=batch_size,
        prompt_lens=tuple(len(prompt) for prompt in prompts),
        order=sort_by_length(prompts),
        output_len=output_len,
        micro_batch_sizes=sizes,
        tasks=tuple(
            TaskShape(micro_batch=batch, step=step, first_row=0, end_row=size)
            for batch, size in enumerate(sizes)
            for step in range(output_len)
        ),
        iterations=tuple(
            Iteration(duration_s=round(one.duration_s, 6), token_times_s=one.token_times_s, stages=()) for one in passes
        ),
        warmup_s=tuple(warmup),
        steady=steady,
        memory=memory,
        telemetry=telemetry,
        transport="device_map" if len(gpus) > 1 else "local",
    )
