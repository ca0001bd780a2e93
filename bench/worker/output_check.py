"""Is a plan's output the model's? Small passes before timing, comparison of the timed ones, and a plan as the truth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Failure, OutputCheck
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.loop import PassResult
from pipetune.bench.spec import DTYPE_BYTES, Plan, Protocol
from pipetune.bench.worker.acceptance import wrong_output, wrong_tokens
from pipetune.bench.worker.reference import (
    Reference,
    choose_checked,
    compare_logits,
    compare_scores,
    compare_tokens,
    spread_of,
    worst_check,
)
from pipetune.bench.worker.stage_host import StageHost


def check_output(host: StageHost, plan: Plan, job: Job, reference: Reference) -> OutputCheck:
    """Runs the checked prompts through every replica and compares logits, or log-probabilities; the worst counts.

    Every rank calls it under the plan, and gets the same.
    """
    checked = reference.checked
    rows = max(1, len(checked) // 2)
    mine: OutputCheck | None = None
    if job.scores:
        scores = _small_pass(host, plan, job, checked, rows).scores
        if scores is not None:
            mine = compare_scores(reference, {checked[place]: row for place, row in scores.items()})
    else:
        tokens = reference.tokens[list(checked), : reference.logits.shape[1]]
        logits = _small_pass(host, plan, job, checked, rows, tokens).logits
        mine = compare_logits(reference, logits) if logits is not None else None
    gathered = host.control.gather(mine.model_dump(mode="json") if mine is not None else None)
    return worst_check([OutputCheck.model_validate(row) for row in gathered if row is not None])


def wrong_logits(check: OutputCheck, job: Job, shape: ModelShape, *, phase: str = "check") -> Failure | None:
    """The failure that a comparison of logits, or of log-probabilities, amounts to for this model, if any."""
    # With all experts at work as many parameters as there are.
    routes = any(layer.active_params * shape.kept_bytes < 0.9 * layer.weight_bytes for layer in shape.layers)
    return wrong_output(
        check, scored=job.scores, may_route_otherwise=routes and shape.dtype_bytes < DTYPE_BYTES["float32"], phase=phase
    )


class TimedCheck:
    """How the timed passes of this rank's replica compare with the reference: the worst of all iterations."""

    def __init__(self, host: StageHost, plan: Plan, job: Job, reference: Reference | None) -> None:
        """
        Args:
            job: over the prompts of all replicas.
        """
        assert host.placement is not None
        self._reference, self._job, self._shape = reference, job, host.shape
        self._share: Sequence[int] = range(len(job.prompts))
        if host.placement.replica is not None and plan.replicas > 1:
            self._share = job.share(host.placement.replica, plan.replicas)
        self._wrong, self._near = 0, 0
        self._scores: OutputCheck | None = None
        self._tokens_compared = False

    def add(self, result: PassResult | None) -> None:
        """Takes one pass in; only the last stage knows its output."""
        if result is None or self._reference is None:
            return
        if result.tokens is not None:
            given = {self._share[index]: row for index, row in result.tokens.items()}
            wrong, near = compare_tokens(self._reference, given)
            self._wrong, self._near = max(self._wrong, wrong), max(self._near, near)
            self._tokens_compared = True
        if result.scores is not None:
            check = compare_scores(self._reference, {self._share[index]: row for index, row in result.scores.items()})
            self._scores = worst_check([self._scores, check]) if self._scores is not None else check

    def seen(self) -> dict[str, Any] | None:
        """What the other ranks must know, as plain values; None where nothing was compared."""
        if not (self._tokens_compared or self._scores is not None):
            return None
        scores = self._scores.model_dump(mode="json") if self._scores is not None else None
        return {"wrong": self._wrong, "near": self._near, "scores": scores}

    def conclude(
        self, check: OutputCheck | None, seen: Sequence[dict[str, Any] | None]
    ) -> tuple[OutputCheck | None, Failure | None]:
        """What all replicas' timed passes, beside the check before them, amount to.

        Args:
            check: of the small passes; None where there were none.
            seen: of every rank.
        """
        rows = [row for row in seen if row is not None]
        if not rows:
            return check, None
        checks = [OutputCheck.model_validate(row["scores"]) for row in rows if row["scores"] is not None]
        if checks:
            check = worst_check([*([check] if check is not None else []), *checks])
            return check, wrong_logits(check, self._job, self._shape, phase="measure")
        wrong, near = sum(row["wrong"] for row in rows), sum(row["near"] for row in rows)
        base = check or OutputCheck(
            reference="unsplit", max_logit_error=0.0, tolerance=0.0, compared_logits=0, argmax_flips=0
        )
        check = base.model_copy(update={"tokens_equal": wrong == 0, "near_ties": near})
        return check, wrong_tokens(wrong, len(self._job.prompts), self._shape.dtype_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """What a rank knows after a small pass; nothing, unless it holds a last stage."""

    logits: dict[int, torch.Tensor] | None = None
    scores: dict[int, torch.Tensor] | None = None


def _small_pass(
    host: StageHost, plan: Plan, job: Job, checked: Sequence[int], rows: int, tokens: torch.Tensor | None = None
) -> _Seen:
    """Runs a few prompts through every replica; results are by place in `checked`.

    Args:
        rows: of a micro-batch at most; few, so that prompts of unlike length are padded against each other.
        tokens: `[k, t]`, fed instead of the sampled ones; None scores the prompts.
    """
    small = min(job.micro_batch_size, rows)
    part = Job(
        prompts=tuple(job.prompts[index] for index in checked),
        output_len=0 if tokens is None else tokens.shape[1],
        micro_batch_size=small,
        prefill_size=small if job.prefill_size == job.micro_batch_size else 1,
        chunk_size=job.chunk_size,
        in_flight=min(job.in_flight, math.ceil(len(checked) / small)),
        pad_token_id=job.pad_token_id,
        forced=None if tokens is None else tuple(tuple(row) for row in tokens.tolist()),
    )
    jobs = (part,) * plan.replicas
    host.open(jobs)
    result = host.run(jobs)
    return _Seen(result.logits, result.scores) if result is not None else _Seen()


def make_reference_from_plan(
    host: StageHost, job: Job, plan: Plan, path: Path, digest: str, protocol: Protocol, dtype: torch.dtype
) -> None:
    """Takes a plan's own output for the truth, where the unsplit model does not fit on any device.

    Later plans are compared with this one: that tells them apart, and cannot tell whether the first was right.

    Args:
        dtype: what the model computes in.
    """
    plan = plan.replica(0)
    host.apply(plan)
    host.status.phase = "reference"
    jobs = (dataclasses.replace(job, keep_margins=not job.scores),)
    host.open(jobs)
    result = host.run(jobs)
    checked = choose_checked(job.prompts, protocol.check_prompts)
    places = range(len(checked))
    everyone = range(len(job.prompts))
    sizes = (len(checked), max(1, len(checked) // 2), 1)
    made: Reference | None = None
    if job.scores:
        passes = [_small_pass(host, plan, job, checked, size).scores for size in sizes]
        if result is not None and result.scores is not None:
            scores = tuple(result.scores[index] for index in everyone)
            others = [torch.cat([one[place] for place in places]) for one in passes if one is not None]
            spread, typical = spread_of(torch.cat([scores[index] for index in checked]), others, dtype)
            made = Reference(
                source="plan",
                workload_digest=digest,
                tokens=torch.empty((len(everyone), 0), dtype=torch.long),
                margins=torch.empty((len(everyone), 0)),
                checked=checked,
                logits=torch.empty((len(checked), 0, 0)),
                spread=spread,
                typical=typical,
                scores=scores,
            )
    else:
        known = result.tokens if result is not None else None
        mine = [known[index] for index in everyone] if known is not None else None
        rows = next(row for row in host.control.gather(mine) if row is not None)
        tokens = torch.tensor(rows, dtype=torch.long)
        chosen = tokens[list(checked), : protocol.check_tokens]
        forced = [_small_pass(host, plan, job, checked, size, chosen).logits for size in sizes]
        if result is not None and result.margins is not None:
            logits, *others = [torch.stack([one[place] for place in places]) for one in forced if one is not None]
            spread, typical = spread_of(logits, others, dtype)
            made = Reference(
                source="plan",
                workload_digest=digest,
                tokens=tokens,
                margins=torch.stack([result.margins[index] for index in everyone]),
                checked=checked,
                logits=logits,
                spread=spread,
                typical=typical,
            )
    if made is not None:
        made.save(path)
    host.control.barrier()
