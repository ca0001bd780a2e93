"""Plans in use inside the workers: generates for prompts and scores texts, for the answers and not to measure."""

import dataclasses
from typing import Any

import torch
from pydantic import validate_call

from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.loop import PassResult
from pipetune.bench.spec import Plan, Sampling
from pipetune.bench.worker.prompts import Tokens
from pipetune.bench.worker.stage_host import StageHost, job_of


class Serving:
    """Every rank has one and calls the same methods; rank 0's answers count."""

    def __init__(self, host: StageHost, tokens: Tokens) -> None:
        self._host, self._tokens = host, tokens

    @validate_call
    def generate(
        self,
        plan: Plan,
        in_flight: int,
        prompts: list[Any],
        max_new_tokens: int | tuple[int, ...],
        ignore_eos: bool,
        sampling: Sampling | None,
    ) -> dict[str, Any]:
        """Tokens for each prompt, and when they were known; stops at end-of-sequence tokens unless told otherwise."""
        job = dataclasses.replace(
            self._job(plan, in_flight, prompts, max_new_tokens),
            sampling=sampling,
            eos_token_ids=None if ignore_eos else self._tokens.eos_token_ids(),
        )
        own, result = self._run(job, "generate")
        zero_s, _ = self._host.window(result)
        mine: dict[int, dict[str, Any]] = {}
        if own is not None and result is not None and result.tokens is not None:
            times = _token_times_s(own, result, zero_s)
            for index, tokens in result.tokens.items():
                mine[index] = {"token_ids": tokens, "token_times_s": times[index][: len(tokens)]}
        return {"results": self._gathered(job, own, mine)}

    @validate_call
    def score(self, plan: Plan, in_flight: int, prompts: list[Any]) -> dict[str, Any]:
        """Log-probabilities of the tokens of each text but the first."""
        job = self._job(plan, in_flight, prompts, 0)
        own, result = self._run(job, "score")
        found = (result.scores if result is not None else None) or {}
        # What a model rules out has minus infinity, which is no value that crosses to the driver.
        least = torch.finfo(torch.float32).min
        mine = {index: {"logprobs": values.clamp(min=least).tolist()} for index, values in found.items()}
        return {"results": self._gathered(job, own, mine)}

    def _job(self, plan: Plan, in_flight: int, prompts: list[Any], max_new_tokens: int | tuple[int, ...]) -> Job:
        """Moves to the plan; the pass over prompts as they were given."""
        lens = None if isinstance(max_new_tokens, int) else max_new_tokens
        longest = max_new_tokens if isinstance(max_new_tokens, int) else max(max_new_tokens)
        rows = self._tokens.encode(prompts, longest)
        if plan != self._host.plan:
            self._host.apply(plan)
        pad_token_id = self._tokens.pad_token_id
        return job_of(plan, rows, output_len=longest, output_lens=lens, in_flight=in_flight, pad_token_id=pad_token_id)

    def _run(self, job: Job, phase: str) -> tuple[Job | None, PassResult | None]:
        """What this rank's replica works on of the job, and what this rank knows after it."""
        self._host.status.phase = phase
        jobs = self._host.parts(job)
        self._host.open(jobs)
        return self._host.own_job(jobs), self._host.run(jobs)

    def _gathered(self, job: Job, own: Job | None, mine: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """What all ranks found, each by the indices of its own part of the job; on rank 0 with ids and text."""
        numbers = own.numbers if own is not None else None
        named = {index if numbers is None else numbers[index]: row for index, row in mine.items()}
        found = {int(number): row for part in self._host.control.gather(named) for number, row in part.items()}
        rows = [found[index] for index in range(len(job.prompts))]
        if self._host.rank == 0:
            tokenizer = self._tokens.tokenizer
            for prompt, row in zip(job.prompts, rows, strict=True):
                ids = row.get("token_ids", prompt)
                row["prompt_token_ids"] = list(prompt)
                row["text"] = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer is not None else None
        return rows


def _token_times_s(job: Job, result: PassResult, zero_s: float) -> dict[int, list[float]]:
    """When each prompt's tokens were known, by given index."""
    tasks, first_rows, order = job.tasks(), job.first_rows, job.order
    times: dict[int, list[float]] = {index: [] for index in order}
    for index, moment in zip(result.ran, result.timeline.token_times_s, strict=True):
        task = tasks[index]
        if not task.samples:
            continue
        for row in range(task.first_row, task.end_row):
            times[order[first_rows[task.micro_batch] + row]].append(round(moment - zero_s, 6))
    return times
