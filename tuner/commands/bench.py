"""`bench`'s work: one plan measured, compared with the un-pipelined model, or used to generate."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipetune.bench import metrics
from pipetune.bench.engines.sglang import ENGINES
from pipetune.bench.files import scratch_folder
from pipetune.bench.fleet.experiment import Experiment, Labels
from pipetune.bench.prompts.file import read_requests
from pipetune.bench.record import Failure, Measurement, Outcome, Record
from pipetune.bench.spec import EffectivePlan, Plan, Protocol, RunSpec, Value
from pipetune.tuner.commands.plan_request import PlanRequest
from pipetune.tuner.config.schema import GENERATE_OBJECTIVE, SCORE_OBJECTIVE, TuneConfig
from pipetune.tuner.progress import Reporter, describe
from pipetune.tuner.ranking import finals
from pipetune.tuner.ranking.elimination import ALPHA, Fit, Gap
from pipetune.tuner.ranking.runs import BASELINE, Finals, PlanRun
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.report.wording import peer_name
from pipetune.tuner.search.driver import baseline_batch_sizes
from pipetune.tuner.study.files import refuse_existing


class Contender(Value):
    """One row of a comparison: levels over the rounds, and medians of what is no throughput."""

    name: str
    title: str
    throughput: float
    """Tokens put out in a second; where texts are scored, all tokens."""
    q1: float
    q3: float
    ratio: float
    """Throughput over the baseline's."""
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


@dataclass(kw_only=True)
class BenchResult:
    """What `bench` found, so far."""

    plan: Plan
    outcome: Outcome
    in_flight: int | None = None
    comparison: Comparison | None = None
    single_stage_missing: str | None = None
    """Why our single stage is not in the comparison."""
    sweep: list[tuple[float, Measurement]] = field(default_factory=list)
    """Requests a second, and what was measured at them."""
    records: Sequence[Record] = ()
    files: dict[Path, str] = field(default_factory=dict)
    """What was asked for, not written yet."""

    @property
    def spec(self) -> RunSpec | None:
        """What ran, with model and workload; None where nothing did."""
        return next((record.spec for record in self.records if record.spec), None)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A job: what to measure, how, and where results are to go."""

    config: TuneConfig
    request: PlanRequest
    output: Path | None = None
    save_outputs: Path | None = None
    ignore_eos: bool = False
    rounds: int = 0
    """Rounds of the comparison with the un-pipelined model; 0 leaves it out."""
    rates: tuple[float, ...] = ()
    """Requests a second that are measured one after the other; the workload has the first."""
    engine_python: Path | None = None
    """Python of the environment whose engine runs the plan; None: our own runtime does."""

    def run(self, reporter: Reporter) -> BenchResult:
        """Starts a fleet and measures.
        UserError: a model, plan, prompts or file that cannot be used. FleetError: the workers failed."""
        for path in (self.output, self.save_outputs):
            refuse_existing(path)
        with reporter, scratch_folder() as folder:
            reporter.begin(f"starting {len(self.config.concrete_devices)} workers")
            with Experiment.start(
                self.config.model,
                self.config.concrete_devices,
                start_fleet=partial(ENGINES[self.request.engine_name], python=self.engine_python)
                if self.engine_python is not None
                else None,
                hang_timeout_s=self.config.protocol.hang_timeout_s,
                on_progress=reporter.fleet,
            ) as experiment:
                shape = experiment.fleet.shape
                reporter.end(f"{shape.architecture}, {shape.num_layers} layers")
                result = _Work(self, experiment, reporter).run(folder / "reference.safetensors")
        if self.output is not None:
            result.files[self.output] = "".join(f"{record.model_dump_json()}\n" for record in result.records)
        return result


@dataclass
class _Work:
    """A job on its fleet."""

    job: Bench
    experiment: Experiment[Any]
    reporter: Reporter
    records: list[Record] = field(default_factory=list)
    most_records: int = 0
    """Records that a comparison has at most."""

    def run(self, reference: Path) -> BenchResult:
        config, fleet = self.job.config, self.experiment.fleet
        fleet.prompts(config.workload, as_text=self.job.save_outputs is not None)
        plan = self.job.request.complete(fleet.shape, fleet.devices, config.workload.num_prompts, config.device_names)
        if isinstance(effective := fleet.resolve(plan, config.workload), Failure):
            return BenchResult(plan=plan, outcome=effective)
        if config.protocol.check_outputs:
            self.reporter.begin("reference: what the unsplit model says")
            missing = self.experiment.make_reference(reference, config.workload, config.protocol)
            self.reporter.end(
                f"{missing.message}; the output goes unchecked" if missing is not None else "kept for the check"
            )
        # In a comparison the rounds repeat the plan: one repetition is enough for the check.
        protocol = config.protocol.model_copy(update={"num_iters": 1}) if self.job.rounds else config.protocol
        found = BenchResult(
            plan=plan,
            outcome=self._measure(f"measuring {plan.describe()}", effective, protocol),
            in_flight=effective.in_flight,
            records=self.records,
        )
        for rate in self.job.rates:
            if found.sweep:
                found.outcome = self._measure(f"measuring at {rate:g} requests/s", effective, protocol, rate=rate)
            if isinstance(found.outcome, Failure):
                break
            found.sweep.append((rate, found.outcome))
        if isinstance(found.outcome, Measurement) and self.job.rounds:
            self._compare(found, effective)
        if isinstance(found.outcome, Measurement) and self.job.save_outputs is not None:
            found.files[self.job.save_outputs] = self._outputs(effective)
        return found

    def _measure(
        self,
        label: str,
        what: EffectivePlan | int,
        protocol: Protocol,
        due: finals.Due | None = None,
        rate: float | None = None,
    ) -> Outcome:
        """Runs a plan, or the un-pipelined model at a batch size; for a round of the comparison, if one is due, and at
        another rate than the workload's, if one is given."""
        self.reporter.begin(label)
        labels: Labels = {"number": len(self.records)}
        if due is not None:
            labels |= {"role": "finalist", "round": due.round}
        workload = self.job.config.workload
        if rate is not None and workload.arrivals is not None:
            arrivals = workload.arrivals.model_copy(update={"request_rate": rate, "slo_attainment": None})
            workload = workload.model_copy(update={"arrivals": arrivals})
        if isinstance(what, EffectivePlan):
            record = self.experiment.measure(what.plan, workload, protocol, resolved=what, **labels)
        else:
            record = self.experiment.baseline(what, workload, protocol, **labels)
        self.records.append(record)
        self.reporter.end(describe(record.result, ()))
        if self.most_records:
            self.reporter.course(len(self.records), max(0, self.most_records - len(self.records)))
        return record.result

    def _compare(self, found: BenchResult, effective: EffectivePlan) -> None:
        """A finals of the plan, our single stage, and the un-pipelined model at its best batch size. All take part in
        every round; the first failure ends it."""
        config, fleet, rounds = self.job.config, self.experiment.fleet, self.job.rounds
        once = finals.side_by_side(config.protocol)
        sizes = baseline_batch_sizes(config.baseline_batch_sizes, config.workload.num_prompts)
        self.most_records = 1 + len(sizes) + 3 * rounds
        if isinstance(batch_size := self._best_batch_size(sizes, once), Failure):
            found.outcome = batch_size
            return
        plan = effective.plan
        switches = {name: getattr(plan, name) for name in ("compile", "cuda_graphs", "packed_weights")}
        whole = Plan.from_layer_counts((fleet.shape.num_layers,), fleet.devices, batch_size).model_copy(update=switches)
        single = fleet.resolve(whole, config.workload)
        peer = peer_name(config.workload)
        titles = {BASELINE: ("baseline", f"un-pipelined Hugging Face {peer}, batch size {batch_size}")}
        plans = [effective]
        if isinstance(single, EffectivePlan) and single.key != effective.key:
            plans.insert(0, single)
            titles[single.key] = "single stage", f"our runtime on {fleet.devices[0]} alone, {whole.describe()}"
        titles[effective.key] = "plan", f"{plan.describe()} · on {', '.join(plan.devices)}"
        found.single_stage_missing = single.message if isinstance(single, Failure) else None
        finalists = finals.Finalists(plans=tuple(plans), baseline_batch_size=batch_size)
        objective = Objective(metric=SCORE_OBJECTIVE if config.workload.kind == "score" else GENERATE_OBJECTIVE)
        while True:
            due = finals.next_step(
                self.records, finalists, objectives=(objective,), min_rounds=rounds, max_rounds=rounds, seed=config.seed
            )
            if isinstance(due, str):
                found.comparison = comparison_of(self.records, titles, objective)
                return
            label = f"round {due.shown_round + 1} of {rounds} · {titles[due.name][0]}"
            what = batch_size if due.name == BASELINE else finalists.plan(due.name)
            outcome = self._measure(label, what, once, due)
            if isinstance(outcome, Failure):
                found.outcome = outcome
                return

    def _best_batch_size(self, sizes: Sequence[int], once: Protocol) -> int | Failure:
        if len(sizes) == 1:
            return sizes[0]
        outcomes = [self._measure(f"baseline: un-pipelined, batch size {size}", size, once) for size in sizes]
        pairs = zip(outcomes, sizes, strict=True)
        found = [(one.iterations[0].duration_s, size) for one, size in pairs if isinstance(one, Measurement)]
        failures = (outcome for outcome in reversed(outcomes) if isinstance(outcome, Failure))
        return min(found)[1] if found else next(failures)

    def _outputs(self, effective: EffectivePlan) -> str:
        workload = self.job.config.workload
        prompts = self.experiment.fleet.prompts(workload)
        texts: Sequence[object] = prompts
        if workload.prompts_file is not None:
            texts = [request.prompt for _, request in read_requests(workload.prompts_file)]
        rows: list[dict[str, Any]]
        if workload.kind == "score":
            self.reporter.begin(f"scoring {len(prompts)} texts")
            scored = self.experiment.fleet.score(effective.plan, prompts, in_flight=effective.in_flight)
            rows = [{"prompt_token_ids": row.token_ids, "logprobs": row.logprobs} for row in scored]
        else:
            self.reporter.begin(f"generating for {len(prompts)} prompts")
            results = self.experiment.fleet.generate(
                effective.plan,
                prompts,
                max_new_tokens=workload.generated_lens,
                in_flight=effective.in_flight,
                ignore_eos=self.job.ignore_eos,
                sampling=workload.sampling,
            )
            rows = [
                {
                    "prompt_token_ids": row.prompt_token_ids,
                    "text": row.text,
                    "token_ids": row.token_ids,
                    "ttft_ms": round(row.ttft_s * 1e3, 3),
                    "e2el_ms": round(row.e2el_s * 1e3, 3),
                }
                for row in results
            ]
        pairs = zip(texts, rows, strict=False)
        lines = [{"prompt": text, **row} if isinstance(text, str) else row for text, row in pairs]
        self.reporter.end(f"{len(lines)} of them")
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def comparison_of(records: Sequence[Record], titles: Mapping[str, tuple[str, str]], objective: Objective) -> Comparison:
    """Levels and ratios of a finals without failures, the objective a throughput; `titles` holds name and title of each
    row by its key in the finals, the baseline's first."""
    found = Finals([PlanRun(record) for record in records], objective)
    fit = Fit(found.cells)
    return Comparison(
        rounds=found.rounds[BASELINE],
        contenders=tuple(_contender(*titles[name], found, name, fit.gap(BASELINE, name)) for name in titles),
    )


def _contender(name: str, title: str, found: Finals, key: str, gap: Gap | None) -> Contender:
    """A row; `gap` is how far the baseline is behind it."""
    runs, values, spread = found.runs(key), found.values(key), found.spread(key, found.objective.metric)
    assert gap is not None, "all of them run in every round"
    assert spread is not None, "the objective is a throughput"
    busy = [row["stage_busy_ms"] for run in runs if (row := metrics.stage_metrics(run.measurement))]
    ratio = gap.ratio(ALPHA / 2)
    return Contender(
        name=name,
        title=title,
        throughput=spread.median,
        q1=spread.q1,
        q3=spread.q3,
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        bubble_ratio=values.get("bubble_ratio"),
        mean_ttft_ms=values.get("mean_ttft_ms"),
        mean_e2el_ms=values["mean_e2el_ms"],
        stage_busy_ms=tuple(statistics.median(column) for column in zip(*busy, strict=True)) if busy else (),
        throughputs=tuple(statistics.median(metrics.throughputs(run.measurement)) for run in runs),
    )
