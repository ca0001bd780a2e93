"""A fleet without processes: simulated times, and faults on demand; it stands where `bench.launch.Fleet` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from bench.launch import Progress
from bench.memory import ModelShape
from bench.record import Failure, FailureKind, Machine, Measurement
from bench.spec import EffectivePlan, ModelSpec, Protocol, RunSpec, Workload
from tests.record_factory import (
    make_baseline_measurement,
    make_machine,
    make_measurement,
    make_prompt_lens,
    make_shape,
)

Fault = Callable[[RunSpec, int], Failure | None]
"""Given the spec and how many plans were asked for before, a failure or None; it may raise."""


class FakeFleet:
    """Measures by the record factory's simulated machine."""

    def __init__(self, lab: Lab, model: ModelSpec, devices: Sequence[str]) -> None:
        self._lab = lab
        self.model = model.model_copy(update={"revision": lab.revision})
        self.devices = tuple(devices)
        self.shape = lab.shape
        self.machine = lab.machine
        self.device_bytes = dict.fromkeys(devices, lab.device_bytes)
        self.closed = False

    def prompt_lens(self, workload: Workload) -> tuple[int, ...]:
        return make_prompt_lens(workload)

    def make_reference(self, path: Path, workload: Workload, protocol: Protocol) -> Failure | None:
        self._lab.calls.append("reference")
        path.write_bytes(b"reference")
        return None

    def make_reference_from_plan(self, path: Path, spec: RunSpec, effective: EffectivePlan) -> Failure | None:
        self._lab.calls.append(f"reference {effective.key}")
        path.write_bytes(b"reference")
        return None

    def use_reference(self, path: Path) -> None:
        assert path.exists()
        self._lab.calls.append("use_reference")

    def baseline(self, workload: Workload, protocol: Protocol, batch_size: int) -> Measurement | Failure:
        assert not self.closed
        self._lab.calls.append(f"baseline {batch_size}")
        failure = self._lab.baseline_fault(batch_size)
        seed = len(self._lab.calls)
        return failure or make_baseline_measurement(batch_size, workload, num_iters=protocol.num_iters, seed=seed)

    def measure(self, spec: RunSpec, effective: EffectivePlan) -> Measurement | Failure:
        assert not self.closed
        self._lab.calls.append(f"measure {effective.key}")
        failure = self._lab.fault(spec, self._lab.measured)
        self._lab.measured += 1
        if failure is not None:
            return failure
        plan = spec.plan.model_copy(update={"max_in_flight": effective.in_flight})
        measured = make_measurement(
            plan, spec.workload, num_iters=spec.protocol.num_iters, seed=len(self._lab.calls), hop_s=1e-3
        )
        return measured if spec.protocol.check_outputs else measured.model_copy(update={"check": None})

    def interrupt(self) -> None:
        self._lab.calls.append("interrupt")

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_info: object) -> None:
        self.close()


class Lab:
    """What fake fleets share: the machine, the model, the faults, and what was asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.measured = 0
        self.starts = 0
        self.revision = "0123abc"
        self.shape: ModelShape = make_shape()
        self.machine: Machine = make_machine()
        self.device_bytes = 4 * 2**30
        self.fault: Fault = lambda spec, number: None
        self.baseline_fault: Callable[[int], Failure | None] = lambda batch_size: None

    def start(
        self,
        model: ModelSpec,
        devices: Sequence[str],
        *,
        log_dir: Path | None = None,
        hang_timeout_s: float = 10.0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Any:
        self.starts += 1
        if on_progress is not None:
            on_progress(Progress(phase="start", message="starting"))
        return FakeFleet(self, model, devices)


def failure(kind: FailureKind, **fields: Any) -> Failure:
    return Failure(kind=kind, message=f"made {kind.value}", phase="measure", stage=0, **fields)
