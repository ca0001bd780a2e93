"""One run, one record: whatever a fleet is asked to do, its outcome is durable before anybody hears of it."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pipetune.bench.errors import FleetError, ModelError
from pipetune.bench.record import Failure, FailureKind, Outcome, Record, Role
from pipetune.bench.spec import EffectivePlan, Plan, Protocol, RunSpec
from pipetune.tuner.progress import Reporter, describe
from pipetune.tuner.search.policy.history import TRANSIENT
from pipetune.tuner.search.stop import Interrupted, StopSignal
from pipetune.tuner.study.search_log import LogBook
from pipetune.tuner.study.store import StudyStore

if TYPE_CHECKING:
    from pipetune.bench.fleet.fleet import Fleet

_HOPELESS = 5
"""So many runs in a row that lost their workers: the machine is at fault, not the plans."""


class Runs:
    """A fleet, a store, and those who wait."""

    def __init__(
        self,
        store: StudyStore,
        start_fleet: Callable[..., Fleet],
        reporter: Reporter,
        stop: StopSignal,
        book: LogBook,
    ) -> None:
        self.store = store
        self.reporter = reporter
        self.stop = stop
        self.fleet: Fleet
        self._book = book
        self._start_fleet = start_fleet
        self._lost_in_a_row = 0
        self._fleet_has_reference = False
        self._plan_must_be_reference = False

    def open_fleet(self, stack: contextlib.ExitStack) -> Fleet:
        """Starts a fleet that ends with the stack."""
        config = self.store.config
        self.reporter.begin(f"starting {len(config.concrete_devices)} workers")
        with self.stop.interruptible():
            self.fleet = self._start_fleet(
                config.model,
                config.concrete_devices,
                log_dir=self.store.log_dir,
                hang_timeout_s=config.protocol.hang_timeout_s,
                on_progress=self.reporter.fleet,
            )
        stack.callback(self.fleet.close)
        self._fleet_has_reference = False
        shape = self.fleet.shape
        self.reporter.end(f"{shape.architecture}, {shape.num_layers} layers, on {', '.join(self.fleet.devices)}")
        return self.fleet

    def ensure_reference(self) -> None:
        """Gives the fleet what every plan's output is checked against: the unsplit model's own.

        Raises:
            ModelError: the model cannot be split.
            FleetError: the workers failed.
        """
        if self._fleet_has_reference or not self.store.config.protocol.check_outputs:
            return
        self._fleet_has_reference = True
        with self._book.spend("reference"):
            self._give_reference()

    def _give_reference(self) -> None:
        path = self.store.reference_path
        if path.exists():
            self.fleet.use_reference(path)
            return
        self.reporter.begin("reference: what the unsplit model says")
        with self.stop.interruptible():
            failure = self.fleet.make_reference(path, self.store.workload, self.store.config.protocol)
        if failure is None:
            self.reporter.end("kept; every plan's output is compared with it")
        elif failure.kind in (FailureKind.UNSUPPORTED_MODEL, FailureKind.WRONG_OUTPUT):
            raise ModelError(failure.message)
        elif failure.kind == FailureKind.OUT_OF_MEMORY:
            self._plan_must_be_reference = True
            self.reporter.end(f"{failure.message}; the first plan that runs will be what the others are compared with")
        else:
            raise FleetError(failure)

    def _refer_to(self, spec: RunSpec, effective: EffectivePlan) -> None:
        """Makes a plan the reference where the unsplit model fits nowhere; a plan that fails leaves it to the next."""
        self.reporter.begin(f"reference: {spec.plan.describe()} in place of the unsplit model")
        with self._book.spend("reference"), self.stop.interruptible():
            failure = self.fleet.make_reference_from_plan(self.store.reference_path, spec, effective)
        self._plan_must_be_reference = failure is not None
        self.reporter.end("kept; every later plan's output is compared with it" if failure is None else failure.message)

    def spec(self, plan: Plan, protocol: Protocol | None = None) -> RunSpec:
        """The whole run of a plan."""
        return RunSpec(
            model=self.fleet.model,
            workload=self.store.workload,
            plan=plan,
            protocol=protocol or self.store.config.protocol,
        )

    def measure(
        self,
        role: Role,
        label: str,
        plan: Plan,
        resolved: EffectivePlan | Failure,
        *,
        protocol: Protocol | None = None,
        trial_number: int | None = None,
        params: Mapping[str, int] | None = None,
        round_: int | None = None,
    ) -> Record:
        """Measures a plan, or records why it is not run.

        Raises:
            Interrupted: see `run`.
        """
        spec = self.spec(plan, protocol)
        if isinstance(resolved, EffectivePlan):
            self.ensure_reference()
            if self._plan_must_be_reference:
                self._refer_to(spec, resolved)
        effective = resolved if isinstance(resolved, EffectivePlan) else None
        return self.run(
            role,
            label,
            lambda: resolved if isinstance(resolved, Failure) else self.fleet.measure(spec, resolved),
            spec=spec,
            effective=effective,
            trial_number=trial_number,
            params=params,
            round_=round_,
        )

    def baseline(
        self, role: Role, label: str, protocol: Protocol, batch_size: int, round_: int | None = None
    ) -> Record:
        """Measures the un-pipelined model at one batch size."""
        return self.run(
            role,
            f"{label}, batch size {batch_size}",
            lambda: self.fleet.baseline(self.store.workload, protocol, batch_size),
            params={"batch_size": batch_size},
            round_=round_,
        )

    def run(
        self,
        role: Role,
        label: str,
        work: Callable[[], Outcome],
        *,
        spec: RunSpec | None = None,
        effective: EffectivePlan | None = None,
        trial_number: int | None = None,
        params: Mapping[str, int] | None = None,
        round_: int | None = None,
    ) -> Record:
        """Runs one thing and writes its record.

        Raises:
            Interrupted: somebody asked to stop, and this is no trial: it leaves no record and is run again. A trial's
                record says that it was interrupted.
            FleetError: the workers were lost too often.
        """
        self.reporter.begin(label)
        started_at = dt.datetime.now(dt.UTC)
        began = time.monotonic()
        result: Outcome
        try:
            with self.stop.interruptible():
                result = work()
        except Interrupted:
            self.fleet.interrupt()
            if trial_number is None:
                raise
            result = interruption("somebody stopped the study; --resume runs the plan again")
        record = self.store.add(
            role=role,
            result=result,
            hardware_id=self.fleet.machine.hardware_id,
            started_at=timestamp(started_at),
            wall_s=round(time.monotonic() - began, 3),
            spec=spec,
            effective=effective,
            trial_number=trial_number,
            params=dict(params) if params is not None else None,
            round_=round_,
        )
        self.reporter.end(describe(record.result, self.store.config.objectives))
        lost = isinstance(result, Failure) and result.kind in TRANSIENT
        self._lost_in_a_row = self._lost_in_a_row + 1 if lost else 0
        if isinstance(result, Failure) and self._lost_in_a_row >= _HOPELESS:
            raise FleetError(result)
        return record


def interruption(message: str) -> Failure:
    """The failure of a run that somebody or something stopped."""
    return Failure(kind=FailureKind.INTERRUPTED, phase="measure", message=message)


def timestamp(moment: dt.datetime) -> str:
    """UTC, ISO 8601, to the second."""
    return moment.astimezone(dt.UTC).isoformat(timespec="seconds")
