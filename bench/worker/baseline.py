"""The baseline: Hugging Face `generate` un-pipelined, or its plain forward pass where texts are scored.

It runs at a batch size of its own, with prompts sorted and padded as ours are.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from pipetune.bench.machine.telemetry import peak_rss_bytes, read_telemetry, reset_peak_rss, sensors_for
from pipetune.bench.record import Iteration, Measurement, StageMemory, TaskShape
from pipetune.bench.runtime.device import undisturbed
from pipetune.bench.runtime.job import MicroBatchInputs, sort_by_length
from pipetune.bench.runtime.sampling import log_probabilities
from pipetune.bench.spec import Protocol, Sampling, Workload, device_index, device_kind
from pipetune.bench.worker.acceptance import is_steady


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
    """Seconds from the prompts to each batch's tokens, step by step; one for each batch where texts are scored."""
    tokens: dict[int, list[int]]
    """By given index; empty where texts are scored."""
    scores: dict[int, torch.Tensor] | None = None
    """Where texts are scored: by given index `[length - 1]`, log-probabilities of all tokens but the first."""


def generate_once(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    output_lens: Sequence[int],
    batch_size: int,
    pad_token_id: int,
    sampling: Sampling | None = None,
    processor: Callable[[Sequence[int], int], LogitsProcessor] | None = None,
) -> BaselinePass:
    """Runs `generate` over the prompts, longest first, `batch_size` at a time.

    `output_lens` are tokens to generate for each; a batch goes on until its last prompt has them. `sampling` is
    transformers' own with these settings; its draws are not ours, their cost is. `processor` makes what changes the
    scores of a batch, from its prompts' given indices and its padded length.
    """
    how: dict[str, Any] = {"do_sample": sampling is not None}
    if sampling is not None:
        how |= sampling.model_dump(include={"temperature", "top_k", "top_p"})
    batches = list(batches_of(model, prompts, batch_size, pad_token_id))
    tokens: dict[int, list[int]] = {}
    clock = _TokenClock()
    began = time.monotonic()
    for chosen, inputs in batches:
        steps = max(output_lens[index] for index in chosen)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=steps, eos_token_id=None, pad_token_id=pad_token_id, use_cache=True, **how
        )
        # `generate` fills what the given config leaves open from the model's own.
        model.generation_config = config
        processors = LogitsProcessorList([processor(chosen, inputs.prompt_len)] if processor is not None else [])
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs.ids,
                attention_mask=inputs.mask,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        for index, row in zip(chosen, output[:, inputs.prompt_len :].tolist(), strict=True):
            assert len(row) == steps, f"generate gave {len(row)} tokens, not {steps}"
            tokens[index] = row[: output_lens[index]]
    return BaselinePass(
        duration_s=time.monotonic() - began,
        token_times_s=tuple(round(moment - began, 6) for moment in clock.times_s),
        tokens=tokens,
    )


def score_once(model: Any, prompts: Sequence[Sequence[int]], *, batch_size: int, pad_token_id: int) -> BaselinePass:
    """Takes log-probabilities by plain forward passes over the prompts, longest first, `batch_size` at a time."""
    batches = list(batches_of(model, prompts, batch_size, pad_token_id))
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    scores: dict[int, torch.Tensor] = {}
    times_s: list[float] = []
    began = time.monotonic()
    for chosen, inputs in batches:
        positions = {"position_ids": inputs.positions} if takes_positions else {}
        with torch.inference_mode():
            logits = model(input_ids=inputs.ids, attention_mask=inputs.mask, use_cache=False, **positions).logits
            for row, index in enumerate(chosen):
                length = len(prompts[index])
                behind = inputs.ids[row, inputs.prompt_len - length + 1 :].to(logits.device)
                scores[index] = log_probabilities(logits[row, inputs.prompt_len - length : -1], behind).cpu()
            del logits
        times_s.append(round(time.monotonic() - began, 6))
    return BaselinePass(duration_s=times_s[-1], token_times_s=tuple(times_s), tokens={}, scores=scores)


def batches_of(
    model: Any, prompts: Sequence[Sequence[int]], batch_size: int, pad_token_id: int, *, output_len: int = 0
) -> Iterator[tuple[tuple[int, ...], MicroBatchInputs]]:
    """Given indices of each batch, longest prompts first, and its inputs, with room for so much output."""
    device = model.get_input_embeddings().weight.device
    order = sort_by_length(prompts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        some = [prompts[index] for index in chosen]
        yield (chosen, MicroBatchInputs.build(some, output_len=output_len, pad_token_id=pad_token_id, device=device))


def measure_baseline(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    workload: Workload,
    protocol: Protocol,
    batch_size: int,
    pad_token_id: int,
    devices: Sequence[str],
    device_bytes: dict[str, int],
    report: Callable[[str, int, int], None],
) -> Measurement:
    """Measures the baseline: warm-up, then timed passes, as for a plan; `report` gets phase, done and total."""
    on_gpus = device_kind(devices[0]) == "cuda"

    def once() -> BaselinePass:
        with undisturbed():
            if workload.kind == "score":
                return score_once(model, prompts, batch_size=batch_size, pad_token_id=pad_token_id)
            return generate_once(
                model,
                prompts,
                output_lens=workload.generated_lens,
                batch_size=batch_size,
                pad_token_id=pad_token_id,
                sampling=workload.sampling,
            )

    warmup = []
    for number in range(protocol.num_iters_warmup):
        report("baseline warmup", number, protocol.num_iters_warmup)
        warmup.append(round(once().duration_s, 6))
    sensors = sensors_for(devices)
    before = sensors.state()
    if on_gpus:
        for name in devices:
            torch.cuda.reset_peak_memory_stats(device_index(name))
    else:
        reset_peak_rss()
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
            weights_bytes=weights // len(devices),
            kv_bytes=0,
            activation_bytes=0,
            peak_bytes=torch.cuda.max_memory_allocated(device_index(name)) if on_gpus else peak_rss_bytes(),
            peak_source="cuda_allocator" if on_gpus else "vm_hwm",
            cap_bytes=device_bytes[name],
        )
        for name in devices
    )
    durations = [one.duration_s for one in passes]
    order, lens = sort_by_length(prompts), workload.generated_lens
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return Measurement(
        method="hf_forward" if workload.kind == "score" else "hf_generate",
        batch_size=batch_size,
        prompt_lens=tuple(len(prompt) for prompt in prompts),
        order=order,
        output_len=workload.generated_len,
        output_lens=workload.unlike_lens,
        goodput=workload.goodput,
        micro_batch_sizes=tuple(map(len, batches)),
        tasks=tuple(
            TaskShape(micro_batch=batch, step=step, first_row=0, end_row=len(chosen))
            for batch, chosen in enumerate(batches)
            for step in range(max(1, *(lens[index] for index in chosen)))
        ),
        iterations=tuple(
            Iteration(duration_s=round(one.duration_s, 6), token_times_s=one.token_times_s, stages=()) for one in passes
        ),
        warmup_s=tuple(warmup),
        steady=is_steady(durations if len(durations) > 1 else warmup[-1:] + durations, protocol.steady_tolerance),
        memory=memory,
        telemetry=telemetry,
        transport="device_map" if len(devices) > 1 else "local",
    )
