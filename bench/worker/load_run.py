"""A measured run under arrivals: each timed pass is a trace of requests, with gaps of its own."""

from collections.abc import Sequence
from typing import Any

from pipetune.bench.load.admission import rules_of
from pipetune.bench.load.arrivals import arrival_times_s
from pipetune.bench.load.online import OnlineRequest, OnlineRun
from pipetune.bench.record import Iteration
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.online import OnlineStage, Sizes
from pipetune.bench.spec import RunSpec
from pipetune.bench.worker.online import Online
from pipetune.bench.worker.output_check import TimedCheck
from pipetune.bench.worker.plan_run import PlanRun
from pipetune.bench.worker.reference import Reference
from pipetune.bench.worker.stage_host import StageHost


class LoadRun(PlanRun):
    """Measures one plan under a workload's arrivals; the check before is that of any run."""

    def __init__(
        self, host: StageHost, spec: RunSpec, in_flight: int, job: Job, reference: Reference | None, online: Online
    ) -> None:
        super().__init__(host, spec, job, reference)
        assert spec.workload.arrivals is not None
        self._arrivals, self._online = spec.workload.arrivals, online
        self._lens = spec.workload.generated_lens
        self._sizes = Sizes(
            rules=rules_of(self.plan, in_flight, joins=host.shape.joins, whole_slots=host.shape.whole_slots),
            max_len=max(len(prompt) + length for prompt, length in zip(job.prompts, self._lens, strict=True)),
            prompt_len=job.longest,
        )
        self._stage: OnlineStage | None = None

    def _open(self, jobs: Sequence[Job | None], *, before_check: bool) -> None:
        if before_check and self.reference is not None:
            return
        self._stage = self._online.open(self.plan, self._sizes, self.job.sampling, instrument=self.protocol.instrument)

    def _serve(self, times_s: Sequence[float], max_concurrency: int | None) -> OnlineRun:
        """The first prompts, at these times."""
        prompts, lens = self.job.prompts, self._lens
        requests = [
            OnlineRequest(number=number, prompt=prompts[number], output_len=lens[number], at_s=round(at_s, 6))
            for number, at_s in enumerate(times_s)
        ]
        return self._online.serve(self._stage, requests, self._sizes, max_concurrency)

    def _warm_up(self, jobs: Sequence[Job | None]) -> list[float]:
        """Twice as many requests as the slots hold, all at once."""
        rules, most = self._sizes.rules, len(self.job.prompts)
        self.host.report("warmup", 0, 1)
        count = min(most, self._arrivals.num_warmups or 2 * rules.slots * rules.rows * self.plan.replicas)
        return [self._serve([0.0] * count, None).duration_s]

    def _pass(self, number: int, jobs: Sequence[Job | None], timed_check: TimedCheck) -> Iteration:
        seeded = self._arrivals.model_copy(update={"seed": self._arrivals.seed + number})
        times_s = arrival_times_s(seeded, len(self.job.prompts))
        run = self._serve(times_s, self._arrivals.max_concurrency)
        if self.host.rank == 0:
            timed_check.add_tokens({one.number: list(one.token_ids) for one in run.requests})
        return run

    def _is_steady(self, warmup: list[float], durations: list[float]) -> bool:
        # Traces differ, and how long one takes is mostly told by its rate.
        return True

    def _shapes(self, jobs: Sequence[Job | None]) -> dict[str, Any]:
        order = tuple(range(len(self.job.prompts)))
        counts = (0,) * self.plan.replicas if self.plan.replicas > 1 else None
        return {"order": order, "micro_batch_sizes": (), "tasks": (), "replica_tasks": counts}

    def _kv_bytes(self) -> int:
        return sum(cache.nbytes() for cache in self._stage.caches) if self._stage is not None else 0
