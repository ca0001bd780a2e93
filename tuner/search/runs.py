"""The runs of a study: each one's record is durable before anybody hears of it, and no Ctrl-C comes in between."""

import contextlib
import functools
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Unpack

from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.errors import FleetError, StudyError
from pipetune.bench.fleet.experiment import Attempt, Experiment, Labels
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import Failure, FailureKind, Outcome, Record
from pipetune.bench.spec import EffectivePlan, Plan, Protocol, RunSpec, devices_here
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.progress import Reporter, describe
from pipetune.tuner.ranking.runs import PlanRun
from pipetune.tuner.search.policy.history import is_lost
from pipetune.tuner.study.files import LOGS_FOLDER, StudyFile
from pipetune.tuner.study.search_log import SearchLogWriter
from pipetune.tuner.study.store import StudyStore

_HOPELESS = 5
"""So many runs in a row that lost their workers: the machine is at fault, not the plans."""


def starter_of(config: TuneConfig) -> Callable[..., Any] | None:
    """What starts the engine of a study; None for our own runtime."""
    if config.engine is None:
        return None
    return functools.partial(VllmEngine, python=Path(config.engine.python), baseline=config.engine.settings)


class Interrupted(KeyboardInterrupt):
    """Raised where the work may be stopped, once somebody asked for it."""


class StopSignal:
    """Listens for SIGINT and SIGTERM. The first asks to stop, a second one stops at once, wherever it is."""

    def __init__(self) -> None:
        self.asked = False
        self._may_raise = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals within the block, which must run in the main thread."""
        before: dict[int, Any] = {one: signal.signal(one, self._on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block a signal raises `Interrupted` at once, as did one before it; outside it is only noted."""
        if self.asked:
            raise Interrupted
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or self._may_raise:
            self._may_raise = False
            raise Interrupted


class Runs:
    """An experiment, the study that keeps its records, and who waits for them."""

    def __init__(self, store: StudyStore, start_fleet: Callable[..., Fleet] | None, reporter: Reporter) -> None:
        self.store, self.reporter = store, reporter
        self.stop, self.log = StopSignal(), SearchLogWriter(store.folder / StudyFile.SEARCH)
        self.experiment: Experiment
        self._start_fleet = start_fleet or starter_of(store.config)
        self._done = self._left = 0
        self._lost: list[str | None] = []
        """Devices that were lost in a row, where they are known."""
        self._fleet_has_reference = False
        self._plan_must_be_reference = False

    @property
    def fleet(self) -> Fleet:
        """The workers."""
        return self.experiment.fleet

    def open_fleet(self, stack: contextlib.ExitStack) -> Fleet:
        """Starts workers that end with the stack, and holds their GPUs as long."""
        config = self.store.config
        with self._starting():
            self.experiment = Experiment.start(
                config.model,
                config.concrete_devices,
                start_fleet=self._start_fleet,
                log_dir=self.store.folder / LOGS_FOLDER,
                hang_timeout_s=config.protocol.hang_timeout_s,
                on_progress=self.reporter.fleet,
            )
            stack.enter_context(self.experiment)
        return self.fleet

    def renew_fleet(self) -> None:
        """Starts fresh workers in place of the present ones."""
        with self._starting():
            self.experiment.renew()

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        self.reporter.begin(f"starting {len(self.store.config.concrete_devices)} workers")
        with self.stop.interruptible():
            yield
        self._fleet_has_reference = False
        shape = self.fleet.shape
        self.reporter.end(f"{shape.architecture}, {shape.num_layers} layers, on {', '.join(self.fleet.devices)}")

    def expect(self, left: int) -> None:
        """Says that at most so many runs are still to come."""
        self._left = max(0, left)
        self.reporter.course(self._done, self._left)

    def ensure_reference(self) -> None:
        """Gives the fleet what every plan's output is checked against: the unsplit model's own. ModelError where it
        cannot be split, StudyError where something else stands in the reference's place, FleetError where the workers
        failed."""
        if self._fleet_has_reference or not self.store.config.protocol.check_outputs:
            return
        self._fleet_has_reference = True
        path = self.store.folder / StudyFile.REFERENCE
        with self.log.spend("reference"):
            if path.exists():
                try:
                    self.fleet.use_reference(path, self.store.workload)
                    return
                except StudyError as error:
                    if not path.is_file():
                        raise
                    self.reporter.say(str(error))
            self.reporter.begin("reference: what the unsplit model says")
            with self.stop.interruptible():
                missing = self.experiment.make_reference(path, self.store.workload, self.store.config.protocol)
        self._plan_must_be_reference = missing is not None
        self.reporter.end(
            "kept; every plan's output is compared with it"
            if missing is None
            else f"{missing.message}; the first plan that runs will be what the others are compared with"
        )

    def _refer_to(self, spec: RunSpec, effective: EffectivePlan) -> None:
        """Makes a plan the reference where the unsplit model fits nowhere; a plan that fails leaves it to the next."""
        self.reporter.begin(f"reference: {spec.plan.describe()} in place of the unsplit model")
        with self.log.spend("reference"), self.stop.interruptible():
            failure = self.experiment.refer_to_plan(self.store.folder / StudyFile.REFERENCE, spec, effective)
        self._plan_must_be_reference = failure is not None
        self.reporter.end("kept; every later plan's output is compared with it" if failure is None else failure.message)

    def spec(self, plan: Plan, protocol: Protocol | None = None) -> RunSpec:
        """The whole run of a plan."""
        return self.experiment.spec(plan, self.store.workload, protocol or self.store.config.protocol)

    def measure(
        self,
        label: str,
        plan: Plan,
        resolved: EffectivePlan | Failure,
        *,
        protocol: Protocol | None = None,
        predicted: float | None = None,
        **labels: Unpack[Labels],
    ) -> Record:
        """Measures a plan, or records why it is not run; where the highest rate is looked for, near what its own runs
        sustained, else near what is predicted. Interrupted: somebody asked to stop, and this is no trial: it
        leaves no record and is run again, where a trial's record says that it was interrupted. FleetError: workers lost
        too often."""
        spec = self.spec(plan, protocol)
        if isinstance(resolved, EffectivePlan):
            self.ensure_reference()
            if self._plan_must_be_reference:
                self._refer_to(spec, resolved)
        return self._keep(
            label,
            lambda attempt: self.experiment.measure(
                plan,
                spec.workload,
                spec.protocol,
                resolved=resolved,
                near_rate=self._own_rate(resolved) or predicted,
                attempt=attempt,
                **labels,
            ),
            is_trial=labels.get("trial_number") is not None,
        )

    def _own_rate(self, resolved: EffectivePlan | Failure) -> float | None:
        """The median of the highest rates that were measured of a plan."""
        if isinstance(resolved, Failure):
            return None
        key = resolved.by(served=False).key
        own = [one for one in self.store.current if one.effective and one.effective.by(served=False).key == key]
        rates = [rate for one in own if (rate := PlanRun(one).metrics.get("max_request_rate"))]
        return statistics.median(rates) if rates else None

    def baseline(self, label: str, protocol: Protocol, batch_size: int, **labels: Unpack[Labels]) -> Record:
        """Measures the un-pipelined model at one batch size; raises as `measure`."""
        return self._keep(
            f"{label}, batch size {batch_size}",
            lambda attempt: self.experiment.baseline(
                batch_size, self.store.workload, protocol, attempt=attempt, **labels
            ),
        )

    def _keep(self, label: str, run: Callable[[Attempt], Record], *, is_trial: bool = False) -> Record:
        """The record of a run; one that lost its workers is run again once, as the search does with its trials."""
        record = self._once(label, run, is_trial)
        if is_trial or not is_lost(record):
            return record
        return self._once(f"{label} · again: it lost its workers", run, is_trial)

    def _once(self, label: str, run: Callable[[Attempt], Record], is_trial: bool) -> Record:
        self.reporter.begin(label)
        record = self.store.add(run(functools.partial(self._attempt, is_trial)))
        self.reporter.end(describe(record.result, self.store.config.objectives))
        self._done += 1
        self.expect(self._left - 1)
        device = record.result.lost_device if isinstance(record.result, Failure) else None
        twice = device is not None and self._lost[-1:] == [device]
        if isinstance(record.result, Failure) and (twice or (is_lost(record) and len(self._lost) + 1 >= _HOPELESS)):
            raise FleetError(record.result)
        self._lost = [*self._lost, device] if device or is_lost(record) else []
        return record

    def survive(self, error: FleetError) -> None:
        """Lets the work begin anew after a loss: on the same devices, and without one that was lost twice in a row.
        Raises the same where it is no device's, or the machine's; or with the way out, where the work shall stop, or
        what is left does not suffice."""
        failure, config = error.failure, self.store.config
        device, twice = failure.lost_device, self._lost[-1:] == [failure.lost_device]
        if device is None or (not twice and len(self._lost) + 1 >= _HOPELESS):
            raise error
        if not twice:
            self._lost.append(device)
            return self.reporter.say(f"{error}; the workers are started again")
        rest, way_out = {*config.concrete_devices} - {device}, "--resume goes on once it is mended"
        left, is_led = len(rest), bool(devices_here(tuple(rest)))
        needed = min(config.space.replicas or (1,)) * config.space.min_stages
        if config.shared_study is not None:
            way_out = f"the others of the shared study go on without this process, and {way_out}"
        elif config.on_device_loss == "stop":
            way_out = f"what was measured is kept: {way_out}, `tune --resume --on-device-loss degrade` without it"
        elif left < needed or not is_led:
            if not self.store.records:
                # Where none ever worked, none of them is at fault.
                (self.store.folder / StudyFile.LOSSES).unlink(missing_ok=True)
            few = f"{left} of the {needed} devices that `space` needs are left" if left else "no device is left"
            few = "no device of host0 is left, where the reference is kept" if left and not is_led else few
            way_out = f"{few}: what was measured is kept, and {way_out}"
        else:
            self._lost.clear()
            return self.reporter.say(f"{error}; {self.store.go_on_without(device, failure)}")
        told = f"{device} was lost twice: {failure.message}; {way_out}"
        raise FleetError(failure.model_copy(update={"message": told})) from error

    def _attempt(self, is_trial: bool, run: Callable[[], Outcome]) -> Outcome:
        try:
            with self.stop.interruptible():
                return run()
        except Interrupted:
            self.fleet.interrupt()
            if not is_trial:
                raise
            return interruption("somebody stopped the study; --resume runs the plan again")


def interruption(message: str) -> Failure:
    """The failure of a run that somebody or something stopped."""
    return Failure(kind=FailureKind.INTERRUPTED, phase="measure", message=message)
