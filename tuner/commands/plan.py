"""The best predicted plans, with what they come to stage by stage; nothing of them is run.

`find_plans` reads the model's shape with a single worker, which loads no weights, so that the devices planned for need
not be here. What tasks take on them comes from a profile, from devices described in a file, or from nominal rates, and
the result says from which.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import device_bytes
from pipetune.bench.memory import ModelShape, stage_bytes
from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.bench.profile import Profile
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, device_kind
from pipetune.tuner.config.schema import Constraint, TuneConfig
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.calibration.predictor import refit
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.described import DescribedDevices
from pipetune.tuner.planning.costs.profile_cache import find_profile, read_profile
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.planning.simulation.prediction import Prediction
from pipetune.tuner.progress import Reporter
from pipetune.tuner.search.space.build import build_space
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import candidates
from pipetune.tuner.study.plan_file import PlanFile, render

SourceKind = Literal["profile", "described", "nominal"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What predictions are made from."""

    kind: SourceKind
    text: str
    """For people: which profile, of when and where; which file; or that rates are nominal."""
    remedy: str | None = None
    """How to get a better one."""


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of a plan, as predicted."""

    replica: int
    device: str
    first_layer: int
    end_layer: int
    busy_s: float
    idle_share: float
    """Share of the plan's duration in which the stage computes nothing."""
    weights_bytes: int
    kv_bytes: int
    """Bytes of the KV cache over all micro-batches in flight."""
    activation_bytes: int
    total_bytes: int
    cap_bytes: int

    @property
    def cap_share(self) -> float:
        """Share of its memory cap that the stage is predicted to take."""
        return self.total_bytes / self.cap_bytes


@dataclass(frozen=True, kw_only=True)
class PlannedPlan:
    """One plan, as predicted."""

    effective: EffectivePlan
    prediction: Prediction
    metrics: dict[str, float]
    """By the names of `bench.metrics`, memory among them."""
    stages: tuple[PlannedStage, ...]
    broken: tuple[Constraint, ...]
    """Constraints that it is predicted to break."""

    @property
    def plan(self) -> Plan:
        """The plan without what was resolved of it."""
        return self.effective.plan

    @property
    def limiting(self) -> PlannedStage:
        """The stage that is busy longest: it sets the beat."""
        return self.stages[self.prediction.limiting_stage]

    @property
    def bottleneck_share(self) -> float:
        """Bound over duration: how near the plan is to what its own slowest stage allows."""
        return self.prediction.bound_s / self.prediction.duration_s


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a worker says of the model and the prompts."""

    model: ModelSpec
    """With its revision."""
    shape: ModelShape
    hardware_id: str
    prompt_lens: tuple[int, ...]
    device_bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What `pipetune plan` found."""

    config: TuneConfig
    known: Known
    source: Source
    num_partitions: int
    num_points: int
    num_candidates: int
    plans: tuple[PlannedPlan, ...]
    """Best first; those that break constraints come behind those that keep them."""
    notes: tuple[str, ...]

    def plan_file(self) -> PlanFile:
        """The best plan, marked as predicted."""
        best = self.plans[0]
        workload = self.config.workload
        if workload.prompts_file is not None:
            workload = workload.model_copy(update={"prompts_file": str(Path(workload.prompts_file).absolute())})
        return PlanFile(
            plan=best.plan,
            model=self.known.model,
            workload=workload,
            devices=self.config.concrete_devices,
            in_flight=best.effective.in_flight,
            predicted=best.metrics,
            predicted_from=self.source.text,
        )

    def write(self, path: Path) -> None:
        """Writes the best plan in the form that `bench --plan` reads.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, render(self.plan_file(), self.known.shape, "plan"))


def find_plans(
    config: TuneConfig,
    reporter: Reporter,
    *,
    described: DescribedDevices | None = None,
    profile_file: Path | None = None,
    observations: Sequence[Observation] = (),
    top: int = 10,
) -> Planned:
    """Plans without running any.

    Args:
        config: with its devices resolved; `profile` says whether this machine's cache of profiles is looked into.
        described: devices to plan for, where they come from a file.
        profile_file: a profile to take instead of the cached one.
        observations: runs that correct what tasks take.
        top: plans to keep.

    Raises:
        UserError: a model, prompts, bounds or a profile that cannot be used.
        NothingFeasibleError: no plan fits into memory.
    """
    reporter.begin(f"reading {config.model.name}")
    known = read_model(config, reporter, described)
    costs, source = _costs(config, known, described, profile_file)
    reporter.begin("predicting")
    resolve = Resolver.of_workload(known.shape, config.workload, known.prompt_lens, known.device_bytes)
    model = refit(CostModel.of_workload(known.shape, config.workload, known.prompt_lens, costs), observations)
    space = build_space(config.space, config.concrete_devices, known.shape, model, resolve)
    found = [candidate.effective for candidate in candidates(space, resolve)]
    predictions = model.predict_many([(effective.plan, effective.in_flight) for effective in found])
    prompt_len = max(known.prompt_lens)
    planned = [
        _planned(effective, prediction, known, config, prompt_len)
        for effective, prediction in zip(found, predictions, strict=True)
    ]
    return Planned(
        config=config,
        known=known,
        source=source,
        num_partitions=len(space.partitions),
        num_points=space.num_points,
        num_candidates=len(found),
        plans=rank(planned, config.objectives[0])[:top],
        notes=_notes(config, planned),
    )


def rank(plans: Sequence[PlannedPlan], objective: str) -> tuple[PlannedPlan, ...]:
    """Best first by a predicted metric, or by duration where it is not predicted; broken constraints go last."""
    sign = -1.0 if objective in HIGHER_IS_BETTER else 1.0

    def key(plan: PlannedPlan) -> tuple[float, float, float, str]:
        excess = sum(constraint.excess(plan.metrics[constraint.metric]) for constraint in plan.broken)
        value = plan.metrics.get(objective)
        seconds = plan.prediction.duration_s
        return excess, seconds if value is None else sign * value, seconds, plan.effective.key

    return tuple(sorted(plans, key=key))


def read_model(config: TuneConfig, reporter: Reporter, described: DescribedDevices | None) -> Known:
    """What a worker says of the model and the prompts.

    One on the CPU is enough, but for GPUs of this machine, whose free memory they alone know.
    """
    devices = config.concrete_devices
    on_gpus = described is None and any(device_kind(device) == "cuda" for device in devices)
    model = config.model
    if not on_gpus and model.attention.startswith("flash"):
        # Such kernels need a GPU; the shape is the same without them.
        model = model.model_copy(update={"attention": "auto"})
    workers = devices if on_gpus else ("cpu:0",)
    with Experiment.start(model, workers, exclusive=False, on_progress=reporter.fleet) as experiment:
        fleet, shape = experiment.fleet, experiment.fleet.shape
        if described is not None:
            sizes = described.device_bytes(devices)
            shape = shape.model_copy(update={"task_bytes": described.task_bytes or shape.task_bytes})
        else:
            sizes = dict(fleet.device_bytes) if on_gpus else device_bytes(devices)
        return Known(
            model=fleet.model.model_copy(update={"attention": config.model.attention}),
            shape=shape,
            hardware_id=fleet.machine.hardware_id,
            prompt_lens=fleet.prompt_lens(config.workload),
            device_bytes=sizes,
        )


def _costs(
    config: TuneConfig, known: Known, described: DescribedDevices | None, profile_file: Path | None
) -> tuple[Costs | None, Source]:
    if described is not None:
        about = f" ({described.about})" if described.about else ""
        text = f"devices described in {described.place}{about}"
        return described.costs(known.shape, scores=config.workload.kind == "score"), Source(kind="described", text=text)
    if (profile := _profile(config, known, profile_file)) is not None:
        machine = profile.machine
        text = f"the profile of {profile.measured_at} on {machine.hostname} (hardware {machine.hardware_id})" + (
            f", from {profile_file}" if profile_file is not None else ""
        )
        text += "".join(f"; doubtful: {disturbance}" for disturbance in profile.disturbances)
        return ProfiledCosts(profile), Source(kind="profile", text=text)
    return None, Source(
        kind="nominal",
        text="nominal rates, by the kind of device alone: the order of plans means more than their numbers",
        remedy=f"`pipetune profile {model_flags(config)}` times layers and links",
    )


def model_flags(config: TuneConfig) -> str:
    """What to give commands for this model and these devices."""
    model = config.model
    flags = f"--model {shlex.quote(model.name)} --devices {','.join(config.concrete_devices)}"
    for name in ("dtype", "storage_dtype", "load_format", "attention", "revision"):
        if (value := getattr(model, name)) != type(model).model_fields[name].default:
            flags += f" --{name.replace('_', '-')} {shlex.quote(value)}"
    return flags + " --trust-remote-code" * model.trust_remote_code


def _profile(config: TuneConfig, known: Known, profile_file: Path | None) -> Profile | None:
    """The profile given, or the newest that was kept of this machine; None where there is none, or none is wanted.

    Raises:
        ConfigError: the profile given is of another model, or lacks a device.
    """
    if profile_file is None:
        if not config.profile:
            return None
        return find_profile(
            hardware_id=known.hardware_id,
            devices=config.concrete_devices,
            model=known.model,
            packed_weights=config.space.packed_weights,
            cuda_graphs=config.space.cuda_graphs,
            scores=config.workload.kind == "score",
        )
    profile = read_profile(profile_file)
    if not profile.shape.is_alike(known.shape):
        raise ConfigError(
            f"--profile {profile_file}: it is of {profile.model.name} in {profile.model.dtype}, and {known.model.name} "
            f"in {known.model.dtype} is planned for; give the profile of this model"
        )
    there = [one.device for one in profile.devices]
    if lacking := [name for name in config.concrete_devices if name not in there]:
        raise ConfigError(
            f"--profile {profile_file}: {lacking[0]} is not in it; it has {', '.join(there)}. A --device-file can say "
            "that it is like one of them"
        )
    return profile


def _planned(
    effective: EffectivePlan, prediction: Prediction, known: Known, config: TuneConfig, prompt_len: int
) -> PlannedPlan:
    plan = effective.plan
    busy = iter(prediction.stage_busy_s)
    stages = []
    for replica, index in itertools.product(range(plan.replicas), range(len(plan.stages))):
        own = plan.replica(replica)
        stage = own.stages[index]
        need = stage_bytes(known.shape, own, index, prompt_len=prompt_len, output_len=config.workload.generated_len)
        busy_s = next(busy)
        stages.append(
            PlannedStage(
                replica=replica,
                device=stage.device,
                first_layer=stage.first_layer,
                end_layer=stage.end_layer,
                busy_s=busy_s,
                idle_share=1.0 - busy_s / prediction.duration_s,
                weights_bytes=need.weights,
                kv_bytes=effective.in_flight * need.kv_per_slot,
                activation_bytes=need.activations,
                total_bytes=need.total(effective.in_flight),
                cap_bytes=stage.cap_bytes(known.device_bytes[stage.device]),
            )
        )
    metrics = dict(prediction.metrics) | {
        "peak_memory_bytes": float(max(stage.total_bytes for stage in stages)),
        "peak_memory_fraction": max(stage.cap_share for stage in stages),
    }
    return PlannedPlan(
        effective=effective,
        prediction=prediction,
        metrics=metrics,
        stages=tuple(stages),
        broken=tuple(
            constraint
            for constraint in config.constraints
            if constraint.metric in metrics and constraint.excess(metrics[constraint.metric]) > 0
        ),
    )


def _notes(config: TuneConfig, planned: Sequence[PlannedPlan]) -> tuple[str, ...]:
    """What a reader must know of objectives and constraints."""
    predicted = planned[0].metrics
    notes = []
    if config.objectives[0] not in predicted:
        notes.append(f"{config.objectives[0]} is not predicted: plans are ranked by their duration")
    if len(config.objectives) > 1:
        notes.append(f"ranked by {config.objectives[0]} alone, of {len(config.objectives)} objectives")
    if unknown := [str(constraint) for constraint in config.constraints if constraint.metric not in predicted]:
        notes.append(f"not predicted, and so not looked at: {', '.join(unknown)}")
    if all(plan.broken for plan in planned):
        notes.append("no plan is predicted to keep all constraints; those come first that break them least")
    return tuple(notes)
