"""Unpatched vLLM as an engine: plans are run by it, in an environment of its own, and measured as ours are.

Model, machine, prompts and the reference are a fleet's of one worker, which is ended before the engine runs.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

from pipetune.bench.engines.host import HELLO_TIMEOUT_S, EngineHost
from pipetune.bench.engines.outcome import Pass, Told, outcome_of
from pipetune.bench.engines.reference import EngineReference
from pipetune.bench.engines.vllm_args import Arguments, cores_of_workers, gpus_of, vllm_arguments
from pipetune.bench.errors import ConfigError, FleetError, PlanError
from pipetune.bench.fleet.fleet import Closing, Fleet
from pipetune.bench.fleet.supervisor import FleetOptions, Progress
from pipetune.bench.load.arrivals import arrival_times_s
from pipetune.bench.machine.hardware import cores_of, device_bytes
from pipetune.bench.machine.sensors import CpuSensors, family
from pipetune.bench.machine.telemetry import read_telemetry, sensors_for
from pipetune.bench.memory import check_plan, stage_bytes
from pipetune.bench.record import Failure, FailureKind, Machine, Measurement, OutputCheck
from pipetune.bench.spec import (
    EffectivePlan,
    EngineName,
    EngineSettings,
    ModelSpec,
    Plan,
    Protocol,
    RunSpec,
    Workload,
    device_kind,
)
from pipetune.bench.worker.acceptance import is_steady, wrong_output

KV_BLOCK = 128
"""Tokens of a block of KV cache on CPUs."""
IN_PLACE_NOTE = "re-partitioned in place its output was wrong; the engine was started anew"
_LIMITS = ("max_num_batched_tokens", "max_num_seqs")
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}
"""The scheduler is in the host's own process: in one of its own, requests trickle in and group by chance."""
_LEAD_S = 0.05
"""The hosts of all replicas begin together, so long after they were told to."""


class VllmEngine(Closing):
    """vLLM on CPUs or GPUs; one host a replica, kept over plans that it can move to in place. What is in capitals is
    another for an engine that is driven alike."""

    NAME: ClassVar[EngineName] = "vllm"
    TITLE: ClassVar[str] = "vLLM"
    HOST: ClassVar[Path] = Path(__file__).parent / "vllm_host" / "pipetune_vllm_host.py"
    VERSIONS: ClassVar[tuple[tuple[int, ...], tuple[int, ...]]] = ((0, 32), (0, 33))
    """From the first of them up to the second, which is left out: what the host was written for."""
    MOVES: ClassVar[bool] = True
    """Whether other splits and limits can be taken in place."""
    SERVES: ClassVar[bool] = True
    """Whether its HTTP server can be asked in place of the engine."""
    NOTES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "cpu": (),
        "cuda": ("vLLM's probe has never been run on GPUs by pipetune's tests: doubt what it says",),
    }
    """Said of every measurement, by the devices that it can be made on."""

    def __init__(
        self,
        model: ModelSpec,
        devices: Sequence[str],
        *,
        python: Path,
        baseline: EngineSettings | None = None,
        script: Path | None = None,
        start_fleet: Callable[..., Fleet] | None = None,
        **options: Unpack[FleetOptions],
    ) -> None:
        """Looks at the engine and the model; raises as `Fleet.start` and `versions_of`, and ConfigError for devices and
        settings that it is not driven with. `python` is of an environment that has the engine; pipetune need not be
        there. `baseline` has the settings of the un-pipelined engine, by default the engine's own.
        """
        self.devices = tuple(devices)
        self._check_usable(model)
        self._python, self._script, self._options = python, script or self.HOST, options
        self._baseline = baseline or EngineSettings(name=self.NAME)
        self._hosts: list[EngineHost] = []
        self._started: RunSpec | None = None
        """What the hosts were started for; `_held` is the plan that they hold now."""
        self._held: Plan | None = None
        self._limits: dict[str, int] = {}
        self._workers: list[Told] = []
        self._prompts: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._reference: EngineReference | None = None
        versions = self.versions_of(python, script)
        self._fleet = (start_fleet or Fleet.start)(model, self.devices[:1], **options)
        self.model, self.shape, self.machine = self._fleet.model, self._fleet.shape, self._fleet.machine
        self.device_bytes = device_bytes(self.devices)
        self.machine = with_engine(self.machine, versions)

    def prompts(self, workload: Workload, *, as_text: bool = False) -> tuple[tuple[int, ...], ...]:
        """Token ids of every prompt; raises as `Fleet.prompts` does."""
        # When they come is no matter, and asking anew starts a worker.
        key = workload.digest(exclude={"arrivals": True, "goodput": True})
        if key not in self._prompts:
            self._prompts[key] = self._fleet.prompts(workload)
        return self._prompts[key]

    def prompt_lens(self, workload: Workload) -> tuple[int, ...]:
        """Length of every prompt in tokens; raises as `prompts` does."""
        return tuple(map(len, self.prompts(workload)))

    def resolve(self, plan: Plan, workload: Workload) -> EffectivePlan | Failure:
        """The plan, or why it does not fit: its stages beside their KV cache, and in that a single request.

        ConfigError for prompts that cannot be used, or a workload that the engine is not measured with; PlanError for a
        plan that is not for it, does not suit the model, or names a device that is not there.
        """
        if workload.kind == "score":
            raise ConfigError(f"workload.kind=score: {self.TITLE} is measured generating so far")
        if workload.arrivals is not None and workload.arrivals.max_concurrency is not None:
            raise ConfigError(f"workload.arrivals.max_concurrency: not kept for {self.TITLE}; set engine.max_num_seqs")
        check_plan(self.shape, plan)
        if plan.engine is None or plan.engine.name != self.NAME:
            there = "there is none" if plan.engine is None else f"it is {plan.engine.name}"
            raise PlanError(f"plan.engine: {there}, and {self.TITLE} is to run it; give engine: {{name: {self.NAME}}}")
        if plan.engine.served and not self.SERVES:
            raise PlanError(f"plan.engine.served: {self.TITLE} is measured without its HTTP server; leave it out")
        if strange := [one for own in plan.devices for one in plan.shards(own) if one not in self.devices]:
            raise PlanError(f"plan.stages: {strange[0]} is not among the devices {', '.join(self.devices)}")
        length = -(-self._longest(workload) // KV_BLOCK) * KV_BLOCK
        for index, stage in enumerate(plan.stages):
            layers = self.shape.layers[stage.first_layer : stage.end_layer]
            least = sum(layer.kv_bytes_per_token for layer in layers) * length // plan.width
            kv = plan.engine.kv_cache_memory_bytes or least
            weights = stage_bytes(self.shape, plan, index, prompt_len=length, output_len=0).weights // plan.width
            cap = min(stage.cap_bytes(self.device_bytes[one]) for one in plan.devices[index :: len(plan.stages)])
            what, wanted, had = "the KV cache of one request", least, kv
            if least <= kv:
                what, wanted, had = "its weights and its KV cache", weights + kv, cap
            if wanted > had:
                return Failure(
                    kind=FailureKind.OVER_MEMORY_CAP,
                    stage=index,
                    device=stage.device,
                    phase="plan",
                    message=f"stage {index} on {stage.device} needs {wanted / 2**20:.0f} MiB for {what} and may take "
                    f"{had / 2**20:.0f} MiB; give it fewer layers, or change plan.engine.kv_cache_memory_bytes",
                    bytes_wanted=wanted,
                    bytes_had=had,
                )
        return EffectivePlan(plan=plan, in_flight=len(plan.stages))

    def make_reference(self, path: Path, workload: Workload, protocol: Protocol) -> Failure | None:
        """Asks the unsplit model, as transformers has it, for what outputs are compared with."""
        self._stop()
        failure = self._fleet.make_reference(path, workload, protocol)
        self._reference = EngineReference.load(path) if failure is None else None
        return failure

    def make_reference_from_plan(self, path: Path, spec: RunSpec, effective: EffectivePlan) -> Failure | None:
        """Not to be had of this engine: its outputs then are compared with nothing."""
        text = "an engine's own output is no reference: outputs are not checked where the unsplit model fits nowhere"
        return Failure(kind=FailureKind.UNSUPPORTED_MODEL, phase="reference", message=text)

    def use_reference(self, path: Path, workload: Workload) -> None:
        """Takes a reference made earlier; raises as `Fleet.use_reference` does."""
        self._fleet.use_reference(path, workload)
        self._reference = EngineReference.load(path)

    def baseline(self, workload: Workload, protocol: Protocol, batch_size: int) -> Measurement | Failure:
        """Measures the engine un-pipelined on one device, with `batch_size` sequences at once."""
        settings = self._baseline.model_copy(update={"max_num_seqs": batch_size})
        plan = Plan.from_layer_counts((self.shape.num_layers,), self.devices, 1).model_copy(update={"engine": settings})
        outcome = self.measure(RunSpec(model=self.model, workload=workload, plan=plan, protocol=protocol))
        return outcome if isinstance(outcome, Failure) else outcome.model_copy(update={"batch_size": batch_size})

    def measure(self, spec: RunSpec, effective: EffectivePlan | None = None) -> Measurement | Failure:
        """Moves to the plan, in place where that can be, checks its output, warms up and measures."""
        if isinstance(known := self.resolve(spec.plan, spec.workload), Failure):
            return known
        self._fleet.interrupt()
        try:
            return self._measure(spec, time.monotonic() + spec.protocol.timeout_s)
        except FleetError as error:
            self._stop()
            return error.failure

    def interrupt(self) -> None:
        """Ends the engine at once; it starts anew when it is next used."""
        self._stop()
        self._fleet.interrupt()

    def close(self) -> None:
        """Ends the engine."""
        self._stop()
        self._fleet.close()

    def _measure(self, spec: RunSpec, deadline: float) -> Measurement | Failure:
        protocol, began, check, hosts = spec.protocol, time.monotonic(), None, self._hosts
        reference = self._reference if protocol.check_outputs else None
        notes, in_place = self._move(spec, deadline, guarded=reference is not None)
        load_s, began = time.monotonic() - began, time.monotonic()
        if reference is not None:
            check = self._compare(reference, spec, deadline)
            if in_place and wrong_output(check, scored=True) is not None:
                notes.append(IN_PLACE_NOTE)
                self._start(spec, deadline)
                check = self._compare(reference, spec, deadline)
            if (wrong := wrong_output(check, scored=True)) is not None:
                return wrong
        check_s = round(time.monotonic() - began, 4) if check is not None else None
        # A host that just started is slow for a pass or two.
        warmup, wanted = list[float](), protocol.num_iters_warmup * (1 + (hosts is not self._hosts))
        while len(warmup) < wanted:
            warmup.append(round(self._pass(spec, deadline, "warmup").duration_s, 6))
            unlike = len(warmup) == wanted >= 2 and not is_steady(warmup[-2:], protocol.steady_tolerance)
            wanted += unlike and wanted < protocol.max_warmup
        sensors = sensors_for(spec.plan.devices)
        before = sensors.state()
        sensors.start(*([family(below=True)] if isinstance(sensors, CpuSensors) else []))
        passes = [self._pass(spec, deadline, "measure", number) for number in range(protocol.num_iters)]
        telemetry = read_telemetry(sensors, before)
        if isinstance(outcome := outcome_of(self, spec, passes, self._workers, reference, check), Failure):
            return outcome
        durations = [*(warmup[-1:] if len(passes) == 1 else []), *(one.duration_s for one in passes)]
        return outcome.model_copy(
            update={
                "telemetry": telemetry,
                "load_s": round(load_s, 4),
                "check_s": check_s,
                "warmup_s": tuple(warmup),
                "steady": spec.workload.arrivals is not None or is_steady(durations, protocol.steady_tolerance),
                "notes": (*self.NOTES[device_kind(self.devices[0])], *notes, *outcome.notes),
                "transport": self.NAME,
            }
        )

    def _pass(self, spec: RunSpec, deadline: float, phase: str, number: int | None = None) -> Pass:
        """All prompts once, over all replicas: at once, or by the gaps of a timed pass."""
        prompts, lens, count = self.prompts(spec.workload), spec.workload.generated_lens, spec.plan.replicas
        at_s: Sequence[float] = (0.0,) * len(prompts)
        if number is not None and (arrivals := spec.workload.arrivals) is not None:
            at_s = arrival_times_s(arrivals.model_copy(update={"seed": arrivals.seed + number}), len(prompts))
        shares = [range(replica, len(prompts), count) for replica in range(count)]
        start_at = time.monotonic() + _LEAD_S
        how = spec.workload.sampling
        sampling = {"temperature": 0.0} if how is None else how.model_dump()
        columns = {"prompts": prompts, "output_lens": lens, "at_s": at_s}
        rows = [{name: [column[k] for k in own] for name, column in columns.items()} for own in shares]
        answers = self._all("run", phase, deadline, rows, start_at=start_at, sampling=sampling)
        return Pass(shares, start_at, at_s, answers)

    def _compare(self, reference: EngineReference, spec: RunSpec, deadline: float) -> OutputCheck:
        """Under forced tokens, the worst of all replicas."""
        chosen = [self.prompts(spec.workload)[index] for index in reference.checked]
        answers = self._all("logprobs", "check", deadline, prompts=chosen, continuations=reference.forced())
        return max((reference.compare(answer["rows"]) for answer in answers), key=lambda one: one.max_logit_error)

    def _move(self, spec: RunSpec, deadline: float, *, guarded: bool) -> tuple[list[str], bool]:
        """Makes the hosts hold the plan; notes, and whether it took another split in place, which `guarded` allows."""
        plan, held = spec.plan, self._held
        limits = {name: getattr(plan.engine, name) or most for name, most in self._limits.items()}
        stays = held is not None and held.layer_counts == plan.layer_counts
        if self._started is None or not self._can_hold(spec, limits) or not (stays or guarded):
            self._start(spec, deadline)
            return [], False
        try:
            if not stays:
                self._note_workers(self._all("repartition", "load", deadline, layers=plan.layer_counts), plan)
            if self._moves(plan):
                self._all("limits", "load", deadline, (), **limits)
        except FleetError as error:
            self._start(spec, deadline)
            return [f"the engine was started anew, since it could not be changed in place: {error}"], False
        self._held = plan
        return [], not stays

    def _can_hold(self, spec: RunSpec, limits: dict[str, int]) -> bool:
        """Whether the hosts can come to hold a plan: they have its stages, room, and settings but the limits."""
        assert self._started is not None
        was, plan = self._started.plan, spec.plan
        assert was.engine is not None
        has_room = self._longest(spec.workload) <= self._longest(self._started.workload)
        if not self._moves(was) or len(was.stages) != len(plan.stages):
            return has_room and was == plan
        stages = tuple(
            one.model_copy(update={"first_layer": other.first_layer, "end_layer": other.end_layer})
            for one, other in zip(was.stages, plan.stages, strict=True)
        )
        settings = was.engine.model_copy(update={name: getattr(plan.engine, name) for name in _LIMITS})
        is_alike = was.model_copy(update={"stages": stages, "engine": settings}) == plan
        return has_room and is_alike and all(limits[name] <= self._limits[name] for name in limits)

    def _moves(self, plan: Plan) -> bool:
        return self.MOVES and not (plan.engine is not None and plan.engine.served)

    def _arguments(self, spec: RunSpec) -> Arguments:
        """What the engine is told by names of its own, beside the split."""
        plan, longest = spec.plan, self._longest(spec.workload)
        told = vllm_arguments(self.model, plan, max_model_len=longest, device_bytes=self.device_bytes)
        served = plan.engine is not None and plan.engine.served
        return {"model": str(self._fleet.folder), "seed": 0, "served": served, **told}

    def _start(self, spec: RunSpec, deadline: float) -> None:
        self._stop()
        plan = spec.plan
        try:
            for replica in range(plan.replicas):
                self._hosts.append(self._host(plan.replica(replica), replica))
            self._started = spec
            answers = self._all("start", "start", deadline, (), layers=plan.layer_counts, **self._arguments(spec))
            self._note_workers(answers, plan)
        except BaseException:
            # An interrupt among them.
            self._stop()
            raise
        self._limits = {name: min(answer[name] or 0 for answer in answers) for name in _LIMITS}
        self._held = plan

    def _note_workers(self, answers: Sequence[Told], plan: Plan) -> None:
        """What the workers say that they hold, against the plan."""
        self._workers = [worker for answer in answers for worker in answer["workers"]]
        for worker in self._workers:
            stage = plan.stages[worker["stage"]]
            held, wanted = (worker["first_layer"], worker["end_layer"]), (stage.first_layer, stage.end_layer)
            if held != wanted:
                text = f"stage {worker['stage']} holds layers {held}: {self.TITLE} did not take the split, {wanted}"
                raise FleetError(Failure(kind=FailureKind.WORKER_ERROR, phase="load", message=text))

    def _all(self, do: str, phase: str, deadline: float, own: Sequence[Told] = (), **args: Any) -> list[Told]:
        """One command to all hosts at once, with what is each one's own."""
        if (say := self._options.get("on_progress")) is not None:
            say(Progress(phase=phase, message=f"{self.TITLE}: {do}"))
        assert self._started is not None
        for replica, host in enumerate(self._hosts):
            host.send(do, phase, self._started.plan.replica(replica), **args, **(own[replica] if own else {}))
        return [host.receive(deadline) for host in self._hosts]

    def _environment(self, plan: Plan) -> dict[str, str]:
        if device_kind(self.devices[0]) == "cuda":
            return _ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": gpus_of(plan, os.environ.get("CUDA_VISIBLE_DEVICES"))}
        allowed, each = sorted(os.sched_getaffinity(0)), cores_of(self.devices[0], self.devices)
        return _ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": cores_of_workers(plan, self.devices, allowed, each)}

    def _host(self, plan: Plan, replica: int) -> EngineHost:
        if (folder := self._options.get("log_dir")) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return EngineHost(
            self._python,
            self._script,
            log=folder / f"{self.NAME}-{replica}.log" if folder is not None else None,
            environment=self._environment(plan),
            hang_timeout_s=self._options.get("hang_timeout_s", 10.0),
        )

    def _longest(self, workload: Workload) -> int:
        """Tokens of the longest request, with the one that is generated when outputs are checked."""
        return 1 + max(map(sum, zip(self.prompt_lens(workload), workload.generated_lens, strict=True)))

    def _stop(self) -> None:
        hosts, self._hosts = self._hosts, []
        self._started = self._held = None
        for host in hosts:
            host.close()

    @classmethod
    def versions_of(cls, python: Path, script: Path | None = None) -> dict[str, str]:
        """Versions of what another Python has; ConfigError where there is no such Python, or it has not this engine, or
        one that the host was not written for, FleetError where it says nothing of itself."""
        script = script or cls.HOST
        host = EngineHost(python, script, log=None, environment=_ENVIRONMENT, hang_timeout_s=HELLO_TIMEOUT_S)
        host.close()
        versions: dict[str, str] = host.hello["versions"]
        wanted = "{}>={},<{}".format(cls.NAME, *(".".join(map(str, bound)) for bound in cls.VERSIONS))
        if cls.NAME not in versions:
            raise ConfigError(f"engine_python: {python} has no {cls.TITLE}; install {wanted} there")
        parts = versions[cls.NAME].split(".")[: len(cls.VERSIONS[0])]
        if not cls.VERSIONS[0] <= tuple(int(part) for part in parts if part.isdecimal()) < cls.VERSIONS[1]:
            raise ConfigError(f"engine_python: {python} has {cls.TITLE} {versions[cls.NAME]}; install {wanted} there")
        return versions

    def _check_usable(self, model: ModelSpec) -> None:
        kind = device_kind(self.devices[0])
        usable = (kind,) if kind in self.NOTES else tuple(self.NOTES)
        if odd := [device for device in self.devices if device_kind(device) not in usable or "/" in device]:
            kinds = " or ".join({"cpu": "CPUs", "cuda": "GPUs"}[name] for name in usable)
            raise ConfigError(
                f"devices: {self.TITLE} is measured on {kinds} of this host alone so far, not on {odd[0]}"
            )
        for name, usual in {"load_format": "auto", "storage_dtype": None, "attention": "auto"}.items():
            if getattr(model, name) != usual:
                raise ConfigError(f"model.{name}={getattr(model, name)}: our runtime's; leave it out for {self.TITLE}")


def with_engine(machine: Machine, versions: Mapping[str, str]) -> Machine:
    """A machine with the engine's packages among its software."""
    packages = machine.software.packages | {f"engine's {name}": version for name, version in versions.items()}
    return machine.model_copy(update={"software": machine.software.model_copy(update={"packages": packages})})
