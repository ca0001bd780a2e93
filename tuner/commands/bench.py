"""`bench`'s work: one plan measured, compared with the un-pipelined model, or used to generate."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipetune.bench import metrics
from pipetune.bench.record import Failure, Measurement, Outcome, Record
from pipetune.bench.spec import EffectivePlan, Plan, Protocol, Value
from pipetune.tuner.commands.plan_request import PlanRequest
from pipetune.tuner.config.schema import GENERATE_OBJECTIVE, SCORE_OBJECTIVE, TuneConfig
from pipetune.tuner.progress import Reporter, describe
from pipetune.tuner.ranking import finals
from pipetune.tuner.ranking.elimination import ALPHA, Gap, gaps_behind
from pipetune.tuner.ranking.rounds import log_costs
from pipetune.tuner.ranking.runs import PlanRun, medians_of, spread_of
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.report.wording import peer_name
from pipetune.tuner.search.driver import baseline_batch_sizes
from pipetune.tuner.study.files import refuse_existing, write_new

if TYPE_CHECKING:
    from pipetune.bench.fleet.experiment import Experiment, Labels
    from pipetune.bench.fleet.fleet import GenerationResult, ScoreResult


class Contender(Value):
    """One row of a comparison: medians over the rounds."""

    name: str
    title: str
    throughput: float
    """Tokens put out in a second; where texts are scored, all tokens."""
    q1: float
    q3: float
    ratio: float
    """Throughput over the baseline's: the geometric mean of the rounds' ratios."""
    ratio_low: float | None
    """Lower end of the ratio's 95 % interval, by the test of the finals; None where the rounds are too few for one."""
    ratio_high: float | None
    bubble_ratio: float | None
    mean_ttft_ms: float | None
    """None where texts are scored."""
    mean_e2el_ms: float
    stage_busy_ms: tuple[float, ...]
    """Busy time of each stage of all replicas; empty for the baseline."""
    throughputs: tuple[float, ...]
    """Tokens per second in each round."""

    @property
    def iqr(self) -> float:
        """Interquartile range of the throughput, tokens per second."""
        return self.q3 - self.q1


class Comparison(Value):
    """What the rounds said; the first row is the baseline."""

    rounds: int
    contenders: tuple[Contender, ...]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What `bench` found."""

    plan: Plan
    outcome: Outcome
    in_flight: int | None = None
    comparison: Comparison | None = None
    single_stage_missing: str | None = None
    """Why our single stage is not in the comparison."""
    records: tuple[Record, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A job: what to measure, how, and where results go."""

    config: TuneConfig
    request: PlanRequest
    output: Path | None = None
    save_outputs: Path | None = None
    ignore_eos: bool = False
    rounds: int = 0
    """Rounds of the comparison with the un-pipelined model; 0 leaves it out."""

    def run(self, reporter: Reporter) -> BenchResult:
        """Starts a fleet, measures, and writes the files that were asked for.

        Raises:
            UserError: a model, plan, prompts or file that cannot be used.
            FleetError: the workers failed.
        """
        from pipetune.bench.fleet.experiment import Experiment

        for path in (self.output, self.save_outputs):
            refuse_existing(path)
        with reporter, tempfile.TemporaryDirectory(prefix="pipetune-") as folder:
            reporter.begin(f"starting {len(self.config.concrete_devices)} workers")
            with Experiment.start(
                self.config.model,
                self.config.concrete_devices,
                hang_timeout_s=self.config.protocol.hang_timeout_s,
                on_progress=reporter.fleet,
            ) as experiment:
                shape = experiment.fleet.shape
                reporter.end(f"{shape.architecture}, {shape.num_layers} layers")
                result = _Work(self, experiment, reporter).run(Path(folder) / "reference.safetensors")
        if self.output is not None:
            write_new(self.output, "".join(f"{record.model_dump_json()}\n" for record in result.records))
        return result


@dataclass
class _Work:
    """A job on its fleet."""

    job: Bench
    experiment: Experiment
    reporter: Reporter
    records: list[Record] = field(default_factory=list)

    def run(self, reference: Path) -> BenchResult:
        config, fleet = self.job.config, self.experiment.fleet
        plan = self.job.request.complete(fleet.shape, fleet.devices, config.workload.num_prompts)
        effective = fleet.resolve(plan, config.workload)
        if isinstance(effective, Failure):
            return BenchResult(plan=plan, outcome=effective)
        if config.protocol.check_outputs:
            self.reporter.begin("reference: what the unsplit model says")
            missing = self.experiment.make_reference(reference, config.workload, config.protocol)
            self.reporter.end(
                f"{missing.message}; the output goes unchecked" if missing is not None else "kept for the check"
            )
        # In a comparison the rounds repeat the plan: one repetition is enough for the check.
        protocol = config.protocol.model_copy(update={"num_iters": 1}) if self.job.rounds else config.protocol
        outcome = self._measure(f"measuring {plan.describe()}", effective, protocol)
        comparison, single_missing = None, None
        if isinstance(outcome, Measurement) and self.job.rounds:
            compared, single_missing = self._compare(effective)
            if isinstance(compared, Failure):
                outcome = compared
            else:
                comparison = compared
        if isinstance(outcome, Measurement) and self.job.save_outputs is not None:
            self._save_outputs(effective, self.job.save_outputs)
        return BenchResult(
            plan=plan,
            outcome=outcome,
            in_flight=effective.in_flight,
            comparison=comparison,
            single_stage_missing=single_missing,
            records=tuple(self.records),
        )

    def _measure(
        self, label: str, effective: EffectivePlan, protocol: Protocol, due: finals.Due | None = None
    ) -> Outcome:
        self.reporter.begin(label)
        workload = self.job.config.workload
        labels = self._labels(due)
        record = self.experiment.measure(effective.plan, workload, protocol, resolved=effective, **labels)
        return self._keep(record)

    def _baseline(self, label: str, batch_size: int, protocol: Protocol, due: finals.Due | None = None) -> Outcome:
        self.reporter.begin(label)
        workload, labels = self.job.config.workload, self._labels(due)
        return self._keep(self.experiment.baseline(batch_size, workload, protocol, **labels))

    def _labels(self, due: finals.Due | None) -> Labels:
        number = len(self.records)
        return {"number": number} if due is None else {"number": number, "role": "finalist", "round": due.round}

    def _keep(self, record: Record) -> Outcome:
        self.records.append(record)
        self.reporter.end(describe(record.result, ()))
        return record.result

    def _compare(self, effective: EffectivePlan) -> tuple[Comparison | Failure, str | None]:
        """A finals of the plan, our single stage, and the un-pipelined model at its best batch size.

        All take part in every round; the first failure ends it.
        """
        config, fleet, rounds = self.job.config, self.experiment.fleet, self.job.rounds
        once = finals.side_by_side(config.protocol)
        batch_size = self._best_batch_size(once)
        if isinstance(batch_size, Failure):
            return batch_size, None
        plan = effective.plan
        switches = {name: getattr(plan, name) for name in ("compile", "cuda_graphs", "packed_weights")}
        whole = Plan.from_layer_counts((fleet.shape.num_layers,), fleet.devices, batch_size).model_copy(update=switches)
        single = fleet.resolve(whole, config.workload)
        peer = peer_name(config.workload)
        titles = {finals.BASELINE: ("baseline", f"un-pipelined Hugging Face {peer}, batch size {batch_size}")}
        plans = [effective]
        if isinstance(single, EffectivePlan) and single.key != effective.key:
            plans.insert(0, single)
            titles[single.key] = "single stage", f"our runtime on {fleet.devices[0]} alone, {whole.describe()}"
        titles[effective.key] = "plan", f"{plan.describe()} · on {', '.join(plan.devices)}"
        missing = single.message if isinstance(single, Failure) else None
        finalists = finals.Finalists(plans=tuple(plans), baseline_batch_size=batch_size)
        objective = Objective(metric=SCORE_OBJECTIVE if config.workload.kind == "score" else GENERATE_OBJECTIVE)
        while True:
            due = finals.next_step(
                self.records,
                finalists,
                objectives=(objective,),
                min_rounds=rounds,
                max_rounds=rounds,
                seed=config.seed,
            )
            if isinstance(due, finals.FinalsResult):
                return comparison_of(self.records, titles, objective), missing
            label = f"round {due.shown_round + 1} of {rounds} · {titles[due.name][0]}"
            if due.name == finals.BASELINE:
                outcome = self._baseline(label, batch_size, once, due)
            else:
                outcome = self._measure(label, finalists.plan(due.name), once, due)
            if isinstance(outcome, Failure):
                return outcome, missing

    def _best_batch_size(self, once: Protocol) -> int | Failure:
        config = self.job.config
        sizes = baseline_batch_sizes(config.baseline_batch_sizes, config.workload.num_prompts)
        if len(sizes) == 1:
            return sizes[0]
        found: list[tuple[float, int]] = []
        outcome: Outcome | None = None
        for size in sizes:
            outcome = self._baseline(f"baseline: un-pipelined, batch size {size}", size, once)
            if isinstance(outcome, Measurement):
                found.append((outcome.iterations[0].duration_s, size))
        if found:
            return min(found)[1]
        assert isinstance(outcome, Failure)
        return outcome

    def _save_outputs(self, effective: EffectivePlan, path: Path) -> None:
        workload = self.job.config.workload
        prompts: Sequence[str | Sequence[int]] = self.experiment.fleet.prompts(workload)
        if workload.prompts_file is not None:
            prompts = _read_prompts(Path(workload.prompts_file), workload.num_prompts)
        if workload.kind == "score":
            self.reporter.begin(f"scoring {len(prompts)} texts")
            scored = self.experiment.fleet.score(effective.plan, prompts, in_flight=effective.in_flight)
            lines = [_score_line(text, row) for text, row in zip(prompts, scored, strict=True)]
        else:
            self.reporter.begin(f"generating for {len(prompts)} prompts")
            results = self.experiment.fleet.generate(
                effective.plan,
                prompts,
                max_new_tokens=workload.output_len,
                in_flight=effective.in_flight,
                ignore_eos=self.job.ignore_eos,
                sampling=workload.sampling,
            )
            lines = [_output_line(prompt, row) for prompt, row in zip(prompts, results, strict=True)]
        write_new(path, "".join(lines))
        self.reporter.end(f"written to {path}")


def comparison_of(records: Sequence[Record], titles: Mapping[str, tuple[str, str]], objective: Objective) -> Comparison:
    """Medians and ratios of a finals without failures.

    Args:
        titles: name and title of each row by its key in the finals, the baseline's first.
        objective: a throughput.
    """
    runs: dict[str, list[PlanRun]] = {name: [] for name in titles}
    for record in records:
        if record.role == "finalist" and isinstance(record.result, Measurement):
            key = record.effective.key if record.effective is not None else finals.BASELINE
            runs[key].append(PlanRun(record, record.result))
    costs = {name: log_costs([run.record for run in group], 0, objective) for name, group in runs.items()}
    gaps = gaps_behind(costs, finals.BASELINE)
    return Comparison(
        rounds=len(runs[finals.BASELINE]),
        contenders=tuple(_contender(*titles[name], group, gaps.get(name), objective) for name, group in runs.items()),
    )


def _contender(name: str, title: str, runs: Sequence[PlanRun], gap: Gap | None, objective: Objective) -> Contender:
    """A row; `gap` is how much more a token costs than in the baseline, and None for the baseline itself."""
    spread, values = spread_of(runs, objective.metric), medians_of(runs)
    busy = [row["stage_busy_ms"] for run in runs if (row := metrics.stage_metrics(run.measurement))]
    low, high = (1.0, 1.0) if gap is None else (None, None)
    if gap is not None and gap.freedom:
        least, most = gap.interval(ALPHA / 2)
        low, high = 1 / (1 + most), 1 / (1 + least)
    return Contender(
        name=name,
        title=title,
        throughput=spread.median,
        q1=spread.q1,
        q3=spread.q3,
        ratio=1.0 if gap is None else math.exp(-gap.log_ratio),
        ratio_low=low,
        ratio_high=high,
        bubble_ratio=values.get("bubble_ratio"),
        mean_ttft_ms=values.get("mean_ttft_ms"),
        mean_e2el_ms=values["mean_e2el_ms"],
        stage_busy_ms=tuple(statistics.median(column) for column in zip(*busy, strict=True)) if busy else (),
        throughputs=tuple(statistics.median(metrics.throughputs(run.measurement)) for run in runs),
    )


def _read_prompts(path: Path, count: int) -> list[str | list[int]]:
    """The prompts that the fleet has accepted already."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line["prompt"] if "prompt" in line else line["prompt_token_ids"] for line in lines[:count]]


def _output_line(prompt: str | Sequence[int], row: GenerationResult) -> str:
    given: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {}
    values = {
        **given,
        "prompt_token_ids": list(row.prompt_token_ids),
        "text": row.text,
        "token_ids": list(row.token_ids),
        "ttft_ms": round(row.ttft_s * 1e3, 3),
        "e2el_ms": round(row.e2el_s * 1e3, 3),
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def _score_line(text: str | Sequence[int], row: ScoreResult) -> str:
    given: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {}
    values = {**given, "prompt_token_ids": list(row.token_ids), "logprobs": list(row.logprobs)}
    return json.dumps(values, ensure_ascii=False) + "\n"
