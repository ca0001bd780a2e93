"""Unpatched vLLM as an engine: plans are run by it, in an environment of its own, and measured as ours are.

Model, machine, prompts and the reference are a fleet's of one worker, which is ended before the engine runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, Unpack

from pipetune.bench.engines.host import EngineHost
from pipetune.bench.engines.outcome import Pass, TimedRun
from pipetune.bench.engines.reference import EngineReference
from pipetune.bench.errors import ConfigError, FleetError, PlanError
from pipetune.bench.fleet.fleet import Closing, Fleet
from pipetune.bench.fleet.supervisor import FleetOptions, Progress
from pipetune.bench.machine.hardware import cores_of, device_bytes
from pipetune.bench.machine.sensors import CpuSensors, family
from pipetune.bench.machine.telemetry import read_telemetry
from pipetune.bench.memory import check_plan, stage_bytes
from pipetune.bench.record import Failure, FailureKind, Measurement, OutputCheck
from pipetune.bench.spec import (
    EffectivePlan,
    EngineSettings,
    ModelSpec,
    Plan,
    Protocol,
    RunSpec,
    StagePlan,
    Workload,
    device_kind,
)
from pipetune.bench.worker.acceptance import is_steady, wrong_output

HOST = Path(__file__).parent / "vllm_host" / "pipetune_vllm_host.py"
VERSIONS = ((0, 32), (0, 33))
"""From the first of them up to the second, which is left out: what the host was tried with."""
KV_BLOCK = 128
"""Tokens of a block of KV cache on CPUs."""
_LEAD_S = 0.05
"""The hosts of all replicas begin together, so long after they were told to."""


class VllmEngine(Closing):
    """vLLM on some CPU devices; one host a replica, kept over plans that it can move to in place."""

    def __init__(
        self,
        model: ModelSpec,
        devices: Sequence[str],
        *,
        python: Path,
        baseline: EngineSettings | None = None,
        script: Path = HOST,
        start_fleet: Callable[..., Fleet] | None = None,
        **options: Unpack[FleetOptions],
    ) -> None:
        self.devices = tuple(devices)
        _check_usable(model, self.devices)
        self._python, self._script, self._options = python, script, options
        self._baseline_settings = baseline or EngineSettings()
        self._hosts: list[EngineHost] = []
        self._started: Plan | None = None
        """As the hosts were started with; `_held` is what they hold now."""
        self._held: Plan | None = None
        self._limits: dict[str, int] = {}
        self._kv_bytes: list[int] = []
        self._baseline_bytes: list[int] = []
        self._model_len = 0
        self._prompts: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._reference: EngineReference | None = None
        versions = self._look()
        self._fleet = (start_fleet or Fleet.start)(model, self.devices[:1], **options)
        self.model, self.shape, self.worker_env = self._fleet.model, self._fleet.shape, self._fleet.worker_env
        self.device_bytes = device_bytes(self.devices)
        software = self._fleet.machine.software
        packages = {**software.packages, **{f"engine's {name}": version for name, version in versions.items()}}
        self.machine = self._fleet.machine.model_copy(
            update={"software": software.model_copy(update={"packages": packages})}
        )

    @classmethod
    def start(cls, model: ModelSpec, devices: Sequence[str], *, python: Path, **options: Unpack[FleetOptions]) -> Self:
        """Looks at vLLM and the model.

        Args:
            python: of an environment that has vLLM; pipetune need not be there.

        Raises:
            ConfigError: devices or settings that vLLM is not driven with, no such Python, or another version of vLLM.
            ModelError: the model cannot be found, read or split.
            FleetError: workers that do not start.
        """
        return cls(model, devices, python=python, **options)

    def prompts(self, workload: Workload) -> tuple[tuple[int, ...], ...]:
        """Token ids of every prompt; raises as `Fleet.prompts` does."""
        key = workload.digest()
        if key not in self._prompts:
            self._prompts[key] = self._fleet.prompts(workload)
        return self._prompts[key]

    def prompt_lens(self, workload: Workload) -> tuple[int, ...]:
        """Length of every prompt in tokens; raises as `prompts` does."""
        return tuple(map(len, self.prompts(workload)))

    def resolve(self, plan: Plan, workload: Workload) -> EffectivePlan | Failure:
        """The plan, or why it does not fit: its stages beside their KV cache, and in that a single request.

        Raises:
            ConfigError: prompts that cannot be used, or a workload that vLLM is not measured with.
            PlanError: the plan is not for this engine, does not suit the model, or names a device that is not there.
        """
        _check_workload(workload)
        check_plan(self.shape, plan)
        if plan.engine is None:
            raise PlanError("plan.engine: there is none, and vLLM is to run the plan; give engine: {name: vllm}")
        for device in (one for own in plan.devices for one in plan.shards(own)):
            if device not in self.devices:
                raise PlanError(f"plan.stages: {device} is not among the devices {', '.join(self.devices)}")
        length = -(-self._model_length(workload) // KV_BLOCK) * KV_BLOCK
        kv, width = plan.engine.kv_cache_memory_bytes, plan.engine.tensor_parallel_size
        for index, stage in enumerate(plan.stages):
            layers = self.shape.layers[stage.first_layer : stage.end_layer]
            least = sum(layer.kv_bytes_per_token for layer in layers) * length // width
            weights = stage_bytes(self.shape, plan, index, prompt_len=length, output_len=0).weights // width
            cap = min(stage.cap_bytes(self.device_bytes[one]) for one in plan.devices[index :: len(plan.stages)])
            for wanted, had, what in (
                (least, kv or least, "for the KV cache of one request"),
                (weights + (kv or least), cap, "for its weights and its KV cache"),
            ):
                if wanted > had:
                    text = f"stage {index} on {stage.device} needs {wanted / 2**20:.0f} MiB {what} and may take "
                    text += f"{had / 2**20:.0f} MiB; give it fewer layers or change plan.engine.kv_cache_memory_bytes"
                    return Failure(
                        kind=FailureKind.OVER_MEMORY_CAP,
                        stage=index,
                        device=stage.device,
                        phase="plan",
                        message=text,
                        bytes_wanted=wanted,
                        bytes_had=had,
                    )
        return EffectivePlan(plan=plan, in_flight=len(plan.stages))

    def make_reference(self, path: Path, workload: Workload, protocol: Protocol) -> Failure | None:
        """Asks the unsplit model, as transformers has it, for what outputs are compared with."""
        self._stop()
        failure = self._fleet.make_reference(path, workload, protocol)
        if failure is None:
            self._reference = EngineReference.load(path)
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
        """Measures the engine at its defaults on one device, un-pipelined, with `batch_size` sequences at once."""
        stage = StagePlan(device=self.devices[0], first_layer=0, end_layer=self.shape.num_layers)
        settings = self._baseline_settings.model_copy(update={"max_num_seqs": batch_size})
        plan = Plan(stages=(stage,), micro_batch_size=1, engine=settings)
        outcome = self.measure(RunSpec(model=self.model, workload=workload, plan=plan, protocol=protocol))
        is_measured = isinstance(outcome, Measurement)
        return outcome.model_copy(update={"batch_size": batch_size}) if is_measured else outcome

    def measure(self, spec: RunSpec, effective: EffectivePlan | None = None) -> Measurement | Failure:
        """Moves to the plan, in place where that can be, checks its output, warms up and measures."""
        known = self.resolve(spec.plan, spec.workload)
        if isinstance(known, Failure):
            return known
        self._fleet.interrupt()
        deadline = time.monotonic() + spec.protocol.timeout_s
        try:
            return self._measure(spec, deadline)
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
        plan, protocol, began = spec.plan, spec.protocol, time.monotonic()
        prompts = self.prompts(spec.workload)
        reference = self._reference if protocol.check_outputs else None
        notes, in_place = self._move(spec, deadline, guarded=reference is not None)
        load_s, began, check = time.monotonic() - began, time.monotonic(), None
        if reference is not None:
            check = self._compare(reference, prompts, plan, deadline)
            wrong = wrong_output(check, scored=True)
            if wrong is not None and in_place:
                notes.append("re-partitioned in place its output was wrong; the engine was started anew")
                self._stop()
                self._move(spec, deadline, guarded=False)
                check = self._compare(reference, prompts, plan, deadline)
                wrong = wrong_output(check, scored=True)
            if wrong is not None:
                return wrong
        check_s = time.monotonic() - began if check is not None else None
        warmup: list[float] = []
        wanted = protocol.num_iters_warmup
        while len(warmup) < wanted:
            warmup.append(self._pass(spec, prompts, deadline, "warmup").duration_s)
            unlike = len(warmup) == wanted >= 2 and not is_steady(warmup[-2:], protocol.steady_tolerance)
            wanted += unlike and wanted < protocol.max_warmup
        sensors = CpuSensors(plan.devices)
        before = sensors.state()
        sensors.start(family(below=True))
        passes = [self._pass(spec, prompts, deadline, "measure") for _ in range(protocol.num_iters)]
        lens = self.prompt_lens(spec.workload)
        run = TimedRun(
            spec, lens, self.shape, self.device_bytes, passes, self._kv_bytes, self._baseline_bytes, reference, check
        )
        outcome = run.outcome()
        if isinstance(outcome, Failure):
            return outcome
        durations = [*(warmup[-1:] if len(passes) == 1 else []), *(one.duration_s for one in passes)]
        return outcome.model_copy(
            update={
                "telemetry": read_telemetry(sensors, before),
                "load_s": round(load_s, 4),
                "check_s": None if check_s is None else round(check_s, 4),
                "warmup_s": tuple(round(one, 6) for one in warmup),
                "steady": is_steady(durations, protocol.steady_tolerance),
                "notes": (*notes, *outcome.notes),
            }
        )

    def _pass(self, spec: RunSpec, prompts: Sequence[Sequence[int]], deadline: float, phase: str) -> Pass:
        """All prompts once, over all replicas."""
        self._say(phase, "running")
        lens, replicas = spec.workload.generated_lens, spec.plan.replicas
        sampling: dict[str, Any] = {"temperature": 0.0}
        if (how := spec.workload.sampling) is not None:
            sampling = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "seed": how.seed}
        shares = [range(replica, len(prompts), replicas) for replica in range(replicas)]
        start_at = time.monotonic() + _LEAD_S
        answers = self._all(
            "run",
            phase,
            deadline,
            [
                {
                    "prompts": [prompts[index] for index in share],
                    "output_lens": [lens[index] for index in share],
                    "sampling": sampling,
                    "start_at": start_at,
                    "probe": True,
                }
                for share in shares
            ],
        )
        return Pass(shares, start_at, answers)

    def _compare(
        self, reference: EngineReference, prompts: Sequence[Sequence[int]], plan: Plan, deadline: float
    ) -> OutputCheck:
        """The worst of all replicas."""
        self._say("check", "forced tokens")
        chosen = {"prompts": [prompts[index] for index in reference.checked], "continuations": reference.forced()}
        answers = self._all("logprobs", "check", deadline, [chosen] * plan.replicas)
        return max((reference.compare(answer["rows"]) for answer in answers), key=lambda one: one.max_logit_error)

    def _move(self, spec: RunSpec, deadline: float, *, guarded: bool) -> tuple[list[str], bool]:
        """Makes the hosts hold the plan; notes, and whether it took another split in place, which `guarded` allows."""
        plan, notes = spec.plan, []
        assert plan.engine is not None
        is_other_split = self._held is not None and self._held.layer_counts != plan.layer_counts
        if self._started is None or not self._can_hold(spec) or (is_other_split and not guarded):
            self._stop()
            self._start(spec, deadline)
            return notes, False
        try:
            if is_other_split:
                self._say("load", f"another split in place: {plan.describe()}")
                answers = self._all("repartition", "load", deadline, [{"layers": plan.layer_counts}] * plan.replicas)
                self._note_stages(answers, plan)
            self._all("limits", "load", deadline, [self._limits_of(plan.engine)] * plan.replicas)
        except FleetError as error:
            self._stop()
            notes.append(f"the engine was started anew, since it could not be changed in place: {error}")
            self._start(spec, deadline)
            return notes, False
        self._held = plan
        return notes, is_other_split

    def _can_hold(self, spec: RunSpec) -> bool:
        """Whether the hosts can come to hold a plan without a new start."""
        assert self._started is not None
        if self._model_length(spec.workload) > self._model_len:
            return False
        one, other = (_less(plan) for plan in (self._started, spec.plan))
        assert spec.plan.engine is not None
        wanted = self._limits_of(spec.plan.engine)
        return one == other and all(wanted[name] <= self._limits[name] for name in wanted)

    def _limits_of(self, settings: EngineSettings) -> dict[str, int]:
        """Limits of a plan; what it leaves to the engine, the engine has told if it was started so."""
        return {name: getattr(settings, name) or most for name, most in self._limits.items()}

    def _start(self, spec: RunSpec, deadline: float) -> None:
        plan = spec.plan
        assert plan.engine is not None
        self._say("start", f"starting vLLM: {plan.describe()}")
        length = self._model_length(spec.workload)
        settings = plan.engine.model_dump(exclude={"name"}, exclude_none=True)
        if plan.engine.kv_cache_memory_bytes is None:
            share = min(stage.cap_bytes(self.device_bytes[stage.device]) for stage in plan.stages)
            settings["gpu_memory_utilization"] = round(share / sum(self.device_bytes.values()), 4)
        settings |= {
            "model": str(self._fleet.folder),
            "dtype": self.model.dtype,
            "trust_remote_code": self.model.trust_remote_code,
            "max_model_len": length,
            "seed": 0,
            "layers": plan.layer_counts,
        }
        self._hosts = []
        try:
            for replica in range(plan.replicas):
                self._hosts.append(self._host(plan.replica(replica), replica))
            self._started = plan
            answers = self._all("start", "start", deadline, [settings] * plan.replicas)
        except BaseException:
            # An interrupt among them.
            self._stop()
            raise
        self._limits = {name: min(answer[name] for answer in answers) for name in _LIMITS}
        self._note_stages(answers, plan)
        self._held, self._model_len = plan, length

    def _note_stages(self, answers: Sequence[dict[str, Any]], plan: Plan) -> None:
        """What the workers say that they hold, against the plan."""
        self._kv_bytes, self._baseline_bytes = [], []
        for answer in answers:
            for worker in answer["stages"]:
                stage = plan.stages[worker["stage"]]
                held, wanted = (worker["first_layer"], worker["end_layer"]), (stage.first_layer, stage.end_layer)
                if held != wanted:
                    text = f"stage {worker['stage']} holds layers {held} and not {wanted}: vLLM did not take the split"
                    raise FleetError(Failure(kind=FailureKind.WORKER_ERROR, phase="load", message=text))
                self._kv_bytes.append(worker["kv_bytes"])
                self._baseline_bytes.append(worker["baseline_bytes"])

    def _all(self, do: str, phase: str, deadline: float, args: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One command to all hosts at once."""
        assert self._started is not None
        for replica, (host, own) in enumerate(zip(self._hosts, args, strict=True)):
            host.send(do, phase, self._started.replica(replica), **own)
        return [host.receive(deadline) for host in self._hosts]

    def _host(self, plan: Plan | None, replica: int) -> EngineHost:
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        if plan is not None:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
                ",".join(map(str, self._cores(one))) for own in plan.devices for one in plan.shards(own)
            )
        folder = self._options.get("log_dir")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return EngineHost(
            self._python,
            self._script,
            log=folder / f"vllm-{replica}.log" if folder is not None else None,
            environment=environment,
            hang_timeout_s=self._options.get("hang_timeout_s", 10.0),
        )

    def _cores(self, device: str) -> list[int]:
        """The cores of a CPU device: an equal share, in order."""
        allowed, count = sorted(os.sched_getaffinity(0)), cores_of(device, self.devices)
        first = self.devices.index(device) * count
        return [allowed[(first + place) % len(allowed)] for place in range(count)]

    def _look(self) -> dict[str, str]:
        """Versions of what the other Python has."""
        host = self._host(None, 0)
        host.close()
        versions: dict[str, str] = host.hello["versions"]
        first, last = (".".join(map(str, version)) for version in VERSIONS)
        if "vllm" not in versions:
            raise ConfigError(f"engine_python: {self._python} has no vLLM; install vllm>={first},<{last} there")
        numbers = tuple(int(part) for part in versions["vllm"].split(".")[:2] if part.isdecimal())
        if not VERSIONS[0] <= numbers < VERSIONS[1]:
            raise ConfigError(
                f"engine_python: {self._python} has vLLM {versions['vllm']}, which is not >={first},<{last}; "
                "install one of these there"
            )
        return versions

    def _model_length(self, workload: Workload) -> int:
        """Longest request, with the token that the check takes beside."""
        pairs = zip(self.prompts(workload), workload.generated_lens, strict=True)
        return 1 + max(len(prompt) + more for prompt, more in pairs)

    def _stop(self) -> None:
        hosts, self._hosts = self._hosts, []
        self._started = self._held = None
        for host in hosts:
            with suppress(OSError):
                host.close()

    def _say(self, phase: str, message: str) -> None:
        if (say := self._options.get("on_progress")) is not None:
            say(Progress(phase=phase, message=message))


_LIMITS = ("max_num_batched_tokens", "max_num_seqs")


def _less(plan: Plan) -> Plan:
    """A plan without what can be changed in place: where layers are cut, and the scheduler's limits."""
    ends = range(1, len(plan.stages) + 1)
    stages = tuple(
        stage.model_copy(update={"first_layer": end - 1, "end_layer": end})
        for stage, end in zip(plan.stages, ends, strict=True)
    )
    engine = plan.engine and plan.engine.model_copy(update=dict.fromkeys(_LIMITS))
    return plan.model_copy(update={"stages": stages, "engine": engine})


def _check_usable(model: ModelSpec, devices: Sequence[str]) -> None:
    if odd := [device for device in devices if device_kind(device) != "cpu" or "/" in device]:
        raise ConfigError(f"devices: vLLM is measured on CPUs of this host alone so far, and {odd[0]} is another")
    odd_settings = {
        "load_format": model.load_format == "dummy",
        "storage_dtype": model.storage_dtype is not None,
        "attention": model.attention != "auto",
    }
    if named := [name for name, is_odd in odd_settings.items() if is_odd]:
        raise ConfigError(f"model.{named[0]}: {getattr(model, named[0])} is pipetune's own runtime's; leave it out")


def _check_workload(workload: Workload) -> None:
    if workload.kind == "score" or workload.arrivals is not None:
        what = "kind=score" if workload.kind == "score" else "arrivals"
        raise ConfigError(f"workload.{what}: vLLM is measured generating for prompts given at once so far")
