"""From settings to cases: both sides of every config, under one workload, and what is compared of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.errors import ConfigError
from bench.metrics import metric_names
from bench.spec import Plan, device_kind
from tuner.config import TuneConfig
from tuner.differences import differences
from tuner.gate.values import Case, GateConfig, Side, SideName, Tolerance


@dataclass(frozen=True, kw_only=True)
class SideRequest:
    """One side as it was asked for, its settings resolved."""

    config: TuneConfig
    plan: Plan
    python: str | None = None
    ref: str | None = None
    env: Mapping[str, str] | None = None

    def side(self, name: SideName) -> Side:
        """As a value."""
        return Side(
            name=name,
            model=self.config.model,
            plan=self.plan,
            devices=self.config.concrete_devices,
            python=self.python,
            ref=self.ref,
            env=dict(self.env or {}),
        )


def case_of(name: str, baseline: SideRequest, candidate: SideRequest) -> Case:
    """One case.

    Raises:
        ConfigError: the sides would not do the same work, or a metric that this work does not yield.
    """
    for section in ("workload", "protocol"):
        lines = differences(getattr(baseline.config, section), getattr(candidate.config, section))
        if lines:
            raise ConfigError(
                f"{name}: the two sides were given different work ({section}: {'; '.join(lines)}); "
                "say which by --config or by flags, which hold for both"
            )
    config = baseline.config
    return Case(
        name=name,
        workload=config.workload,
        protocol=config.protocol,
        baseline=baseline.side("baseline"),
        candidate=candidate.side("candidate"),
        metrics=_metrics(name, config),
        noise_floor=config.gate.noise_floor,
    )


def parse_env(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` of each.

    Raises:
        ConfigError: one is not of that form, or a key is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} {text!r}: write KEY=VALUE, as in {flag} NCCL_ALGO=Ring")
        if key in found:
            raise ConfigError(f"{flag} {text!r}: {key} is given twice; keep one")
        found[key] = value
    return found


def _metrics(name: str, config: TuneConfig) -> dict[str, Tolerance]:
    workload = config.workload
    gpu = any(device_kind(device) == "cuda" for device in config.concrete_devices)
    yielded = metric_names(workload.num_prompts, workload.generated_len, gpu=gpu)
    wanted = config.gate.metrics
    missing = [metric for metric in wanted if metric not in yielded]
    if not missing:
        return dict(wanted)
    if wanted != GateConfig().metrics:
        raise ConfigError(
            f"gate.metrics: {missing[0]} is not measured in {name}; there are: {', '.join(sorted(yielded))}"
        )
    kept = {metric: tolerance for metric, tolerance in wanted.items() if metric in yielded}
    return kept if "output_throughput" in kept else {"total_token_throughput": Tolerance(), **kept}
