"""Who runs the two sides of a case: fresh processes for every run, or one running fleet that changes plans."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from bench.errors import ConfigError, FleetError
from bench.record import Failure, Machine, Outcome
from bench.spec import Protocol as RunProtocol
from bench.spec import RunSpec
from tuner import locks
from tuner.gate import interpreter
from tuner.gate.side import run_fresh, sample_of, timed
from tuner.gate.values import SIDES, Case, Method, Sample, Side, SideName

if TYPE_CHECKING:
    from bench.launch import Fleet

BLIND_IN_PROCESS = (
    "what differs from process to process (start-up, memory layout, luck): both sides shared one process",
    "what a process of its own would need: memory that one side leaves behind for the other",
)


class Contenders(Protocol):
    """Runs sides, once each time it is asked."""

    method: Method
    cannot_see: tuple[str, ...]

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def machine(self, name: SideName) -> Machine | None:
        """What a side runs on, of the first case."""
        ...

    def run(self, case: Case, name: SideName, *, check: bool) -> Sample:
        """One unit."""
        ...


class FreshProcesses:
    """Every run in processes of its own."""

    method: Method = "fresh_processes"
    cannot_see: tuple[str, ...] = ()

    def __init__(self, cases: tuple[Case, ...]) -> None:
        """
        Raises:
            ConfigError: an environment that cannot be used, a revision that cannot be built.
        """
        self._interpreters: dict[SideName, interpreter.Interpreter] = {
            name: interpreter_of(cases[0].side(name)) for name in SIDES
        }
        self._machines: dict[SideName, Machine | None] = {}

    def __enter__(self) -> Self:
        self._machines = {name: one.machine() for name, one in self._interpreters.items()}
        return self

    def __exit__(self, *exit_info: object) -> None: ...

    def machine(self, name: SideName) -> Machine | None:
        return self._machines[name]

    def run(self, case: Case, name: SideName, *, check: bool) -> Sample:
        machine = self._machines[name]
        hardware_id = machine.hardware.hardware_id if machine is not None else None
        return run_fresh(case, name, self._interpreters[name], hardware_id=hardware_id, check=check)


class RunningFleet:
    """All runs of a case in one fleet, which moves the layers that change hands."""

    method: Method = "running_fleet"
    cannot_see: tuple[str, ...] = BLIND_IN_PROCESS

    def __init__(self, cases: tuple[Case, ...]) -> None:
        """
        Raises:
            ConfigError: the sides differ in more than their plans.
        """
        for case in cases:
            for side in (case.baseline, case.candidate):
                alike = side.model == case.baseline.model and side.devices == case.baseline.devices
                if side.python or side.ref or side.env or not alike:
                    raise ConfigError(
                        "--rounds-in-process: one running fleet can compare plans of one model on the same devices; the "
                        f"sides of {case.name} differ in more than that: leave it out, and they run in fresh processes"
                    )
        self._cases = cases
        self._stack = ExitStack()
        self._fleets: dict[str, Fleet] = {}

    def __enter__(self) -> Self:
        from bench.launch import Fleet

        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipetune-gate-")))
            for case in self._cases:
                fleet = stack.enter_context(
                    Fleet.start(
                        case.baseline.model, case.baseline.devices, hang_timeout_s=case.protocol.hang_timeout_s
                    )
                )
                stack.enter_context(locks.hold_gpus(fleet.devices, fleet.machine.hardware.gpus))
                if case.protocol.check_outputs:
                    failure = fleet.make_reference(
                        folder / f"{case.name}.safetensors", case.workload, case.protocol
                    )
                    if failure is not None:
                        raise FleetError(failure)
                self._fleets[case.name] = fleet
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def machine(self, name: SideName) -> Machine | None:
        return self._fleets[self._cases[0].name].machine

    def run(self, case: Case, name: SideName, *, check: bool) -> Sample:
        fleet = self._fleets[case.name]
        protocol = case.protocol.model_copy(update={"check_outputs": check})
        outcome, took_s, started_at = timed(lambda: _measure(fleet, case, name, protocol))
        return sample_of(
            outcome, hardware_id=fleet.machine.hardware.hardware_id, started_at=started_at, wall_s=took_s
        )


def interpreter_of(side: Side) -> interpreter.Interpreter:
    """How a side's processes are started.

    Raises:
        ConfigError: an environment that cannot be used, a revision that cannot be built.
    """
    if side.ref is not None:
        return interpreter.of_ref(side.ref, side.env)
    if side.python is not None:
        return interpreter.of_python(side.python, side.env)
    return interpreter.own(side.env)


def _measure(fleet: Fleet, case: Case, name: SideName, protocol: RunProtocol) -> Outcome:
    side = case.side(name)
    resolved = fleet.resolve(side.plan, case.workload)
    if isinstance(resolved, Failure):
        return resolved
    return fleet.measure(
        RunSpec(model=fleet.model, workload=case.workload, plan=side.plan, protocol=protocol), resolved
    )
