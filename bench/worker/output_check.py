"""Is a plan's output the model's? Small passes before timing, comparison of the timed ones, and a plan as the truth."""

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
from pipetune.bench.worker import reference as ref
from pipetune.bench.worker.acceptance import wrong_output, wrong_tokens
from pipetune.bench.worker.stage_host import StageHost


def check_output(host: StageHost, plan: Plan, job: Job, reference: ref.Reference) -> OutputCheck:
    """Runs the checked prompts through every replica and compares logits, or log-probabilities; the worst counts. Every
    rank calls it under the plan, and gets the same."""
    checked = reference.checked
    tokens = None if job.scores else reference.tokens[list(checked), : reference.logits.shape[1]]
    found = _small_pass(host, plan, job, checked, max(1, len(checked) // 2), tokens)
    mine: OutputCheck | None = None
    if found is not None and job.scores:
        mine = ref.compare_scores(reference, {checked[place]: row for place, row in found.items()})
    elif found is not None:
        mine = ref.compare_logits(reference, found)
    return ref.worst_check([OutputCheck.model_validate(row) for row in host.control.gather(mine) if row is not None])


def wrong_logits(check: OutputCheck, job: Job, shape: ModelShape, *, phase: str = "check") -> Failure | None:
    """The failure that a comparison of logits, or of log-probabilities, amounts to for this model, if any."""
    # With all experts at work as many parameters as there are.
    routes = any(layer.active_params * shape.kept_bytes < 0.9 * layer.weight_bytes for layer in shape.layers)
    return wrong_output(
        check, scored=job.scores, may_route_otherwise=routes and shape.dtype_bytes < DTYPE_BYTES["float32"], phase=phase
    )


class TimedCheck:
    """How the timed passes of this rank's replica compare with the reference: the worst of all iterations."""

    def __init__(self, host: StageHost, plan: Plan, job: Job, reference: ref.Reference | None) -> None:
        """The job is over the prompts of all replicas."""
        assert host.placement is not None
        self._reference, self._job, self._shape = reference, job, host.shape
        self._share: Sequence[int] = range(len(job.prompts))
        if host.placement.replica is not None and plan.replicas > 1:
            self._share = job.share(host.placement.replica, plan.replicas)
        self._counts: tuple[int, int] | None = None
        self._scores: OutputCheck | None = None

    def add(self, result: PassResult | None) -> None:
        """Takes one pass in; only the last stage knows its output."""
        if result is None or self._reference is None:
            return
        if result.tokens is not None:
            self.add_tokens({self._share[index]: row for index, row in result.tokens.items()})
        if result.scores is not None:
            scores = {self._share[index]: row for index, row in result.scores.items()}
            check = ref.compare_scores(self._reference, scores)
            self._scores = ref.worst_check([self._scores, check]) if self._scores is not None else check

    def add_tokens(self, tokens: dict[int, list[int]]) -> None:
        """Takes the tokens of prompts, by given index; those that the reference has are compared."""
        if self._reference is not None:
            known = {index: row for index, row in tokens.items() if index < len(self._reference.tokens)}
            (wrong, near), (most_wrong, most_near) = ref.compare_tokens(self._reference, known), self._counts or (0, 0)
            self._counts = max(wrong, most_wrong), max(near, most_near)

    def seen(self) -> dict[str, Any]:
        """What the other ranks must know."""
        return {"counts": self._counts, "scores": self._scores}

    def conclude(
        self, check: OutputCheck | None, seen: Sequence[dict[str, Any]]
    ) -> tuple[OutputCheck | None, Failure | None]:
        """What all replicas' timed passes, as every rank has seen them, amount to, beside the check before them."""
        if checks := [OutputCheck.model_validate(row["scores"]) for row in seen if row["scores"] is not None]:
            check = ref.worst_check([*([check] if check is not None else []), *checks])
            return check, wrong_logits(check, self._job, self._shape, phase="measure")
        if not (counts := [row["counts"] for row in seen if row["counts"] is not None]):
            return check, None
        wrong, near = (sum(column) for column in zip(*counts, strict=True))
        base = check or OutputCheck(
            reference="unsplit", max_logit_error=0.0, tolerance=0.0, compared_logits=0, argmax_flips=0
        )
        check = base.model_copy(update={"tokens_equal": wrong == 0, "near_ties": near})
        return check, wrong_tokens(wrong, len(self._job.prompts), self._shape.dtype_bytes)


def _small_pass(
    host: StageHost, plan: Plan, job: Job, checked: Sequence[int], rows: int, tokens: torch.Tensor | None
) -> dict[int, torch.Tensor] | None:
    """Runs a few prompts through every replica, in micro-batches of at most `rows`: few, so that prompts of unlike
    length are padded against each other.

    `tokens` `[k, t]` are fed instead of the sampled ones; None scores the prompts. Gives the logits under the tokens,
    or log-probabilities, by place in `checked`; None without a last stage.
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
        sampling=job.sampling,
        forced=None if tokens is None else tuple(tuple(row) for row in tokens.tolist()),
    )
    jobs = (part,) * plan.replicas
    host.open(jobs)
    if (result := host.run(jobs)) is None:
        return None
    return result.scores if tokens is None else result.logits


def make_reference_from_plan(
    host: StageHost, job: Job, plan: Plan, path: Path, digest: str, protocol: Protocol
) -> None:
    """Takes a plan's own output for the truth, where the unsplit model does not fit on any device. Later plans are
    compared with this one: that tells them apart, and cannot tell whether the first was right."""
    plan, dtype = plan.replica(0), host.stage.dtype
    host.apply(plan)
    host.status.phase = "reference"
    jobs = (dataclasses.replace(job, keep_margins=not job.scores, output_lens=None),)
    host.open(jobs)
    result = host.run(jobs)
    checked = ref.choose_checked(job.prompts, protocol.check_prompts)
    everyone = range(len(job.prompts))
    tokens, forced = torch.empty((len(everyone), 0), dtype=torch.long), None
    if not job.scores:
        known = result.tokens if result is not None else None
        mine = [known[index] for index in everyone] if known is not None else None
        tokens = torch.tensor(next(row for row in host.control.gather(mine) if row is not None), dtype=torch.long)
        forced = tokens[list(checked), : protocol.check_tokens]
    sizes = (len(checked), max(1, len(checked) // 2), 1)
    passes = [_small_pass(host, plan, job, checked, size, forced) for size in sizes]
    found = [[one[place] for place in range(len(checked))] for one in passes if one is not None]
    if result is not None and (result.scores is not None or result.margins is not None):
        scores, margins, logits = None, torch.empty((len(everyone), 0)), torch.empty((len(checked), 0, 0))
        if result.scores is not None:
            scores = tuple(result.scores[index] for index in everyone)
            own, others = torch.cat([scores[index] for index in checked]), [torch.cat(rows) for rows in found]
        else:
            assert result.margins is not None
            margins = torch.stack([result.margins[index] for index in everyone])
            own, *others = [torch.stack(rows) for rows in found]
            logits = own
        spread, typical = ref.spread_of(own, others, dtype)
        ref.Reference(
            source="plan",
            workload_digest=digest,
            tokens=tokens,
            margins=margins,
            checked=checked,
            logits=logits,
            spread=spread,
            typical=typical,
            scores=scores,
        ).save(path)
    host.control.barrier()
