"""Who runs the two sides of a case: fresh processes for every run, or one running fleet that changes plans.

A fresh process is `pipetune bench`, whose flags and record are older than the gate: so another environment's or an old
revision's pipetune can be one of the sides. Metrics are derived here from the raw record, by one set of formulas for
both.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import ValidationError

from pipetune.bench import metrics
from pipetune.bench.engines.sglang import ENGINES
from pipetune.bench.engines.vllm import with_engine
from pipetune.bench.errors import ConfigError, PlanError, UserError, explain
from pipetune.bench.files import scratch_folder
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Closing
from pipetune.bench.fleet.hosts import LISTEN_VARIABLE, STAY_VARIABLE, dismiss
from pipetune.bench.record import Failure, FailureKind, Machine, Record, timestamp
from pipetune.bench.spec import Value, hosts_of
from pipetune.tuner.config.sources import differences
from pipetune.tuner.gate.python_env import Interpreter, of_python, of_ref
from pipetune.tuner.gate.values import SIDES, Case, Method, Sample, SideName

BLIND_IN_PROCESS = (
    "what differs from process to process (start-up, memory layout, luck): both sides shared one process",
    "what a process of its own would need: memory that one side leaves behind for the other",
)
_START_S = 300.0
"""What starting and loading may take beyond the protocol's own time-out."""
_GOODBYE_S = 10.0
"""What a process that is told to stop has to clean up."""
_TAIL = 2000
_DIE_WITH_GATE = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
os.getppid() == int(sys.argv[1]) or os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Becomes the command behind its parent's process id; the kernel kills it (PR_SET_PDEATHSIG) when that process ends,
and its workers with it."""
_PREFIX, _IN_USE, _OF_PLAN = "pipetune: ", " is in use by ", "plan."
"""How the command line begins a message, what `bench.fleet.locks` says of a GPU that others hold, and how it goes on
where a plan is not for the model."""


class SideRunner(contextlib.AbstractContextManager["SideRunner"], Protocol):
    """Runs sides, once each time it is asked."""

    method: Method
    cannot_see: tuple[str, ...]

    def prepare(self, deadline: float) -> dict[SideName, Machine | None]:
        """Gets both sides ready by a deadline of the monotonic clock, and says what those of the first case run on.
        UserError: sides that cannot be started as they were asked for; FleetError: workers that do not start;
        OutOfTime: not ready by the deadline."""

    def run(self, case: Case, name: SideName, *, check: bool, timeout_s: float | None = None) -> Sample:
        """One unit, its output compared with the unsplit model's where that is to be checked, given up beyond the
        timeout; None is what the protocol lets a run take."""


class FreshProcesses(Closing):
    """Every run in processes of its own."""

    method: Method = "fresh_processes"
    cannot_see: tuple[str, ...] = ()

    def __init__(self, cases: tuple[Case, ...]) -> None:
        """Raises a ConfigError for sides over several hosts that differ in what each of these hosts has of its own."""
        sides = [side for case in cases for side in (case.baseline, case.candidate)]
        self._hosts = tuple({host: None for side in sides for host in hosts_of(side.devices)})
        for side in sides if self._hosts != ("",) else ():
            if side.python or side.ref or side.env or side.engine_python or "" in hosts_of(side.devices):
                raise ConfigError(
                    f"{side.name}: on several hosts sides differ in plans, dtypes and settings alone; leave out "
                    "its Python, revision and environment, and name the hosts of all devices, as in host0/cpu:0"
                )
        self._case = cases[0]
        self._interpreters: dict[SideName, Interpreter] = {}
        self._machines: dict[SideName, Machine | None] = {}

    def prepare(self, deadline: float) -> dict[SideName, Machine | None]:
        """Finds both sides' Pythons, which say what they run on, and builds what is missing by the deadline."""
        for name in SIDES:
            side = self._case.side(name)
            if side.ref is not None:
                found = of_ref(side.ref, side.env, deadline=deadline)
            else:
                found = of_python(side.python, side.env) if side.python is not None else Interpreter(env=side.env)
            self._interpreters[name] = found
        self._machines = {name: one.machine() for name, one in self._interpreters.items()}
        for name, machine in self._machines.items():
            side = self._case.side(name)
            if side.engine_python is not None and side.plan.engine is not None:
                versions = ENGINES[side.plan.engine.name].versions_of(Path(side.engine_python))
                self._machines[name] = with_engine(machine, versions) if machine is not None else None
        return self._machines

    def close(self) -> None:
        """Sends other hosts home, which stayed from process to process."""
        if self._machines and self._hosts != ("",) and LISTEN_VARIABLE in os.environ:
            dismiss(os.environ[LISTEN_VARIABLE], self._hosts)

    def run(self, case: Case, name: SideName, *, check: bool, timeout_s: float | None = None) -> Sample:
        """One run in processes that start for it and end with it."""
        machine = self._machines[name]
        sample = run_fresh(case, name, self._interpreters[name], check=check, timeout_s=timeout_s)
        here = machine.hardware.hardware_id if machine is not None else None
        sample = sample.model_copy(update={"hardware_id": here})
        if check and sample.is_measured and not sample.checked:
            self.cannot_see += (f"whether the output of the {name} of {case.name} is right: it could not be checked",)
        return sample


class RunningFleet(Closing):
    """All runs in one fleet, which moves the layers that change hands."""

    method: Method = "running_fleet"
    _experiment: Experiment

    def __init__(self, cases: tuple[Case, ...]) -> None:
        """Raises a ConfigError where the sides, or the cases, differ in more than plans and workloads."""
        first = cases[0].baseline
        for case in cases:
            for side in (case.baseline, case.candidate):
                other = [f"model.{line}" for line in differences(first.model, side.model)]
                if side.python or side.ref or side.env or side.engine_python:
                    other.append("software or environment of its own")
                if side.devices != first.devices:
                    other.append(f"devices: {', '.join(first.devices)} → {', '.join(side.devices)} (see --devices)")
                if other:
                    raise ConfigError(
                        f"--rounds-in-process: one running fleet can compare plans alone, and the {side.name} of "
                        f"{case.name} has {'; '.join(other)}; leave it out, and all run in fresh processes"
                    )
        self.cannot_see: tuple[str, ...] = BLIND_IN_PROCESS
        self._cases = cases
        self._stack = contextlib.ExitStack()
        self._references: dict[str, Path] = {}

    def prepare(self, deadline: float) -> dict[SideName, Machine | None]:
        """Starts the fleet, which has bounds of its own; raises as `SideRunner.prepare`."""
        side = self._cases[0].baseline
        hang_timeout_s = max(case.protocol.hang_timeout_s for case in self._cases)
        folder = self._stack.enter_context(scratch_folder())
        self._experiment = self._stack.enter_context(
            Experiment.start(side.model, side.devices, hang_timeout_s=hang_timeout_s)
        )
        for case in self._cases:
            if case.protocol.check_outputs:
                path = folder / f"{len(self._references)}.safetensors"
                missing = self._experiment.make_reference(path, case.workload, case.protocol)
                if missing is None:
                    self._references[case.name] = path
                else:
                    self.cannot_see += (f"whether the output of {case.name} is right: {missing.message}",)
        return dict.fromkeys(SIDES, self._experiment.fleet.machine)

    def close(self) -> None:
        """Ends the fleet."""
        self._stack.close()

    def run(self, case: Case, name: SideName, *, check: bool, timeout_s: float | None = None) -> Sample:
        """One run in the running fleet."""
        reference = self._references.get(case.name) if check else None
        longest_s = min(case.protocol.timeout_s, timeout_s or math.inf)
        update = {"check_outputs": reference is not None, "timeout_s": longest_s}
        if reference is not None:
            self._experiment.fleet.use_reference(reference, case.workload)
        protocol = case.protocol.model_copy(update=update)
        return sample_of(self._experiment.measure(case.side(name).plan, case.workload, protocol))


def run_fresh(
    case: Case, name: SideName, interpreter: Interpreter, *, check: bool, timeout_s: float | None = None
) -> Sample:
    """Starts a side, measures it, and ends it, as `SideRunner.run` asks. PlanError: this very pipetune refuses the
    plan, so that it cannot be for that model whoever runs it; ConfigError: it refuses the baseline's model, prompts or
    devices, so that there is nothing to compare with."""
    longest_s = min(_START_S + 2 * case.protocol.timeout_s, timeout_s or math.inf)
    with scratch_folder() as folder:
        started_at, began = timestamp(), time.monotonic()
        found = _run(case, name, interpreter, folder, check=check, timeout_s=longest_s)
        took_s = round(time.monotonic() - began, 3)
    common: dict[str, Any] = {"started_at": started_at, "wall_s": took_s}
    if isinstance(found, Record):
        return sample_of(found).model_copy(update={**common, "recorded_hardware_id": found.hardware_id})
    if isinstance(found, Failure):
        return Sample(failure=found, **common)
    return Sample(not_comparable=found, **common)


def sample_of(record: Record) -> Sample:
    """What the gate keeps of a run of this pipetune."""
    common: dict[str, Any] = record.model_dump(include={"hardware_id", "started_at", "wall_s"})
    outcome = record.result
    if isinstance(outcome, Failure):
        return Sample(failure=outcome, **common)
    return Sample(
        metrics=metrics.derive(outcome),
        durations_s=tuple(run.duration_s for run in outcome.iterations),
        steady=outcome.steady,
        disturbances=outcome.telemetry.disturbances,
        checked=outcome.check is not None,
        **common,
    )


def _run(
    case: Case, name: SideName, interpreter: Interpreter, folder: Path, *, check: bool, timeout_s: float
) -> Record | Failure | str:
    """A record, or why there is none: the side failed; in words, it did not, but the run says nothing of it."""
    side = case.side(name)
    config, plan, output = folder / "config.yaml", folder / "plan.json", folder / "records.jsonl"
    model = _given(side.model) | {"name": side.model.name}
    trusted = model.pop("trust_remote_code", False)
    asked = {"workload": _given(case.workload), "protocol": _given(case.protocol)}
    config.write_text(yaml.safe_dump({"model": model, **asked, "devices": list(side.devices)}), encoding="utf-8")
    plan.write_text(side.plan.model_dump_json(exclude_defaults=True), encoding="utf-8")
    command = [interpreter.python, "-P", "-m", interpreter.module, "bench", "--config", str(config)]
    command += ["--plan", str(plan), "--check" if check else "--no-check"]
    command += ["--no-progress", "--json", "--output", str(output)]
    command += ["--trust-remote-code"] if trusted else []
    command += ["--engine-python", side.engine_python] if side.engine_python is not None else []
    try:
        # Over several hosts those that have joined come back for the next side.
        stay = {STAY_VARIABLE: "1"} if hosts_of(side.devices) != ("",) else {}
        done = _finish(command, interpreter.environment | stay, timeout_s)
    except subprocess.TimeoutExpired:
        return Failure(kind=FailureKind.TIMEOUT, message=f"its process did not end within {timeout_s:.0f} s")
    except OSError as error:
        return Failure(kind=FailureKind.WORKER_DIED, message=f"its process cannot be started: {error}", phase="start")
    if done.returncode == 130:
        raise KeyboardInterrupt
    if output.exists() and output.stat().st_size:
        return _read(output, case, name)
    return _nothing(done, name, interpreter)


def _finish(command: list[str], environment: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end. Whatever comes between, a Ctrl-C for one, leaves no process behind. A session of its
    own keeps the terminal's Ctrl-C from it, so that it is told once, by us, and can clean up."""
    command = [sys.executable, "-ISc", _DIE_WITH_GATE, str(os.getpid()), *command]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            try:
                said, complained = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                # It may have ended while this process was stopped itself.
                if process.poll() is None:
                    raise
                said, complained = process.communicate()
        except BaseException:
            try:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=_GOODBYE_S)
            finally:
                # Also where a second Ctrl-C ends the waiting.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


def _given(value: Value) -> dict[str, Any]:
    """Without what is at its default, which an old revision may not know."""
    return value.model_dump(mode="json", exclude_defaults=True)


def _nothing(done: subprocess.CompletedProcess[str], name: SideName, interpreter: Interpreter) -> Failure | str:
    """What a process says that left no record, such as that a plan does not fit into memory."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return Failure.model_validate(json.loads(done.stdout)["failure"])
    said = (done.stderr.strip() or done.stdout.strip())[-_TAIL:]
    last = said.splitlines()[-1] if said else "it said nothing"
    message = last.removeprefix(_PREFIX)
    if done.returncode == UserError.exit_code and _IN_USE in message:
        return f"it did not get its GPU: {message}"
    ours = interpreter == Interpreter(env=interpreter.env)
    of_plan = message.startswith(_OF_PLAN)
    # What refuses the candidate alone is a finding.
    if done.returncode == UserError.exit_code and ours and (of_plan or name == "baseline"):
        raise (PlanError if of_plan else ConfigError)(f"{name}: {message}")
    return Failure(
        kind=FailureKind.WORKER_ERROR,
        message=f"pipetune bench ended with exit code {done.returncode} and left no record: {last}",
        detail=said or None,
    )


def _read(output: Path, case: Case, name: SideName) -> Record | str:
    """The last record: others stand before it where a run was repeated. An old revision, whose defaults are not ours,
    may have done other work."""
    try:
        record = Record.model_validate_json(output.read_text(encoding="utf-8").splitlines()[-1])
    except ValidationError as error:
        return (
            f"its record is of another version than this pipetune reads: {explain(error)}; compare with a "
            "revision whose records it reads"
        )
    assert record.spec is not None, "a plan was measured"
    known = {"prompts_file": None, "prompts_sha256": None}
    alike = {"check_outputs": case.protocol.check_outputs}
    other = [
        *differences(case.side(name).plan, record.spec.plan),
        *differences(case.workload.model_copy(update=known), record.spec.workload.model_copy(update=known)),
        *differences(case.protocol, record.spec.protocol.model_copy(update=alike)),
    ]
    if not other:
        return record
    return (
        f"it did other work than it was asked for, by other defaults: {other[0]}; give that by a flag or a "
        "--config, as a value that is no default here: both sides are told it then"
    )
