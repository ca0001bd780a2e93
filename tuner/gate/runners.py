"""Who runs the two sides of a case: fresh processes for every run, or one running fleet that changes plans."""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from pipetune.bench.errors import ConfigError
from pipetune.bench.record import Machine
from pipetune.tuner.gate import python_env
from pipetune.tuner.gate.fresh_process import run_fresh, sample_of
from pipetune.tuner.gate.values import SIDES, Case, Method, Sample, Side, SideName
from pipetune.tuner.study.diff import differences

if TYPE_CHECKING:
    from pipetune.bench.fleet.experiment import Experiment

BLIND_IN_PROCESS = (
    "what differs from process to process (start-up, memory layout, luck): both sides shared one process",
    "what a process of its own would need: memory that one side leaves behind for the other",
)


class SideRunner(Protocol):
    """Runs sides, once each time it is asked."""

    method: Method
    cannot_see: tuple[str, ...]

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def prepare(self, deadline: float) -> None:
        """Gets both sides ready to run; that may take minutes.

        Args:
            deadline: by the monotonic clock.

        Raises:
            UserError: sides that cannot be started as they were asked for.
            FleetError: workers that do not start.
            OutOfTime: they are not ready by the deadline.
        """
        ...

    def machine(self, name: SideName) -> Machine | None:
        """What a side runs on, of the first case."""
        ...

    def run(self, case: Case, name: SideName, *, check: bool, timeout_s: float | None = None) -> Sample:
        """One unit.

        Args:
            check: whether its output is compared with the unsplit model's.
            timeout_s: beyond which it is given up; None is what the protocol lets a run take.
        """
        ...


class FreshProcesses:
    """Every run in processes of its own."""

    method: Method = "fresh_processes"
    cannot_see: tuple[str, ...] = ()

    def __init__(self, cases: tuple[Case, ...]) -> None:
        self._case = cases[0]
        self._interpreters: dict[SideName, python_env.Interpreter] = {}
        self._machines: dict[SideName, Machine | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_info: object) -> None: ...

    def prepare(self, deadline: float) -> None:
        """Finds both sides' Pythons, and builds what is missing by the deadline."""
        self._interpreters = {name: interpreter_of(self._case.side(name), deadline) for name in SIDES}
        self._machines = {name: one.machine() for name, one in self._interpreters.items()}

    def machine(self, name: SideName) -> Machine | None:
        """The machine as that side's own pipetune sees it."""
        return self._machines[name]

    def run(self, case: Case, name: SideName, *, check: bool, timeout_s: float | None = None) -> Sample:
        """One run in processes that start for it and end with it."""
        machine = self._machines[name]
        hardware_id = machine.hardware.hardware_id if machine is not None else None
        sample = run_fresh(
            case, name, self._interpreters[name], hardware_id=hardware_id, check=check, timeout_s=timeout_s
        )
        if check and sample.is_measured and not sample.checked:
            self.cannot_see += (f"whether the output of the {name} of {case.name} is right: it could not be checked",)
        return sample


class RunningFleet:
    """All runs in one fleet, which moves the layers that change hands."""

    method: Method = "running_fleet"

    def __init__(self, cases: tuple[Case, ...]) -> None:
        """
        Raises:
            ConfigError: the sides, or the cases, differ in more than plans and workloads.
        """
        first = cases[0].baseline
        for case in cases:
            for side in (case.baseline, case.candidate):
                other = [f"model.{line}" for line in differences(first.model, side.model)]
                if side.python or side.ref or side.env:
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
        self._stack = ExitStack()
        self._experiment: Experiment | None = None
        self._references: dict[str, Path] = {}

    def __enter__(self) -> Self:
        return self

    def prepare(self, deadline: float) -> None:
        """Starts the fleet, which has bounds of its own; raises as `SideRunner.prepare`."""
        from pipetune.bench.fleet.experiment import Experiment

        side = self._cases[0].baseline
        hang_timeout_s = max(case.protocol.hang_timeout_s for case in self._cases)
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pipetune-gate-")))
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def machine(self, name: SideName) -> Machine | None:
        """The machine of the one fleet that both sides share."""
        return self._running.fleet.machine

    def run(self, case: Case, name: SideName, *, check: bool, timeout_s: float | None = None) -> Sample:
        """One run in the running fleet."""
        reference = self._references.get(case.name) if check else None
        longest_s = min(case.protocol.timeout_s, timeout_s or math.inf)
        update = {"check_outputs": reference is not None, "timeout_s": longest_s}
        if reference is not None:
            self._running.fleet.use_reference(reference)
        protocol = case.protocol.model_copy(update=update)
        return sample_of(self._running.measure(case.side(name).plan, case.workload, protocol))

    @property
    def _running(self) -> Experiment:
        assert self._experiment is not None, "the fleet was started"
        return self._experiment


def interpreter_of(side: Side, deadline: float = math.inf) -> python_env.Interpreter:
    """How a side's processes are started.

    Raises:
        ConfigError: an environment that cannot be used, a revision that cannot be built.
        OutOfTime: a revision is not built by the deadline.
    """
    if side.ref is not None:
        return python_env.of_ref(side.ref, side.env, deadline=deadline)
    if side.python is not None:
        return python_env.of_python(side.python, side.env)
    return python_env.own(side.env)
