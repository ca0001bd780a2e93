"""The truth a plan is checked against: the unsplit model's tokens, logits, margins and its own spread.

A reference holds, for every prompt, the greedy tokens and the margin between the two largest logits at each; and for
a few prompts all logits under those tokens. Its spread is the largest difference that the unsplit model itself shows
between batch sizes and between cached and uncached passes, in the dtype at hand: kernels round differently by shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from bench.baseline import BaselinePass, generate_once
from bench.errors import ModelError, StudyError
from bench.faults import is_out_of_memory
from bench.record import OutputCheck
from bench.runtime.job import MicroBatchInputs, margins_of, sort_by_length
from bench.spec import ModelSpec, Workload

# Twice the spread seen: a handful of comparisons underestimates the largest difference that can occur.
SPREAD_FACTOR = 2.0
# Units in the last place, of the largest logit, that kernels may differ by where the passes compared agree more closely
# than that: in fp32 plans may use another library's matrix products (`packed_weights`), which sum in another order.
FLOOR_ULPS = {torch.float32: 40}
# Prompts whose logits over the whole vocabulary are held at once while margins are taken.
MARGIN_BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """T tokens a prompt, N prompts, k of them checked over t tokens, V vocabulary."""

    source: str
    """`unsplit`, or `plan` where the unsplit model does not fit."""
    workload_digest: str
    tokens: torch.Tensor
    """`[N, T]`, greedy."""
    margins: torch.Tensor
    """`[N, T]`: largest less second largest logit."""
    checked: tuple[int, ...]
    """Given indices of the k prompts checked."""
    logits: torch.Tensor
    """`[k, t, V]`, fp32."""
    spread: float

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit that is put down to kernels and not to a wrong split."""
        return SPREAD_FACTOR * self.spread

    def save(self, path: Path) -> None:
        """Writes the file under a temporary name first."""
        temporary = path.with_name(f".{path.name}.tmp")
        save_file(
            {
                "tokens": self.tokens,
                "margins": self.margins,
                "checked": torch.tensor(self.checked, dtype=torch.long),
                "logits": self.logits,
            },
            temporary,
            metadata={
                "source": self.source,
                "workload_digest": self.workload_digest,
                "spread": repr(self.spread),
            },
        )
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, workload_digest: str) -> Reference:
        """Reads a reference and makes sure that it belongs to this model and workload.

        Raises:
            StudyError: the file is missing, damaged, or of another workload.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise StudyError(f"{path}: not a reference ({error}); delete it and it is made anew") from error
        if metadata["workload_digest"] != workload_digest:
            raise StudyError(f"{path}: made for another model or workload; delete it and it is made anew")
        return cls(
            source=metadata["source"],
            workload_digest=workload_digest,
            tokens=tensors["tokens"],
            margins=tensors["margins"],
            checked=tuple(tensors["checked"].tolist()),
            logits=tensors["logits"],
            spread=float(metadata["spread"]),
        )


def choose_checked(prompts: Sequence[Sequence[int]], count: int) -> tuple[int, ...]:
    """Prompts to check, spread over the lengths, shortest and longest included, so that padding is checked too."""
    order = sort_by_length(prompts)
    count = min(count, len(order))
    if count == 1:
        return (order[0],)
    places = {round(place * (len(order) - 1) / (count - 1)) for place in range(count)}
    return tuple(sorted(order[place] for place in places))


def forced_logits(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: torch.Tensor,
    *,
    batch_size: int,
    pad_token_id: int,
    cached: bool,
) -> torch.Tensor:
    """Logits of the unsplit model when `tokens` `[n, t]` are fed after the prompts.

    Args:
        cached: step by step with a KV cache as in generation, else in one pass over prompt and tokens.

    Returns:
        `[n, t, V]` fp32 on the host, in the order given.
    """
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    steps = tokens.shape[1]
    order = sort_by_length(prompts)
    rows: dict[int, torch.Tensor] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        inputs = MicroBatchInputs.build(
            [prompts[index] for index in chosen], output_len=steps, pad_token_id=pad_token_id, device=device
        )
        length = inputs.prompt_len
        inputs.ids[:, length:] = tokens[list(chosen)].to(device)
        pieces = [(0, length + steps - 1)]
        if cached:
            pieces = [(0, length), *((length + step, length + step + 1) for step in range(steps - 1))]
        cache, parts = None, []
        for first, end in pieces:
            kwargs: dict[str, Any] = {}
            if "position_ids" in accepted:
                kwargs["position_ids"] = inputs.positions[:, first:end]
            if "logits_to_keep" in accepted:
                # Over the whole prompt they would take more memory than the model.
                kwargs["logits_to_keep"] = 1 if cached else steps
            output = model(
                input_ids=inputs.ids[:, first:end],
                attention_mask=inputs.mask[:, :end],
                past_key_values=cache,
                use_cache=cached,
                **kwargs,
            )
            cache = output.past_key_values if cached else None
            parts.append(output.logits[:, -1:] if cached else output.logits[:, -steps:])
        logits = torch.cat(parts, dim=1).float().cpu()
        for place, index in enumerate(chosen):
            rows[index] = logits[place]
    return torch.stack([rows[index] for index in range(len(prompts))])


def compare_logits(reference: Reference, logits: dict[int, torch.Tensor]) -> OutputCheck:
    """Compares a plan's forced logits, by place in `reference.checked`, with the reference's."""
    largest, flips, compared = 0.0, 0, 0
    for place, own in logits.items():
        truth = reference.logits[place]
        difference = (own - truth).abs().max().item()
        # NaN compares as false: a plan that yields it must not pass.
        largest = max(largest, difference) if difference == difference else float("inf")
        apart = margins_of(truth) > reference.tolerance
        flips += int(((own.argmax(-1) != truth.argmax(-1)) & apart).sum().item())
        compared += own.numel()
    return OutputCheck(
        reference="unsplit" if reference.source == "unsplit" else "plan",
        max_logit_error=min(largest, 3.4e38),
        tolerance=reference.tolerance,
        compared_logits=compared,
        argmax_flips=flips,
    )


def worst_check(checks: Sequence[OutputCheck]) -> OutputCheck:
    """One check out of several of the same reference: the largest error, and flips and logits of all."""
    return checks[0].model_copy(
        update={
            "max_logit_error": max(check.max_logit_error for check in checks),
            "compared_logits": sum(check.compared_logits for check in checks),
            "argmax_flips": sum(check.argmax_flips for check in checks),
        }
    )


def compare_tokens(reference: Reference, tokens: dict[int, list[int]]) -> tuple[int, int]:
    """Compares free-running greedy tokens with the reference's.

    Returns:
        Prompts that part from the reference where the top two are clearly apart, and prompts that part at a near tie.
    """
    wrong = near = 0
    for index, own in tokens.items():
        truth = reference.tokens[index].tolist()
        parting = next((place for place, (a, b) in enumerate(zip(own, truth, strict=False)) if a != b), None)
        if parting is None:
            continue
        if reference.margins[index, parting].item() <= reference.tolerance:
            near += 1
        else:
            wrong += 1
    return wrong, near


def make_reference(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    output_len: int,
    check_prompts: int,
    check_tokens: int,
    pad_token_id: int,
    workload_digest: str,
) -> Reference:
    """Asks the unsplit model for its greedy tokens, their margins, the logits of a few prompts, and its spread."""
    own = _greedy(model, prompts, output_len=output_len, pad_token_id=pad_token_id)
    tokens = torch.tensor([own.tokens[index] for index in range(len(prompts))], dtype=torch.long)

    def ask(chosen: Sequence[int], steps: int, batch_size: int, *, cached: bool) -> torch.Tensor:
        return forced_logits(
            model,
            [prompts[index] for index in chosen],
            tokens[list(chosen), :steps],
            batch_size=batch_size,
            pad_token_id=pad_token_id,
            cached=cached,
        )

    with torch.inference_mode():
        everyone = range(len(prompts))
        margins = torch.cat(
            [
                margins_of(ask(everyone[begin : begin + MARGIN_BATCH], output_len, MARGIN_BATCH, cached=False))
                for begin in range(0, len(prompts), MARGIN_BATCH)
            ]
        )
        checked = choose_checked(prompts, check_prompts)
        steps = min(check_tokens, output_len)
        logits = ask(checked, steps, len(checked), cached=True)
        others = [
            ask(checked, steps, 1, cached=True),
            ask(checked, steps, max(1, len(checked) // 2), cached=True),
            ask(checked, steps, len(checked), cached=False),
        ]
    return Reference(
        source="unsplit",
        workload_digest=workload_digest,
        tokens=tokens,
        margins=margins,
        checked=checked,
        logits=logits,
        spread=spread_of(logits, others, model.dtype),
    )


def _greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, output_len: int, pad_token_id: int
) -> BaselinePass:
    """Greedy tokens at the largest batch that fits: all prompts, a half, a quarter …"""
    size = len(prompts)
    while True:
        try:
            return generate_once(model, prompts, output_len=output_len, batch_size=size, pad_token_id=pad_token_id)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Behind the except: its traceback holds what was allocated.
        size = (size + 1) // 2


def spread_of(logits: torch.Tensor, others: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    """Largest difference between passes of the same work; a few units in the last place if they agree bit for bit.

    Raises:
        ModelError: there are no numbers to compare: the model overflows in this dtype.
    """
    if not all(bool(one.isfinite().all()) for one in (logits, *others)):
        raise ModelError(
            f"model.dtype: in {str(dtype).removeprefix('torch.')} the model's own logits are not finite, so that no "
            "plan could be checked; choose bfloat16 or float32"
        )
    seen = max((other - logits).abs().max().item() for other in others)
    return max(seen, FLOOR_ULPS.get(dtype, 4) * torch.finfo(dtype).eps * logits.abs().max().item())


def reference_digest(model: ModelSpec, workload: Workload) -> str:
    """What ties a reference to its model and workload; a prompts file counts by its content, wherever it lies."""
    if workload.prompts_sha256 is not None:
        workload = workload.model_copy(update={"prompts_file": None})
    return f"{model.digest()}-{workload.digest()}"
