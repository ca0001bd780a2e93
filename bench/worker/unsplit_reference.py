"""Asks the unsplit model for the truth: tokens, margins and logits, or log-probabilities, and its own spread."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from pipetune.bench.models.layers import cache_name
from pipetune.bench.runtime.job import margins_of
from pipetune.bench.runtime.sampling import draw, draw_margins, log_probabilities, uniforms
from pipetune.bench.spec import Protocol, Sampling, Workload
from pipetune.bench.worker.baseline import BaselinePass, batches_of, generate_once, score_once
from pipetune.bench.worker.faults import is_out_of_memory
from pipetune.bench.worker.reference import Reference, choose_checked, spread_of

# Prompts whose logits over the whole vocabulary are held at once while margins are taken.
MARGIN_BATCH = 8


def make_reference(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    workload: Workload,
    protocol: Protocol,
    dtype: torch.dtype,
    pad_token_id: int,
    workload_digest: str,
) -> Reference:
    """The truth of a workload; `dtype` is what the model computes in."""
    if workload.kind == "score":
        return _scored(model, prompts, protocol, dtype, pad_token_id, workload_digest)
    checked = choose_checked(prompts, protocol.check_prompts)
    output_len, sampling = workload.generated_len, workload.sampling
    u = None if sampling is None else uniforms(sampling, range(len(prompts)), output_len)
    own = _at_a_size_that_fits(
        lambda size: generate_once(
            model,
            prompts,
            output_lens=(output_len,) * len(prompts),
            batch_size=size,
            pad_token_id=pad_token_id,
            processor=None
            if u is None or sampling is None
            else lambda chosen, length: _Draws(u[list(chosen)], sampling, length),
        ),
        len(prompts),
    )
    tokens = torch.tensor([own.tokens[index] for index in range(len(prompts))], dtype=torch.long)

    def ask(chosen: Sequence[int], steps: int, batch_size: int, *, cached: bool) -> torch.Tensor:
        some, forced = [prompts[index] for index in chosen], tokens[list(chosen), :steps]
        return forced_logits(model, some, forced, batch_size=batch_size, pad_token_id=pad_token_id, cached=cached)

    with torch.inference_mode():
        margins = []
        for begin in range(0, len(prompts), MARGIN_BATCH):
            some = range(begin, min(begin + MARGIN_BATCH, len(prompts)))
            logits = ask(some, output_len, MARGIN_BATCH, cached=False)
            margins.append(_margins(logits, None if u is None else u[list(some)], sampling))
        steps = min(protocol.check_tokens, output_len)
        logits = ask(checked, steps, len(checked), cached=True)
        others = [
            ask(checked, steps, 1, cached=True),
            ask(checked, steps, max(1, len(checked) // 2), cached=True),
            ask(checked, steps, len(checked), cached=False),
        ]
    spread, typical = spread_of(logits, others, dtype)
    return Reference(
        source="unsplit",
        workload_digest=workload_digest,
        tokens=tokens,
        margins=torch.cat(margins),
        checked=checked,
        logits=logits,
        spread=spread,
        typical=typical,
    )


class _Draws(LogitsProcessor):
    """Makes greedy `generate` take the tokens that we draw: all logits but theirs become impossible."""

    def __init__(self, u: torch.Tensor, sampling: Sampling, prompt_len: int) -> None:
        """`u` is `[rows, output_len]`, and `prompt_len` counts padded places."""
        self._u, self._sampling, self._prompt_len = u, sampling, prompt_len

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        u = self._u[:, input_ids.shape[1] - self._prompt_len].to(scores.device)
        drawn = draw(scores, u, self._sampling)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn.unsqueeze(-1), 0.0)


def _margins(logits: torch.Tensor, u: torch.Tensor | None, sampling: Sampling | None) -> torch.Tensor:
    """`[n, t]` of logits `[n, t, V]`."""
    if u is None or sampling is None:
        return margins_of(logits)
    return torch.stack([draw_margins(logits[:, step], u[:, step], sampling) for step in range(logits.shape[1])], dim=1)


def _scored(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    protocol: Protocol,
    dtype: torch.dtype,
    pad_token_id: int,
    workload_digest: str,
) -> Reference:
    """The truth where texts are scored."""
    everyone = range(len(prompts))
    checked = choose_checked(prompts, protocol.check_prompts)

    def ask(chosen: Sequence[int], size: int) -> torch.Tensor:
        """Log-probabilities of some prompts, one after the other."""
        some = [prompts[index] for index in chosen]
        scores = _at_a_size_that_fits(
            lambda fits: score_once(model, some, batch_size=fits, pad_token_id=pad_token_id), size
        ).scores
        assert scores is not None
        return torch.cat([scores[place] for place in range(len(some))])

    def ask_cached(prompt: Sequence[int], steps: int) -> torch.Tensor:
        """Log-probabilities of a prompt's last tokens, step by step."""
        first, last = prompt[: len(prompt) - steps], torch.tensor([prompt[len(prompt) - steps :]], dtype=torch.long)
        logits = forced_logits(model, [first], last, batch_size=1, pad_token_id=pad_token_id, cached=True)
        return log_probabilities(logits[0], last[0])

    flat = ask(everyone, len(prompts))
    rows = torch.split(flat, [len(prompt) - 1 for prompt in prompts])
    # All of them again, padded otherwise: a handful would underestimate the largest difference among so many.
    spreads = [spread_of(flat, [ask(everyone, max(1, len(prompts) // 2))], dtype)]
    spreads.append(spread_of(torch.cat([rows[index] for index in checked]), [ask(checked, 1)], dtype))
    with torch.inference_mode():
        for index in checked:
            if steps := min(protocol.check_tokens, len(rows[index])):
                spreads.append(spread_of(rows[index][-steps:], [ask_cached(prompts[index], steps)], dtype))
    return Reference(
        source="unsplit",
        workload_digest=workload_digest,
        tokens=torch.empty((len(prompts), 0), dtype=torch.long),
        margins=torch.empty((len(prompts), 0)),
        checked=checked,
        logits=torch.empty((len(checked), 0, 0)),
        spread=max(largest for largest, _ in spreads),
        typical=max(typical for _, typical in spreads),
        scores=rows,
    )


def _at_a_size_that_fits(work: Callable[[int], BaselinePass], size: int) -> BaselinePass:
    """Does the work at the largest batch that fits: the size given, a half, a quarter …"""
    while True:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Behind the except: its traceback holds what was allocated.
        size = (size + 1) // 2


def forced_logits(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: torch.Tensor,
    *,
    batch_size: int,
    pad_token_id: int,
    cached: bool,
) -> torch.Tensor:
    """Logits of the unsplit model when `tokens` `[n, t]` are fed after the prompts: `[n, t, V]` fp32 on the host, in
    the order given; with `cached` step by step with a KV cache as in generation, else in one pass over both.
    """
    accepted = inspect.signature(model.forward).parameters
    by_name = cache_name(model) or "past_key_values"
    steps = tokens.shape[1]
    rows: dict[int, torch.Tensor] = {}
    for chosen, inputs in batches_of(model, prompts, batch_size, pad_token_id, output_len=steps):
        length = inputs.prompt_len
        inputs.ids[:, length:] = tokens[list(chosen)].to(inputs.ids.device)
        pieces = [(0, length + steps - 1)]
        if cached:
            pieces = [(0, length), *((length + step, length + step + 1) for step in range(steps - 1))]
        cache, parts = None, []
        for first, end in pieces:
            kwargs: dict[str, Any] = {by_name: cache, "use_cache": cached}
            if "position_ids" in accepted:
                kwargs["position_ids"] = inputs.positions[:, first:end]
            if "logits_to_keep" in accepted:
                # Over the whole prompt they would take more memory than the model.
                kwargs["logits_to_keep"] = 1 if cached else steps
            output = model(input_ids=inputs.ids[:, first:end], attention_mask=inputs.mask[:, :end], **kwargs)
            cache = getattr(output, by_name) if cached else None
            parts.append(output.logits[:, -1:] if cached else output.logits[:, -steps:])
        logits = torch.cat(parts, dim=1).float().cpu()
        for place, index in enumerate(chosen):
            rows[index] = logits[place]
    return torch.stack([rows[index] for index in range(len(prompts))])
