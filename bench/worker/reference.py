"""The truth a plan is checked against: the unsplit model's tokens, logits, margins and its own spread.

A reference holds, for every prompt, the tokens, greedy or drawn, and at each the margin within which it stays the same;
and for a few prompts all logits under those tokens. Where texts are scored it holds the log-probabilities of all tokens
instead. Its spread is the largest difference that the unsplit model itself shows between batch sizes and between cached
and uncached passes, in the dtype at hand: kernels round differently by shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipetune.bench.errors import ConfigError, ModelError, StudyError
from pipetune.bench.record import OutputCheck
from pipetune.bench.runtime.job import margins_of, sort_by_length
from pipetune.bench.spec import Arrivals, ModelSpec, Workload

# Twice the spread seen: a handful of comparisons underestimates the largest difference that can occur.
SPREAD_FACTOR = 2.0
# Stands for what is no number.
LARGEST = 3.4e38
# How far a plan's median may lie above the largest median of the passes compared: medians of few positions vary, too.
TYPICAL_FACTOR = 3.0
# Units in the last place, of the largest logit, that kernels may differ by where the passes compared agree more closely
# than that: in fp32 plans may use another library's matrix products (`packed_weights`), which sum in another order.
FLOOR_ULPS = {torch.float32: 40}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """T tokens a prompt, N prompts, k of them checked over t tokens, V vocabulary."""

    source: str
    """`unsplit`, or `plan` where the unsplit model does not fit."""
    workload_digest: str
    tokens: torch.Tensor
    """`[N, T]`, greedy or drawn; T is 0 where texts are scored."""
    margins: torch.Tensor
    """`[N, T]`: largest less second largest logit, or how far logits may be off for a draw to stay the same."""
    checked: tuple[int, ...]
    """Given indices of the k prompts checked."""
    logits: torch.Tensor
    """`[k, t, V]`, fp32."""
    spread: float
    """Largest difference of a logit, or of a log-probability, between passes of the same work."""
    typical: float | None = None
    """Largest difference of the median over positions; None in files from before it was kept."""
    scores: tuple[torch.Tensor, ...] | None = None
    """Where texts are scored: of each prompt `[length - 1]`, log-probabilities of its tokens but the first, fp32."""

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit that is put down to kernels and not to a wrong split."""
        return SPREAD_FACTOR * self.spread

    @property
    def typical_tolerance(self) -> float | None:
        """Largest median error that is put down to kernels; a wrong split is off nearly everywhere."""
        return None if self.typical is None else min(TYPICAL_FACTOR * self.typical, self.tolerance)

    def save(self, path: Path) -> None:
        """Writes the file under a temporary name first; ConfigError where the disk is full, or read-only."""
        temporary = path.with_name(f".{path.name}.tmp")
        tensors = {
            "tokens": self.tokens,
            "margins": self.margins,
            "checked": torch.tensor(self.checked, dtype=torch.long),
            "logits": self.logits,
        }
        if self.scores is not None:
            tensors["scores"] = torch.cat(self.scores)
            tensors["score_lens"] = torch.tensor([len(row) for row in self.scores], dtype=torch.long)
        metadata = {
            "source": self.source,
            "workload_digest": self.workload_digest,
            "spread": repr(self.spread),
            **({} if self.typical is None else {"typical": repr(self.typical)}),
        }
        try:
            save_file(tensors, temporary, metadata=metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path, workload_digest: str) -> Self:
        """Reads a reference of this model and workload; StudyError where it is missing, damaged, or of others."""
        try:
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            loaded = cls(
                source=metadata["source"],
                workload_digest=metadata["workload_digest"],
                tokens=tensors["tokens"],
                margins=tensors["margins"],
                checked=tuple(tensors["checked"].tolist()),
                logits=tensors["logits"],
                spread=float(metadata["spread"]),
                typical=float(metadata["typical"]) if "typical" in metadata else None,
                scores=torch.split(tensors["scores"], tensors["score_lens"].tolist()) if "scores" in tensors else None,
            )
        except Exception as error:
            raise StudyError(f"{path}: not a reference ({error!r}); --resume makes it anew") from error
        if loaded.workload_digest != workload_digest:
            raise StudyError(f"{path}: made for another model or workload; --resume makes it anew")
        return loaded


def choose_checked(prompts: Sequence[Sequence[int]], count: int) -> tuple[int, ...]:
    """Prompts to check, spread over the lengths, shortest and longest included, so that padding is checked too."""
    order = sort_by_length(prompts)
    count = min(count, len(order))
    places = {round(place * (len(order) - 1) / max(count - 1, 1)) for place in range(count)}
    return tuple(sorted(order[place] for place in places))


def compare_logits(reference: Reference, logits: dict[int, torch.Tensor]) -> OutputCheck:
    """Compares a plan's forced logits, by place in `reference.checked`, with the reference's."""
    flips, compared, errors = 0, 0, []
    for place, own in logits.items():
        truth = reference.logits[place]
        errors.append(_errors(own, truth).amax(-1))
        apart = margins_of(truth) > reference.tolerance
        flips += int(((own.argmax(-1) != truth.argmax(-1)) & apart).sum().item())
        compared += own.numel()
    return _check(reference, torch.cat(errors), compared, flips)


def compare_scores(reference: Reference, scores: dict[int, torch.Tensor]) -> OutputCheck:
    """Compares a plan's log-probabilities, by given index, with the reference's."""
    assert reference.scores is not None, "a reference of generated tokens has no log-probabilities"
    errors = []
    for index, own in scores.items():
        truth = reference.scores[index]
        assert own.shape == truth.shape, f"prompt {index}: {tuple(own.shape)} scores, not {tuple(truth.shape)}"
        errors.append(_errors(own, truth))
    together = torch.cat(errors)
    return _check(reference, together, together.numel(), 0)


def _errors(own: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    # NaN compares as false: a plan that yields it must not pass.
    return (own - truth).abs().nan_to_num(nan=LARGEST, posinf=LARGEST)


def _check(reference: Reference, errors: torch.Tensor, compared: int, flips: int) -> OutputCheck:
    return OutputCheck(
        reference="unsplit" if reference.source == "unsplit" else "plan",
        max_logit_error=errors.max().item() if errors.numel() else 0.0,
        tolerance=reference.tolerance,
        compared_logits=compared,
        argmax_flips=flips,
        typical_error=errors.median().item() if errors.numel() else 0.0,
        typical_tolerance=reference.typical_tolerance,
        positions=errors.numel(),
        outliers=int((errors > reference.tolerance).sum().item()),
    )


def worst_check(checks: Sequence[OutputCheck]) -> OutputCheck:
    """One check out of several of the same reference: the largest errors, and counts of all."""
    return checks[0].model_copy(
        update={
            "max_logit_error": max(check.max_logit_error for check in checks),
            "compared_logits": sum(check.compared_logits for check in checks),
            "argmax_flips": sum(check.argmax_flips for check in checks),
            "typical_error": max(check.typical_error or 0.0 for check in checks),
            "positions": sum(check.positions for check in checks),
            "outliers": sum(check.outliers for check in checks),
        }
    )


def compare_tokens(reference: Reference, tokens: dict[int, list[int]]) -> tuple[int, int]:
    """Prompts whose free-running tokens, greedy or drawn, part from the reference where it is clear, and near a tie."""
    wrong = near = 0
    for index, own in tokens.items():
        truth = reference.tokens[index].tolist()
        parting = next((place for place, (a, b) in enumerate(zip(own, truth, strict=False)) if a != b), None)
        if parting is not None:
            is_near = reference.margins[index, parting].item() <= reference.tolerance
            wrong, near = wrong + (not is_near), near + is_near
    return wrong, near


def spread_of(logits: torch.Tensor, others: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """How far passes of the same work differ: at most, and in the median over positions.

    Both are a few units in the last place if the passes agree more closely than that. `logits` are `[…, V]`, or
    log-probabilities `[n]`. ModelError where there are no numbers to compare: the model overflows in this dtype.
    """
    if not all(bool(one.isfinite().all()) for one in (logits, *others)):
        name = str(dtype).removeprefix("torch.")
        remedy = {"float16": "choose bfloat16 or float32", "bfloat16": "choose float32"}.get(name)
        raise ModelError(
            f"model.dtype: in {name} the model's own logits are not finite, so that no plan could be checked; "
            f"{remedy or 'its weights are damaged: fetch the checkpoint again'}"
        )
    floor = FLOOR_ULPS.get(dtype, 4) * torch.finfo(dtype).eps * logits.abs().max().item()
    errors = [(other - logits).abs() for other in others]
    by_position = [error.amax(-1) if error.dim() > 1 else error for error in errors]
    largest = max(error.max().item() for error in by_position)
    typical = max(error.median().item() for error in by_position)
    return max(largest, floor), max(typical, floor)


def reference_digest(model: ModelSpec, workload: Workload) -> str:
    """What ties a reference to its model and workload; a prompts file counts by its content, wherever it lies."""
    # Whatever the rate, requests under arrivals have one truth.
    arrivals = None if workload.arrivals is None else Arrivals(request_rate=1.0)
    workload = workload.model_copy(update={"goodput": None, "arrivals": arrivals})
    if workload.prompts_sha256 is not None:
        workload = workload.model_copy(update={"prompts_file": None})
    return f"{model.by_content.digest()}-{workload.digest()}"
