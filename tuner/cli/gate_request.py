"""What the flags of `gate` ask for: a gate that measures, one against a stored baseline, or one of two files."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import ConfigError
from tuner.cli import common
from tuner.config import TuneConfig
from tuner.export import PLAN_FILE, PlanFile, read_plan
from tuner.gate.cases import SideRequest, case_of, parse_env
from tuner.gate.contenders import FreshProcesses, RunningFleet
from tuner.gate.session import Gate
from tuner.gate.values import Case, GateConfig, GateResult, SideName, Tolerance, full_name
from tuner.plan_request import PlanRequest
from tuner.progress import Reporter

Job = Callable[[Reporter], GateResult]


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """The flags as they were given."""

    params: Mapping[str, Any]
    configs: tuple[Path, ...]
    baseline_plan: Path | None
    candidate_plan: Path | None
    baseline_dtype: str | None
    candidate_dtype: str | None
    baseline_python: str | None
    candidate_python: str | None
    baseline_ref: str | None
    baseline_env: tuple[str, ...]
    candidate_env: tuple[str, ...]
    stored: tuple[Path, ...]
    files: tuple[Path, ...]
    metrics: tuple[str, ...]
    margin: float | None
    max_minutes: float | None
    rounds_in_process: bool
    order_seed: int | None

    def job(self) -> Job:
        """What there is to do, checked as far as it can be before anything runs.

        Raises:
            UserError: flags that do not go together, files that cannot be read, settings that do not fit.
        """
        if self.files:
            return self._of_files()
        if self.stored:
            return self._stored()
        if self.baseline_plan is None:
            raise ConfigError(
                "which plans? Give --baseline-plan FILE, and --candidate-plan FILE where it is another; "
                "or --stored STUDY; or two files of pytest-benchmark"
            )
        if self.baseline_ref is not None and self.baseline_python is not None:
            raise ConfigError("--baseline-ref and --baseline-python: give one; a revision brings its own environment")
        cases = tuple(self._case(config) for config in self._configs())
        contenders = (RunningFleet if self.rounds_in_process else FreshProcesses)(cases)
        seed = self._order_seed()
        return Gate(cases=cases, contenders=contenders, seed=seed, max_minutes=self.max_minutes).run

    def _of_files(self) -> Job:
        from tuner.gate.stored import compare_files

        others = [self.baseline_plan, self.candidate_plan, *self.stored, self.baseline_ref]
        if len(self.files) != 2 or any(other is not None for other in others):
            raise ConfigError(
                "two files of pytest-benchmark, the baseline's and the candidate's, are compared by themselves; "
                f"given are {len(self.files)} files, and {sum(other is not None for other in others)} other sides"
            )
        gate = self._gate_config(GateConfig())
        return lambda reporter: compare_files(self.files[0], self.files[1], gate)

    def _stored(self) -> Job:
        from tuner.gate.stored import StoredGate

        used = {
            "--baseline-plan": self.baseline_plan,
            "--baseline-dtype": self.baseline_dtype,
            "--baseline-python": self.baseline_python,
            "--baseline-ref": self.baseline_ref,
            "--baseline-env": self.baseline_env or None,
            "--rounds-in-process": self.rounds_in_process or None,
        }
        given = [flag for flag, value in used.items() if value is not None]
        if given:
            raise ConfigError(f"--stored and {given[0]}: the baseline is stored, and does not run; leave one out")
        (config,) = self._configs() if len(self.configs) < 2 else (self._several(),)
        side = self._side("candidate", self.candidate_plan or self._stored_plan(), config)
        return StoredGate(stored=self.stored, candidate=side, max_minutes=self.max_minutes).run

    def _stored_plan(self) -> Path:
        """The best plan of the stored study: what else runs it now."""
        plan = self.stored[0] / PLAN_FILE
        if not plan.is_file():
            raise ConfigError(f"--stored {self.stored[0]}: holds no {PLAN_FILE}; name a plan by --candidate-plan FILE")
        return plan

    def _several(self) -> Path:
        raise ConfigError(f"--stored: one case at a time; given are {len(self.configs)} configs")

    def _configs(self) -> tuple[Path | None, ...]:
        names = [path.stem for path in self.configs]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError(f"--config: two files are called {doubled[0]}; a case is named after its file, rename one")
        return self.configs or (None,)

    def _case(self, config: Path | None) -> Case:
        plan = self.candidate_plan or self.baseline_plan
        return case_of(
            config.stem if config is not None else "default",
            self._side("baseline", self.baseline_plan, config),
            self._side("candidate", plan, config),
        )

    def _side(self, name: SideName, plan: Path | None, config: Path | None) -> SideRequest:
        assert plan is not None
        request = PlanRequest.of(
            plan=plan,
            device_map=None,
            layers=None,
            micro_batch_size=None,
            prefill_micro_batch_size=None,
            memory_fraction=None,
        )
        below, below_name = request.settings_below()
        dtype = self.baseline_dtype if name == "baseline" else self.candidate_dtype
        resolved = common.resolve_settings(
            {**self.params, "config": config, "dtype": dtype, "output_dir": None}, below=below, below_name=below_name
        )
        settings = resolved.config
        file: PlanFile = read_plan(plan)
        update = {"gate": self._gate_config(settings.gate)}
        side: TuneConfig = settings.model_copy(update=update)
        return SideRequest(
            config=side,
            plan=file.plan,
            python=self.baseline_python if name == "baseline" else self.candidate_python,
            ref=self.baseline_ref if name == "baseline" else None,
            env=parse_env(f"--{name}-env", self.baseline_env if name == "baseline" else self.candidate_env),
        )

    def _gate_config(self, config: GateConfig) -> GateConfig:
        """With what flags say instead.

        Raises:
            ConfigError: a metric or a margin that cannot be.
        """
        metrics = dict(config.metrics)
        try:
            if self.metrics:
                metrics = {full_name(name): metrics.get(full_name(name), Tolerance()) for name in self.metrics}
            if self.margin is not None:
                metrics = {
                    name: Tolerance(margin=self.margin, least_effect=min(tolerance.least_effect, self.margin))
                    for name, tolerance in metrics.items()
                }
        except ValueError as error:
            raise ConfigError(f"--metric, --margin: {error}") from None
        return config.model_copy(update={"metrics": metrics})

    def _order_seed(self) -> int:
        """New lots every night, unless they are given: a fixed order would repeat its luck."""
        return secrets.randbelow(2**31) if self.order_seed is None else self.order_seed
