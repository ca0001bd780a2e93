"""`bench`'s work: one plan measured, compared with the un-pipelined model, or used to generate."""

from __future__ import annotations

import datetime as dt
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipetune.bench.errors import ConfigError, FleetError, ModelError
from pipetune.bench.memory import resolve
from pipetune.bench.record import Failure, FailureKind, Measurement, Outcome, Record
from pipetune.bench.spec import EffectivePlan, Plan, Protocol, RunSpec
from pipetune.tuner.commands.comparison import Comparison, compare, run_rounds
from pipetune.tuner.commands.plan_request import PlanRequest
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.progress import Reporter, describe
from pipetune.tuner.ranking import finals
from pipetune.tuner.report.wording import peer_name
from pipetune.tuner.search.driver import baseline_batch_sizes
from pipetune.tuner.study import locks

if TYPE_CHECKING:
    from pipetune.bench.fleet.fleet import Fleet, GenerationResult, ScoreResult


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
    """Of the comparison with the un-pipelined model; 0 leaves it out."""

    def run(self, reporter: Reporter) -> BenchResult:
        """Starts a fleet, measures, and writes the files that were asked for.

        Raises:
            UserError: a model, plan, prompts or file that cannot be used.
            FleetError: the workers failed.
        """
        from pipetune.bench.fleet.fleet import Fleet

        for path in (self.output, self.save_outputs):
            refuse_existing(path)
        with reporter:
            reporter.begin(f"starting {len(self.config.concrete_devices)} workers")
            with Fleet.start(
                self.config.model,
                self.config.concrete_devices,
                hang_timeout_s=self.config.protocol.hang_timeout_s,
                on_progress=reporter.fleet,
            ) as fleet:
                reporter.end(f"{fleet.shape.architecture}, {fleet.shape.num_layers} layers")
                with (
                    locks.hold_gpus(fleet.devices, fleet.machine.hardware.gpus),
                    tempfile.TemporaryDirectory(prefix="pipetune-") as folder,
                ):
                    result = _Session(self, fleet, reporter, Path(folder) / "reference.safetensors").run()
        if self.output is not None:
            write_new(self.output, "".join(f"{record.model_dump_json()}\n" for record in result.records))
        return result


@dataclass
class _Session:
    """A job on its fleet."""

    job: Bench
    fleet: Fleet
    reporter: Reporter
    reference: Path
    records: list[Record] = field(default_factory=list)

    def run(self) -> BenchResult:
        config, fleet = self.job.config, self.fleet
        plan = self.job.request.complete(fleet.shape, fleet.devices, config.workload.num_prompts)
        lens = fleet.prompt_lens(config.workload)
        effective = self._resolve(plan, lens)
        if isinstance(effective, Failure):
            return BenchResult(plan=plan, outcome=effective)
        if config.protocol.check_outputs:
            self._make_reference()
        outcome = self._measure(f"measuring {plan.describe()}", effective, self._protocol())
        comparison, missing = None, None
        if isinstance(outcome, Measurement) and self.job.rounds:
            compared, missing = self._compare(effective, lens)
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
            single_stage_missing=missing,
            records=tuple(self.records),
        )

    def _protocol(self) -> Protocol:
        """In a comparison the rounds repeat the plan: one repetition is enough for the check."""
        protocol = self.job.config.protocol
        return protocol.model_copy(update={"num_iters": 1}) if self.job.rounds else protocol

    def _resolve(self, plan: Plan, lens: Sequence[int]) -> EffectivePlan | Failure:
        workload = self.job.config.workload
        return resolve(
            self.fleet.shape,
            plan,
            num_prompts=workload.num_prompts,
            prompt_len=max(lens),
            output_len=workload.generated_len,
            device_bytes=self.fleet.device_bytes,
        )

    def _make_reference(self) -> None:
        self.reporter.begin("reference: what the unsplit model says")
        failure = self.fleet.make_reference(self.reference, self.job.config.workload, self.job.config.protocol)
        if failure is None:
            self.reporter.end("kept for the check")
        elif failure.kind == FailureKind.OUT_OF_MEMORY:
            self.reporter.end(f"{failure.message}; the output goes unchecked")
        elif failure.kind in (FailureKind.UNSUPPORTED_MODEL, FailureKind.WRONG_OUTPUT):
            raise ModelError(failure.message)
        else:
            raise FleetError(failure)

    def _measure(self, label: str, effective: EffectivePlan, protocol: Protocol) -> Outcome:
        self.reporter.begin(label)
        outcome = self._recorded(effective, protocol)
        self.reporter.end(describe(outcome, ()))
        return outcome

    def _recorded(self, effective: EffectivePlan, protocol: Protocol) -> Outcome:
        spec = RunSpec(
            model=self.fleet.model, workload=self.job.config.workload, plan=effective.plan, protocol=protocol
        )
        return self._record(lambda: self.fleet.measure(spec, effective), spec, effective)

    def _baseline(self, protocol: Protocol, batch_size: int) -> Outcome:
        return self._record(lambda: self.fleet.baseline(self.job.config.workload, protocol, batch_size), None, None)

    def _record(self, work: Callable[[], Outcome], spec: RunSpec | None, effective: EffectivePlan | None) -> Outcome:
        started_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        began = time.monotonic()
        outcome = work()
        self.records.append(
            Record(
                number=len(self.records),
                role="bench",
                spec=spec,
                effective=effective,
                hardware_id=self.fleet.machine.hardware_id,
                started_at=started_at,
                wall_s=round(time.monotonic() - began, 3),
                result=outcome,
            )
        )
        return outcome

    def _compare(self, effective: EffectivePlan, lens: Sequence[int]) -> tuple[Comparison | Failure, str | None]:
        """Rounds of the baseline at its best batch size, our single stage, and the plan."""
        once = finals.side_by_side(self.job.config.protocol)
        batch_size = self._best_batch_size(once)
        if isinstance(batch_size, Failure):
            return batch_size, None
        plan = effective.plan
        contenders: dict[str, Callable[[], Outcome]] = {"baseline": lambda: self._baseline(once, batch_size)}
        peer = peer_name(self.job.config.workload)
        titles = {"baseline": f"un-pipelined Hugging Face {peer}, batch size {batch_size}"}
        switches = {name: getattr(plan, name) for name in ("compile", "cuda_graphs", "packed_weights")}
        whole = Plan.from_layer_counts((self.fleet.shape.num_layers,), self.fleet.devices, batch_size)
        whole = whole.model_copy(update=switches)
        single = self._resolve(whole, lens)
        missing = single.message if isinstance(single, Failure) else None
        if isinstance(single, EffectivePlan) and single.key != effective.key:
            alone = single
            contenders["single stage"] = lambda: self._recorded(alone, once)
            titles["single stage"] = f"our runtime on {self.fleet.devices[0]} alone, {whole.describe()}"
        contenders["plan"] = lambda: self._recorded(effective, once)
        titles["plan"] = f"{plan.describe()} · on {', '.join(plan.devices)}"
        measured = run_rounds(contenders, rounds=self.job.rounds, seed=self.job.config.seed, reporter=self.reporter)
        return (measured if isinstance(measured, Failure) else compare(measured, titles)), missing

    def _best_batch_size(self, once: Protocol) -> int | Failure:
        config = self.job.config
        sizes = baseline_batch_sizes(config.baseline_batch_sizes, config.workload.num_prompts)
        if len(sizes) == 1:
            return sizes[0]
        found: list[tuple[float, int]] = []
        outcome: Outcome | None = None
        for size in sizes:
            self.reporter.begin(f"baseline: un-pipelined, batch size {size}")
            outcome = self._baseline(once, size)
            self.reporter.end(describe(outcome, ()))
            if isinstance(outcome, Measurement):
                found.append((outcome.iterations[0].duration_s, size))
        if found:
            return min(found)[1]
        assert isinstance(outcome, Failure)
        return outcome

    def _save_outputs(self, effective: EffectivePlan, path: Path) -> None:
        workload = self.job.config.workload
        prompts: Sequence[str | Sequence[int]] = self.fleet.prompts(workload)
        if workload.prompts_file is not None:
            prompts = _read_prompts(Path(workload.prompts_file), workload.num_prompts)
        if workload.kind == "score":
            self.reporter.begin(f"scoring {len(prompts)} texts")
            scored = self.fleet.score(effective.plan, prompts, in_flight=effective.in_flight)
            lines = [_score_line(text, row) for text, row in zip(prompts, scored, strict=True)]
        else:
            self.reporter.begin(f"generating for {len(prompts)} prompts")
            results = self.fleet.generate(
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


def refuse_existing(path: Path | None) -> None:
    """Files that a user names are never overwritten.

    Raises:
        ConfigError: the file is there, or its folder is not.
    """
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{path} exists; name a new file, or take it away first")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")


def write_new(path: Path, text: str) -> None:
    """Writes a new file.

    Raises:
        ConfigError: it is there already, or cannot be written.
    """
    refuse_existing(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


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
