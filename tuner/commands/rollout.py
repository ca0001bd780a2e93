"""A split on its way from a small fleet to a large one: each larger fleet is predicted from the smaller, then measured.

    rollout/
      tune/              a study on the first fleet
      fleet-1.json       what it let expect of the next one
      fleet-1/           a study of the plans that are best by that
      gate/              the best of the last fleet beside what runs there today
      rollout.json       the chain, as .md and .html too
      promoted_plan.json what passed

Every step is durable once it is done, and is not done again.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from pipetune.bench.errors import ConfigError, NothingFeasibleError, StudyError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet.fleet import device_bytes
from pipetune.bench.metrics import derive
from pipetune.bench.profile import Profile
from pipetune.bench.record import Failure, Measurement, Record
from pipetune.bench.spec import EffectivePlan, Plan, SchemaVersion, Value
from pipetune.tuner.commands.plan import Known, Planned
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.gate.cases import SideRequest, case_of
from pipetune.tuner.gate.outputs import files as outputs
from pipetune.tuner.gate.run import Gate
from pipetune.tuner.gate.runners import FreshProcesses
from pipetune.tuner.gate.values import GateResult, Side, SideName, Verdict
from pipetune.tuner.planning.calibration import carried
from pipetune.tuner.planning.calibration.observation import observe
from pipetune.tuner.progress import Reporter
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.report.data import Report
from pipetune.tuner.search.driver import run_plans
from pipetune.tuner.study.files import StudyFile, load_study, read
from pipetune.tuner.study.plan_file import PLAN_FILE, PlanFile, read_plan
from pipetune.tuner.study.store import StudyStore

_TELLING = 2.0
"""An interval that is wider than this factor either way says little; chosen."""
TUNE, GATE = "tune", "gate"
PROMOTED_FILE = "promoted_plan.json"


class Predicted(Value):
    """A plan for a larger fleet, before it was run."""

    effective: EffectivePlan
    value: float = Field(gt=0)
    """The objective."""


class Prediction(Value):
    """`fleet-1.json`: what a smaller fleet let expect of a larger one."""

    schema_version: SchemaVersion = 1
    devices: tuple[str, ...]
    made_from: str
    half_width: float
    """Half of the 95 % interval around each value, as a logarithm."""
    plans: tuple[Predicted, ...] = Field(min_length=1)
    """Best first."""


class Tried(Value):
    """A predicted plan and its runs."""

    predicted: Predicted
    low: float
    high: float
    measured: tuple[float, ...]
    """The objective in each round; empty where a run failed."""
    failure: str | None = None

    @property
    def level(self) -> float | None:
        """Median over the rounds."""
        return statistics.median(self.measured) if self.measured else None

    @property
    def miss(self) -> float | None:
        """Logarithm of measured over predicted."""
        return None if self.level is None else math.log(self.level / self.predicted.value)

    @property
    def is_within(self) -> bool:
        """Whether the measured value lies in its interval."""
        return self.level is not None and self.low <= self.level <= self.high

    @property
    def held(self) -> str:
        """What it says that the measured value lies within the interval."""
        factor = math.sqrt(self.high / self.low)
        little = f"the prediction, good to a factor of {factor:.2g}, says little"
        return "the prediction held" if factor < _TELLING else little


class FleetStep(Value):
    """One larger fleet: predicted, then measured."""

    devices: tuple[str, ...]
    made_from: str
    tried: tuple[Tried, ...]

    @property
    def misses(self) -> list[float]:
        """Misses of the plans that ran."""
        return [one.miss for one in self.tried if one.miss is not None]


class Rollout(Value):
    """`rollout.json`: the whole chain as far as it went."""

    schema_version: SchemaVersion = 1
    objective: str
    model: str
    first_model: str | None = None
    """What the first fleet was tuned with, where it was a model of fewer layers: the first plan and value are its."""
    first_devices: tuple[str, ...]
    first_plan: Plan
    first_value: float
    fleets: tuple[FleetStep, ...]
    best: Tried | None = None
    """The best plan of the last fleet; None where none ran."""
    today: Plan | None = None
    gate: GateResult | None = None
    promoted: bool = False
    verdict: str
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """What was asked for."""

    config: TuneConfig
    fleets: tuple[tuple[str, ...], ...]
    """Devices of each, the smallest first."""
    folder: Path
    first_model: str | None = None
    """The model with fewer layers, for the first fleet: its times are carried over layer by layer, its runs are not."""
    today: Path | None = None
    """The plan that runs on the last fleet now; None takes the even split, which engines default to."""
    top: int = 3
    rounds: int = 3
    max_minutes: float | None = None
    """How long the gate may take."""

    def __post_init__(self) -> None:
        if len(self.fleets) < 2:
            raise ConfigError(f"--fleet: {len(self.fleets)} given; name two or more, the smallest first")
        for smaller, larger in itertools.pairwise(self.fleets):
            if len(larger) < len(smaller):
                raise ConfigError(f"--fleet {','.join(larger)}: it is smaller than the one before; the largest is last")
        if self.first_model is not None and not self.config.profile:
            raise ConfigError("--first-model: only a profile carries over to the whole model; leave --no-profile out")
        if self.today is not None and (missing := {*read_plan(self.today).plan.devices} - {*self.fleets[-1]}):
            raise ConfigError(f"--today {self.today}: it runs on {min(missing)}, which the last fleet lacks")

    @property
    def first(self) -> TuneConfig:
        """Settings of the study on the first fleet."""
        config = self.of(self.fleets[0])
        if self.first_model is None:
            return config
        small = {"name": self.first_model, "revision": None, "load_format": "dummy"}
        return config.model_copy(update={"model": config.model.model_copy(update=small)})

    def of(self, devices: Sequence[str]) -> TuneConfig:
        """Settings on a fleet."""
        return self.config.model_copy(update={"devices": tuple(devices), "on_device_loss": "stop"})

    def steps(self) -> list[tuple[str, str, bool]]:
        """What each step is, what it leaves, and whether that is there."""
        small = f" with {self.first_model}" if self.first_model is not None else ""
        found = [(f"tune on {','.join(self.fleets[0])}{small}", f"{TUNE}/{PLAN_FILE}")]
        for number, devices in enumerate(self.fleets[1:], start=1):
            found.append((f"predict {self.top} plans for {','.join(devices)}", f"fleet-{number}.json"))
            found.append((f"measure them there in {self.rounds} rounds", f"fleet-{number}"))
        today = self.today if self.today is not None else "the even split"
        found += [(f"gate against {today}", f"{GATE}/gate.json"), ("promote the best", PROMOTED_FILE)]
        return [(what, place, (self.folder / place).exists()) for what, place in found]


class Chain:
    """A rollout under way, from the study of the first fleet on. UserError: the study found no plan, a step's files are
    damaged or of other fleets, nothing fits. FleetError: the workers failed."""

    def __init__(self, request: RolloutRequest, reporter: Reporter) -> None:
        study = load_study(request.folder / TUNE)
        ranking, profile = Report.of(study).ranking, study.folder / StudyFile.PROFILE
        if ranking.best is None or study.machine is None:
            raise StudyError(f"{study.folder}: no plan of the first fleet has a rank; see its report")
        if (known := study.config.model.name) != (wanted := request.first.model.name):
            raise StudyError(f"{study.folder}: it is of {known}, and not of {wanted}; name the same, or another -o")
        self.request, self.reporter = request, reporter
        self.objective = request.config.objectives[0]
        self.first, self.machine = ranking.best, study.machine
        self.profile = read(profile, Profile) if profile.exists() else None
        runs = study.records if request.first_model is None else ()
        self.observations = {request.fleets[0]: [*filter(None, map(observe, runs))]}
        """By the fleet whose runs they are of."""

    def run(self) -> Rollout:
        """Goes on to the end of the chain."""
        fleets: list[FleetStep] = []
        with self.reporter:
            for number, devices in enumerate(self.request.fleets[1:], start=1):
                fleets.append(self._fleet(number, devices, [fleet.misses for fleet in fleets if fleet.misses]))
            return self._conclude(tuple(fleets))

    def _fleet(self, number: int, devices: tuple[str, ...], misses: Sequence[Sequence[float]]) -> FleetStep:
        """Predicts for a fleet and measures there what is predicted to be best."""
        folder = self.request.folder / f"fleet-{number}"
        self.reporter.say(f"fleet {number + 1} of {len(self.request.fleets)}: {','.join(devices)}")
        sd = carried.PRIOR_SD if self.request.first_model is None else carried.FEWER_LAYERS_SD
        prediction = self._predict(folder.with_suffix(".json"), devices, carried.half_width(misses, sd))
        records = self._measure(folder, prediction)
        self.observations[devices] = [*filter(None, map(observe, records))]
        tried = []
        for predicted in prediction.plans:
            runs = [record for record in records if record.spec and record.spec.plan == predicted.effective.plan]
            failed = next((run.result for run in runs if isinstance(run.result, Failure)), None)
            done = [derive(run.result) for run in runs if isinstance(run.result, Measurement)]
            low, high = (predicted.value * math.exp(sign * prediction.half_width) for sign in (-1, 1))
            measured = () if failed else tuple(values[self.objective] for values in done)
            why = failed.message if failed else None
            tried.append(Tried(predicted=predicted, low=low, high=high, measured=measured, failure=why))
        return FleetStep(devices=devices, made_from=prediction.made_from, tried=tuple(tried))

    def _predict(self, path: Path, devices: tuple[str, ...], width: float) -> Prediction:
        if path.exists():
            known = read(path, Prediction)
            if known.devices != devices:
                raise ConfigError(
                    f"{path}: it is of {','.join(known.devices)}, and --fleet says {','.join(devices)}; name the "
                    "same fleets, or another -o"
                )
            return known
        profile = self.profile
        if profile is not None and self.request.first_model is not None:
            whole = Known(self.request.of(self.request.fleets[0]), self.reporter, None)
            profile = carried.deepened(profile, whole.model, whole.shape)
        cores, seen = self.machine.hardware.cpu_cores, self.observations.items()
        described = carried.larger_fleet(profile, self.request.fleets[0], device_bytes(devices), cores=cores)
        lessons = [one for fleet, own in seen for one in carried.slowed(own, fleet, devices, cores=cores)]
        request, reporter = self.request, self.reporter
        planned = Planned(request.of(devices), reporter, described=described, observations=lessons, top=request.top)
        if self.objective not in planned.plans[0].metrics:
            raise ConfigError(
                f"objectives: {self.objective} is not predicted; roll out by one that `pipetune plan` shows"
            )
        if not (kept := [one for one in planned.plans if not one.broken]):
            broken = ", ".join(map(str, planned.plans[0].broken))
            raise NothingFeasibleError(f"fleet {','.join(devices)}: every plan is predicted to break {broken}")
        found = Prediction(
            devices=devices,
            made_from=f"{described.about}, and {len(lessons)} runs",
            half_width=width,
            plans=tuple(Predicted(effective=one.effective, value=one.metrics[self.objective]) for one in kept),
        )
        write_durably(path, found.model_dump_json(indent=1) + "\n")
        return found

    def _measure(self, folder: Path, prediction: Prediction) -> tuple[Record, ...]:
        """A study of these plans alone, or what is left of it."""
        request = self.request
        config = request.of(prediction.devices).model_copy(update={"finalist_rounds": request.rounds})
        begun = (folder / StudyFile.CONFIG).exists()
        with StudyStore.resume(folder, config) if begun else StudyStore.create(folder, config) as store:
            if not run_plans(store, self.reporter, [one.effective for one in prediction.plans]):
                raise KeyboardInterrupt
            return store.records

    def _conclude(self, fleets: tuple[FleetStep, ...]) -> Rollout:
        """The gate, if the last prediction held, and what is promoted."""
        objective = Objective(metric=self.objective)
        ran = [one for one in fleets[-1].tried if one.level is not None]
        best = min(ran, key=lambda one: objective.cost(one.level or 0.0), default=None)
        chain = Rollout(
            objective=self.objective,
            model=self.request.config.model.name,
            first_model=self.request.first_model,
            first_devices=self.request.fleets[0],
            first_plan=self.first.plan,
            first_value=self.first.metrics[self.objective],
            fleets=fleets,
            best=best,
            verdict=f"nothing that was predicted ran on {','.join(fleets[-1].devices)}",
            exit_code=3,
        )
        if best is None:
            return chain
        if not best.is_within:
            why = (
                f"the prediction did not carry: {best.level:.4g} was measured where {best.low:.4g} to {best.high:.4g} "
                "was predicted; look at what differs there, or tune on the large fleet itself"
            )
            return chain.model_copy(update={"verdict": why})
        plan, today = best.predicted.effective.plan, self._today(best.predicted.effective.plan)
        if plan == today:
            return self._promoted(chain, today, None, "what runs today is the best: there is nothing to change")
        gate = self._gate(today, plan)
        if gate.exit_code:
            why = f"not promoted: the gate against what runs today says {gate.verdict.value}"
            if gate.verdict is Verdict.INCONCLUSIVE:
                why += f"; to run it again, remove {self.request.folder / GATE}"
            return chain.model_copy(update={"today": today, "gate": gate, "verdict": why, "exit_code": gate.exit_code})
        return self._promoted(chain, today, gate, f"promoted: {best.held}, and the gate says OK")

    def _today(self, like: Plan) -> Plan:
        if self.request.today is not None:
            return read_plan(self.request.today).plan
        devices = self.request.fleets[-1]
        shape = load_study(self.request.folder / f"fleet-{len(self.request.fleets) - 1}").shape
        assert shape is not None, "plans ran there"
        stages = min(len(devices), shape.num_layers)
        quotient, rest = divmod(shape.num_layers, stages)
        counts = tuple(quotient + (place < rest) for place in range(stages))
        even = Plan.from_layer_counts(counts, devices, math.ceil(self.request.config.workload.num_prompts / stages))
        return even.model_copy(update={key: getattr(like, key) for key in ("compile", "cuda_graphs", "packed_weights")})

    def _gate(self, today: Plan, plan: Plan) -> GateResult:
        folder, devices = self.request.folder / GATE, self.request.fleets[-1]
        if (kept := folder / "gate.json").exists():
            known = read(kept, GateResult)
            if (known.cases[0].baseline.plan, known.cases[0].candidate.plan) == (today, plan):
                return known
        config = self.request.of(devices)

        def side(name: SideName, plan: Plan) -> SideRequest:
            return SideRequest(Side(name=name, model=config.model, plan=plan, devices=devices), config)

        cases = (case_of("rollout", side("baseline", today), side("candidate", plan)),)
        most, runner = self.request.max_minutes, FreshProcesses(cases)
        gate = Gate(cases=cases, runner=runner, seed=config.seed, max_minutes=most).run(self.reporter)
        outputs.write(gate, folder, None)
        return gate

    def _promoted(self, chain: Rollout, today: Plan, gate: GateResult | None, verdict: str) -> Rollout:
        best, request = chain.best, self.request
        assert best is not None, "only what ran is promoted"
        assert best.level is not None, "only what ran is promoted"
        effective = best.predicted.effective
        plan_file = PlanFile(
            plan=effective.plan,
            model=request.config.model,
            workload=request.config.workload,
            devices=request.fleets[-1],
            in_flight=effective.in_flight,
            metrics={self.objective: best.level},
            predicted={self.objective: best.predicted.value},
            predicted_from=chain.fleets[-1].made_from,
        )
        write_durably(request.folder / PROMOTED_FILE, plan_file.model_dump_json(indent=1) + "\n")
        return chain.model_copy(
            update={"today": today, "gate": gate, "promoted": True, "verdict": verdict, "exit_code": 0}
        )
