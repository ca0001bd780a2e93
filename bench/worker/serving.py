"""Plans in use inside the workers: generates for prompts and scores texts, for the answers and not to measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipetune.bench.errors import ConfigError
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.loop import PassResult
from pipetune.bench.spec import Plan, Sampling
from pipetune.bench.worker.stage_host import StageHost
from pipetune.bench.worker.tokens import Tokens


class Serving:
    """Every rank has one and calls the same methods; rank 0's answers count."""

    def __init__(self, host: StageHost, tokens: Tokens) -> None:
        self._host, self._tokens = host, tokens

    def generate(
        self,
        *,
        plan: dict[str, Any],
        in_flight: int,
        prompts: list[Any],
        max_new_tokens: int,
        ignore_eos: bool,
        sampling: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Tokens for each prompt, and when they were known; stops at end-of-sequence tokens unless told otherwise."""
        try:
            job = self._job(plan, in_flight, prompts, max_new_tokens)
        except ConfigError as error:
            return {"error": str(error)}
        job = dataclasses.replace(
            job,
            sampling=None if sampling is None else Sampling.model_validate(sampling),
            eos_token_ids=None if ignore_eos else self._tokens.eos_token_ids(),
        )
        jobs, result = self._run(job, "generate")
        zero_s, _ = self._host.window(result)
        mine: dict[int, dict[str, Any]] = {}
        if result is not None and result.tokens is not None:
            own = self._own(jobs)
            times = _token_times_s(own, result, zero_s)
            mine = {
                _number(own, index): {"token_ids": tokens, "token_times_s": times[index][: len(tokens)]}
                for index, tokens in result.tokens.items()
            }
        return {"results": self._gathered(job, mine, lambda prompt, row: row["token_ids"])}

    def score(self, *, plan: dict[str, Any], in_flight: int, texts: list[Any]) -> dict[str, Any]:
        """Log-probabilities of the tokens of each text but the first."""
        try:
            job = self._job(plan, in_flight, texts, 0)
        except ConfigError as error:
            return {"error": str(error)}
        jobs, result = self._run(job, "score")
        mine: dict[int, dict[str, Any]] = {}
        if result is not None and result.scores is not None:
            own = self._own(jobs)
            # What a model rules out has minus infinity, which is no value that crosses to the driver.
            least = torch.finfo(torch.float32).min
            mine = {
                _number(own, index): {"logprobs": values.clamp(min=least).tolist()}
                for index, values in result.scores.items()
            }
        return {"results": self._gathered(job, mine, lambda prompt, row: prompt)}

    def _job(self, plan: dict[str, Any], in_flight: int, prompts: list[Any], max_new_tokens: int) -> Job:
        """Moves to the plan; the pass over prompts as they were given."""
        rows = self._tokens.encode(prompts, max_new_tokens)
        parsed = Plan.model_validate(plan)
        if parsed != self._host.plan:
            self._host.apply(parsed)
        return Job(
            prompts=rows,
            output_len=max_new_tokens,
            micro_batch_size=parsed.micro_batch_size,
            prefill_size=parsed.prefill_size,
            chunk_size=parsed.prefill_chunk_size,
            in_flight=in_flight,
            pad_token_id=self._tokens.pad_token_id,
        )

    def _run(self, job: Job, phase: str) -> tuple[tuple[Job | None, ...], PassResult | None]:
        self._host.status.phase = phase
        jobs = self._host.parts(job)
        self._host.open(jobs)
        return jobs, self._host.run(jobs)

    def _own(self, jobs: Sequence[Job | None]) -> Job:
        own = self._host.own_job(jobs)
        assert own is not None, "a rank without work has a result"
        return own

    def _gathered(
        self,
        job: Job,
        mine: dict[int, dict[str, Any]],
        to_decode: Callable[[Sequence[int], dict[str, Any]], Sequence[int]],
    ) -> list[dict[str, Any]]:
        """What all ranks found for the prompts, in the order given; on rank 0 with ids and text.

        Args:
            to_decode: of a prompt and what was found for it, the ids whose text is wanted.
        """
        found = {int(number): row for part in self._host.control.gather(mine) for number, row in part.items()}
        rows = [found[index] for index in range(len(job.prompts))]
        if self._host.rank == 0:
            tokenizer = self._tokens.tokenizer()
            for prompt, row in zip(job.prompts, rows, strict=True):
                ids = to_decode(prompt, row)
                row["prompt_token_ids"] = list(prompt)
                row["text"] = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer is not None else None
        return rows


def _number(job: Job, index: int) -> int:
    """Place, among the prompts of all replicas, of one of a replica's job."""
    return index if job.numbers is None else job.numbers[index]


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
