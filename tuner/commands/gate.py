"""What the flags of `gate` ask for: a gate that measures, one against a stored baseline, or one of two files."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from pipetune.bench.errors import ConfigError, explain
from pipetune.bench.fleet.fleet import warn_of_cores
from pipetune.bench.spec import Plan, hosts_of
from pipetune.tuner.commands.plan_request import PlanRequest
from pipetune.tuner.config import sources
from pipetune.tuner.config.gate import GateConfig, Tolerance, full_name
from pipetune.tuner.gate.cases import SideRequest, case_of, parse_env
from pipetune.tuner.gate.python_env import commit_of
from pipetune.tuner.gate.run import Gate
from pipetune.tuner.gate.runners import FreshProcesses, RunningFleet, SideRunner
from pipetune.tuner.gate.stored.run import compare_files, compare_stored, nothing_stored
from pipetune.tuner.gate.values import GateResult, Side, SideName
from pipetune.tuner.progress import Reporter
from pipetune.tuner.study.files import StudyFile, read_config
from pipetune.tuner.study.plan_file import PLAN_FILE, read_plan

Job = Callable[[Reporter], GateResult]
_OF_PAIRS = ("rounds_in_process", "order_seed")


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """The flags as they were given."""

    params: Mapping[str, Any]
    warn: Callable[[str], None]
    """Told of each thing that a user should look at."""
    config: tuple[Path, ...] = ()
    baseline_plan: Path | None = None
    candidate_plan: Path | None = None
    baseline_dtype: str | None = None
    candidate_dtype: str | None = None
    baseline_python: str | None = None
    candidate_python: str | None = None
    baseline_engine_python: str | None = None
    candidate_engine_python: str | None = None
    baseline_ref: str | None = None
    baseline_env: tuple[str, ...] = ()
    candidate_env: tuple[str, ...] = ()
    stored: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()
    metric: tuple[str, ...] = ()
    margin: float | None = None
    max_minutes: float | None = None
    rounds_in_process: bool = False
    order_seed: int | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any], *, warn: Callable[[str], None]) -> Self:
        """A request from the command's parameters, by their names; what was not given stays at its default."""
        own = {field.name: params[field.name] for field in fields(cls) if params.get(field.name) is not None}
        own = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in own.items()}
        return cls(params=params, warn=warn, **own)

    def job(self) -> Job:
        """What there is to do, checked as far as it can be before anything runs.
        UserError: flags that do not go together, files that cannot be read, settings that do not fit."""
        if self.files:
            return self._of_files()
        if self.stored:
            return self._stored()
        baseline = self._measured_plan()
        if self.baseline_ref is not None and self.baseline_python is not None:
            raise ConfigError("--baseline-ref and --baseline-python: give one; a revision brings its own environment")
        cases = tuple(
            case_of(
                config.stem if config is not None else "default",
                self._side("baseline", baseline, config),
                self._side("candidate", self.candidate_plan or baseline, config),
            )
            for config in self._configs()
        )
        runner: SideRunner = RunningFleet(cases) if self.rounds_in_process else FreshProcesses(cases)
        # Every night has an order of its own, unless a seed is given: a fixed one would repeat its luck.
        seed = secrets.randbelow(2**31) if self.order_seed is None else self.order_seed
        return Gate(cases=cases, runner=runner, seed=seed, max_minutes=self.max_minutes).run

    def shown(self) -> str:
        """All settings of each case, with their sources, as YAML; those of the baseline, where sides differ. Raises as
        `job`."""
        plan = self.candidate_plan or self._stored_plan() if self.stored else self._measured_plan()
        if plan is None:
            raise ConfigError(f"--stored {self.stored[0]}: no plan of it has a rank; name one by --candidate-plan FILE")
        name: SideName = "candidate" if self.stored else "baseline"
        return "---\n".join(sources.show(self._settings(name, plan, config)) for config in self._configs())

    def _measured_plan(self) -> Path:
        if self.baseline_plan is None:
            raise ConfigError(
                "which plans? Give --baseline-plan FILE, and --candidate-plan FILE where it is another; "
                "or --stored STUDY; or two files of pytest-benchmark"
            )
        return self.baseline_plan

    def _of_files(self) -> Job:
        given = self._given("stored", *self._of("candidate"), "max_minutes", *self._of("baseline"), *_OF_PAIRS)
        given += [sources.settings()[name].option for name in sources.given(self.params) if name != "output_dir"]
        if len(self.files) < 2 or given:
            raise ConfigError(
                "files of pytest-benchmark are compared alone: one or more of the baseline, then the candidate's; "
                f"given are {' '.join(map(str, self.files))}{' and ' if given else ''}{', '.join(given)}"
            )
        gate = GateConfig()
        if (config := self._one_config()) is not None:
            # What ran is said by the files.
            unused: sources.Below = ({("model", "name"): "that of the files"}, "the files")
            gate = sources.resolve_settings({"config": config}, below=unused, warn=self.warn).config.gate
        gate = self._gate_config(gate)
        *baselines, candidate = self.files
        return lambda reporter: compare_files(baselines, candidate, gate)

    def _stored(self) -> Job:
        if given := self._given(*self._of("baseline"), *_OF_PAIRS):
            raise ConfigError(f"--stored and {given[0]}: the baseline is stored, and does not run; leave one out")
        config = self._one_config()
        plan = self.candidate_plan or self._stored_plan()
        if plan is None:
            return lambda reporter: nothing_stored(self.stored[0], self._gate_config(GateConfig()))
        candidate = self._side("candidate", plan, config)
        if hosts_of(candidate.side.devices) != ("",):
            raise ConfigError("--stored: runs on one host; compare plans over several by --baseline-plan FILE")
        other_dtype = self.candidate_dtype is not None
        return lambda reporter: compare_stored(
            self.stored, candidate, reporter, other_dtype=other_dtype, max_minutes=self.max_minutes
        )

    def _of(self, side: SideName) -> list[str]:
        return [field.name for field in fields(self) if field.name.startswith(f"{side}_")]

    def _given(self, *names: str) -> list[str]:
        """Those of the flags that are not at their defaults."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != getattr(GateRequest, name)]

    def _stored_plan(self) -> Path | None:
        """The best plan of the stored study: what else runs it now; None where a study has none."""
        plan = self.stored[0] / PLAN_FILE
        if plan.is_file():
            return plan
        if (self.stored[0] / StudyFile.CONFIG).is_file():
            return None
        raise ConfigError(
            f"--stored {self.stored[0]}: is no study with a {PLAN_FILE}; name a plan by --candidate-plan FILE"
        )

    def _one_config(self) -> Path | None:
        if len(self.config) > 1:
            raise ConfigError(f"one case at a time where a side is stored; given are {len(self.config)} configs")
        return next(iter(self.config), None)

    def _configs(self) -> tuple[Path | None, ...]:
        names = [path.stem for path in self.config]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"--config: two files are called {doubled[0]}; a case is named after its file, rename one"
            )
        return self.config or (None,)

    def _side(self, name: SideName, plan: Path, config: Path | None) -> SideRequest:
        resolved = self._settings(name, plan, config).config
        ref = self.baseline_ref if name == "baseline" else None
        warn_of_cores(resolved.concrete_devices)
        settings = resolved.model_copy(update={"gate": self._gate_config(resolved.gate)})
        side = Side(
            name=name,
            model=resolved.model,
            plan=(own := read_plan(plan).plan),
            devices=resolved.concrete_devices,
            engine_python=self._engine_python(name, own),
            python=self.baseline_python if name == "baseline" else self.candidate_python,
            ref=ref,
            revision=commit_of(ref) if ref is not None else None,
            env=parse_env(f"--{name}-env", self.baseline_env if name == "baseline" else self.candidate_env),
        )
        return SideRequest(side, settings)

    def _engine_python(self, name: SideName, plan: Plan) -> str | None:
        """The Python of a side's engine; where both sides' plans are an engine's, the baseline's serves for both."""
        flag, given = f"--{name}-engine-python", getattr(self, f"{name}_engine_python")
        if given is not None and plan.engine is None:
            raise ConfigError(f"{flag} {given}: the {name}'s plan has no engine; give it engine: {{name: vllm}}")
        found: str | None = given or self.baseline_engine_python
        if plan.engine is not None and found is None:
            raise ConfigError(f"{name}: {plan.engine.name} is to run {plan.describe()}; name its Python by {flag}")
        return found if plan.engine is not None else None

    def _settings(self, name: SideName, plan: Path, config: Path | None) -> sources.Resolved:
        below, below_name = PlanRequest(source=str(plan), plan_file=read_plan(plan)).settings_below()
        if self.stored and (self.stored[0] / StudyFile.CONFIG).is_file():
            protocol = read_config(self.stored[0]).protocol.model_dump(mode="json")
            below = {**below, **{("protocol", key): value for key, value in protocol.items()}}
        dtype = self.baseline_dtype if name == "baseline" else self.candidate_dtype
        return sources.resolve_settings(
            {**self.params, "config": config, "dtype": dtype, "output_dir": None},
            below=(below, below_name),
            reads_trace=True,
            warn=self.warn,
        )

    def _gate_config(self, config: GateConfig) -> GateConfig:
        """The section of the config, with what flags say instead."""
        metrics = dict(config.metrics)
        try:
            if self.metric:
                metrics = {full_name(name): metrics.get(full_name(name), Tolerance()) for name in self.metric}
            if self.margin is not None:
                metrics = {
                    name: Tolerance(margin=self.margin, least_effect=min(tolerance.least_effect, self.margin))
                    for name, tolerance in metrics.items()
                }
        except ValidationError as error:
            raise ConfigError(f"--margin {self.margin}: {explain(error).removeprefix('margin: ')}") from None
        except ValueError as error:
            raise ConfigError(f"--metric: {error}") from None
        return config.model_copy(update={"metrics": metrics})
