"""The best predicted plans, with what they come to stage by stage; nothing of them is run.

The model's shape is read with a single worker, which loads no weights, so that the devices planned for need
not be here. What tasks take on them comes from a profile, from devices described in a file, or from nominal rates, and
the result says from which.
"""

import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipetune.bench.errors import ConfigError, NothingFeasibleError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Fleet, device_bytes
from pipetune.bench.load.traces import read_trace
from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.bench.profile import Profile
from pipetune.bench.spec import EffectivePlan, Plan, device_kind
from pipetune.tuner.config.schema import Constraint, TuneConfig
from pipetune.tuner.planning.calibration.engine_model import EngineModel
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.calibration.predictor import refit
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.described import DescribedDevices
from pipetune.tuner.planning.costs.profile_cache import find_profile, read_profile
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.load import LoadPrediction
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.planning.simulation.prediction import Prediction
from pipetune.tuner.planning.simulation.sustained import Load
from pipetune.tuner.progress import Reporter
from pipetune.tuner.search.policy.warm_start import lessons_of
from pipetune.tuner.search.runs import starter_of
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import candidates
from pipetune.tuner.search.study_costs import new_space, resolver_of
from pipetune.tuner.study.plan_file import PlanFile, render

_MOST_TRACED, _MOST_RATED = 2000, 10
"""Requests of a trace that are simulated, and plans whose highest rate is looked for."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What predictions are made from."""

    kind: Literal["profile", "described", "nominal"]
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
    load: LoadPrediction | None = None
    """What it is thought to give where requests come over time; `metrics` and `stages` are of that then."""

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


class Known:
    """What a worker says of the model and the prompts.

    One on the CPU is enough, but for GPUs of this machine, whose free memory they alone know; another engine starts its
    own, and runs nothing.
    """

    def __init__(
        self,
        config: TuneConfig,
        reporter: Reporter,
        described: DescribedDevices | None,
        start_fleet: Callable[..., Fleet] | None = None,
    ) -> None:
        devices, model = config.concrete_devices, config.model
        on_gpus = described is None and any(device_kind(device) == "cuda" for device in devices)
        if not on_gpus and model.attention.startswith("flash"):
            # Such kernels need a GPU; the shape is the same without them.
            model = model.model_copy(update={"attention": "auto"})
        workers = devices if on_gpus or config.engine is not None else ("cpu:0",)
        with Experiment.start(
            model, workers, exclusive=False, start_fleet=start_fleet or starter_of(config), on_progress=reporter.fleet
        ) as experiment:
            fleet, self.shape = experiment.fleet, experiment.fleet.shape
            if described is not None:
                self.device_bytes = described.device_bytes(devices)
                task_bytes = described.task_bytes or self.shape.task_bytes
                self.shape = self.shape.model_copy(update={"task_bytes": task_bytes})
            else:
                self.device_bytes = dict(fleet.device_bytes) if on_gpus else device_bytes(devices)
            self.model = fleet.model.model_copy(update={"attention": config.model.attention})
            """With its revision."""
            self.machine = fleet.machine
            self.prompt_lens = fleet.prompt_lens(config.workload)
            own = Resolver.of_workload(self.shape, config.workload, self.prompt_lens, self.device_bytes)
            self.resolve = own if config.engine is None else resolver_of(fleet, config, self.prompt_lens)


class Planned:
    """The plans that are best by prediction; none is run."""

    def __init__(
        self,
        config: TuneConfig,
        reporter: Reporter,
        *,
        described: DescribedDevices | None = None,
        profile_file: Path | None = None,
        observations: Sequence[Observation] = (),
        top: int = 10,
        start_fleet: Callable[..., Fleet] | None = None,
    ) -> None:
        """
        Args:
            config: with its devices resolved; `profile` says whether this machine's cache of profiles is looked into.
            described: devices to plan for, where they come from a file.
            profile_file: a profile to take instead of the cached one.
            observations: runs that correct what tasks take.
            top: plans to keep.
            start_fleet: as in `run_study`.

        Raises:
            UserError: a model, prompts, bounds or a profile that cannot be used.
            NothingFeasibleError: no plan fits into memory.
        """
        if described is not None and config.warm_start:
            raise ConfigError(
                "warm_start: runs of this machine say nothing of devices in a file; leave one of them out"
            )
        if config.engine is not None and (described is not None or profile_file is not None):
            given = "--device-file" if described is not None else "--profile"
            raise ConfigError(f"engine: its own runs alone say what it takes, by --warm-start; leave {given} out")
        reporter.begin(f"reading {config.model.name}")
        self.config, self.known = config, Known(config, reporter, described, start_fleet)
        known, workload, resolve = self.known, config.workload, self.known.resolve
        costs, self.source = _costs(config, known, described, profile_file)
        earlier = [lessons_of(one, config, known.model, known.machine, known.shape) for one in config.warm_start]
        said = zip(config.warm_start, earlier, strict=True)
        if seen := [one for _, lessons, _ in earlier for one in lessons]:
            self.source = replace(self.source, text=f"{self.source.text}, corrected by {len(seen)} earlier runs")
        reporter.begin("predicting")
        kind = CostModel if config.engine is None else EngineModel
        model = refit(kind.of_workload(known.shape, workload, known.prompt_lens, costs), [*observations, *seen])
        space = new_space(config, config.concrete_devices, model, resolve)
        found = [candidate.effective for candidate in candidates(space, resolve)]
        self.space = {"partitions": len(space.partitions), "points": space.num_points, "predicted": len(found)}
        predictions = model.predict_many([(effective.plan, effective.in_flight) for effective in found])
        planned = [
            _planned(effective, prediction, resolve, config)
            for effective, prediction in zip(found, predictions, strict=True)
        ]
        self.objective, self.notes = config.objectives[0], _notes(config, planned)
        if workload.arrivals is not None:
            planned, self.objective, self.notes = _under_load(config, known, planned, model, reporter, top)
        self.notes += [f"{folder}: {text or 'it measured nothing'}" for folder, (_, _, text) in said]
        if all(one.broken for one in planned):
            self.notes.append("no plan is predicted to keep all constraints; those come first that break them least")
        self.plans = rank(planned, self.objective)[:top]

    def write(self, path: Path) -> None:
        """Writes the best plan, marked as predicted, in the form that `bench --plan` reads."""
        best = self.plans[0]
        # What is measured of it is a batch.
        workload = self.config.workload.model_copy(update={"arrivals": None})
        if workload.prompts_file is not None:
            workload = workload.model_copy(update={"prompts_file": str(Path(workload.prompts_file).absolute())})
        plan_file = PlanFile(
            plan=best.plan,
            model=self.known.model,
            workload=workload,
            devices=self.config.concrete_devices,
            in_flight=best.effective.in_flight,
            predicted=best.metrics,
            predicted_from=self.source.text,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, render(plan_file, self.known.shape, "plan"))


def rank(plans: Sequence[PlannedPlan], objective: str) -> tuple[PlannedPlan, ...]:
    """Best first by a predicted metric, or by duration where it is not predicted; broken constraints go last."""
    sign = -1.0 if objective in HIGHER_IS_BETTER else 1.0

    def key(plan: PlannedPlan) -> tuple[float, float, float, str]:
        excess = sum(constraint.excess(plan.metrics[constraint.metric]) for constraint in plan.broken)
        value = plan.metrics.get(objective)
        seconds = plan.prediction.duration_s
        return excess, seconds if value is None else sign * value, seconds, plan.effective.key

    return tuple(sorted(plans, key=key))


def _under_load(
    config: TuneConfig, known: Known, planned: Sequence[PlannedPlan], model: CostModel, reporter: Reporter, top: int
) -> tuple[list[PlannedPlan], str, list[str]]:
    """Plans as they are under arrivals, the metric that ranks them, and what a reader must know.

    Of plans that differ in where they are cut alone the one is taken that is fastest with a batch, with a slot and
    with two for each of its stages.
    """
    workload = config.workload
    assert workload.arrivals is not None
    trace = None
    if workload.arrivals.trace is not None:
        trace = read_trace(workload.arrivals.trace, time_scale=workload.arrivals.time_scale, limit=_MOST_TRACED)
        if given := next((one.place for one in trace.arrivals if one.input_len is None), None):
            raise ConfigError(f"{given}: has no input_length; predictions need lengths, not prompts")
    load = Load(model, workload, trace)
    fastest: dict[tuple[object, ...], PlannedPlan] = {}
    for one in sorted(planned, key=lambda one: one.prediction.duration_s):
        plan = one.plan
        sizes = (plan.micro_batch_size, plan.prefill_size, plan.prefill_chunk_size, plan.engine)
        fastest.setdefault((len(plan.stages), plan.replicas, *sizes, plan.lanes), one)
    resolve = Resolver(
        shape=known.shape,
        num_prompts=len(load) * len(known.device_bytes),
        prompt_len=load.longest[0],
        output_len=load.longest[1],
        device_bytes=known.device_bytes,
        under_arrivals=True,
    )
    chosen: dict[str, PlannedPlan] = {}
    factors: tuple[int | None, ...] = (1, 2)
    if config.engine is not None:
        resolve, factors = known.resolve, (None,)
    for one, factor in itertools.product(fastest.values(), factors):
        slots = factor and factor * len(one.plan.stages)
        effective = resolve(one.plan.model_copy(update={"max_in_flight": slots}))
        if isinstance(effective, EffectivePlan):
            planned_ = _planned(effective, one.prediction, resolve, config)
            chosen.setdefault(f"{effective.key} {effective.in_flight}", planned_)
    if not chosen:
        raise NothingFeasibleError("no plan has room for the longest request; give plans more memory or devices")
    reporter.begin(f"simulating {len(chosen)} plans under load")
    found = [_loaded(one, load.serve(one.effective), config) for one in chosen.values()]
    objective = config.objectives[0]
    if objective not in found[0].metrics:
        objective = "max_request_rate" if workload.goodput is not None else "p90_e2el_ms"
    if workload.goodput is not None:
        # Roughly for all, then for the best ones: each takes many simulated runs.
        for is_rough in (True, False):
            reporter.begin(f"looking for the highest rates of {len(found)} plans")
            rated = []
            for one in found:
                guess = one.metrics.get("max_request_rate") or one.metrics["request_throughput"]
                rate = load.highest_rate(one.effective, config.slo_attainment, guess=guess, is_rough=is_rough)
                rated.append(replace(one, metrics={**one.metrics, "max_request_rate": rate}))
            found = list(rank(rated, objective)[: max(top, _MOST_RATED)])
    notes = [f"simulated with {len(load)} requests"]
    if trace is not None and trace.failed:
        notes.append(f"{trace.failed} requests of the trace had failed when it was recorded, and are left out")
    return found, objective, notes


def _loaded(one: PlannedPlan, load: LoadPrediction, config: TuneConfig) -> PlannedPlan:
    memory = {name: value for name, value in one.metrics.items() if name.startswith("peak_")}
    metrics = load.metrics(config.workload.goodput) | memory
    stages = tuple(
        replace(stage, busy_s=busy_s, idle_share=1.0 - busy_s / load.duration_s)
        for stage, busy_s in zip(one.stages, load.busy_s, strict=True)
    )
    return replace(one, load=load, metrics=metrics, broken=_broken(config, metrics), stages=stages)


def _broken(config: TuneConfig, metrics: Mapping[str, float]) -> tuple[Constraint, ...]:
    return tuple(
        constraint
        for constraint in config.constraints
        if constraint.metric in metrics and constraint.excess(metrics[constraint.metric]) > 0
    )


def _costs(
    config: TuneConfig, known: Known, described: DescribedDevices | None, profile_file: Path | None
) -> tuple[Costs | None, Source]:
    if config.engine is not None:
        way = None if config.warm_start else "`--warm-start STUDY` corrects them by what a study of this engine saw"
        return None, Source(kind="nominal", text="nominal rates", remedy=way)
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
    """The profile given, or the newest that was kept of this machine; None where there is none, or none is wanted."""
    if profile_file is None:
        if not config.profile:
            return None
        return find_profile(
            hardware_id=known.machine.hardware_id,
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


def _planned(effective: EffectivePlan, prediction: Prediction, resolve: Resolver, config: TuneConfig) -> PlannedPlan:
    plan = effective.plan
    busy = iter(prediction.stage_busy_s)
    stages = []
    for replica, index in itertools.product(range(plan.replicas), range(len(plan.stages))):
        own = plan.replica(replica)
        stage = own.stages[index]
        need = resolve.stage_bytes(own, index)
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
                cap_bytes=stage.cap_bytes(resolve.device_bytes[stage.device]),
            )
        )
    metrics = dict(prediction.metrics) | {
        "peak_memory_bytes": float(max(stage.total_bytes for stage in stages)),
        "peak_memory_fraction": max(stage.cap_share for stage in stages),
    }
    broken = _broken(config, metrics)
    return PlannedPlan(effective=effective, prediction=prediction, metrics=metrics, stages=tuple(stages), broken=broken)


def _notes(config: TuneConfig, planned: Sequence[PlannedPlan]) -> list[str]:
    """What a reader must know of objectives and constraints."""
    predicted = planned[0].metrics
    notes = []
    if config.objectives[0] not in predicted:
        notes.append(f"{config.objectives[0]} is not predicted: plans are ranked by their duration")
    if len(config.objectives) > 1:
        notes.append(f"ranked by {config.objectives[0]} alone, of {len(config.objectives)} objectives")
    if unknown := [str(constraint) for constraint in config.constraints if constraint.metric not in predicted]:
        notes.append(f"not predicted, and so not looked at: {', '.join(unknown)}")
    return notes
