"""From settings to cases: both sides of every config, under one workload, and what is compared of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipetune.bench.errors import ConfigError
from pipetune.bench.metrics import metrics_of_workload
from pipetune.bench.spec import Workload, device_kind
from pipetune.tuner.config.gate import GateConfig, Tolerance
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.config.sources import differences, settings
from pipetune.tuner.gate.values import Case, Side


@dataclass(frozen=True)
class SideRequest:
    """One side as it was asked for, and its settings, resolved."""

    side: Side
    config: TuneConfig


def case_of(name: str, baseline: SideRequest, candidate: SideRequest) -> Case:
    """One case. ConfigError: the sides would not do the same work, or a metric that this work does not yield."""
    lines = [
        *differences(_identity(baseline.config.workload), _identity(candidate.config.workload)),
        *differences(baseline.config.protocol, candidate.config.protocol),
    ]
    if lines:
        raise ConfigError(
            f"{name}: the two sides were given different work ({'; '.join(lines)}); say which by --config or by flags, "
            "which hold for both"
        )
    config = baseline.config
    for side in (baseline.side, candidate.side):
        left = list(side.devices)
        for device in side.plan.devices:
            if device not in left:
                raise ConfigError(
                    f"{name}: the plan {side.plan.describe()} wants {device}, and the devices are "
                    f"{', '.join(side.devices)}; give others by --devices, or another plan"
                )
            left.remove(device)
    gpu = any(device_kind(device) == "cuda" for device in baseline.side.devices)
    return Case(
        name=name,
        workload=config.workload,
        protocol=config.protocol,
        baseline=baseline.side,
        candidate=candidate.side,
        metrics=metrics_of(name, config.gate, config.workload, gpu=gpu, engine=baseline.side.plan.engine is not None),
        noise_floor=config.gate.noise_floor,
    )


def parse_env(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` of each. ConfigError: one is not of that form, or a key is given twice."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} {text!r}: write KEY=VALUE, as in {flag} NCCL_ALGO=Ring")
        if key in found:
            raise ConfigError(f"{flag} {text!r}: {key} is given twice; keep one")
        if any(key == setting.variable for setting in settings().values()):
            raise ConfigError(
                f"{flag} {text!r}: it sets what both sides are to do alike; give it by a flag or a config"
            )
        found[key] = value
    return found


def metrics_of(
    name: str, gate: GateConfig, workload: Workload, *, gpu: bool, engine: bool = False
) -> dict[str, Tolerance]:
    """What a gate compares of a case.
    ConfigError: a metric is asked for by name that such a workload does not yield."""
    yielded = metrics_of_workload(workload, gpu=gpu, engine=engine)
    wanted = gate.metrics
    if not (missing := [metric for metric in wanted if metric not in yielded]):
        return dict(wanted)
    if tuple(wanted) != tuple(GateConfig().metrics):
        raise ConfigError(
            f"gate.metrics: {missing[0]} is not measured in {name}; there are: {', '.join(sorted(yielded))}"
        )
    kept = {metric: tolerance for metric, tolerance in wanted.items() if metric in yielded}
    return kept if "output_throughput" in kept else {"total_token_throughput": wanted["output_throughput"], **kept}


def _identity(workload: Workload) -> Workload:
    """Two copies of one prompts file, each beside its plan, are the same prompts."""
    return workload.model_copy(update={"prompts_file": None}) if workload.prompts_sha256 is not None else workload
