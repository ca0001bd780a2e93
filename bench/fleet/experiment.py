"""The one way to drive a fleet: start it, hold its GPUs, refer outputs to the unsplit model, measure, record.

Experiment.start ──► fleet of workers, GPUs held against other studies
  make_reference ──► what the unsplit model says, in a file; later outputs are compared with it
  measure        ──► plan ─ resolve ─► effective plan ─ run ─► Record
  baseline       ──► un-pipelined model ─ run ─► Record
  renew          ──► fresh workers, the GPUs held on
"""

import contextlib
import operator
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypedDict, Unpack

from typing_extensions import TypeVar

from pipetune.bench.errors import FleetError, ModelError
from pipetune.bench.fleet.engine import Engine
from pipetune.bench.fleet.fleet import Closing, Fleet
from pipetune.bench.fleet.locks import hold_gpus
from pipetune.bench.fleet.supervisor import FleetOptions
from pipetune.bench.load.rates import RateSearch, bracket
from pipetune.bench.metrics import derive
from pipetune.bench.record import Failure, FailureKind, Measurement, Outcome, Record, Role, timestamp
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Workload, devices_here

Runner = TypeVar("Runner", bound=Engine, default=Fleet)
"""A fleet, or another engine in its place."""
Attempt = Callable[[Callable[[], Outcome]], Outcome]
"""Calls the run it is given; may give another outcome where somebody interrupts it."""


class Labels(TypedDict, total=False):
    """Fields of a record that say what a run was for; by default it is number 0 of role `bench`."""

    number: int
    role: Role
    trial_number: int | None
    params: dict[str, int | float | str] | None
    round: int | None


class Experiment(Closing, Generic[Runner]):
    """A fleet whose runs become records."""

    def __init__(self, start: Callable[[], Runner], *, exclusive: bool) -> None:
        self._start = start
        self._held = contextlib.ExitStack()
        self.fleet = start()
        try:
            if exclusive:
                self._held.enter_context(hold_gpus(devices_here(self.fleet.devices), self.fleet.machine.hardware.gpus))
        except BaseException:
            self.fleet.close()
            raise

    @classmethod
    def start(
        cls,
        model: ModelSpec,
        devices: Sequence[str],
        *,
        exclusive: bool = True,
        start_fleet: Callable[..., Runner] | None = None,
        **options: Unpack[FleetOptions],
    ) -> Self:
        """Starts a fleet of one worker per device; raises as `Fleet.start`, and what else is told below.

        Args:
            exclusive: hold its GPUs against other studies; False for those that only look at a model or a machine.
            start_fleet: in place of `Fleet.start`.

        Raises:
            StudyError: another study runs on one of the GPUs.
        """
        starter: Callable[..., Any] = start_fleet or Fleet.start
        return cls(lambda: starter(model, devices, **options), exclusive=exclusive)

    def renew(self) -> None:
        """Starts a fresh fleet in place of the present one; raises as `start`."""
        self.fleet.close()
        self.fleet = self._start()

    def make_reference(self, path: Path, workload: Workload, protocol: Protocol) -> Failure | None:
        """Keeps in a file what the unsplit model says, which later outputs are compared with.

        Gives None, or why there is no reference, where the model fits on no device. ModelError where it cannot be
        split, or comes out wrong when it is.
        """
        failure = self.fleet.make_reference(path, workload, protocol)
        if failure is None or failure.kind is FailureKind.OUT_OF_MEMORY:
            return failure
        if failure.kind in (FailureKind.UNSUPPORTED_MODEL, FailureKind.WRONG_OUTPUT):
            raise ModelError(failure.message)
        raise FleetError(failure)

    def refer_to_plan(self, path: Path, spec: RunSpec, effective: EffectivePlan) -> Failure | None:
        """Takes a plan's own output for the reference, where the unsplit model fits nowhere; else why it failed."""
        return self.fleet.make_reference_from_plan(path, spec, effective)

    def spec(self, plan: Plan, workload: Workload, protocol: Protocol) -> RunSpec:
        """The whole run of a plan, with the revision that the model resolved to."""
        return RunSpec(model=self.fleet.model, workload=workload, plan=plan, protocol=protocol)

    def measure(
        self,
        plan: Plan,
        workload: Workload,
        protocol: Protocol,
        *,
        resolved: EffectivePlan | Failure | None = None,
        near_rate: float | None = None,
        attempt: Attempt = operator.call,
        **labels: Unpack[Labels],
    ) -> Record:
        """Measures a plan, or says why it is not run; raises as the fleet's `resolve` and `measure`.

        `resolved` is what the plan comes to under its memory caps; None resolves it here. `near_rate` is what it is
        thought to sustain, requests/s, where the highest rate is looked for.
        """
        known = self.fleet.resolve(plan, workload) if resolved is None else resolved
        spec = self.spec(plan, workload, protocol)
        if isinstance(known, Failure):
            return self._record(lambda: known, attempt, spec, None, labels)
        arrivals = workload.arrivals
        if arrivals is None or arrivals.slo_attainment is None:
            return self._record(lambda: self.fleet.measure(spec, known), attempt, spec, known, labels)
        search = RateSearch.of(arrivals, near=near_rate)
        return self._record(lambda: self._at_highest_rate(spec, known, search), attempt, spec, known, labels)

    def _at_highest_rate(self, spec: RunSpec, known: EffectivePlan, search: RateSearch) -> Outcome:
        """Runs at one rate after the other, and what was measured at the highest that was sustained."""
        arrivals = spec.workload.arrivals
        assert arrivals is not None
        found: dict[float, Measurement] = {}
        while (rate := search.next()) is not None:
            once = arrivals.model_copy(update={"request_rate": rate, "slo_attainment": None})
            workload = spec.workload.model_copy(update={"arrivals": once})
            outcome = self.fleet.measure(spec.model_copy(update={"workload": workload}), known)
            if isinstance(outcome, Failure):
                return outcome
            found[rate], search.shares[rate] = outcome, derive(outcome)["slo_attainment"]
        kept, (low, high) = found[search.sustained or min(found)], bracket(search.shares, search.wanted)
        note = "all rates that were tried are sustained; the highest may be higher"
        if low is None:
            note = "no rate that was tried is sustained"
        elif high is not None:
            note = f"no rate between {low:g} and {high:g} requests/s was tried, where the highest is"
        way_out = "give another --request-rate, or more --most-rates"
        notes = [] if search.is_narrow else [f"{note}: {way_out}"]
        disturbances = dict.fromkeys(text for one in found.values() for text in one.telemetry.disturbances)
        return kept.model_copy(
            update={
                "tried_rates": tuple(sorted(search.shares.items())),
                "wanted_share": search.wanted,
                "notes": (*kept.notes, *notes),
                "telemetry": kept.telemetry.model_copy(update={"disturbances": tuple(disturbances)}),
            }
        )

    def baseline(
        self,
        batch_size: int,
        workload: Workload,
        protocol: Protocol,
        *,
        attempt: Attempt = operator.call,
        **labels: Unpack[Labels],
    ) -> Record:
        """Measures the un-pipelined model at one batch size."""
        labels.setdefault("params", {"batch_size": batch_size})
        return self._record(lambda: self.fleet.baseline(workload, protocol, batch_size), attempt, None, None, labels)

    def _record(
        self,
        run: Callable[[], Outcome],
        attempt: Attempt,
        spec: RunSpec | None,
        effective: EffectivePlan | None,
        labels: Labels,
    ) -> Record:
        started_at, began = timestamp(), time.monotonic()
        result = attempt(run)
        named: Labels = {"number": 0, "role": "bench", **labels}
        return Record(
            spec=spec,
            effective=effective,
            hardware_id=self.fleet.machine.hardware_id,
            started_at=started_at,
            wall_s=round(time.monotonic() - began, 3),
            result=result,
            **named,
        )

    def close(self) -> None:
        """Ends the workers, and lets the GPUs go."""
        try:
            self.fleet.close()
        finally:
            self._held.close()
